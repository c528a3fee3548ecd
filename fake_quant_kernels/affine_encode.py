"""Rows -> integer codes: the encode of `affine`.

    code = rint(clamp(w * r, lo - z, hi - z)) + z      r = 1 / s, one IEEE fp32 reciprocal per scale; int zero point z
    code = rint(clamp((w - m) * r, lo, hi))            float minimum m

w [R, K] in any float dtype, read as fp32; s, z, m fp32 [R, G] or [1, 1], K % G == 0. Codes are int8 where lo < 0, else
uint8 [R, K]; packed (4 bits, K even) planar halves, uint8 [R, K/2] (`pack`). A NaN has the code of q = 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.dispatch import AotCase, Device, Kernel, Op, tl
from qat.fake_quant_kernels.pack import pack_halves
from qat.fake_quant_kernels.rows import (
    broadcast,
    chunks,
    code_dtype,
    empty_codes,
    field_of,
    geometry,
    grouped,
    nibbles,
    no_nan,
    part,
    places,
    rounded,
    tile,
    tiling,
)


def scaled(w: Tensor, scale: Tensor, minimum: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The argument of the clamp, `grouped`, in new memory or in `out` [R, K]: fp32 (fp64 if w is)."""
    groups = scale.shape[1]
    wide = w
    if w.dtype not in (torch.float32, torch.float64):
        # a product of mixed dtypes would make this copy as well, in fresh memory
        wide = w.float() if out is None else out.copy_(w)
    blocks, into = grouped(wide, groups), None if out is None else grouped(out, groups)
    reciprocal = broadcast(scale.reciprocal())
    if minimum is not None:
        return torch.sub(blocks, broadcast(minimum), out=into).mul_(reciprocal)
    return torch.mul(blocks, reciprocal, out=into)


def put_codes(
    value: Tensor, zero: Tensor | None, lo: int, hi: int, packed: bool, finite: bool, out: Tensor, rows: slice
) -> None:
    """The codes of a chunk of rows into out[rows], from what `scaled` gave, which is overwritten; finite:
    it holds no NaN."""
    # the bounds are integers: rounding first gives the same codes, and a clamp by numbers is the faster one
    value = value.round_()
    if torch.compiler.is_compiling():
        # compilers make a scalar loop of nan_to_num
        value = torch.where(value != value, 0.0, value)
    elif not finite:
        value.nan_to_num_(0.0)
    if zero is not None:
        value += broadcast(zero)
    value.clamp_(lo, hi)
    if torch.compiler.is_compiling():
        codes = value.to(code_dtype(lo)).flatten(1)
        out[rows] = pack_halves(codes) if packed else codes
        return
    # a cast to uint8 takes eight times as long as one to int8
    beyond = hi > 127
    if beyond:
        value.sub_(128.0)
    into = torch.empty_like(value, dtype=torch.int8) if packed else part(out, rows).view(torch.int8).view(value.shape)
    codes = into.copy_(value).view(code_dtype(lo))
    if beyond:
        codes.bitwise_xor_(128)
    if packed:
        out[rows] = pack_halves(codes.flatten(1))


def _encode(
    w: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None, lo: int, hi: int, packed: bool
) -> Tensor:
    """w [R, K] -> codes within lo..hi, int8 / uint8 [R, K], or uint8 [R, K/2] if packed."""
    out = empty_codes(w, lo, packed)
    for rows, (buffer,) in chunks(w, 1):
        value = scaled(part(w, rows), part(scale, rows), part(minimum, rows), buffer)
        put_codes(value, part(zero, rows), lo, hi, packed, False, out, rows)
    return out


def encode_looking(
    w: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None, lo: int, hi: int, packed: bool
) -> tuple[Tensor, bool]:
    """The codes, and whether w holds no NaN; for tensors that are `eager_on_cpu`."""
    out, finite = empty_codes(w, lo, packed), True
    for rows, (buffer,) in chunks(w, 1):
        value = scaled(part(w, rows), part(scale, rows), part(minimum, rows), buffer)
        fine = not value.numel() or no_nan(value.amax())
        put_codes(value, part(zero, rows), lo, hi, packed, fine, out, rows)
        finite &= fine
    return out, finite


def _fake(
    w: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None, lo: int, hi: int, packed: bool
) -> Tensor:
    return empty_codes(w, lo, packed)


@Device
def _codes(
    w: Any,
    scale: Any,
    zero: Any,
    minimum: Any,
    unit: Any,
    j: Any,
    mask_n: Any,
    mask: Any,
    size: Any,
    lo: Any,
    hi: Any,
    SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    ZERO: tl.constexpr,
    MINIMUM: tl.constexpr,
) -> Any:
    x = tl.load(w + places(unit, j, size), mask=mask, other=0.0).to(tl.float32)
    s = field_of(scale, unit, mask_n, SHARED, SPLIT)
    z = field_of(zero, unit, mask_n, SHARED, SPLIT) if ZERO else s
    m = field_of(minimum, unit, mask_n, SHARED, SPLIT) if MINIMUM else s
    return rounded(x, tl.math.div_rn(1.0, s), z, m, lo, hi, ZERO, MINIMUM)


@Kernel
def _encode_kernel(
    w: Any,
    scale: Any,
    zero: Any,
    minimum: Any,
    codes: Any,
    units: Any,
    size: Any,
    per_half: Any,
    lo: Any,
    hi: Any,
    PACKED: tl.constexpr,
    SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    ZERO: tl.constexpr,
    MINIMUM: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
) -> None:
    n, j = tile(size, BN, BL)
    mask_n = n < units
    mask = mask_n[:, None] & (j < size)[None, :]
    unit = n
    if PACKED:
        unit = n + n // per_half * per_half
    q = _codes(w, scale, zero, minimum, unit, j, mask_n, mask, size, lo, hi, SHARED, SPLIT, ZERO, MINIMUM)
    if PACKED:
        unit += per_half
        high = _codes(w, scale, zero, minimum, unit, j, mask_n, mask, size, lo, hi, SHARED, SPLIT, ZERO, MINIMUM)
        q = nibbles(q, high)
    tl.store(codes + places(n, j, size), q.to(codes.dtype.element_ty), mask=mask)


def _triton(
    w: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None, lo: int, hi: int, packed: bool
) -> Tensor:
    codes = empty_codes(w, lo, packed)
    if codes.numel():
        shared = scale.numel() == 1
        units, size, per_half, split = geometry(w.shape[0], w.shape[1], 1 if shared else scale.shape[1], packed)
        programs, high, wide = tiling(units, size)
        # a pointer that is not read stands for a field that is not there
        s, z, m = (scale if field is None else field.contiguous() for field in (scale, zero, minimum))
        _encode_kernel[(programs,)](
            *(w.contiguous(), s, z, m, codes, units, size, per_half, float(lo), float(hi)),
            PACKED=packed,
            SHARED=shared,
            SPLIT=split,
            ZERO=zero is not None,
            MINIMUM=minimum is not None,
            BN=high,
            BL=wide,
        )
    return codes


affine_encode = Op("affine_encode", _encode, _fake, _triton)


def _case(name: str, dtype: str, size: int, code: str = "i8", zero: bool = False, minimum: bool = False) -> AotCase:
    packed = code == "u8"
    _, high, wide = tiling(1 << 20, size)
    return AotCase(
        f"encode {name}",
        _encode_kernel,
        {
            "w": f"*{dtype}",
            **dict.fromkeys(("scale", "zero", "minimum"), "*fp32"),
            "codes": f"*{code}",
            **dict.fromkeys(("units", "size", "per_half"), "i32"),
            **dict.fromkeys(("lo", "hi"), "fp32"),
        },
        {
            "PACKED": packed,
            "SHARED": False,
            "SPLIT": 0,
            "ZERO": zero,
            "MINIMUM": minimum,
            "BN": high,
            "BL": wide,
        },
    )


AOT = (
    _case("group 32 bf16", "bf16", 32),
    _case("group 64 bf16 with zero points", "bf16", 64, zero=True),
    _case("group 128 fp32", "fp32", 128),
    _case("group 32 bf16 packed", "bf16", 32, "u8"),
    _case("group 128 fp32 packed with minima", "fp32", 128, "u8", minimum=True),
    _case("row 4096 bf16", "bf16", 4096),
    _case("row 4096 fp32 packed", "fp32", 4096, "u8"),
)
