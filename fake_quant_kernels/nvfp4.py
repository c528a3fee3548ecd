"""NVFP4: e2m1 numbers in blocks of 16, a scale in e4m3 for each, and one fp32 scale for the tensor.

Two conventions for the tensor's scale T, which are not the same in the last bit:

    over = False    s = f * T,  T = amax(tensor) / (6 * 448)        TensorRT-LLM and Model-Optimizer (weight_scale_2)
    over = True     s = f / T,  T = 6 * 448 / amax(tensor)          compressed-tensors and vLLM (weight_global_scale)

    f = e4m3(clamp(amax(block) * (1 / 6) * (1 / T  or  T), 2^-9, 448))      half to even; never 0
    code = e2m1(w * (1 / s))                half to even, saturating at 6
    w_hat = code * s                        in fp32, then one cast

The tensor's scale is an argument: it takes a pass of its own (`float8.amax`, then `tensor_scale`), and a frozen one
takes none. The consumers multiply the number by the finished s, so w_hat is what they decode, bit for bit.

Backward: dw = g * (|v| <= 6), or g itself; ds = sum_block g * (code - v * (|v| <= 6)) is the gradient of s as a whole:
a learned block scale passes it straight through the rounding to e4m3.

Shapes: w [R, K] in any float dtype, read as fp32; scales float8_e4m3fn [R, G], K % G == 0, G = K / 16 in the format;
T fp32 of one element. Codes uint8 [R, K] with the sign in bit 3, or uint8 [R, K/2] if packed (planar halves).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.fake_quant_kernels.block_launch import dequantize, differentiate, quantize
from qat.fake_quant_kernels.blocks import cases
from qat.fake_quant_kernels.dispatch import Op
from qat.fake_quant_kernels.elements import (
    E2M1,
    E4M3_OVER,
    E4M3_TIMES,
    clipped_vjp,
    e2m1_codes,
    e2m1_numbers,
    e2m1_round_,
    group_amax,
    pack,
    scaled,
    unpack,
)

F8 = torch.float8_e4m3fn


def tensor_scale(amax: Tensor, over: bool) -> Tensor:
    """The tensor's largest magnitude (any shape) -> T, finite and positive: of 0 or NaN too."""
    if over:
        return (torch.reciprocal(amax) * 2688.0).nan_to_num(nan=2.0**-107, posinf=2.0**110).clamp(2.0**-107, 2.0**110)
    return (amax * (1.0 / 2688.0)).nan_to_num(nan=2.0**107, posinf=2.0**107).clamp(2.0**-110, 2.0**107)


def scales_of(amax: Tensor, tensor: Tensor, over: bool) -> Tensor:
    """Blocks' largest magnitudes fp32 [R, G] -> scales in e4m3."""
    local = (amax * (1.0 / 6.0)) * (tensor if over else 1.0 / tensor).reshape(1, 1)
    return local.nan_to_num_(nan=448.0, posinf=448.0).clamp_(2.0**-9, 448.0).to(F8)


def values_of(scales: Tensor, tensor: Tensor, over: bool) -> Tensor:
    """Scales as stored -> s, fp32 [R, G]."""
    tensor = tensor.reshape(1, 1)
    return scales.float() / tensor if over else scales.float() * tensor


def _encode(w: Tensor, scales: Tensor, tensor: Tensor, over: bool, packed: bool) -> Tensor:
    """w [R, K] with given scales -> codes [R, K], or [R, K/2] if packed."""
    codes = e2m1_codes(e2m1_round_(scaled(w, values_of(scales, tensor, over)))).reshape(w.shape)
    return pack(codes) if packed else codes


def _decode(codes: Tensor, scales: Tensor, tensor: Tensor, over: bool, dtype: torch.dtype, packed: bool) -> Tensor:
    """Codes -> numbers [R, K] of `dtype`."""
    if packed:
        codes = unpack(codes)
    blocks = e2m1_numbers(codes).reshape(codes.shape[0], scales.shape[1], codes.shape[1] // scales.shape[1])
    return blocks.mul_(values_of(scales, tensor, over).unsqueeze(-1)).reshape(codes.shape).to(dtype)


def _fake(w: Tensor, scales: Tensor, tensor: Tensor, over: bool, dtype: torch.dtype) -> Tensor:
    """w [R, K] with given scales -> decode(encode(w)) [R, K] of `dtype`, except that a NaN stays NaN."""
    s = values_of(scales, tensor, over)
    return e2m1_round_(scaled(w, s)).mul_(s.unsqueeze(-1)).reshape(w.shape).to(dtype)


def _encode_dynamic(w: Tensor, tensor: Tensor, groups: int, over: bool, packed: bool) -> tuple[Tensor, Tensor]:
    """w [R, K] -> (codes as `encode` gives, scales float8_e4m3fn [R, groups])."""
    scales = scales_of(group_amax(w, groups), tensor, over)
    return _encode(w, scales, tensor, over, packed), scales


def _fake_dynamic(w: Tensor, tensor: Tensor, groups: int, over: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w [R, K] -> (numbers [R, K] of `dtype`, scales float8_e4m3fn [R, groups])."""
    scales = scales_of(group_amax(w, groups), tensor, over)
    return _fake(w, scales, tensor, over, dtype), scales


def _vjp(
    grad: Tensor, w: Tensor, scales: Tensor, tensor: Tensor, over: bool, need_w: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    """grad [R, K] -> (dw in its dtype, ds fp32 [R, G]); one that is not needed is empty."""
    v = scaled(w, values_of(scales, tensor, over))
    u = e2m1_round_(v.clone()) if need_scale else v
    return clipped_vjp(grad, v, u, -6.0, 6.0, tuple(scales.shape), need_w, need_scale)


# ---------------------------------------------------------------------------------------------- launchers


def _kind(over: bool) -> int:
    return E4M3_OVER if over else E4M3_TIMES


def _encode_triton(w: Tensor, scales: Tensor, tensor: Tensor, over: bool, packed: bool) -> Tensor:
    if not w.numel():
        return _encode(w, scales, tensor, over, packed)
    stored = scales.contiguous().view(torch.uint8)
    return quantize(w, E2M1, stored, 0, True, torch.uint8, packed, _kind(over), tensor_scale=tensor)[0]


def _decode_triton(
    codes: Tensor, scales: Tensor, tensor: Tensor, over: bool, dtype: torch.dtype, packed: bool
) -> Tensor:
    if not codes.numel():
        return _decode(codes, scales, tensor, over, dtype, packed)
    stored = scales.contiguous().view(torch.uint8)
    return dequantize(codes, E2M1, stored, dtype, packed, _kind(over), tensor_scale=tensor)


def _fake_triton(w: Tensor, scales: Tensor, tensor: Tensor, over: bool, dtype: torch.dtype) -> Tensor:
    if not w.numel():
        return _fake(w, scales, tensor, over, dtype)
    stored = scales.contiguous().view(torch.uint8)
    return quantize(w, E2M1, stored, 0, False, dtype, kind=_kind(over), tensor_scale=tensor)[0]


def _encode_dynamic_triton(w: Tensor, tensor: Tensor, groups: int, over: bool, packed: bool) -> tuple[Tensor, Tensor]:
    if not w.numel():
        return _encode_dynamic(w, tensor, groups, over, packed)
    codes, stored = quantize(
        w, E2M1, None, groups, True, torch.uint8, packed, _kind(over), tensor_scale=tensor, inv_peak=1.0 / 6.0
    )
    return codes, stored.view(F8)


def _fake_dynamic_triton(
    w: Tensor, tensor: Tensor, groups: int, over: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if not w.numel():
        return _fake_dynamic(w, tensor, groups, over, dtype)
    numbers, stored = quantize(
        w, E2M1, None, groups, False, dtype, kind=_kind(over), tensor_scale=tensor, inv_peak=1.0 / 6.0
    )
    return numbers, stored.view(F8)


def _vjp_triton(
    grad: Tensor, w: Tensor, scales: Tensor, tensor: Tensor, over: bool, need_w: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    if not w.numel() or not (need_w or need_scale):
        return _vjp(grad, w, scales, tensor, over, need_w, need_scale)
    stored = scales.contiguous().view(torch.uint8)
    return differentiate(grad, w, E2M1, stored, -6.0, 6.0, need_w, need_scale, _kind(over), tensor_scale=tensor)


def _codes_like(w: Tensor, packed: bool) -> Tensor:
    return w.new_empty((w.shape[0], w.shape[1] // (1 + packed)), dtype=torch.uint8)


def _scales_like(w: Tensor, groups: int) -> Tensor:
    return w.new_empty((w.shape[0], groups), dtype=F8)


encode = Op("nvfp4_encode", _encode, lambda w, s, t, over, packed: _codes_like(w, packed), _encode_triton)
decode = Op(
    "nvfp4_decode",
    _decode,
    lambda c, s, t, over, dtype, packed: c.new_empty((c.shape[0], c.shape[1] * (1 + packed)), dtype=dtype),
    _decode_triton,
)
fake = Op("nvfp4_fake", _fake, lambda w, s, t, over, dtype: w.new_empty(w.shape, dtype=dtype), _fake_triton)
encode_dynamic = Op(
    "nvfp4_encode_dynamic",
    _encode_dynamic,
    lambda w, t, groups, over, packed: (_codes_like(w, packed), _scales_like(w, groups)),
    _encode_dynamic_triton,
)
fake_dynamic = Op(
    "nvfp4_fake_dynamic",
    _fake_dynamic,
    lambda w, t, groups, over, dtype: (w.new_empty(w.shape, dtype=dtype), _scales_like(w, groups)),
    _fake_dynamic_triton,
)
vjp = Op(
    "nvfp4_vjp",
    _vjp,
    lambda grad, w, s, t, over, need_w, need_scale: (
        grad.new_empty(grad.shape if need_w else (0,)),
        grad.new_empty(s.shape if need_scale else (0,), dtype=torch.float32),
    ),
    _vjp_triton,
)

AOT = (*cases("nvfp4", E2M1, packed=True, kind=E4M3_TIMES), *cases("nvfp4_over", E2M1, kind=E4M3_OVER))
