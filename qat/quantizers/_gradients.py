"""Gradients of a quantizer's own `forward` that are no grid's: of scales under codes that stay, and by its own rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.qtensor import Fields
from qat.specs import QuantSpec


def scale_gradient(grad_RK: Tensor, codes: Tensor, fields: Fields, spec: QuantSpec, packed: bool = False) -> Tensor:
    """Gradient of a scale [R, G] under codes that stay: the sum over its group of grad * (what it multiplies)."""
    scale, zero, minimum = fields
    nothing = None if minimum is None else torch.zeros_like(minimum)
    numbers = spec.grid.decode(codes, torch.ones_like(scale), zero, nothing, torch.float32, packed)
    return (grad_RK.float() * numbers).reshape(*scale.shape, -1).sum(-1)


class Fixed(torch.autograd.Function):
    """`decode` of codes that stay."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, spec: QuantSpec, *fields: Tensor | None) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(codes, *fields)
        return spec.grid.decode(codes, *fields)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        codes, *fields = ctx.saved_tensors
        return None, None, scale_gradient(grads[0], codes, Fields(*fields), ctx.spec), None, None


class Ruled(torch.autograd.Function):
    """Fake quantization with the gradient rule of a quantizer."""

    @staticmethod
    def forward(
        ctx: Any,
        w_RK: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        minimum: Tensor | None,
        spec: QuantSpec,
        quantizer: Any,
    ) -> Tensor:
        ctx.save_for_backward(w_RK, scale, zero, minimum)
        ctx.how = spec, quantizer
        fields = Fields(scale, zero, minimum)
        by = quantizer.coding(fields)
        if by is fields:
            return spec.grid.fake_quantize(w_RK, *fields)
        codes, poisoned = spec.grid.encode_poisoning(w_RK, *by)
        return spec.grid.decode(codes, *fields._replace(scale=scale + (poisoned - by.scale)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (w, *fields), (spec, quantizer) = ctx.saved_tensors, ctx.how
        return *quantizer.vjp(spec, grads[0], w, Fields(*fields), ctx.needs_input_grad[:4]), None, None
