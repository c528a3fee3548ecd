"""Affine fake quantization of rows: the one place where a weight is rounded.

Encode (one IEEE fp32 reciprocal per scale, round half to even):

    r = 1 / s
    q = rint(clamp(w * r,       lo - z, hi - z))        code = q + z          integer zero point z (0 if none)
    q = rint(clamp((w - m) * r, lo,     hi))            code = q              float minimum m

Decode, in fp32 with separate multiply and add:

    w_hat = (code - z) * s                              w_hat = code * s + m

Backward, with v the argument of the clamp and `inside` = (clamp did nothing):

    dw = g * inside             (or g where the gradient rule says so: dynamic scales use the identity)
    ds = sum_group g * (q - v * inside)                 LSQ, Esser et al. 2020, equation 3
    dz = sum_group -g * s * (1 - inside)
    dm = sum_group  g * (1 - inside)

Shapes: w [R, K]; s, z, m [R, G] or [1, 1] with K % G == 0. fp32 in, fp32 out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _grouped(w: Tensor, scale: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """w [R, K] -> [R, G, K/G] so that [R, G, 1] scales broadcast; returns it with the shape of the scales."""
    groups = scale.shape[1]
    return w.reshape(w.shape[0], groups, w.shape[1] // groups), (*scale.shape, 1)


def _scaled(
    w: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None, lo: int, hi: int
) -> tuple[Tensor, Tensor | int, Tensor | int]:
    """The argument of the clamp [R, G, K/G] and the clamp's bounds (numbers where there is no zero point)."""
    blocks, shape = _grouped(w, scale)
    if minimum is not None:
        blocks = blocks - minimum.reshape(shape)
    value = blocks * (1.0 / scale).reshape(shape)
    if zero is None:
        return value, lo, hi
    return value, lo - zero.reshape(shape), hi - zero.reshape(shape)


def _rounded(value: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Clamp, then round half to even."""
    return torch.round(torch.clamp(value, low, high))  # type: ignore[arg-type]


def encode(w: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None, lo: int, hi: int) -> Tensor:
    """w [R, K] -> codes [R, K] as integral fp32 numbers within lo..hi."""
    value, low, high = _scaled(w, scale, zero, minimum, lo, hi)
    codes = _rounded(value, low, high)
    if zero is not None:
        codes = codes + zero.reshape(*zero.shape, 1)
    return codes.reshape(w.shape)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None) -> Tensor:
    """Integral fp32 codes [R, K] -> weights [R, K] in fp32."""
    blocks, shape = _grouped(codes, scale)
    if zero is not None:
        blocks = blocks - zero.reshape(shape)
    value = blocks * scale.reshape(shape)
    if minimum is not None:
        value = value + minimum.reshape(shape)
    return value.reshape(codes.shape)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        minimum: Tensor | None,
        lo: int,
        hi: int,
        identity: bool,
    ) -> Tensor:
        ctx.save_for_backward(w, scale, zero, minimum)
        ctx.grid = (lo, hi, identity)
        return decode(encode(w, scale, zero, minimum, lo, hi), scale, zero, minimum)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, scale, zero, minimum = ctx.saved_tensors
        lo, hi, identity = ctx.grid
        grad = grads[0]
        if identity and not any(ctx.needs_input_grad[1:4]):
            return grad, None, None, None, None, None, None
        value, low, high = _scaled(w, scale, zero, minimum, lo, hi)
        inside = (value >= low) & (value <= high)
        blocks = grad.reshape(value.shape)

        def reduced(terms: Tensor) -> Tensor:
            total = terms.sum(-1)
            return total if total.shape == scale.shape else total.sum_to_size(scale.shape)

        dw = grad if identity else (blocks * inside).reshape(w.shape)
        dscale = dzero = dminimum = None
        if ctx.needs_input_grad[1]:
            # not `value * inside`: a value beyond fp32 is infinite, and infinity times 0 is NaN
            dscale = reduced(blocks * (_rounded(value, low, high) - value.masked_fill(~inside, 0.0)))
        if zero is not None and ctx.needs_input_grad[2]:
            dzero = -reduced(blocks * ~inside) * scale
        if minimum is not None and ctx.needs_input_grad[3]:
            dminimum = reduced(blocks * ~inside)
        return dw, dscale, dzero, dminimum, None, None, None


def fake_quantize(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    identity: bool = False,
) -> Tensor:
    """`decode(encode(w))` with the gradients above; `identity` passes dw everywhere (dynamic scales).

    w [R, K] fp32; scale, zero, minimum [R, G] or [1, 1] fp32 (zero integral). Returns [R, K] fp32.
    """
    return _FakeQuantize.apply(w, scale, zero, minimum, lo, hi, identity)  # type: ignore[no-any-return, no-untyped-call]
