"""How activations are quantized: what a layer's input, keys, values or output are rounded with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.codes import RecentCodes
from qat.ops import no_view
from qat.qtensor import Fields
from qat.quantizers import Quantizer
from qat.slot import Slot

# codes, scale, zero, minimum
Quantized = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_recent = RecentCodes()


def observe(quantizer: Quantizer, x: Tensor | None) -> None:
    assert x is not None
    if type(quantizer).observe is Quantizer.observe:
        return
    with torch.no_grad():
        quantizer.observe(x.detach().reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1))


def visible(fields: Fields, scale: Tensor) -> Fields:
    """Differentiable fields; NaN where the scale that the codes came with is (it equals theirs otherwise)."""
    return fields._replace(scale=fields.scale + (scale - fields.scale).detach())


def activation(quantizer: Quantizer, x: Tensor, shared: bool = False) -> tuple[Slot, Quantized]:
    """The slot of what is no weight with its codes and fields; shared: other layers may read it too."""
    spec = quantizer.live_spec
    slot = Slot(quantizer, spec, quantizer.layout.of(x))
    if not quantizer.identity_gradient:
        fields = quantizer.fields(slot.rows(x.detach()))
        codes, used = quantizer.quantize(slot.rows(x.detach()), spec, fields)
        return slot, (codes, *visible(fields, used.scale))
    if not shared or torch.compiler.is_compiling() or quantizer.static_activations:
        # what is kept is not the same in every layer
        codes, fields = quantizer.quantize(slot.rows(x.detach()), spec)
    else:
        codes, fields = _recent.quantized(x, slot)
    return slot, (codes, *fields)


class Rounded(torch.autograd.Function):
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
