"""The autograd node of a linear layer (`nn.Linear`, Conv1D of GPT-2) in eager mode, at full strength, whose input is
float or has dynamic scales.

It computes what `qat.node` computes, and saves the same, in as few calls as that takes: Python between two large matrix
products finds its caches cold and takes twice its time. All other calls, and graphs, are `qat.node`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.node import inside, no_autocast
from qat.ops import LinearOp, no_view
from qat.slot import Slot


@dataclass(frozen=True)
class Way:
    """What is the same in all calls of a layer until something is changed."""

    layer: nn.Module
    op: LinearOp
    slot: Slot
    # what it computes in
    dtype: torch.dtype


class QuantizedLinear(torch.autograd.Function):
    """Arguments: the way, the input's slot with its codes and fields (None: it is float), x, bias, weight, its codes
    and fields. Gradients: x, bias, weight, fields."""

    @staticmethod
    def forward(
        ctx: Any,
        way: Way,
        x_quantized: tuple[Any, ...] | None,
        x: Tensor,
        bias: Tensor | None,
        w: Tensor,
        *quantized: Tensor | None,
    ) -> Tensor:
        slot, dtype = way.slot, way.dtype
        _, _, _, _, need_w, _, *need_fields = ctx.needs_input_grad
        kept = quantized
        if not slot.keep:
            kept = (None,) * 4 if slot.quantizer.identity_gradient else (None, *quantized[1:])
        # the gradient of a scale needs that of w_hat, also where the weight itself is frozen
        learns = need_w or any(need_fields)
        ctx.way, ctx.x_slot, ctx.x_dtype = way, None, x.dtype
        with no_autocast(w.device.type):
            if x_quantized is None:
                ctx.save_for_backward(bias, w, *kept, x if learns else None)
                # what is no float was given by mistake, which the product says
                x_hat = _in(x, dtype) if x.is_floating_point() else x
            else:
                ctx.x_slot, *x_codes = x_quantized
                ctx.save_for_backward(bias, w, *kept, *(x_codes if learns else (None,) * 4))
                x_hat = ctx.x_slot.hat(x, x_codes, None, dtype)
            hat = slot.hat(w, quantized, None, dtype)
            return no_view(way.op.forward(way.layer, (x_hat, _in(bias, dtype)), (hat,)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        way: Way = ctx.way
        op, slot, dtype = way.op, way.slot, way.dtype
        bias, w, *saved = ctx.saved_tensors
        quantized, x_saved = saved[:4], saved[4:]
        _, _, need_x, need_bias, need_w, _, *need_fields = ctx.needs_input_grad
        hat = dx = dbias = None
        dws: tuple[Tensor | None, ...] = (None,) * 4
        with inside(), no_autocast(grad.device.type):
            grad = grad.to(dtype)
            learns = need_w or any(need_fields)
            if need_bias or learns:
                x_hat = None
                if learns:
                    x_slot = ctx.x_slot
                    x_hat = _in(x_saved[0], dtype) if x_slot is None else x_slot.hat(None, x_saved, None, dtype, True)
                (_, dbias), (dhat,) = op.backward(way.layer, grad, (x_hat, None), (), (False, need_bias, learns))
                x_hat = None
                if dhat is not None:
                    wants = (need_w, *need_fields)
                    both = slot.pulled(dhat, w, quantized, wants, dtype) if need_x else None
                    if both is not None:
                        dws, hat = both
                    else:
                        dws = slot.pull(dhat, w, quantized, None, wants, w.dtype, True)
                    # its memory may be free for what follows
                    dhat = None
            if need_x:
                if hat is None:
                    hat = slot.hat(w, quantized, None, dtype, True)
                (dx, _), _ = op.backward(way.layer, grad, (None, None), (hat,), (True, False, False))
        dbias = None if dbias is None else _in(dbias, bias.dtype)
        return (None, None, _in(dx, ctx.x_dtype), dbias, dws[0], None, *dws[1:])


def _in(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)
