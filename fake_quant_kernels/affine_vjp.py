"""Gradients of affine fake quantization, in one pass over the numbers and their gradient g.

With v the argument of the clamp (`affine`), c its result, q = rint(c) and `inside` = (c == v), false for a NaN:

    dw   = g * inside
    ds   = sum_group g * (q - v * inside)       LSQ, Esser et al. 2020, equation 3
    lost = sum_group g * (1 - inside)           dz = -s * lost, dm = lost

g, w [R, K] in any float dtype, read as fp32; s, z, m fp32 [R, G] or [1, 1], K % G == 0, and the sums in that shape.
A kernel's sums are in another order than the reference's: both are within a few ulps of the sum of magnitudes. Where dw
alone is wanted, eager torch on a CPU gives 0 for any g outside, infinite or NaN, and for a NaN in w 0 or g.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.fake_quant_kernels.affine_encode import scaled
from qat.fake_quant_kernels.device import clip, rint
from qat.fake_quant_kernels.dispatch import AotCase, Device, Kernel, Op, tl
from qat.fake_quant_kernels.rows import (
    broadcast,
    chunks,
    eager_on_cpu,
    field_of,
    geometry,
    grouped,
    part,
    places,
    tile,
    tiling,
)


def clamped(value: Tensor, zero: Tensor | None, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
    """`value` `grouped` between the bounds, in new memory or in `out`; NaN stays NaN."""
    if zero is None:
        return torch.clamp(value, lo, hi, out=out)
    low, high = broadcast(lo - zero), broadcast(hi - zero)
    # clamp by tensors takes four times as long
    found = torch.maximum(value, low, out=out)
    return torch.minimum(found, high, out=out)


def _vjp(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    need_w: bool,
    need_scale: bool,
    need_lost: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dw [R, K] in the dtype of grad, ds and the lost gradient in the shape of scale; those not needed are empty."""
    found = _fake(grad, w, scale, zero, minimum, lo, hi, need_w, need_scale, need_lost)
    if need_w and not (need_scale or need_lost) and _masks(grad, w, zero, lo, hi):
        _mask(grad, w, scale, minimum, lo, hi, found[0])
    else:
        needs = need_w, need_scale, need_lost
        _walk(grad, w, scale, zero, minimum, lo, hi, *(t if n else None for t, n in zip(found, needs, strict=True)))
    return found


def vjp_over(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    need_w: bool,
    need_scale: bool,
    need_lost: bool,
    hat: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same in plain torch, with dw in the memory of grad, which is lost; those of fields that are not needed are
    None. hat: memory [R, K] of any float dtype for the fake-quantized numbers, which cost little more here."""
    if need_w and not (need_scale or need_lost) and _masks(grad, w, zero, lo, hi):
        _mask(grad, w, scale, minimum, lo, hi, grad, hat)
        return grad, None, None
    dscale, lost = (torch.empty_like(scale) if need else None for need in (need_scale, need_lost))
    _walk(grad, w, scale, zero, minimum, lo, hi, grad if need_w else None, dscale, lost, hat)
    return grad, dscale, lost


def _masks(grad: Tensor, w: Tensor, zero: Tensor | None, lo: int, hi: int) -> bool:
    """Whether `_mask` finds dw alone."""
    if zero is not None or grad.dtype != torch.float32 or w.dtype == torch.float64:
        return False
    # beside 0 there are only denormals, which may be switched off
    return lo < 0 < hi and eager_on_cpu(grad)


def _mask(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    dw: Tensor,
    hat: Tensor | None = None,
) -> None:
    """Fills dw (grad itself, or other memory) and hat: g where the argument of the clamp is between the two numbers
    around the bounds, else 0, in one pass instead of three."""
    groups = scale.shape[1]
    for rows, (buffer,) in chunks(w, 1):
        s, m = part(scale, rows), part(minimum, rows)
        value = scaled(part(w, rows), s, m, buffer)
        g = grouped(part(grad, rows), groups)
        into = g if dw is grad else grouped(part(dw, rows), groups)
        torch.ops.aten.hardtanh_backward.grad_input(g, value, *_around(lo, hi), grad_input=into)
        if hat is not None:
            _put_hat(part(hat, rows), value.clamp_(lo, hi).round_(), s, m)


def _walk(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    dw: Tensor | None,
    dscale: Tensor | None,
    lost: Tensor | None,
    hat: Tensor | None = None,
) -> None:
    """Fills dw (grad itself, or other memory), dscale, lost and hat, those that are there."""
    shared = scale.shape[0] == 1
    for sums in (dscale, lost):
        if shared and sums is not None:
            sums.zero_()
    groups, dtype = scale.shape[1], torch.promote_types(w.dtype, torch.float32)
    casts, straight = grad.dtype != dtype, grad.dtype == dtype and eager_on_cpu(grad)
    for rows, buffers in chunks(w, 2 + (dscale is not None) + (lost is not None) + casts):
        spare = iter([None if each is None else grouped(each, groups) for each in buffers[1:]])
        value = scaled(part(w, rows), part(scale, rows), part(minimum, rows), buffers[0])
        clipped = clamped(value, part(zero, rows), lo, hi, next(spare))
        terms = torch.round(clipped, out=next(spare)) if dscale is not None else clipped
        # 1.0 and 0.0: operations on bools take ten times as long
        inside = value.eq_(clipped)
        if hat is not None:
            integers = terms if dscale is not None else terms.round_()
            _put_hat(part(hat, rows), integers, part(scale, rows), part(minimum, rows))
        outside = torch.neg(inside, out=next(spare)).add_(1.0) if lost is not None else inside
        g = grouped(part(grad, rows), groups)
        if casts:
            wide = next(spare)
            g = g.to(dtype) if wide is None else wide.copy_(g)
        if dscale is not None:
            # not v * inside: a v beyond fp32 is infinite, and infinity times 0 is NaN
            _add(dscale, rows, terms.addcmul_(clipped, inside, value=-1.0).mul_(g).sum(-1, groups == 1))
        if lost is not None:
            _add(lost, rows, outside.mul_(g).sum(-1, groups == 1))
        if dw is not None and straight:
            torch.mul(g, inside, out=grouped(part(dw, rows), groups))
        elif dw is not None:
            dw[rows] = inside.mul_(g).reshape(dw[rows].shape)


@functools.cache
def _around(lo: int, hi: int) -> tuple[float, float]:
    """The numbers of fp32 next to lo and hi, outside of them."""
    ends = (lo, -np.inf), (hi, np.inf)
    low, high = (float(np.nextafter(np.float32(end), np.float32(beyond))) for end, beyond in ends)
    return low, high


def _put_hat(hat: Tensor, integers: Tensor, scale: Tensor, minimum: Tensor | None) -> None:
    """Fake-quantized numbers of a chunk, from their codes less zero points `grouped`."""
    exact = hat.dtype == integers.dtype
    value = torch.mul(integers, broadcast(scale), out=grouped(hat, scale.shape[1]) if exact else None)
    if minimum is not None:
        value += broadcast(minimum)
    if not exact:
        hat.copy_(value.view(hat.shape))


def _add(whole: Tensor, rows: slice, sums: Tensor) -> None:
    """The sums of a chunk's groups, to their places or to the one number of a shared scale."""
    if whole.shape[0] == 1:
        whole += sums.sum_to_size(whole.shape)
    else:
        whole[rows] = sums


def _fake(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    need_w: bool,
    need_scale: bool,
    need_lost: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dw = grad.new_empty(grad.shape if need_w else 0)
    return dw, scale.new_empty(scale.shape if need_scale else 0), scale.new_empty(scale.shape if need_lost else 0)


@Device
def value_of(
    w: Any,
    s: Any,
    minimum: Any,
    n: Any,
    at: Any,
    mask_n: Any,
    mask: Any,
    SHARED: tl.constexpr,
    MINIMUM: tl.constexpr,
) -> Any:
    """The argument of the clamp."""
    x = tl.load(w + at, mask=mask, other=0.0).to(tl.float32)
    if MINIMUM:
        x = x - field_of(minimum, n, mask_n, SHARED, 0)
    return x * tl.math.div_rn(1.0, s)


@Kernel
def _vjp_kernel(
    grad: Any,
    w: Any,
    scale: Any,
    zero: Any,
    minimum: Any,
    dw: Any,
    dscale: Any,
    lost: Any,
    units: Any,
    size: Any,
    lo: Any,
    hi: Any,
    SHARED: tl.constexpr,
    ZERO: tl.constexpr,
    MINIMUM: tl.constexpr,
    NEED_W: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_LOST: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
) -> None:
    n, j = tile(size, BN, BL)
    mask_n = n < units
    mask = mask_n[:, None] & (j < size)[None, :]
    at = places(n, j, size)
    s = field_of(scale, n, mask_n, SHARED, 0)
    v = value_of(w, s, minimum, n, at, mask_n, mask, SHARED, MINIMUM)
    low, high = lo, hi
    if ZERO:
        z = field_of(zero, n, mask_n, SHARED, 0)
        low, high = lo - z, hi - z
    clipped = clip(v, low, high)
    inside = clipped == v
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    across = (size + BL - 1) // BL
    partial = n * across + tl.program_id(0) % across
    if NEED_W:
        tl.store(dw + at, (g * tl.where(inside, 1.0, 0.0)).to(dw.dtype.element_ty), mask=mask)
    if NEED_SCALE:
        tl.store(dscale + partial, tl.sum(g * (rint(clipped) - tl.where(inside, v, 0.0)), axis=1), mask=mask_n)
    if NEED_LOST:
        tl.store(lost + partial, tl.sum(g * tl.where(inside, 0.0, 1.0), axis=1), mask=mask_n)


def _triton(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    need_w: bool,
    need_scale: bool,
    need_lost: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shared = scale.numel() == 1
    units, size, *_ = geometry(w.shape[0], w.shape[1], 1 if shared else scale.shape[1], False)
    programs, high, wide = tiling(units, size)
    across = -(-size // wide)
    dw = grad.new_empty(grad.shape if need_w else 0)
    # sums of each tile's part of a unit; added up below
    dscale, lost = (scale.new_empty((units, across) if need else 0) for need in (need_scale, need_lost))
    if grad.numel():
        s, z, m = (scale if field is None else field.contiguous() for field in (scale, zero, minimum))
        _vjp_kernel[(programs,)](
            *(grad.contiguous(), w.contiguous(), s, z, m, dw, dscale, lost, units, size, float(lo), float(hi)),
            SHARED=shared,
            ZERO=zero is not None,
            MINIMUM=minimum is not None,
            NEED_W=need_w,
            NEED_SCALE=need_scale,
            NEED_LOST=need_lost,
            BN=high,
            BL=wide,
        )
    dscale, lost = (t if t.dim() != 2 else t.sum() if shared else t.sum(1) for t in (dscale, lost))
    return dw, dscale.reshape(scale.shape) if need_scale else dscale, lost.reshape(scale.shape) if need_lost else lost


affine_vjp = Op("affine_vjp", _vjp, _fake, _triton)


def _case(
    name: str,
    dtype: str,
    size: int,
    need_w: bool = True,
    need_scale: bool = True,
    need_lost: bool = False,
    **kind: bool,
) -> AotCase:
    _, high, wide = tiling(1 << 20, size)
    return AotCase(
        f"vjp {name}",
        _vjp_kernel,
        {
            **dict.fromkeys(("grad", "w"), f"*{dtype}"),
            **dict.fromkeys(("scale", "zero", "minimum"), "*fp32"),
            "dw": f"*{dtype}",
            **dict.fromkeys(("dscale", "lost"), "*fp32"),
            **dict.fromkeys(("units", "size"), "i32"),
            **dict.fromkeys(("lo", "hi"), "fp32"),
        },
        {
            "SHARED": False,
            "ZERO": kind.get("zero", False),
            "MINIMUM": kind.get("minimum", False),
            "NEED_W": need_w,
            "NEED_SCALE": need_scale,
            "NEED_LOST": need_lost,
            "BN": high,
            "BL": wide,
        },
    )


AOT = (
    _case("group 32 bf16", "bf16", 32),
    _case("group 64 bf16 with zero points", "bf16", 64, need_lost=True, zero=True),
    _case("group 128 fp32 with minima", "fp32", 128, need_lost=True, minimum=True),
    _case("row 4096 bf16", "bf16", 4096),
    _case("row 4096 fp32, weights only", "fp32", 4096, need_scale=False),
)
