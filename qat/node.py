"""The autograd node of a QAT layer; of most linear layers in eager mode it is `qat.linear_node`'s.

    y = op(x_hat, w_hat),  w_hat = decode(codes of w),  x_hat = decode(codes of x)

Codes and stored fields (scale, zero point, minimum) are arguments: they are found before the node runs, once per
optimizer step for a weight (`qat.codes`), and learned scales get their gradient through the fields. Forward saves

    x         as codes where the forward used codes of a dynamic scale, else as it came (only if backward needs it)
    w         the Parameter itself, which is alive anyway
    codes     at most a byte per weight, shared with the code cache. None where the weight is rounded anew in forward
              and backward (`Slot.direct`); nothing where `Slot.keep` is false: then backward quantizes w again, and
              nothing as large as the weight stays alive between the two (FSDP2, ZeRO-3)
    seeds     two numbers, of a backward that rounds (`int8`); it quantizes w again where codes are packed

and never a fake-quantized weight. Everything in here is plain torch or one of our operators, so that torch.compile
takes the node into its graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.codes import packs
from qat.fake_quant_kernels import fp8_linear, int8_linear
from qat.fake_quant_kernels.dispatch import uses_triton
from qat.fake_quant_kernels.int8_gradients import int8_dgrad, int8_wgrad
from qat.ops import LayerOp, LinearOp, Tensors, no_view, replayed
from qat.quantizers import Quantizer
from qat.slot import Latents, Slot

# tensors of one slot among the node's arguments: codes, scale, zero, minimum
_SLOT = 4

# > 0 while one of our nodes or float ops is running: the rehearsal lets these touch planned weights
_inside = 0


class _Inside(contextlib.AbstractContextManager[None]):
    def __enter__(self) -> None:
        global _inside
        _inside += 1

    def __exit__(self, *_: object) -> None:
        global _inside
        _inside -= 1


_INSIDE = _Inside()
_NOWHERE = contextlib.nullcontext()


def inside() -> contextlib.AbstractContextManager[None]:
    return _NOWHERE if torch.compiler.is_compiling() else _INSIDE


def is_inside() -> bool:
    return _inside > 0


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, operations run in the dtypes of their arguments."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type=device_type, enabled=False)
    return _NOWHERE


@dataclass(frozen=True)
class Call:
    """The parts of one call that are not tensors."""

    layer: nn.Module
    op: LayerOp
    dtype: torch.dtype
    # of the input, and of each weight; None: it stays float
    x: Slot | None
    weights: tuple[Slot | None, ...]
    # tensors of the call: x, bias, ...
    inputs: int
    # multiply the codes themselves: int8 | fp8 | "", the decoded numbers
    product: str = ""
    # random state of the forward, for ops whose backward runs it again
    random: Any = None
    # float | int8 | int8_dgrad: how the gradients' matmuls run
    backward: str = "float"

    def cast(self, inputs: Tensors) -> Tensors:
        """The inputs after x: parameters in the compute dtype, what the caller gave as it came."""
        given = self.op.given(self.layer, 1 + len(inputs)) - 1
        return tuple(
            t.to(self.dtype) if t is not None and t.is_floating_point() and i >= given else t
            for i, t in enumerate(inputs)
        )

    def x_hat(
        self, x: Tensor | None, quantized: Sequence[Tensor | None], blend: Tensor | None, again: bool = False
    ) -> Tensor | None:
        if x is None and quantized[0] is None:
            return None
        if self.x is None:
            assert x is not None
            return x.to(self.dtype) if x.is_floating_point() else x
        return self.x.hat(x, quantized, blend, self.dtype, again)  # type: ignore[arg-type]

    def w_hat(
        self, i: int, w: Latents, quantized: Sequence[Tensor | None], blend: Tensor | None, again: bool = False
    ) -> Tensor:
        slot = self.weights[i]
        if slot is None:
            return w.to(self.dtype)  # type: ignore[union-attr]
        hat = slot.hat(w, quantized, blend, torch.float32 if slot.undo else self.dtype, again)
        return slot.undone(hat, w).to(self.dtype)


class QuantizedLayer(torch.autograd.Function):
    """Arguments: the call, blend (0-dim, None at full strength), seeds (int64 [2], of a backward that rounds), the
    inputs, the weights, the input's codes and fields, each weight's codes and fields, the factors of each adapter.
    Gradients: inputs, weights, fields, factors."""

    @staticmethod
    def forward(ctx: Any, call: Call, blend: Tensor | None, seeds: Tensor | None, *tensors: Tensor | None) -> Tensor:
        inputs, weights, x_quantized, quantized, factors = _parts(call, tensors)
        _, needs_w, _, needs_q, needs_f = _parts(call, ctx.needs_input_grad[3:])
        x = inputs[0]
        ctx.call = call
        ctx.x_dtype = x.dtype
        # the gradient of a scale or an adapter needs that of w_hat, also where the weight itself is frozen
        learns = [need or any(q) or any(f) for need, q, f in zip(needs_w, needs_q, needs_f, strict=True)]
        kept_x, *kept = _kept(call, blend, x, call.op.needs_x(learns), x_quantized, quantized)
        more = [t for pair in factors for t in pair]
        ctx.save_for_backward(blend, seeds, kept_x, *inputs[1:], *weights, *kept, *more)
        with no_autocast(weights[0].device.type):
            if call.product:
                return no_view(_product(call, inputs, x_quantized, quantized[0]))
            x_hat = call.x_hat(x, x_quantized, blend)
            made_of = _made_of(weights, factors)
            w_hats = [call.w_hat(i, w, quantized[i], blend) for i, w in enumerate(made_of)]
            y = call.op.forward(call.layer, (x_hat, *call.cast(inputs[1:])), w_hats)
            return no_view(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call: Call = ctx.call
        blend, seeds, *tensors = ctx.saved_tensors
        inputs, weights, x_quantized, quantized, factors = _parts(call, tensors)
        needs_in, needs_w, needs_x, needs_q, needs_f = _parts(call, ctx.needs_input_grad[3:])
        made_of = _made_of(weights, factors)
        if torch.compiler.is_compiling() and not uses_triton(grad.device):
            made_of = [_after(grad, w) if s and s.direct else w for s, w in zip(call.weights, made_of, strict=True)]
        with inside(), no_autocast(grad.device.type):
            slots = (call.x, *call.weights)
            # of what is quantized: x, and each weight or the sum that stands for it
            own = (needs_in[0], *(need or any(f) for need, f in zip(needs_w, needs_f, strict=True)))
            wants = [(need, *q[1:]) for need, q in zip(own, (needs_x, *needs_q), strict=True)]
            wanted = [any(wants[0]), *needs_in[1:], *map(any, wants[1:])]
            early: dict[int, tuple[Tensor | None, ...]] = {}

            def meanwhile(i: int, d: Tensor | None) -> Tensor | None:
                slot = call.weights[i]
                if slot is None or d is None or blend is not None:
                    return None
                both = slot.pulled(d, made_of[i], quantized[i], wants[1 + i], call.dtype)
                if both is None:
                    return None
                early[1 + i], hat = both
                return hat

            dinputs, dweights = _gradients(
                call, blend, seeds, grad, inputs, made_of, x_quantized, quantized, wanted, meanwhile
            )
            found: list[tuple[Tensor | None, ...]] = []
            latents = (inputs[0], *made_of)
            dtypes = (ctx.x_dtype, *((f[0] if f else w).dtype for w, f in zip(weights, factors, strict=True)))
            fields = (x_quantized, *quantized)
            for i, d in enumerate((dinputs[0], *dweights)):
                slot = slots[i]
                if i in early:
                    found.append(early[i])
                elif d is None:
                    found.append((None,) * _SLOT)
                elif slot is None:
                    found.append((d.to(dtypes[i]) if own[i] else None, None, None, None))
                else:
                    d = slot.undone(d, latents[i])
                    pulled = slot.pull(d, latents[i], fields[i], blend, wants[i], dtypes[i], call.op.separable)
                    found.append(pulled)
            dfactors: list[Tensor | None] = []
            for i, (w, pair) in enumerate(zip(weights, factors, strict=True), 1):
                if pair:
                    slot, dw = slots[i], found[i][0]
                    needs = (needs_w[i - 1], *(need and not slot.undo for need in needs_f[i - 1]))  # type: ignore[union-attr]
                    dw, *pulled = (None,) * 3 if dw is None else slot.reparam.pull(dw, (w, *pair), needs)  # type: ignore[union-attr, assignment]
                    dfactors += pulled
                    found[i] = (None if dw is None else dw.to(w.dtype), *found[i][1:])
        dothers = [None if d is None else d.to(t.dtype) for d, t in zip(dinputs[1:], inputs[1:], strict=True)]
        dfields = [d for grads in found for d in (None, *grads[1:])]
        return (None, None, None, found[0][0], *dothers, *(grads[0] for grads in found[1:]), *dfields, *dfactors)


def _gradients(
    call: Call,
    blend: Tensor | None,
    seeds: Tensor | None,
    grad: Tensor,
    inputs: Tensors,
    weights: Sequence[Latents],
    x_quantized: Tensors,
    quantized: list[Tensors],
    wanted: Sequence[bool],
    meanwhile: Callable[[int, Tensor | None], Tensor | None],
) -> tuple[Tensors, Tensors]:
    """Gradients of x_hat and the other inputs, and of each w_hat; not both hats in memory where one after the other
    does. meanwhile: takes the gradient of a w_hat further, and gives that w_hat if it came along."""
    n, count = len(inputs), len(weights)
    grad = grad.to(call.dtype) if grad.is_floating_point() else grad
    others = call.cast(inputs[1:])

    def x_hat() -> Tensor | None:
        return call.x_hat(inputs[0], x_quantized, blend, True)

    if seeds is not None:
        return _integer_gradients(call, seeds, grad, inputs, weights, x_quantized, quantized, wanted, x_hat)
    if call.op.separable:
        first = [False, *wanted[1:]]
        (_, *dothers), dweights = call.op.backward(call.layer, grad, (x_hat(), *others), [], first)
        if not wanted[0]:
            return (None, *dothers), dweights
        second = [True, *[False] * (n - 1 + count)]
        came = [meanwhile(i, d) for i, d in enumerate(dweights)]
        hats = [call.w_hat(i, weights[i], quantized[i], blend, True) if h is None else h for i, h in enumerate(came)]
        (dx, *_), _ = call.op.backward(call.layer, grad, (None, *others), hats, second)
        return (dx, *dothers), dweights
    with replayed(call.random):
        w_hats = [call.w_hat(i, w, quantized[i], blend, True) for i, w in enumerate(weights)]
        return call.op.backward(call.layer, grad, (x_hat(), *others), w_hats, wanted)


def _after(grad: Tensor, w: Latents) -> Latents:
    """w, for a compiler something that comes after grad: what is made of it is made in backward, and not saved for it.
    An operator that it does not see into is told `again`."""
    first = grad.reshape(-1)[:1].sum()
    return w + (first != first).to(w.dtype) * 0.0  # type: ignore[union-attr, operator]


def _parts(call: Call, of: Sequence[Any]) -> tuple[Any, Any, Any, list[Any], list[Any]]:
    """What there is `of` each of the node's tensors, sorted: (inputs, weights, the input's codes and fields, each
    weight's codes and fields, the factors of each weight's adapter)."""
    n, count = call.inputs, len(call.weights)
    ends = range(n + count, n + count + _SLOT * (2 + count), _SLOT)
    each = [of[at : at + _SLOT] for at in ends[:-1]]
    more = iter(of[ends[-1] :])
    adapted = [slot is not None and slot.reparam is not None for slot in call.weights]
    factors = [(next(more), next(more)) if has else () for has in adapted]
    return of[:n], of[n : n + count], each[0], each[1:], factors


def _made_of(weights: Tensors, factors: list[tuple[Tensor, ...]]) -> list[Latents]:
    return [(w, *pair) if pair else w for w, pair in zip(weights, factors, strict=True)]  # type: ignore[misc]


def _kept(
    call: Call, blend: Tensor | None, x: Tensor | None, need_x: bool, x_quantized: Tensors, quantized: list[Tensors]
) -> Tensors:
    """What backward gets of x, of its codes and fields, and of each weight's."""
    slot = call.x
    if slot is not None and slot.quantizer.identity_gradient and blend is None:
        kept: list[Tensor | None] = [None, *(x_quantized if need_x else (None,) * _SLOT)]
    else:
        # a scale that stays has no gradient where x is clipped: x itself says where
        static = slot is not None and not slot.quantizer.identity_gradient
        kept = [x if need_x or static else None, None, *x_quantized[1:]]
    for own, q in zip(call.weights, quantized, strict=True):
        if own is None or own.keep:
            kept += q
        else:
            kept += (None,) * _SLOT if own.quantizer.identity_gradient else (None, *q[1:])
    return tuple(kept)


def _product(call: Call, inputs: Tensors, x_quantized: Tensors, w_quantized: Tensors) -> Tensor:
    """The same y with the codes multiplied and scaled afterwards (`fake_quant_kernels.int8_linear`, `fp8_linear`)."""
    x, bias = inputs
    x_codes, x_scale, x_zero, _ = x_quantized
    w_codes, w_scale, _, _ = w_quantized
    if call.product == "fp8":
        y = fp8_linear.fp8_linear(x_codes, x_scale, w_codes, w_scale, bias, call.dtype)  # type: ignore[arg-type]
    else:
        y = int8_linear.int8_linear(x_codes, x_scale, w_codes, w_scale, bias, call.dtype, x_zero)  # type: ignore[arg-type]
    return y.reshape(*x.shape[:-1], y.shape[-1])  # type: ignore[union-attr]


def _integer_gradients(
    call: Call,
    seeds: Tensor,
    grad: Tensor,
    inputs: Tensors,
    weights: Sequence[Latents],
    x_quantized: Tensors,
    quantized: list[Tensors],
    wanted: Sequence[bool],
    x_hat: Callable[[], Tensor | None],
) -> tuple[Tensors, Tensors]:
    """`_gradients` of a linear layer with the matmuls of `qat.fake_quant_kernels.int8_gradients`."""
    w = weights[0]
    assert call.weights[0] is not None
    rows = grad.reshape(-1, grad.shape[-1])
    dx = dw = None
    if wanted[0]:
        codes, scale, _, _ = call.weights[0].quantized(w, quantized[0])
        dx = int8_dgrad(rows, codes, scale, seeds[:1], call.dtype).view(*grad.shape[:-1], codes.shape[1])
    if wanted[2] and call.backward == "int8":
        assert call.x is not None
        codes, scale, zero, _ = call.x.quantized(inputs[0], x_quantized)  # type: ignore[arg-type]
        dw = int8_wgrad(rows, codes, scale, seeds[1:], call.dtype, zero)
    elif wanted[2]:
        (_, _), (dw,) = call.op.backward(call.layer, grad, (x_hat(), None), [], [False, False, True])
    return (dx, rows.sum(0) if wanted[1] else None), (dw,)


def product_kind(
    op: LayerOp,
    blend: Tensor | None,
    x_slot: Slot | None,
    x_quantized: Tensors,
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


class KeepInGraph(torch.autograd.Function):
    """y unchanged; the scales get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *learned: Tensor) -> Tensor:
        ctx.save_for_backward(*learned)
        return torch.ops.aten._unsafe_view(y, y.shape) if y.is_contiguous() else y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (grads[0], *(torch.zeros_like(p) for p in ctx.saved_tensors))


def kept_in_graph(y: Tensor, idle: list[Quantizer]) -> Tensor:
    """y, on which the learned scales of quantizers that do not use them now depend with a gradient of zero."""
    learned = [p for quantizer in idle for p in quantizer.learned() if p.requires_grad]
    if not learned or not torch.is_grad_enabled():
        return y
    return KeepInGraph.apply(y, *learned)  # type: ignore[no-any-return, no-untyped-call]
