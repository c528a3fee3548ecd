"""Codebooks: numbers of a sorted table times a scale.

    v = w * (1 / s)                         one IEEE fp32 reciprocal per scale
    code = number of midpoints below v      midpoint i = fp32((level[i - 1] + level[i]) * 0.5)
    w_hat = level[code] * s                 in fp32, then one cast

A midpoint itself belongs to the lower level (the rule of bitsandbytes' 4-bit kernels). NaN has the highest code, and
fake quantization leaves it NaN. Dynamic scales are those of `dynamic`:

    s = project(amax |w| * inv_peak)        inv_peak: 1 / largest magnitude of the table that may be used

Backward, with `inside` = (low <= v <= high), bounds of the caller's choice:

    dw = g * inside                             or g itself with dynamic scales: then there is nothing to compute
    ds = sum_group g * (level[code] - v * inside)

Tables, sorted; a file that orders its codes otherwise permutes them.

    NF4         quantiles of a normal distribution, Dettmers et al. 2023, appendix E; s = amax
    FP4         e2m1, OCP MX v1.0 section 5.3.3; s = amax / 6
    BNB_FP4     bitsandbytes' own 4-bit float, of which the largest is 1; s = amax
    IQ4_NL      ggml's table of int8 numbers, without 0; w_hat = d * level
    TERNARY     -1, 0, 1
    SEQ2        ParetoQ (Liu et al. 2025, equation 6) with 2 bits: -3/4, -1/4, 1/4, 3/4 of s, clipped at |v| > 0.99
    SEQ_TERNARY the same with 1.58 bits: -2/3, 0, 2/3

Shapes: w [R, K] in any float dtype, read as fp32; scale fp32 [R, G] or [1, 1], K % G == 0; levels fp32 [2..16],
ascending. Codes are uint8 [R, K], or uint8 [R, K/2] if packed (planar halves, K even).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.fake_quant_kernels.block_launch import dequantize, differentiate, quantize
from qat.fake_quant_kernels.blocks import cases
from qat.fake_quant_kernels.dispatch import Op
from qat.fake_quant_kernels.elements import Element, apart, clipped_vjp, group_amax, pack, scaled, unpack
from qat.fake_quant_kernels.storage import project

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BNB_FP4 = (
    -1.0, -0.66666667, -0.5, -0.33333333, -0.25, -0.16666667, -0.005208333333,
    0.0, 0.005208333333, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0,
)  # fmt: skip
IQ4_NL = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
    1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
TERNARY = (-1.0, 0.0, 1.0)
SEQ2 = (-0.75, -0.25, 0.25, 0.75)
SEQ_TERNARY = (-2.0 / 3.0, 0.0, 2.0 / 3.0)


def nearest(v: Tensor, levels: Tensor) -> Tensor:
    """fp32 v of any shape -> codes, uint8 or int32: the number of midpoints below v (NaN: the highest)."""
    midpoints = (levels[1:] + levels[:-1]) * 0.5
    if levels.shape[0] <= 4:
        return torch.stack([~(v <= m) for m in midpoints.unbind()]).sum(0, dtype=torch.uint8)
    return torch.bucketize(v, midpoints, out_int32=True)


def _looked_up(codes: Tensor, levels: Tensor) -> Tensor:
    return levels.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


def _encode(w: Tensor, scale: Tensor, levels: Tensor, packed: bool) -> Tensor:
    """w [R, K] with given scales -> codes uint8 [R, K], or [R, K/2] if packed."""
    codes = nearest(scaled(w, scale), levels).to(torch.uint8).reshape(w.shape)
    return pack(codes) if packed else codes


def _decode(
    codes: Tensor, scale: Tensor, levels: Tensor, dtype: torch.dtype, packed: bool, again: bool = False
) -> Tensor:
    """Codes -> numbers [R, K] of `dtype`; again: as in `affine_decode`."""
    codes = apart(codes)
    if packed:
        codes = unpack(codes)
    blocks = _looked_up(codes, levels).reshape(codes.shape[0], scale.shape[1], -1 if codes.numel() else 0)
    return blocks.mul_(scale.unsqueeze(-1)).reshape(codes.shape).to(dtype)


def _fake(w: Tensor, scale: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """w [R, K] with given scales -> decode(encode(w)) [R, K] of `dtype`, except that a NaN stays NaN."""
    v = scaled(w, scale)
    u = torch.where(v == v, _looked_up(nearest(v, levels), levels), v)
    return u.mul_(scale.unsqueeze(-1)).reshape(w.shape).to(dtype)


def _found(w: Tensor, groups: int, inv_peak: float, storage: torch.dtype, smallest: float, largest: float) -> Tensor:
    return project(group_amax(w, groups) * inv_peak, storage, smallest, largest)


def _encode_dynamic(
    w: Tensor,
    levels: Tensor,
    groups: int,
    inv_peak: float,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """w [R, K] -> (codes as `encode` gives, the scales fp32 [R, groups] that were found)."""
    scale = _found(w, groups, inv_peak, storage, smallest, largest)
    return _encode(w, scale, levels, packed), scale


def _fake_dynamic(
    w: Tensor,
    levels: Tensor,
    groups: int,
    inv_peak: float,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """w [R, K] -> (numbers [R, K] of `dtype`, the scales fp32 [R, groups] that were found)."""
    scale = _found(w, groups, inv_peak, storage, smallest, largest)
    return _fake(w, scale, levels, dtype), scale


def _vjp(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    levels: Tensor,
    low: float,
    high: float,
    need_w: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    """grad [R, K] -> (dw in its dtype, ds fp32 in the shape of the scales); one that is not needed is empty."""
    v = scaled(w, scale)
    u = _looked_up(nearest(v, levels), levels) if need_scale else v
    return clipped_vjp(grad, v, u, low, high, tuple(scale.shape), need_w, need_scale)


# ---------------------------------------------------------------------------------------------- launchers


def _packed_like(w: Tensor, packed: bool) -> Tensor:
    return w.new_empty((w.shape[0], w.shape[1] // 2 if packed else w.shape[1]), dtype=torch.uint8)


def _scales_like(w: Tensor, groups: int) -> Tensor:
    return w.new_empty((w.shape[0], groups), dtype=torch.float32)


def _element(levels: Tensor) -> Element:
    return Element(levels.shape[0])


def _encode_triton(w: Tensor, scale: Tensor, levels: Tensor, packed: bool) -> Tensor:
    if not w.numel():
        return _encode(w, scale, levels, packed)
    return quantize(w, _element(levels), scale, 0, True, torch.uint8, packed, levels=levels)[0]


def _decode_triton(
    codes: Tensor, scale: Tensor, levels: Tensor, dtype: torch.dtype, packed: bool, again: bool = False
) -> Tensor:
    if not codes.numel():
        return _decode(codes, scale, levels, dtype, packed)
    return dequantize(codes, _element(levels), scale, dtype, packed, levels=levels)


def _fake_triton(w: Tensor, scale: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    if not w.numel():
        return _fake(w, scale, levels, dtype)
    return quantize(w, _element(levels), scale, 0, False, dtype, levels=levels)[0]


def _encode_dynamic_triton(
    w: Tensor,
    levels: Tensor,
    groups: int,
    inv_peak: float,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    if not w.numel():
        return _encode_dynamic(w, levels, groups, inv_peak, storage, smallest, largest, packed)
    found = {"inv_peak": inv_peak, "storage": storage, "smallest": smallest, "largest": largest}
    return quantize(w, _element(levels), None, groups, True, torch.uint8, packed, levels=levels, **found)  # type: ignore[arg-type]


def _fake_dynamic_triton(
    w: Tensor,
    levels: Tensor,
    groups: int,
    inv_peak: float,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if not w.numel():
        return _fake_dynamic(w, levels, groups, inv_peak, storage, smallest, largest, dtype)
    found = {"inv_peak": inv_peak, "storage": storage, "smallest": smallest, "largest": largest}
    return quantize(w, _element(levels), None, groups, False, dtype, levels=levels, **found)  # type: ignore[arg-type]


def _vjp_triton(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    levels: Tensor,
    low: float,
    high: float,
    need_w: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    if not w.numel() or not (need_w or need_scale):
        return _vjp(grad, w, scale, levels, low, high, need_w, need_scale)
    return differentiate(grad, w, _element(levels), scale, low, high, need_w, need_scale, levels=levels)


encode = Op("codebook_encode", _encode, lambda w, s, levels, packed: _packed_like(w, packed), _encode_triton)
decode = Op(
    "codebook_decode",
    _decode,
    lambda codes, s, levels, dtype, packed, again=False: codes.new_empty(
        (codes.shape[0], codes.shape[1] * (1 + packed)), dtype=dtype
    ),
    _decode_triton,
)
fake = Op("codebook_fake", _fake, lambda w, s, levels, dtype: w.new_empty(w.shape, dtype=dtype), _fake_triton)
encode_dynamic = Op(
    "codebook_encode_dynamic",
    _encode_dynamic,
    lambda w, levels, groups, *rest: (_packed_like(w, rest[-1]), _scales_like(w, groups)),
    _encode_dynamic_triton,
)
fake_dynamic = Op(
    "codebook_fake_dynamic",
    _fake_dynamic,
    lambda w, levels, groups, *rest: (w.new_empty(w.shape, dtype=rest[-1]), _scales_like(w, groups)),
    _fake_dynamic_triton,
)
vjp = Op(
    "codebook_vjp",
    _vjp,
    lambda grad, w, s, levels, low, high, need_w, need_scale: (
        grad.new_empty(grad.shape if need_w else (0,)),
        s.new_empty(s.shape if need_scale else (0,)),
    ),
    _vjp_triton,
)

AOT = cases("codebook16", Element(16), packed=True) + cases("codebook3", Element(3))
