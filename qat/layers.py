"""QAT layers: the user's module with its class swapped in place, one autograd node per call.

    y = op(x_hat, w_hat),  w_hat = quantizer(w),  x_hat = input_quantizer(x)

Forward saves x and the Parameters; backward quantizes again. Nothing that is as large as the weight stays alive
between the two, which is what keeps FSDP2's sharding worth having.

While inactive a layer runs the float op of its own class, bit for bit, and gives its scales a zero gradient (so DDP
has no unused parameters). Names, hooks, attributes, tying and flags of the module stay as they are; the quantizers
are children called `<weight>_quantizer` and `input_quantizer`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.ops import ConvOp, EmbeddingOp, ExpertsOp, LayerOp, LinearOp
from qat.quantizers import Quantizer
from qat.specs import QuantSpec

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
TYPES = tuple(name for name, _ in (*_OPS.values(), _CONV1D, _EXPERTS))


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


@dataclass
class Live:
    """What a layer is doing now; set by the schedule, plain attributes so that nothing averages or casts them."""

    original: type[nn.Module]
    op: LayerOp
    active: bool = False
    strength: float = 1.0
    # dtypes of the last active forward: what the quantizer read and what it gave (export runs the same path)
    latent_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    # the prepared root's record: a module whose `training` is the root's
    root: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy of one layer must not bring the whole model with it
        return {**self.__dict__, "root": None}

    def trains(self, layer: nn.Module) -> bool:
        """Whether a forward now is one of training. A network that its training module keeps in eval mode (as
        `from_pretrained` returns it) is trained all the same."""
        return torch.is_grad_enabled() and (layer.training or (self.root is not None and self.root.training))


# > 0 while one of our nodes or float ops is running: the rehearsal lets these touch planned weights
_inside = 0


@contextlib.contextmanager
def inside() -> Iterator[None]:
    global _inside
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1


def is_inside() -> bool:
    return _inside > 0


class QATLayer(nn.Module):
    """First base of every swapped class; never instantiated."""

    _qat: Live

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = _forward(self, args, kwargs)
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (self._qat.original,), self.__dict__


def _revive(original: type[nn.Module]) -> nn.Module:
    cls = swapped_class(original)
    return cls.__new__(cls)  # type: ignore[no-any-return]


_swapped: dict[type[nn.Module], Any] = {}


def swapped_class(original: type[nn.Module]) -> Any:
    """The class `QAT<Name>` derived from QATLayer and `original`, made once."""
    if original not in _swapped:
        _swapped[original] = type(f"QAT{original.__name__}", (QATLayer, original), {"__module__": original.__module__})
    return _swapped[original]


def weight_quantizers(layer: nn.Module) -> dict[str, Quantizer]:
    """Weight name -> quantizer, tied ones included."""
    op: LayerOp = layer._qat.op  # type: ignore[assignment, union-attr]
    found = {name: getattr(layer, f"{name}_quantizer", None) for name in op.kinds(layer)}
    return {name: quantizer for name, quantizer in found.items() if quantizer is not None}


def input_quantizer(layer: nn.Module) -> Quantizer | None:
    found: Quantizer | None = getattr(layer, "input_quantizer", None)
    return found


def layer_quantizers(layer: nn.Module) -> list[Quantizer]:
    """Every quantizer that a call of this layer uses."""
    found = list(weight_quantizers(layer).values())
    x_quantizer = input_quantizer(layer)
    return [*found, x_quantizer] if x_quantizer is not None else found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(layer: QATLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    live = layer._qat
    learned = [p for quantizer in layer_quantizers(layer) for p in quantizer.learned()]
    x_quantizer = input_quantizer(layer)
    with inside():
        if not live.active:
            y: Tensor = live.original.forward(layer, *args, **kwargs)
            if x_quantizer is not None and live.trains(layer):
                _observe(x_quantizer, live.op.inputs(layer, args, kwargs)[0])
            wanted = [p for p in learned if p.requires_grad]
            if not wanted or not torch.is_grad_enabled():
                return y
            return _KeepInGraph.apply(y, *wanted)  # type: ignore[no-any-return, no-untyped-call]
        inputs = live.op.inputs(layer, args, kwargs)
        if x_quantizer is not None and live.trains(layer):
            _observe(x_quantizer, inputs[0])
        quantized = weight_quantizers(layer)
        kinds = live.op.kinds(layer)
        weights = [getattr(layer, name) for name in kinds]
        dtype = _compute_dtype(live.op, inputs, weights)
        live.latent_dtype, live.out_dtype = weights[0].dtype, dtype
        quantizers = [quantized.get(name) for name in kinds]
        call = _Call(layer, live.op, dtype, quantizers, x_quantizer, live.strength, len(inputs))
        return _QuantizedLayer.apply(call, *inputs, *weights, *learned)  # type: ignore[no-any-return, no-untyped-call]


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


def _no_view(y: Tensor) -> Tensor:
    """The same numbers in the same memory, but free to be changed in place (`nn.ReLU(inplace=True)` after a layer):
    autograd refuses that for views that a Function hands out."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y.is_contiguous() else y.clone()


class _KeepInGraph(torch.autograd.Function):
    """y unchanged; the scales get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *learned: Tensor) -> Tensor:
        ctx.save_for_backward(*learned)
        return _no_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (grads[0], *(torch.zeros_like(p) for p in ctx.saved_tensors))


@dataclass
class _Call:
    """The parts of one call that are not tensors."""

    layer: nn.Module
    op: LayerOp
    dtype: torch.dtype
    weight_quantizers: list[Quantizer | None]
    input_quantizer: Quantizer | None
    strength: float
    inputs: int

    def __post_init__(self) -> None:
        # what each quantizer was doing: backward may come after the schedule has moved on
        self.states = [(q, q.live_spec, q.frozen) for q in layer_quantizers(self.layer)]
        # quantizer and name of each learned scale, in the order in which the node gets them
        self.slots = [
            (q, next(name for name, value in q._parameters.items() if value is p))
            for q, _, _ in self.states
            for p in q.learned()
        ]
        self.random = _random_state(self.layer) if self.op.replays else None

    @contextlib.contextmanager
    def again(self, learned: list[Tensor]) -> Iterator[None]:
        """Inside, the quantizers are as they were in the forward, with `learned` in place of their parameters."""
        kept = [q._parameters[name] for q, name in self.slots]
        now = [(q, q.live_spec, q.frozen) for q, _, _ in self.states]
        try:
            self._set(self.states, learned)
            yield
        finally:
            self._set(now, kept)

    def _set(self, states: list[tuple[Quantizer, QuantSpec, bool]], learned: Sequence[Tensor | None]) -> None:
        for quantizer, live_spec, frozen in states:
            quantizer.live_spec, quantizer.frozen = live_spec, frozen
        for (quantizer, name), value in zip(self.slots, learned, strict=True):
            quantizer._parameters[name] = value  # type: ignore[assignment]

    def weight(self, index: int, w: Tensor) -> Tensor:
        """w_hat in the compute dtype; between strengths 0 and 1 on the way from w to w_hat."""
        quantizer = self.weight_quantizers[index]
        if quantizer is None:
            return w.to(self.dtype)
        fake = quantizer(w, self.dtype)
        return fake if self.strength >= 1.0 else torch.lerp(w.to(self.dtype), fake, self.strength)

    def input(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        quantizer = self.input_quantizer
        if quantizer is None:
            return x.to(self.dtype)
        fake = quantizer(x, self.dtype)
        return fake if self.strength >= 1.0 else torch.lerp(x.to(self.dtype), fake, self.strength)

    def cast(self, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The inputs after x: parameters in the compute dtype, what the caller gave as it came."""
        given = self.op.given(self.layer, 1 + len(inputs)) - 1
        return tuple(
            t.to(self.dtype) if t is not None and t.is_floating_point() and i >= given else t
            for i, t in enumerate(inputs)
        )


class _QuantizedLayer(torch.autograd.Function):
    """The one node: arguments are the call, its inputs, the weights, and every learned scale."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> Tensor:
        count = len(call.weight_quantizers)
        inputs, weights = tensors[: call.inputs], tensors[call.inputs : call.inputs + count]
        ctx.call = call
        ctx.save_for_backward(*tensors)
        with torch.autocast(device_type=weights[0].device.type, enabled=False):  # type: ignore[union-attr]
            x_hat = call.input(inputs[0])  # type: ignore[arg-type]
            w_hats = [call.weight(i, w) for i, w in enumerate(weights)]  # type: ignore[arg-type]
            y = call.op.forward(call.layer, (x_hat, *call.cast(inputs[1:])), w_hats)
            return _no_view(y) if y._is_view() else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        tensors = ctx.saved_tensors
        count, n = len(call.weight_quantizers), call.inputs
        inputs, weights = tensors[:n], tensors[n : n + count]
        needs = ctx.needs_input_grad[1:]
        learned = [
            p.detach().requires_grad_(need) for p, need in zip(tensors[n + count :], needs[n + count :], strict=True)
        ]
        learns = {id(p): p.requires_grad for p in learned}
        with inside(), call.again(learned), torch.autocast(device_type=grad.device.type, enabled=False):
            with torch.enable_grad():
                x = inputs[0].detach().requires_grad_(needs[0])
                x_hat = call.input(x)
                fresh = [w.detach().requires_grad_(need) for w, need in zip(weights, needs[n : n + count], strict=True)]
                w_hats = [call.weight(i, w) for i, w in enumerate(fresh)]
            wanted = [x_hat.requires_grad, *needs[1:n], *(w.requires_grad for w in w_hats)]
            with _replayed(call.random):
                dinputs, dweights = call.op.backward(
                    call.layer,
                    grad.to(call.dtype) if grad.is_floating_point() else grad,
                    (x_hat.detach(), *call.cast(inputs[1:])),
                    [w.detach() for w in w_hats],
                    wanted,
                )
            scales: dict[int, Tensor] = {}
            dx = _pull(x_hat, x, dinputs[0], call.input_quantizer, learns, scales)
            dws = [
                _pull(w_hat, w, dw, quantizer, learns, scales)
                for w_hat, w, dw, quantizer in zip(w_hats, fresh, dweights, call.weight_quantizers, strict=True)
            ]
        dothers = [None if d is None else d.to(t.dtype) for d, t in zip(dinputs[1:], inputs[1:], strict=True)]
        dlearned = [
            scales.get(id(p), torch.zeros_like(p)) if need else None
            for p, need in zip(learned, needs[n + count :], strict=True)
        ]
        return (None, dx, *dothers, *dws, *dlearned)


def _random_state(layer: nn.Module) -> tuple[Tensor, int | None, Tensor | None]:
    """State of the host's random numbers, and of the GPU that the layer lies on."""
    device = next(p.device for p in layer.parameters())
    if device.type != "cuda":
        return torch.get_rng_state(), None, None
    return torch.get_rng_state(), device.index, torch.cuda.get_rng_state(device)


@contextlib.contextmanager
def _replayed(state: tuple[Tensor, int | None, Tensor | None] | None) -> Iterator[None]:
    """Inside, random numbers are those of `state`; outside, they go on as if nothing had happened."""
    if state is None:
        yield
        return
    host, index, device = state
    with torch.random.fork_rng(devices=[] if index is None else [index]):
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, index)  # type: ignore[arg-type]
        yield


def _pull(
    fake: Tensor,
    latent: Tensor,
    grad: Tensor | None,
    quantizer: Quantizer | None,
    learns: dict[int, bool],
    scales: dict[int, Tensor],
) -> Tensor | None:
    """Gradient of the latent; those of the quantizer's own parameters are added to `scales`."""
    if grad is None or not fake.requires_grad:
        return None
    own = [p for p in (quantizer.learned() if quantizer is not None else ()) if learns.get(id(p))]
    leaves = [t for t in (latent, *own) if t.requires_grad]
    found = torch.autograd.grad(fake, leaves, grad, allow_unused=True)
    by_id = dict(zip(map(id, leaves), found, strict=True))
    for p in own:
        if by_id[id(p)] is not None:
            scales[id(p)] = by_id[id(p)] + scales[id(p)] if id(p) in scales else by_id[id(p)]
    return by_id.get(id(latent))
