"""Numbers that a code can stand for, and scales that are not stored as fp32: arithmetic for `blocks` and its formats.

    element     what u can be: a sorted table of up to 16 levels, or a small float with `mantissa` bits behind the
                point, smallest normal exponent `lowest` and largest number `top`
    kind        how s is stored: FP32 the number itself; E8M0 a byte b, s = 2^(b - 127), 255 is NaN;
                E4M3_TIMES a byte, s = e4m3(byte) * t with one fp32 t for the tensor; E4M3_OVER s = e4m3(byte) / t

Rounding to a small float adds and subtracts 1.5 * 2^(23 - mantissa) times the power of two of the number (2^lowest for
smaller ones): no bits are left behind the last place, half to even, denormals included. No conversion instruction is
used: they exist on few devices, and the interpreter's do not agree with PyTorch's.

    level of v = number of midpoints below v,   midpoint i = fp32((level[i - 1] + level[i]) * 0.5)
    a midpoint itself belongs to the lower level
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels.device import project
from qat.fake_quant_kernels.dispatch import Device, tl

FP32, E8M0, E4M3_TIMES, E4M3_OVER = range(4)


@dataclass(frozen=True)
class Element:
    """levels: entries of the table, 0 for a small float; sign: position of the code's sign bit."""

    levels: int
    mantissa: int = 0
    lowest: int = 0
    sign: int = 3
    top: float = 0.0

    def constants(self) -> dict[str, Any]:
        """The kernels' constexpr arguments."""
        return {
            "LEVELS": self.levels,
            "MANTISSA": self.mantissa,
            "LOWEST": self.lowest,
            "SIGN": self.sign,
            "TOP": self.top,
        }


E4M3 = Element(0, 3, -6, 7, 448.0)
E5M2 = Element(0, 2, -14, 7, 57344.0)
E2M1 = Element(0, 1, 0, 3, 6.0)


def apart(codes: Tensor) -> Tensor:
    """The same codes; for graphs in memory of their own (which is fused away), so that a decode in backward is not
    taken for that of the forward, whose result would then be saved instead of the codes."""
    if not torch.compiler.is_compiling():
        return codes
    wide = torch.int32 if codes.dtype == torch.uint8 else torch.float32
    return codes.new_empty(codes.shape, dtype=wide).copy_(codes)


def pack(codes: Tensor) -> Tensor:
    """uint8 codes below 16 [R, K], K even -> planar halves uint8 [R, K/2]. Raises QATError for an odd K."""
    half = codes.shape[1] // 2
    if codes.shape[1] % 2:
        raise QATError(f"packed codes need an even number of columns, not {codes.shape[1]}")
    return codes[:, :half] | (codes[:, half:] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: uint8 [R, K/2] -> uint8 [R, K]."""
    return torch.cat((packed & 15, packed >> 4), 1)


def grouped(w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """w [R, K] -> [R, G, K/G], and the scales [R, G] or [1, 1] with a dim more, so that they broadcast."""
    groups = scale.shape[1]
    return w.reshape(w.shape[0], groups, w.shape[1] // groups), scale.unsqueeze(-1)


def group_amax(w: Tensor, groups: int) -> Tensor:
    """w [R, K] -> largest magnitude of each group, fp32 [R, G]; NaN if there is one; of nothing: 0."""
    if w.numel() == 0:
        return torch.zeros(w.shape[0], groups, device=w.device)
    return w.reshape(w.shape[0], groups, w.shape[1] // groups).abs().amax(-1).float()


def scaled(w: Tensor, scale: Tensor) -> Tensor:
    """v of the module's docstring, fp32 [R, G, K/G], newly allocated."""
    blocks, scale = grouped(w, scale)
    return blocks * (1.0 / scale)


def clipped_vjp(
    grad: Tensor, v: Tensor, u: Tensor, low: float, high: float, shape: tuple[int, ...], need_w: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the module's docstring from v and u [R, G, K/G], both overwritten; `shape` is that of ds.

    dw in the dtype of grad, ds fp32; one that is not needed is empty. A NaN is not inside and counts as 0 in ds.
    """
    inside = (v >= low) & (v <= high)
    blocks = grad.reshape(v.shape)
    dw, ds = grad.new_empty(0), v.new_empty(0)
    if need_w:
        dw = torch.where(inside, blocks, 0.0).to(grad.dtype).reshape(grad.shape)
    if need_scale:
        u.masked_fill_(v != v, 0.0)
        u -= v.masked_fill_(~inside, 0.0)
        ds = u.mul_(blocks).sum(-1)
        ds = ds if ds.shape == shape else ds.sum_to_size(shape)
    return dw, ds


def e2m1_round_(v: Tensor) -> Tensor:
    """fp32 numbers -> the nearest ones of e2m1, saturating, in place; signs of 0 and NaN stay."""
    size = v.abs().clamp_(max=6.0)
    big = size.view(torch.int32) & 0x7F800000
    big.clamp_(min=127 << 23).add_((22 << 23) | 0x400000)
    numbers = big.view(torch.float32)
    return torch.copysign(size.add_(numbers).sub_(numbers), v, out=v)


def e2m1_codes(u: Tensor) -> Tensor:
    """Numbers of e2m1 -> uint8 codes, the sign in bit 3; NaN has the code of 0."""
    # twice the magnitudes 0, 1/2, 1, 3/2, 2, 3, 4, 6, then 4, 6, 8, 12 become 4, 5, 6, 7
    steps = (u.abs() * 2.0).nan_to_num_(0.0).to(torch.uint8)
    codes = steps.clamp(max=4)
    for step in (4, 6, 8):
        codes += steps > step
    codes |= ((u.view(torch.int32) >> 28) & 8).to(torch.uint8)
    return codes.mul_(u == u)


def e2m1_numbers(codes: Tensor) -> Tensor:
    """uint8 codes -> fp32."""
    size = codes & 7
    steps = size + (size > 4) + (size > 5) + (size > 6) * 3
    return torch.where(codes > 7, -0.5, 0.5) * steps


@Device
def float_round(v: Any, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr) -> Any:
    """fp32 -> the nearest number of the small float, half to even, saturating; signs of 0 and NaN stay."""
    sign = v.to(tl.int32, bitcast=True) & -2147483648
    size = tl.abs(v)
    size = tl.where(size > TOP, TOP, size)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) & 0x7F800000, (127 + LOWEST) << 23)
    big = (exponent + (((23 - MANTISSA) << 23) | 0x400000)).to(tl.float32, bitcast=True)
    size = (size + big) - big
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@Device
def float_code(u: Any, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, SIGN: tl.constexpr) -> Any:
    """A number of the small float -> its code as int32; NaN: all ones behind its sign (8 bits) or 0 (4 bits)."""
    bits = u.to(tl.int32, bitcast=True)
    size = tl.abs(u)
    normal = ((bits & 0x7FFFFFFF) >> (23 - MANTISSA)) - ((126 + LOWEST) << MANTISSA)
    small = (tl.where(size < 2.0**LOWEST, size, 0.0) * 2.0 ** (MANTISSA - LOWEST)).to(tl.int32)
    code = tl.where(size < 2.0**LOWEST, small, normal) | ((bits >> (31 - SIGN)) & (1 << SIGN))
    return tl.where(u != u, (code & 0x80) | 0x7F if SIGN == 7 else 0, code)


@Device
def float_value(code: Any, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, SIGN: tl.constexpr) -> Any:
    """int32 codes -> fp32."""
    if MANTISSA == 2:
        # e5m2 is the upper half of fp16
        u = (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        size = code & ((1 << SIGN) - 1)
        normal = ((size << (23 - MANTISSA)) + ((126 + LOWEST) << 23)).to(tl.float32, bitcast=True)
        u = tl.where(size < (1 << MANTISSA), size.to(tl.float32) * 2.0 ** (LOWEST - MANTISSA), normal)
        if SIGN == 7:
            u = tl.where(size == 0x7F, float("nan"), u)
        u = (u.to(tl.int32, bitcast=True) | ((code << (31 - SIGN)) & -2147483648)).to(tl.float32, bitcast=True)
    return u


@Device
def midpoint(levels: Any, i: tl.constexpr, LEVELS: tl.constexpr) -> Any:
    """Between level i - 1 and level i; infinity behind the last."""
    return (tl.load(levels + (i - 1)) + tl.load(levels + i)) * 0.5 if i < LEVELS else float("inf")


@Device
def nearest(v: Any, levels: Any, LEVELS: tl.constexpr) -> Any:
    """The number of midpoints below v, as int32: a midpoint belongs to the lower level. NaN is above all."""
    if LEVELS <= 4:
        code = tl.zeros(v.shape, tl.int32)
        for i in tl.static_range(1, LEVELS):
            code += tl.where(v <= midpoint(levels, i, LEVELS), 0, 1)
    else:
        # four halvings; the midpoints are in registers
        m1, m2, m3 = midpoint(levels, 1, LEVELS), midpoint(levels, 2, LEVELS), midpoint(levels, 3, LEVELS)
        m4, m5, m6 = midpoint(levels, 4, LEVELS), midpoint(levels, 5, LEVELS), midpoint(levels, 6, LEVELS)
        m7, m8, m9 = midpoint(levels, 7, LEVELS), midpoint(levels, 8, LEVELS), midpoint(levels, 9, LEVELS)
        m10, m11, m12 = midpoint(levels, 10, LEVELS), midpoint(levels, 11, LEVELS), midpoint(levels, 12, LEVELS)
        m13, m14, m15 = midpoint(levels, 13, LEVELS), midpoint(levels, 14, LEVELS), midpoint(levels, 15, LEVELS)
        a = v <= m8
        b = v <= tl.where(a, m4, m12)
        c = v <= tl.where(b, tl.where(a, m2, m10), tl.where(a, m6, m14))
        low = tl.where(b, tl.where(a, m1, m9), tl.where(a, m5, m13))
        high = tl.where(b, tl.where(a, m3, m11), tl.where(a, m7, m15))
        d = v <= tl.where(c, low, high)
        code = tl.where(a, 0, 8) + tl.where(b, 0, 4) + tl.where(c, 0, 2) + tl.where(d, 0, 1)
        # NaN walks past the end of a shorter table
        code = tl.minimum(code, LEVELS - 1)
    return code


@Device
def level_of(code: Any, levels: Any, LEVELS: tl.constexpr) -> Any:
    """level[code] of a 2-D tile: by selection in short tables, else from a copy that the program shares."""
    if LEVELS <= 4:
        u = tl.zeros(code.shape, tl.float32) + tl.load(levels)
        for i in tl.static_range(1, LEVELS):
            u = tl.where(code >= i, tl.load(levels + i), u)
    else:
        at = tl.arange(0, 16)
        table = tl.load(levels + at, at < LEVELS, other=0.0)
        flat = tl.gather(table, tl.reshape(code, [code.shape[0] * code.shape[1]]), 0)
        u = tl.reshape(flat, [code.shape[0], code.shape[1]])
    return u


@Device
def element_code(
    v: Any,
    levels: Any,
    LEVELS: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    SIGN: tl.constexpr,
    TOP: tl.constexpr,
) -> Any:
    if LEVELS > 0:
        code = nearest(v, levels, LEVELS)
    else:
        code = float_code(float_round(v, MANTISSA, LOWEST, TOP), MANTISSA, LOWEST, SIGN)
    return code


@Device
def element_number(
    v: Any, levels: Any, LEVELS: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr
) -> Any:
    """The nearest number of the element; NaN stays NaN."""
    if LEVELS > 0:
        u = level_of(nearest(v, levels, LEVELS), levels, LEVELS)
        u = tl.where(v != v, v, u)
    else:
        u = float_round(v, MANTISSA, LOWEST, TOP)
    return u


# ------------------------------------------------------------------------------------------------ scales


@Device
def scale_value(stored: Any, tensor_scale: Any, KIND: tl.constexpr) -> Any:
    """What is stored -> s in fp32."""
    if KIND == 0:
        s = stored
    elif KIND == 1:
        byte = stored.to(tl.int32)
        bits = tl.where(byte == 0, 0x400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
        s = bits.to(tl.float32, bitcast=True)
    elif KIND == 2:
        s = float_value(stored.to(tl.int32), 3, -6, 7) * tl.load(tensor_scale)
    else:
        s = tl.math.div_rn(float_value(stored.to(tl.int32), 3, -6, 7), tl.load(tensor_scale))
    return s


@Device
def stored_scale(
    amax_bits: Any,
    tensor_scale: Any,
    inv_peak: Any,
    smallest: Any,
    largest: Any,
    KIND: tl.constexpr,
    STORAGE: tl.constexpr,
    TOP: tl.constexpr,
) -> Any:
    """Bits of blocks' largest magnitudes -> what is stored (int32 for bytes)."""
    if KIND == 1:
        # floor(log2) from the exponent's bits; 0 and denormals have 0 there
        exponent = amax_bits >> 23
        lead = 8 if TOP == 448.0 else (15 if TOP == 57344.0 else 2)
        stored = tl.where(exponent == 255, 255, tl.maximum(exponent - lead, 0))
    else:
        local = amax_bits.to(tl.float32, bitcast=True) * inv_peak
        if KIND == 0:
            stored = project(local, STORAGE, smallest, largest)
        else:
            t = tl.load(tensor_scale)
            local = local * tl.math.div_rn(1.0, t) if KIND == 2 else local * t
            # never 0: a block is not lost, and 1 / s stays finite
            local = tl.where(local != local, 448.0, tl.minimum(tl.maximum(local, 0.001953125), 448.0))
            stored = float_code(float_round(local, 3, -6, 448.0), 3, -6, 7)
    return stored


@Device
def magnitude_bits(x: Any) -> Any:
    """Bits of |x|: in the order of the magnitudes, and NaN above all."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
