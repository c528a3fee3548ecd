"""QAT layers: the user's module with its class swapped in place, one autograd node per call (`qat.node`,
`qat.linear_node`).

    y = op(x_hat, w_hat),  w_hat = quantizer(w),  x_hat = input_quantizer(x)

While inactive a layer runs the float op of its own class, bit for bit, and gives its scales a zero gradient (so DDP
has no unused parameters). Names, hooks, attributes, tying and flags of the module stay as they are; the quantizers
are children called `<weight>_quantizer` and `input_quantizer`, of attention (`qat.attention`) `key_quantizer` and
`value_quantizer`.

Compiled (torch.compile, fullgraph too), a layer is part of the graph: its codes are inputs where the cache holds them,
else the graph quantizes. Layers of experts break the graph: their backward runs the module's own forward again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.activations import Quantized, Rounded, activation, observe, visible
from qat.codes import CodeCache, Entry, fields_alone, forget_codes_of, quantize, rows_of
from qat.fake_quant_kernels import int8_linear
from qat.fake_quant_kernels.dispatch import uncompiled
from qat.fake_quant_kernels.pack import PLAIN
from qat.linear_node import QuantizedLinear, Way
from qat.node import Call, QuantizedLayer, inside, kept_in_graph, no_autocast, product_kind
from qat.ops import ConvOp, EmbeddingOp, ExpertsOp, LayerOp, LinearOp, random_state
from qat.qtensor import Fields
from qat.quantizers import Quantizer
from qat.reparam import Reparam
from qat.slot import Slot

_OPS: dict[type[nn.Module], tuple[str, LayerOp]] = {
    nn.Linear: ("Linear", LinearOp()),
    nn.Embedding: ("Embedding", EmbeddingOp()),
    nn.Conv1d: ("Conv1d", ConvOp(1)),
    nn.Conv2d: ("Conv2d", ConvOp(2)),
    nn.Conv3d: ("Conv3d", ConvOp(3)),
    nn.ConvTranspose1d: ("ConvTranspose1d", ConvOp(1, transposed=True)),
    nn.ConvTranspose2d: ("ConvTranspose2d", ConvOp(2, transposed=True)),
    nn.ConvTranspose3d: ("ConvTranspose3d", ConvOp(3, transposed=True)),
}
_CONV1D = ("Conv1D", LinearOp(transposed=True))
_EXPERTS = ("Experts", ExpertsOp())
TYPES = (*(name for name, _ in (*_OPS.values(), _CONV1D, _EXPERTS)), "Attention")
# What a layer rounds besides weights, and watches in training.
_ACTIVATIONS = ("input", "key", "value")


def layer_type(module: nn.Module) -> tuple[str, LayerOp] | None:
    """The short class name that rules use and the op, or None if this class is not listed.

    A subclass counts only if its forward is the listed one: a forward of its own might read the weight itself.
    """
    cls = original_class(module)
    for listed, entry in _OPS.items():
        if issubclass(cls, listed):
            same = all(getattr(cls, name, None) is getattr(listed, name, None) for name in ("forward", "_conv_forward"))
            return entry if same else None
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return _CONV1D
    weights = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    return _EXPERTS if cls.__name__.endswith("Experts") and weights else None


def listed_name(module: nn.Module) -> str | None:
    """The listed class that this module derives from although its forward is its own."""
    return next((name for listed, (name, _) in _OPS.items() if isinstance(module, listed)), None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The user's class of a module, prepared or not."""
    live = module.__dict__.get("_qat")
    return live.original if isinstance(live, Live) else type(module)


@dataclass(eq=False)
class Live:
    """What a layer is doing now; set by the schedule, plain attributes so that nothing averages or casts them."""

    original: type[nn.Module]
    op: LayerOp
    active: bool = False
    # strength between 0 and 1 on the device of the weight; None at full strength
    blend: Tensor | None = None
    # dtypes of the last active forward: what the quantizer read and what it gave (export runs the same path)
    latent_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    # it has been compiled: its codes are made after each step, not in its first forward
    traced: bool = False
    # float | int8 | int8_dgrad: how the matmuls of the gradients run
    backward: str = "float"
    # codes of 8-bit weights and inputs are multiplied as they are where the machine can
    real: bool = True
    cache: CodeCache = field(default_factory=CodeCache)
    # weight name -> what is done to it before it is quantized
    reparams: dict[str, Reparam] = field(default_factory=dict)
    # the prepared root's record: a module whose `training` is the root's
    root: nn.Module | None = None
    # of the last call that was `QuantizedLinear`'s
    way: Way | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy of one layer must not bring the whole model with it
        return {**self.__dict__, "root": None, "way": None}

    def trains(self, layer: nn.Module) -> bool:
        """Whether a forward now is one of training. A network that its training module keeps in eval mode (as
        `from_pretrained` returns it) is trained all the same."""
        return torch.is_grad_enabled() and self.in_training(layer)

    def in_training(self, layer: nn.Module) -> bool:
        """`trains`, whether or not gradients are wanted now."""
        return layer.training or (self.root is not None and self.root.training)


class QATLayer(nn.Module):
    """First base of every swapped class; never instantiated."""

    _qat: Live

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        live = self._qat
        if not live.active:
            y = _float(self, live, args, kwargs)
        elif (quantizer := _plain(self, live)) is not None:
            y = _linear(self, live, quantizer, args, kwargs)
        elif live.op.replays:
            y = _apart(self, live, args, kwargs)
        else:
            y = _quantized(self, live, args, kwargs)
        for reparam in live.reparams.values():
            reparam.gave(y)
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        forget_codes_of(self)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        forget_codes_of(self)
        super()._load_from_state_dict(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return revive, (self._qat.original,), self.__dict__


def revive(original: type[nn.Module], base: type[QATLayer] = QATLayer) -> nn.Module:
    cls = swapped_class(original, base)
    return cls.__new__(cls)  # type: ignore[no-any-return]


_swapped: dict[type[nn.Module], Any] = {}


def swapped_class(original: type[nn.Module], base: type[QATLayer] = QATLayer) -> Any:
    """The class `QAT<Name>` derived from `base` and `original`, made once."""
    if original not in _swapped:
        _swapped[original] = type(f"QAT{original.__name__}", (base, original), {"__module__": original.__module__})
    return _swapped[original]


def weight_quantizers(layer: nn.Module) -> dict[str, Quantizer]:
    """Weight name -> quantizer, tied ones included."""
    op: LayerOp = layer._qat.op  # type: ignore[assignment, union-attr]
    # a tied one is no child; both dicts are asked by hand because a missing attribute is slow to miss
    places = [(name, f"{name}_quantizer") for name in op.kinds(layer)]
    found = {name: layer._modules.get(child) or layer.__dict__.get(child) for name, child in places}
    return {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, Quantizer)}


def input_quantizer(layer: nn.Module) -> Quantizer | None:
    found = layer._modules.get("input_quantizer")
    return found if isinstance(found, Quantizer) else None


def activation_quantizers(layer: nn.Module) -> dict[str, Quantizer]:
    """input | key | value -> quantizer."""
    found = {name: layer._modules.get(f"{name}_quantizer") for name in _ACTIVATIONS}
    return {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, Quantizer)}


def rounds_directly(layer: nn.Module, key: str, quantizer: Quantizer, w: Tensor, dtype: torch.dtype) -> bool:
    """Whether this weight can do without codes: nothing multiplies them, and it is rounded in fewer passes than they
    are made and decoded. dtype: what the layer computes in."""
    live: Live = layer._qat  # type: ignore[assignment]
    multiplied = live.real and input_quantizer(layer) is not None and not int8_linear.idle(w.device, dtype)
    if multiplied or key in live.reparams or live.backward != "float":
        return False
    # a NaN in a row that is not looked up would not show
    if quantizer.layout.kind == "embedding" or w.dtype == torch.float64:
        return False
    return quantizer.direct(quantizer.live_spec, w.device)


def layer_quantizers(layer: nn.Module) -> list[Quantizer]:
    """Every quantizer that a call of this layer uses."""
    return [*weight_quantizers(layer).values(), *activation_quantizers(layer).values()]


def _float(layer: QATLayer, live: Live, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x_quantizer = input_quantizer(layer)
    if torch.compiler.is_compiling():
        live.traced = True
    with inside():
        y: Tensor = live.original.forward(layer, *args, **kwargs)
        if x_quantizer is not None and live.trains(layer):
            observe(x_quantizer, live.op.inputs(layer, args, kwargs)[0])
        return kept_in_graph(y, layer_quantizers(layer))


def _quantized(layer: QATLayer, live: Live, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with inside():
        op = live.op
        inputs = op.inputs(layer, args, kwargs)
        kinds = op.kinds(layer)
        weights = [getattr(layer, key) for key in kinds]
        factors = [t for key in kinds if key in live.reparams for t in live.reparams[key].factors]
        for reparam in live.reparams.values():
            inputs = (inputs[0], reparam.bias(inputs[1]), *inputs[2:])
        dtype = _compute_dtype(op, inputs, weights)
        live.latent_dtype, live.out_dtype = (factors or weights)[0].dtype, dtype
        with no_autocast(weights[0].device.type):
            x_slot, x_quantized = _input(layer, live, inputs[0])
            slots: list[Slot | None] = []
            quantized: list[Tensor | None] = []
            quantizers = weight_quantizers(layer)
            for key, w in zip(kinds, weights, strict=True):
                quantizer = quantizers.get(key)
                slot, entry = _weight(layer, live, key, w, quantizer, dtype)
                slots.append(slot)
                quantized += entry
        product = product_kind(op, live.blend, x_slot, x_quantized, slots[0], quantized, dtype) if live.real else ""
        random = random_state(layer) if op.replays else None
        backward, seeds = "float", None
        if live.backward != "float" and live.blend is None and live.in_training(layer):
            # of torch's own generator, so that a seeded run and a recomputed forward round alike; without gradients
            # too, or a forward that is run again with them (reentrant checkpointing) would find other random numbers
            seeds = torch.randint(-(2**63), 2**63 - 1, (2,), device=weights[0].device)
            backward = live.backward
        call = Call(layer, op, dtype, x_slot, tuple(slots), len(inputs), product, random, backward)
        y: Tensor = QuantizedLayer.apply(call, live.blend, seeds, *inputs, *weights, *x_quantized, *quantized, *factors)  # type: ignore[no-untyped-call]
        y = _output(layer, y)
        frozen = [q for q in (*quantizers.values(), *activation_quantizers(layer).values()) if q.frozen]
        return kept_in_graph(y, frozen) if frozen else y


_apart = uncompiled(_quantized)


def _plain(layer: QATLayer, live: Live) -> Quantizer | None:
    """The weight's quantizer, where `QuantizedLinear` is the node of this call."""
    if not isinstance(live.op, LinearOp) or live.blend is not None or live.reparams or live.backward != "float":
        return None
    modules = layer._modules
    if torch.compiler.is_compiling() or modules.get("output_quantizer") is not None:
        return None
    x_quantizer = input_quantizer(layer)
    if x_quantizer is not None:
        multiplied = live.real and not (x_quantizer.live_spec.is_int and _idle(layer, live))
        if multiplied or not x_quantizer.identity_gradient:
            return None
    # as `weight_quantizers` finds it, in less time; a tied one is no child
    found = modules.get("weight_quantizer") or layer.__dict__.get("weight_quantizer")
    # learned scales that are frozen are to stay in the graph
    return found if isinstance(found, Quantizer) and not (found.frozen and found.learned()) else None


def _idle(layer: QATLayer, live: Live) -> bool:
    """Whether products of integer codes pay nowhere here."""
    w: Tensor = layer.weight  # type: ignore[assignment]
    return bool(int8_linear.idle(w.device, _compute_dtype(live.op, (), [w])))


def _linear(layer: QATLayer, live: Live, quantizer: Quantizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`_quantized` where it is `_plain`."""
    with inside():
        op: LinearOp = live.op  # type: ignore[assignment]
        x, bias = op.inputs(layer, args, kwargs)
        w: Tensor = layer.weight  # type: ignore[assignment]
        device, dtype = w.device.type, _compute_dtype(op, (x, bias), [w])
        live.latent_dtype, live.out_dtype = w.dtype, dtype
        with no_autocast(device):
            x_slot, x_quantized = _input(layer, live, x)
            entry, form, keep = live.cache.quantized(
                "weight", w, quantizer, None, lambda: rounds_directly(layer, "weight", quantizer, w, dtype)
            )
            fields = _fields_of(quantizer, w, None, entry, keep)
        way, spec, direct = live.way, quantizer.live_spec, entry[0] is None
        if way is None or way.dtype != dtype or not way.slot.like(quantizer, spec, form, keep, direct):
            live.way = way = Way(layer, op, Slot(quantizer, spec, quantizer.layout, form, keep, direct=direct), dtype)
        x_all = None if x_slot is None else (x_slot, *x_quantized)
        return QuantizedLinear.apply(way, x_all, x, bias, w, entry[0], *fields)  # type: ignore[no-any-return, no-untyped-call]


_NOTHING: Quantized = (None, None, None, None)


def _weight(
    layer: nn.Module, live: Live, key: str, w: Tensor, quantizer: Quantizer | None, dtype: torch.dtype
) -> tuple[Slot | None, Quantized]:
    """The slot of a weight with its codes and fields; fields of learned scales bring their gradient."""
    if quantizer is None:
        return None, _NOTHING
    layout, cache, reparam, spec = quantizer.layout, live.cache, live.reparams.get(key), quantizer.live_spec
    if torch.compiler.is_compiling():
        live.traced = True
        direct = rounds_directly(layer, key, quantizer, w, dtype)
        # codes of another tensor (functional_call, a Parameter that was replaced) are not this one's
        source, found, form = cache.entries.get(key, (None, None, PLAIN))
        keep = source is w
        make = fields_alone if direct else quantize
        entry: Entry = found if found is not None and keep else make(quantizer, rows_of(w, quantizer, reparam))
        form = form if keep else PLAIN
        keep = keep or (direct and cache.knows(key))
    else:
        entry, form, keep = cache.quantized(
            key, w, quantizer, reparam, lambda: rounds_directly(layer, key, quantizer, w, dtype)
        )
    undoes = reparam is not None and reparam.undoes
    slot = Slot(quantizer, spec, layout, form, keep, reparam, undoes, entry[0] is None)
    return slot, (entry[0], *_fields_of(quantizer, w, reparam, entry, keep))


def _fields_of(quantizer: Quantizer, w: Tensor, reparam: Reparam | None, entry: Entry, keep: bool) -> Fields:
    """The fields of an entry; those of learned scales bring their gradient."""
    fields = Fields(*entry[1:])
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in quantizer.learned()):
        return fields
    found = quantizer.differentiable(fields) if keep else None
    return visible(quantizer.fields(rows_of(w, quantizer, reparam)), entry[1]) if found is None else found


def _input(layer: nn.Module, live: Live, x: Tensor | None) -> tuple[Slot | None, Quantized]:
    """The slot of the input with its codes and fields."""
    quantizer = input_quantizer(layer)
    if quantizer is None or x is None or not x.is_floating_point():
        return None, _NOTHING
    if live.trains(layer):
        observe(quantizer, x)
    return activation(quantizer, x, shared=True)


def rounded(layer: nn.Module, quantizer: Quantizer, x: Tensor) -> Tensor:
    """x on the quantizer's grid; as it is while the layer is inactive."""
    live: Live = layer._qat  # type: ignore[assignment]
    if live.trains(layer):
        observe(quantizer, x)
    if not live.active:
        return kept_in_graph(x, [quantizer])
    with no_autocast(x.device.type):
        slot, quantized = activation(quantizer, x)
        y: Tensor = Rounded.apply(slot, live.blend, x, *quantized)  # type: ignore[no-untyped-call]
    return kept_in_graph(y, [quantizer]) if quantizer.frozen else y


def _output(layer: nn.Module, y: Tensor) -> Tensor:
    """What the layer gives, quantized if a rule says so."""
    quantizer = layer._modules.get("output_quantizer")
    return rounded(layer, quantizer, y) if isinstance(quantizer, Quantizer) else y


def _compute_dtype(op: LayerOp, inputs: tuple[Tensor | None, ...], weights: list[Tensor]) -> torch.dtype:
    """The dtype in which the float layer would have run."""
    device = weights[0].device.type
    if op.autocasts() and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weights[0].dtype
