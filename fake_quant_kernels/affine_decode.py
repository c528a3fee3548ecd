"""Integer codes -> rows: the decode of `affine`, in fp32 with a separate multiply and add, and one cast at the end.

    w_hat = (code - z) * s          integer zero point z (0 if none)
    w_hat = code * s + m            float minimum m

Codes [R, K], integers or integral floats; packed planar halves, uint8 [R, K/2] (`pack`). s, z, m fp32 [R, G] or [1, 1],
K % G == 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.dispatch import AotCase, Device, Kernel, Op, tl
from qat.fake_quant_kernels.pack import unpack_halves
from qat.fake_quant_kernels.rows import broadcast, chunks, field_of, geometry, grouped, part, places, tile, tiling


def _decode(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    dtype: torch.dtype,
    packed: bool,
    signed: bool,
    again: bool = False,
) -> Tensor:
    """Codes [R, K] (packed: uint8 [R, K/2]) -> weights [R, K] in `dtype`.

    again: changes nothing. A compiler takes equal calls for one, and would save the numbers of the forward's decode for
    the backward instead of the codes; this tells the two apart.
    """
    if torch.compiler.is_compiling():
        value = grouped(_traced(codes, packed, signed), scale.shape[1])
        value = value if zero is None else value - broadcast(zero)
        value = value * broadcast(scale)
        value = value if minimum is None else value + broadcast(minimum)
        return value.flatten(1).to(dtype)
    out = _fake(codes, scale, zero, minimum, dtype, packed, signed, again)
    sixteenths = packed and out.device.type == "cpu"
    if sixteenths:
        # 16 * code is what a nibble is without its shift: (16 code - 16 z) * (s / 16), each exact, is the same product
        scale, zero = scale * 0.0625, None if zero is None else zero * 16.0
    for rows, (buffer,) in chunks(out, 1):
        here = part(out, rows)
        if sixteenths:
            integers = _sixteenfold(part(codes, rows), signed)
        else:
            integers = unpack_halves(part(codes, rows), signed) if packed else part(codes, rows)
        if dtype == torch.float32:
            wide = here
        else:
            wide = torch.empty(here.shape, dtype=torch.float32, device=out.device) if buffer is None else buffer
        (wide if wide.shape == integers.shape else wide.view(integers.shape)).copy_(integers)
        value = grouped(wide, scale.shape[1])
        if zero is not None:
            value -= broadcast(part(zero, rows))
        value *= broadcast(part(scale, rows))
        if minimum is not None:
            value += broadcast(part(minimum, rows))
        if wide is not here:
            here.copy_(wide)
    return out


def _traced(codes: Tensor, packed: bool, signed: bool) -> Tensor:
    """Codes as fp32 [R, K], for graphs. They begin as a copy into memory of its own, which is fused away: it keeps the
    decode of a backward apart from its forward's. As one expression of both its result would be saved between them,
    larger than the codes."""
    if not packed:
        return codes.new_empty(codes.shape, dtype=torch.float32).copy_(codes)
    both = codes.new_empty(codes.shape, dtype=torch.int32).copy_(codes).unsqueeze(1)
    place = torch.arange(0, 8, 4, dtype=torch.int32, device=codes.device).view(1, 2, 1)
    # the upper end of a word brings the sign
    halves = (both << (28 - place)) >> 28 if signed else (both >> place) & 15
    return halves.flatten(1).to(torch.float32)


def _sixteenfold(packed: Tensor, signed: bool) -> Tensor:
    """Packed codes [R, K/2] -> 16 * code of the low and of the high halves, [R, 2, K/2]; two passes over bytes."""
    both = packed.view(torch.int8) if signed else packed
    halves = torch.empty((2, *both.shape), dtype=both.dtype)
    torch.bitwise_left_shift(both, 4, out=halves[0])
    torch.bitwise_and(both, -16 if signed else 240, out=halves[1])
    return halves.transpose(0, 1)


def _fake(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    dtype: torch.dtype,
    packed: bool,
    signed: bool,
    again: bool = False,
) -> Tensor:
    return codes.new_empty((codes.shape[0], codes.shape[1] * (2 if packed else 1)), dtype=dtype)


@Device
def _store(
    out: Any,
    q: Any,
    scale: Any,
    zero: Any,
    minimum: Any,
    unit: Any,
    j: Any,
    mask_n: Any,
    mask: Any,
    size: Any,
    SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    ZERO: tl.constexpr,
    MINIMUM: tl.constexpr,
) -> Any:
    x = q.to(tl.float32)
    if ZERO:
        x = x - field_of(zero, unit, mask_n, SHARED, SPLIT)
    x = x * field_of(scale, unit, mask_n, SHARED, SPLIT)
    if MINIMUM:
        x = x + field_of(minimum, unit, mask_n, SHARED, SPLIT)
    tl.store(out + places(unit, j, size), x.to(out.dtype.element_ty), mask=mask)


@Kernel
def _decode_kernel(
    codes: Any,
    scale: Any,
    zero: Any,
    minimum: Any,
    out: Any,
    units: Any,
    size: Any,
    per_half: Any,
    PACKED: tl.constexpr,
    SIGNED: tl.constexpr,
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
    q = tl.load(codes + places(n, j, size), mask=mask, other=0)
    if PACKED:
        q = q.to(tl.int32)
        low, high = q & 15, q >> 4
        if SIGNED:
            low, high = (low ^ 8) - 8, (high ^ 8) - 8
        unit = n + n // per_half * per_half
        _store(out, low, scale, zero, minimum, unit, j, mask_n, mask, size, SHARED, SPLIT, ZERO, MINIMUM)
        unit += per_half
        _store(out, high, scale, zero, minimum, unit, j, mask_n, mask, size, SHARED, SPLIT, ZERO, MINIMUM)
    else:
        _store(out, q, scale, zero, minimum, n, j, mask_n, mask, size, SHARED, SPLIT, ZERO, MINIMUM)


def _triton(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    dtype: torch.dtype,
    packed: bool,
    signed: bool,
    again: bool = False,
) -> Tensor:
    out = _fake(codes, scale, zero, minimum, dtype, packed, signed, again)
    if out.numel():
        shared = scale.numel() == 1
        units, size, per_half, split = geometry(out.shape[0], out.shape[1], 1 if shared else scale.shape[1], packed)
        programs, high, wide = tiling(units, size)
        # a pointer that is not read stands for a field that is not there
        s, z, m = (scale if field is None else field.contiguous() for field in (scale, zero, minimum))
        _decode_kernel[(programs,)](
            *(codes.contiguous(), s, z, m, out, units, size, per_half),
            PACKED=packed,
            SIGNED=signed,
            SHARED=shared,
            SPLIT=split,
            ZERO=zero is not None,
            MINIMUM=minimum is not None,
            BN=high,
            BL=wide,
        )
    return out


affine_decode = Op("affine_decode", _decode, _fake, _triton)


def _case(name: str, code: str, out: str, size: int, zero: bool = False, minimum: bool = False) -> AotCase:
    _, high, wide = tiling(1 << 20, size)
    return AotCase(
        f"decode {name}",
        _decode_kernel,
        {
            "codes": f"*{code}",
            **dict.fromkeys(("scale", "zero", "minimum"), "*fp32"),
            "out": f"*{out}",
            **dict.fromkeys(("units", "size", "per_half"), "i32"),
        },
        {
            "PACKED": code == "u8",
            "SIGNED": True,
            "SHARED": False,
            "SPLIT": 0,
            "ZERO": zero,
            "MINIMUM": minimum,
            "BN": high,
            "BL": wide,
        },
    )


AOT = (
    _case("group 32 to bf16", "i8", "bf16", 32),
    _case("group 128 to fp32 with zero points", "i8", "fp32", 128, zero=True),
    _case("packed group 32 to bf16", "u8", "bf16", 32),
    _case("packed group 64 to bf16 with minima", "u8", "bf16", 64, minimum=True),
    _case("row 4096 to bf16", "i8", "bf16", 4096),
    _case("packed row 4096 to bf16", "u8", "bf16", 4096),
)
