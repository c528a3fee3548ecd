"""Dynamic scales: the fields are found in the numbers and the numbers rounded with them, in one pass.

    s, z, m = `fields` of each group of K/G numbers of a row       absmax: s;  minmax: s and z, or s and m
    codes   = `affine_encode` with them

Shapes: w [R, K] in any float dtype, read as fp32; fields fp32 [R, G]; K % G == 0; codes int8 where lo < 0, else uint8,
[R, K], or packed planar halves uint8 [R, K/2]. The gradient of the numbers is the identity: nothing to compute.

Fields are always finite. With `poison` a group that holds a NaN has the scale NaN instead (and the codes of 0), so that
a diverged run shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.affine_encode import affine_encode, put_codes, scaled
from qat.fake_quant_kernels.device import clip, project, rint, stored
from qat.fake_quant_kernels.dispatch import AotCase, Device, Kernel, Op, no_grad, tl
from qat.fake_quant_kernels.fields import absmax_fields as absmax_fields
from qat.fake_quant_kernels.fields import fields_of_range as fields_of_range
from qat.fake_quant_kernels.fields import minmax_fields as minmax_fields
from qat.fake_quant_kernels.fields import range_of as range_of
from qat.fake_quant_kernels.fields import scale_of_amax as scale_of_amax
from qat.fake_quant_kernels.fields import zero_of as zero_of
from qat.fake_quant_kernels.rows import (
    TILE,
    eager_on_cpu,
    empty_codes,
    fp32_chunks,
    geometry,
    nibbles,
    no_nan,
    places,
    rounded,
    tile,
)
from qat.fake_quant_kernels.storage import storage_code

# numbers of the longest group that one program holds
_LONGEST = 16384


def _absmax(
    w: Tensor,
    groups: int,
    inv_reach: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    packed: bool,
    poison: bool,
) -> tuple[Tensor, Tensor]:
    """w [R, K] -> (codes, scale)."""
    codes, scale = _absmax_fake(w, groups, inv_reach, lo, hi, storage, smallest, largest, packed, poison)
    for rows, x, buffer in fp32_chunks(w):
        s = absmax_fields(x, groups, inv_reach, storage, smallest, largest, poison, buffer)
        finite = poison and eager_on_cpu(w) and s.numel() > 0 and no_nan(s)
        put_codes(scaled(x, s, None, buffer), None, lo, hi, packed, finite, codes, rows)
        scale[rows] = s
    return codes, scale


def _absmax_fake(
    w: Tensor,
    groups: int,
    inv_reach: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    packed: bool,
    poison: bool,
) -> tuple[Tensor, Tensor]:
    return empty_codes(w, lo, packed), w.new_empty((w.shape[0], groups), dtype=torch.float32)


def _minmax(
    w: Tensor,
    groups: int,
    inv_steps: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    half: bool,
    float_minimum: bool,
    packed: bool,
    poison: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """w [R, K] -> (codes, scale, zero or minimum)."""
    how = storage, smallest, largest, half, float_minimum
    codes, scale, second = _minmax_fake(w, groups, inv_steps, lo, hi, *how, packed, poison)
    for rows, x, buffer in fp32_chunks(w):
        s, f = minmax_fields(x, groups, inv_steps, lo, hi, *how, poison)
        zero, minimum = (None, f) if float_minimum else (f, None)
        scale[rows], second[rows] = s, f
        put_codes(scaled(x, s, minimum, buffer), zero, lo, hi, packed, False, codes, rows)
    return codes, scale, second


def _minmax_fake(
    w: Tensor,
    groups: int,
    inv_steps: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    half: bool,
    float_minimum: bool,
    packed: bool,
    poison: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = w.new_empty((w.shape[0], groups), dtype=torch.float32)
    return empty_codes(w, lo, packed), scale, torch.empty_like(scale)


# ---- kernel ----------------------------------------------------------------------------------------------------------


@Device
def _fields(
    x: Any,
    y: Any,
    mask: Any,
    inverse: Any,
    lo: Any,
    hi: Any,
    smallest: Any,
    largest: Any,
    KIND: tl.constexpr,
    STORAGE: tl.constexpr,
    HALF: tl.constexpr,
    POISON: tl.constexpr,
) -> Any:
    """The scale and the zero point or minimum [BN] of units whose numbers are in x and in y, fp32 [BN, BL]."""
    if KIND == 0:
        # as integers magnitudes are in the same order, NaN above infinity: the maximum passes NaN on
        bits = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, y.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        high = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
        scale = project(high * inverse, STORAGE, smallest, largest)
        second = scale
    else:
        nan = tl.max(((x != x) | (y != y)).to(tl.int32), axis=1) > 0
        low = tl.min(tl.where(mask, tl.minimum(x, y), float("inf")), axis=1)
        high = tl.max(tl.where(mask, tl.maximum(x, y), float("-inf")), axis=1)
        if KIND == 1:
            low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        low, high = tl.where(nan, float("nan"), low), tl.where(nan, float("nan"), high)
        if KIND == 1:
            scale = project((high - low) * inverse, STORAGE, smallest, largest)
            # far beyond any code before the rounding, which is for small numbers
            second = lo - rint(clip(low * tl.math.div_rn(1.0, scale), -65536.0, 65536.0))
            second = clip(tl.where(second != second, 0.0, second), lo, hi)
        else:
            second = clip(tl.where(low != low, 0.0, low), -largest, largest)
            second = stored(second, STORAGE)
            if HALF:
                second = stored(second, 1)
            elif STORAGE == 0:
                second = tl.where(tl.abs(second) < smallest, 0.0, second)
            scale = project((high - second) * inverse, STORAGE, smallest, largest)
    if POISON:
        scale = tl.where(high != high, high, scale)
    return scale, second


@Kernel
def _dynamic_kernel(
    w: Any,
    codes: Any,
    scale: Any,
    second: Any,
    units: Any,
    size: Any,
    per_half: Any,
    inverse: Any,
    lo: Any,
    hi: Any,
    smallest: Any,
    largest: Any,
    KIND: tl.constexpr,
    STORAGE: tl.constexpr,
    HALF: tl.constexpr,
    POISON: tl.constexpr,
    HALVES: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
) -> None:
    """KIND 0 absmax, 1 integer zero point, 2 float minimum; HALVES 0 not packed, 1 of groups, 2 of one group."""
    n, j = tile(size, BN, BL)
    mask_n = n < units
    mask = mask_n[:, None] & (j < size)[None, :]
    unit = n
    if HALVES > 0:
        unit = n + n // per_half * per_half
    x = tl.load(w + places(unit, j, size), mask=mask, other=0.0).to(tl.float32)
    y = x
    if HALVES > 0:
        y = tl.load(w + places(unit + per_half, j, size), mask=mask, other=0.0).to(tl.float32)
    other = x
    if HALVES == 2:
        other = y
        unit = n
    s, f = _fields(x, other, mask, inverse, lo, hi, smallest, largest, KIND, STORAGE, HALF, POISON)
    tl.store(scale + unit, s, mask=mask_n)
    if KIND > 0:
        tl.store(second + unit, f, mask=mask_n)
    q = rounded(x, tl.math.div_rn(1.0, s)[:, None], f[:, None], f[:, None], lo, hi, KIND == 1, KIND == 2)
    if HALVES > 0:
        if HALVES == 1:
            s, f = _fields(y, y, mask, inverse, lo, hi, smallest, largest, KIND, STORAGE, HALF, POISON)
            tl.store(scale + unit + per_half, s, mask=mask_n)
            if KIND > 0:
                tl.store(second + unit + per_half, f, mask=mask_n)
        high = rounded(y, tl.math.div_rn(1.0, s)[:, None], f[:, None], f[:, None], lo, hi, KIND == 1, KIND == 2)
        q = nibbles(q, high)
    tl.store(codes + places(n, j, size), q.to(codes.dtype.element_ty), mask=mask)


def _tiling(units: int, size: int) -> tuple[int, int, int]:
    """(BN, BL, warps): tiles of whole units."""
    wide = 1 << max(0, size - 1).bit_length()
    high = min(max(1, TILE // wide), 1 << max(0, units - 1).bit_length())
    return high, wide, max(4, min(16, wide // 512))


def _launched(
    w: Tensor, groups: int, inverse: float, lo: int, hi: int, stored_as: tuple[Any, ...], kind: int, packed: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(codes, scale, second) by the kernel; None where groups are too long, or cut in the middle by packing."""
    storage, smallest, largest, half, poison = stored_as
    units, size, per_half, split = geometry(w.shape[0], w.shape[1], groups, packed)
    if size > _LONGEST or (split and groups > 1) or not w.numel():
        return None
    codes = empty_codes(w, lo, packed)
    scale = w.new_empty((w.shape[0], groups), dtype=torch.float32)
    second = torch.empty_like(scale) if kind else scale
    high, wide, warps = _tiling(units, size)
    _dynamic_kernel[(-(-units // high),)](
        *(w.contiguous(), codes, scale, second, units, size, per_half),
        *(inverse, float(lo), float(hi), smallest, largest),
        KIND=kind,
        STORAGE=storage_code(storage),
        HALF=half,
        POISON=poison,
        HALVES=0 if not packed else 1 + split,
        BN=high,
        BL=wide,
        num_warps=warps,
    )
    return codes, scale, second


def _absmax_triton(
    w: Tensor,
    groups: int,
    inv_reach: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    packed: bool,
    poison: bool,
) -> tuple[Tensor, Tensor]:
    found = _launched(w, groups, inv_reach, lo, hi, (storage, smallest, largest, False, poison), 0, packed)
    if found is not None:
        return found[:2]
    scale = absmax_fields(w, groups, inv_reach, storage, smallest, largest, poison)
    return affine_encode.triton(w, scale, None, None, lo, hi, packed), scale


def _minmax_triton(
    w: Tensor,
    groups: int,
    inv_steps: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    half: bool,
    float_minimum: bool,
    packed: bool,
    poison: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = 2 if float_minimum else 1
    found = _launched(w, groups, inv_steps, lo, hi, (storage, smallest, largest, half, poison), kind, packed)
    if found is not None:
        return found
    scale, second = minmax_fields(w, groups, inv_steps, lo, hi, storage, smallest, largest, half, float_minimum, poison)
    zero, minimum = (None, second) if float_minimum else (second, None)
    return affine_encode.triton(w, scale, zero, minimum, lo, hi, packed), scale, second


dynamic_absmax = Op("dynamic_absmax", _absmax, _absmax_fake, _absmax_triton)
dynamic_minmax = Op("dynamic_minmax", _minmax, _minmax_fake, _minmax_triton)


def _case(name: str, dtype: str, size: int, kind: int = 0, halves: int = 0, storage: int = 2) -> AotCase:
    high, wide, warps = _tiling(1 << 20, size)
    return AotCase(
        f"dynamic {name}",
        _dynamic_kernel,
        {
            "w": f"*{dtype}",
            "codes": "*u8" if halves else "*i8",
            **dict.fromkeys(("scale", "second"), "*fp32"),
            **dict.fromkeys(("units", "size", "per_half"), "i32"),
            **dict.fromkeys(("inverse", "lo", "hi", "smallest", "largest"), "fp32"),
        },
        {
            "KIND": kind,
            "STORAGE": storage,
            "HALF": kind == 2,
            "POISON": True,
            "HALVES": halves,
            "BN": high,
            "BL": wide,
        },
        num_warps=warps,
    )


AOT = (
    _case("absmax group 32 bf16", "bf16", 32),
    _case("absmax group 64 fp32", "fp32", 64, storage=1),
    _case("absmax group 32 bf16 packed", "bf16", 32, halves=1),
    _case("absmax group 128 fp32 packed", "fp32", 128, halves=1),
    _case("absmax row 4096 bf16", "bf16", 4096, storage=0),
    _case("absmax row 4096 bf16 packed", "bf16", 2048, halves=2),
    _case("minmax group 32 bf16", "bf16", 32, kind=1),
    _case("minmax group 128 bf16 packed with minima", "bf16", 128, kind=2, halves=1),
    _case("minmax row 4096 bf16", "bf16", 4096, kind=1),
)


# ---- what others call ------------------------------------------------------------------------------------------------


def absmax(
    w: Tensor,
    groups: int,
    inv_reach: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    signed: bool,
    packed: bool = False,
    *,
    poison: bool = False,
) -> tuple[Tensor, Tensor]:
    """w [R, K] -> (codes int8 / uint8 [R, K] or packed uint8 [R, K/2], scale fp32 [R, G]).

    inv_reach is 1 / reach as a Python float, `smallest`/`largest` bound the stored scale, signed says lo < 0.
    """
    assert signed == (lo < 0)
    how = storage, smallest, largest, packed, poison
    with no_grad():
        return dynamic_absmax(w, groups, inv_reach, lo, hi, *how)  # type: ignore[no-any-return]


def minmax(
    w: Tensor,
    groups: int,
    inv_steps: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    half: bool,
    float_minimum: bool,
    packed: bool = False,
    *,
    poison: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """w [R, K] -> (codes, scale fp32 [R, G], zero point or minimum fp32 [R, G]); codes and numbers as in `absmax`.

    inv_steps is 1 / (hi - lo); float_minimum chooses the minimum; half: the minimum is a number of fp16 too.
    """
    how = storage, smallest, largest, half, float_minimum, packed, poison
    with no_grad():
        return dynamic_minmax(w, groups, inv_steps, lo, hi, *how)  # type: ignore[no-any-return]
