"""QAT layers: the user's module with its class swapped in place, one autograd node per call (`qat.node`).

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

from qat.codes import CodeCache, Entry, RecentCodes, fields_alone, forget_codes_of, packs, quantize, rows_of
from qat.fake_quant_kernels import fp8_linear, int8_linear
from qat.fake_quant_kernels.dispatch import uncompiled
from qat.fake_quant_kernels.pack import PLAIN
from qat.node import Call, KeepInGraph, QuantizedLayer, inside, no_autocast
from qat.ops import ConvOp, EmbeddingOp, ExpertsOp, LayerOp, LinearOp, no_view, random_state
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

    def __getstate__(self) -> dict[str, Any]:
        # a copy of one layer must not bring the whole model with it
        return {**self.__dict__, "root": None}

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
            _observe(x_quantizer, live.op.inputs(layer, args, kwargs)[0])
        return _kept_in_graph(y, layer_quantizers(layer))


def _kept_in_graph(y: Tensor, idle: list[Quantizer]) -> Tensor:
    """y, on which the learned scales of quantizers that do not use them now depend with a gradient of zero."""
    learned = [p for quantizer in idle for p in quantizer.learned() if p.requires_grad]
    if not learned or not torch.is_grad_enabled():
        return y
    return KeepInGraph.apply(y, *learned)  # type: ignore[no-any-return, no-untyped-call]


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
                direct = quantizer is not None and rounds_directly(layer, key, quantizer, w, dtype)
                slot, entry = _weight(live, key, w, quantizer, direct)
                slots.append(slot)
                quantized += entry
        product = _product(op, live.blend, x_slot, x_quantized, slots[0], quantized, dtype) if live.real else ""
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
        return _kept_in_graph(y, frozen) if frozen else y


_apart = uncompiled(_quantized)

_Quantized = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_NOTHING: _Quantized = (None, None, None, None)


def _weight(
    live: Live, key: str, w: Tensor, quantizer: Quantizer | None, direct: bool
) -> tuple[Slot | None, _Quantized]:
    """The slot of a weight with its codes and fields; fields of learned scales bring their gradient."""
    if quantizer is None:
        return None, _NOTHING
    layout, cache, reparam, spec = quantizer.layout, live.cache, live.reparams.get(key), quantizer.live_spec
    if torch.compiler.is_compiling():
        live.traced = True
        # codes of another tensor (functional_call, a Parameter that was replaced) are not this one's
        source, found, form = cache.entries.get(key, (None, None, PLAIN))
        keep = source is w
        make = fields_alone if direct else quantize
        entry: Entry = found if found is not None and keep else make(quantizer, rows_of(w, quantizer, reparam))
        form = form if keep else PLAIN
        keep = keep or (direct and cache.knows(key))
    else:
        entry, form, keep = cache.quantized(key, w, quantizer, reparam, direct)
    undoes = reparam is not None and reparam.undoes
    slot = Slot(quantizer, spec, layout, form, keep, reparam, undoes, direct and entry[0] is None)
    if torch.is_grad_enabled() and any(p.requires_grad for p in quantizer.learned()):
        fields = quantizer.differentiable(Fields(*entry[1:])) if keep else None
        if fields is None:
            fields = _visible(quantizer.fields(rows_of(w, quantizer, reparam)), entry[1])
        return slot, (entry[0], *fields)
    return slot, entry


def _visible(fields: Fields, scale: Tensor) -> Fields:
    """Differentiable fields; NaN where the scale that the codes came with is (it equals theirs otherwise)."""
    return fields._replace(scale=fields.scale + (scale - fields.scale).detach())


def _input(layer: nn.Module, live: Live, x: Tensor | None) -> tuple[Slot | None, _Quantized]:
    """The slot of the input with its codes and fields."""
    quantizer = input_quantizer(layer)
    if quantizer is None or x is None or not x.is_floating_point():
        return None, _NOTHING
    if live.trains(layer):
        _observe(quantizer, x)
    return _activation(quantizer, x, shared=True)


def _activation(quantizer: Quantizer, x: Tensor, shared: bool = False) -> tuple[Slot, _Quantized]:
    """The slot of what is no weight with its codes and fields; shared: other layers may read it too."""
    spec = quantizer.live_spec
    slot = Slot(quantizer, spec, quantizer.layout.of(x))
    if not quantizer.identity_gradient:
        fields = quantizer.fields(slot.rows(x.detach()))
        codes, used = quantizer.quantize(slot.rows(x.detach()), spec, fields)
        return slot, (codes, *_visible(fields, used.scale))
    if not shared or torch.compiler.is_compiling() or quantizer.static_activations:
        # what is kept is not the same in every layer
        codes, fields = quantizer.quantize(slot.rows(x.detach()), spec)
    else:
        codes, fields = _recent.quantized(x, slot)
    return slot, (codes, *fields)


class _Rounded(torch.autograd.Function):
    """x on the grid of its slot. Saved is x, where a gradient looks at it, and nothing else as large."""

    @staticmethod
    def forward(ctx: Any, slot: Slot, blend: Tensor | None, x: Tensor, *quantized: Tensor | None) -> Tensor:
        ctx.slot, ctx.dtype = slot, x.dtype
        ctx.save_for_backward(None if slot.quantizer.identity_gradient else x, blend, *quantized[1:])
        return no_view(slot.hat(x, quantized, blend, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, blend, *fields = ctx.saved_tensors
        needs = (ctx.needs_input_grad[2], *ctx.needs_input_grad[4:])
        dx, *dfields = ctx.slot.pull(grads[0], x, (None, *fields), blend, needs, ctx.dtype, False)
        return None, None, dx, None, *dfields


def rounded(layer: nn.Module, quantizer: Quantizer, x: Tensor) -> Tensor:
    """x on the quantizer's grid; as it is while the layer is inactive."""
    live: Live = layer._qat  # type: ignore[assignment]
    if live.trains(layer):
        _observe(quantizer, x)
    if not live.active:
        return _kept_in_graph(x, [quantizer])
    with no_autocast(x.device.type):
        slot, quantized = _activation(quantizer, x)
        y: Tensor = _Rounded.apply(slot, live.blend, x, *quantized)  # type: ignore[no-untyped-call]
    return _kept_in_graph(y, [quantizer]) if quantizer.frozen else y


def _output(layer: nn.Module, y: Tensor) -> Tensor:
    """What the layer gives, quantized if a rule says so."""
    quantizer = layer._modules.get("output_quantizer")
    return rounded(layer, quantizer, y) if isinstance(quantizer, Quantizer) else y


_recent = RecentCodes()


def _product(
    op: LayerOp,
    blend: Tensor | None,
    x_slot: Slot | None,
    x_quantized: _Quantized,
    w_slot: Slot | None,
    w_quantized: Any,
    dtype: torch.dtype,
) -> str:
    """As what the codes themselves can be multiplied, y = (x_codes w_codes^T) * x_scale * w_scale: int8, fp8, or "" if
    they cannot."""
    if not isinstance(op, LinearOp) or op.transposed or blend is not None or x_slot is None or w_slot is None:
        return ""
    (x_codes, x_scale, x_zero, x_minimum), (codes, scale, zero, minimum) = x_quantized, w_quantized
    assert x_codes is not None and x_scale is not None
    if codes is None:
        return ""
    asymmetric = zero is not None or minimum is not None or x_minimum is not None
    # by the spec, not by the form: whether codes are kept must change no number
    packed = packs(w_slot.spec, w_slot.layout.rows_shape[1])
    # one scale per token or for all, one per output or for all
    if packed or asymmetric or w_slot.undo or scale.shape[1] != 1 or x_scale.shape[1] != 1:
        return ""
    if x_slot.spec.is_int and w_slot.spec.is_int:
        return "" if int8_linear.reasons(x_codes, codes, dtype, x_zero is not None) else "int8"
    if x_slot.spec.kind == w_slot.spec.kind == "e4m3":
        return "" if fp8_linear.reasons(x_codes, codes, dtype) else "fp8"
    return ""


def _observe(quantizer: Quantizer, x: Tensor | None) -> None:
    assert x is not None
    with torch.no_grad():
        quantizer.observe(x.detach().reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1))


def _compute_dtype(op: LayerOp, inputs: tuple[Tensor | None, ...], weights: list[Tensor]) -> torch.dtype:
    """The dtype in which the float layer would have run."""
    device = weights[0].device.type
    if op.autocasts() and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weights[0].dtype
