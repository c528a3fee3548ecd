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

Shapes: w [R, K] in any float dtype, read as fp32; s, z, m fp32 [R, G] or [1, 1] with K % G == 0.

Codes are int8 where lo < 0, else uint8 [R, K]; packed (4 bits, K even) planar halves, uint8 [R, K/2] (`pack`). A NaN
has the code of q = 0, and fake quantization leaves it NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.affine_decode import affine_decode
from qat.fake_quant_kernels.affine_encode import affine_encode, encode_looking, scaled
from qat.fake_quant_kernels.affine_vjp import affine_vjp, clamped, value_of, vjp_over
from qat.fake_quant_kernels.device import clip, rint
from qat.fake_quant_kernels.dispatch import AotCase, Kernel, Op, no_grad, tl, uses_triton
from qat.fake_quant_kernels.rows import broadcast, chunks, eager_on_cpu, field_of, geometry, part, places, tile, tiling


def _fake_quantize(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    dtype: torch.dtype,
    again: bool = False,
) -> Tensor:
    """w [R, K] -> decode(encode(w)) [R, K] in `dtype`, except that a NaN stays NaN; fp32 arithmetic (fp64 if w is).

    again: changes nothing, as in `affine_decode`; it tells apart only what a compiler does not see into.
    """
    out = _fake_quantize_fake(w, scale, zero, minimum, lo, hi, dtype, again)
    wide = torch.promote_types(w.dtype, torch.float32)
    if torch.compiler.is_compiling():
        value = torch.round(clamped(scaled(w, scale, minimum), zero, lo, hi)) * broadcast(scale)
        value = value if minimum is None else value + broadcast(minimum)
        return value.reshape(w.shape).to(dtype)
    for rows, (buffer,) in chunks(w, 1):
        s, z, m = part(scale, rows), part(zero, rows), part(minimum, rows)
        here = part(out, rows)
        value = scaled(part(w, rows), s, m, here if dtype == wide else buffer)
        # (q + z) - z is q: integers below 2^24
        clamped(value, z, lo, hi, value).round_().mul_(broadcast(s))
        if m is not None:
            value += broadcast(m)
        if dtype != wide:
            here.copy_(value.view(here.shape))
    return out


def _fake_quantize_fake(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    dtype: torch.dtype,
    again: bool = False,
) -> Tensor:
    return w.new_empty(w.shape, dtype=dtype)


@Kernel
def _fake_quantize_kernel(
    w: Any,
    scale: Any,
    zero: Any,
    minimum: Any,
    out: Any,
    units: Any,
    size: Any,
    lo: Any,
    hi: Any,
    SHARED: tl.constexpr,
    ZERO: tl.constexpr,
    MINIMUM: tl.constexpr,
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
    x = rint(clip(v, low, high)) * s
    if MINIMUM:
        x = x + field_of(minimum, n, mask_n, SHARED, 0)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=mask)


def _fake_quantize_triton(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    dtype: torch.dtype,
    again: bool = False,
) -> Tensor:
    out = _fake_quantize_fake(w, scale, zero, minimum, lo, hi, dtype, again)
    if out.numel():
        shared = scale.numel() == 1
        units, size, *_ = geometry(w.shape[0], w.shape[1], 1 if shared else scale.shape[1], False)
        programs, high, wide = tiling(units, size)
        s, z, m = (scale if field is None else field.contiguous() for field in (scale, zero, minimum))
        _fake_quantize_kernel[(programs,)](
            *(w.contiguous(), s, z, m, out, units, size, float(lo), float(hi)),
            SHARED=shared,
            ZERO=zero is not None,
            MINIMUM=minimum is not None,
            BN=high,
            BL=wide,
        )
    return out


affine_fake = Op("affine_fake", _fake_quantize, _fake_quantize_fake, _fake_quantize_triton)


def _case(name: str, dtype: str, size: int, out: str = "fp32", zero: bool = False, minimum: bool = False) -> AotCase:
    _, high, wide = tiling(1 << 20, size)
    return AotCase(
        f"fake quantize {name}",
        _fake_quantize_kernel,
        {
            "w": f"*{dtype}",
            **dict.fromkeys(("scale", "zero", "minimum"), "*fp32"),
            "out": f"*{out}",
            **dict.fromkeys(("units", "size"), "i32"),
            **dict.fromkeys(("lo", "hi"), "fp32"),
        },
        {"SHARED": False, "ZERO": zero, "MINIMUM": minimum, "BN": high, "BL": wide},
    )


AOT = (
    _case("group 32 fp32", "fp32", 32),
    _case("group 64 bf16 with zero points", "bf16", 64, zero=True),
    _case("group 128 bf16 to bf16", "bf16", 128, "bf16"),
    _case("row 4096 fp32 with minima", "fp32", 4096, minimum=True),
)


# ---- what others call ------------------------------------------------------------------------------------------------


def encode(
    w: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None, lo: int, hi: int, packed: bool = False
) -> Tensor:
    """w [R, K] of any float dtype -> codes within lo..hi: int8 (lo < 0) or uint8 [R, K]; packed uint8 [R, K/2]."""
    with no_grad():
        return affine_encode(w, scale, zero, minimum, lo, hi, packed)  # type: ignore[no-any-return]


def encode_poisoning(
    w: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None, lo: int, hi: int, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """(`encode`, `poisoned` scale)."""
    with no_grad():
        if eager_on_cpu(w) and not uses_triton(w.device):
            codes, finite = encode_looking(w, scale, zero, minimum, lo, hi, packed)
            return codes, scale if finite else torch.full_like(scale, torch.nan)
        return affine_encode(w, scale, zero, minimum, lo, hi, packed), poisoned(scale, w)


def decode(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    signed: bool = True,
    again: bool = False,
) -> Tensor:
    """Codes [R, K], integers or integral floats (packed: uint8 [R, K/2], with the grid's sign) -> weights [R, K].

    fp32 arithmetic, then one cast to `dtype`. No gradients: those are `vjp`'s. again: said by a backward, so that no
    compiler saves the numbers of the forward for it.
    """
    with no_grad():
        return affine_decode(codes, scale, zero, minimum, dtype, packed, signed, again)  # type: ignore[no-any-return]


def rounded(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    dtype: torch.dtype = torch.float32,
    again: bool = False,
) -> Tensor:
    """`decode(encode(w))` in `dtype` without the codes; again: as in `decode`. NaN stays NaN. No gradients."""
    with no_grad():
        return affine_fake(w, scale, zero, minimum, lo, hi, dtype, again)  # type: ignore[no-any-return]


def vjp(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    lo: int,
    hi: int,
    identity: bool,
    need_w: bool,
    need_scale: bool,
    need_zero: bool,
    need_minimum: bool,
    spend: bool = False,
    hat: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `fake_quantize` for grad [R, K]: dw in the dtype of grad, the fields' in fp32 and their shape.

    None where not needed. With `identity` dw is `grad` itself. spend: grad may be overwritten (plain torch does).
    hat: memory [R, K] for what `rounded` gives, in its dtype, where the gradient can be `spent`.
    """
    need_zero, need_minimum = need_zero and zero is not None, need_minimum and minimum is not None
    ours, need_lost = need_w and not identity, need_zero or need_minimum
    dw: Tensor | None = grad if need_w else None
    if not (ours or need_scale or need_lost or hat is not None):
        return dw, None, None, None
    how = grad, w, scale, zero, minimum, lo, hi, ours, need_scale, need_lost
    found, dscale, lost = vjp_over(*how, hat) if spend and spent(grad) else affine_vjp(*how)
    return (
        found if ours else dw,
        dscale if need_scale else None,
        lost * -scale if need_zero else None,  # type: ignore[operator]
        lost if need_minimum else None,
    )


def spent(grad: Tensor) -> bool:
    """Whether `vjp` can work in the memory of a gradient that nobody else holds."""
    return grad.is_contiguous() and eager_on_cpu(grad) and not uses_triton(grad.device)


def poisoned(scale: Tensor, w: Tensor) -> Tensor:
    """`scale` [R, G] or [1, 1] as it is, or NaN throughout if w holds one, so that a diverged run shows; no sync."""
    if not w.numel():
        return scale
    return scale + 0.0 * torch.nan_to_num(w.detach().amax().float(), nan=torch.nan, posinf=0.0, neginf=0.0)


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
        wide = torch.promote_types(w.dtype, torch.float32)
        return affine_fake(w, scale, zero, minimum, lo, hi, wide)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*vjp(grads[0], *ctx.saved_tensors, *ctx.grid, *ctx.needs_input_grad[:4]), None, None, None)


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

    w [R, K] fp32; scale, zero, minimum [R, G] or [1, 1] fp32 (zero integral). Returns [R, K] fp32; NaN stays NaN.
    """
    return _FakeQuantize.apply(w, scale, zero, minimum, lo, hi, identity)  # type: ignore[no-any-return, no-untyped-call]
