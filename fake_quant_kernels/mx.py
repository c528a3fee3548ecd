"""MX: blocks of 32 numbers of a small float that share a power of two.

OCP Microscaling Formats v1.0, section 6.3, with amax the block's largest magnitude:

    e = floor(log2 amax) - emax             byte = clamp(e + 127, 0, 254), s = 2^(byte - 127)
    code = element(w * 2^-e)                half to even, saturating; w_hat = code * s

emax is the exponent of the element's largest number: 2 (e2m1, 6), 8 (e4m3, 448), 15 (e5m2, 57344). floor(log2 amax) is
the exponent field of amax, never a logarithm; 0 and denormal numbers have the byte 0. A block that holds NaN or an
infinity has the byte 255, which is NaN, and all of its w_hat are NaN. Magnitudes above the largest number (6 < |v| < 8
with e2m1) saturate. Products with s and 1 / s are exact but at the ends of fp32's range.

Backward: dw = g * (|v| <= largest), or g itself; to first order in s (a caller with a learned scale passes it straight
through the rounding to a power of two)

    ds = sum_block g * (code - v * (|v| <= largest))

Shapes: w [R, K] in any float dtype, read as fp32; exponents uint8 [R, G] (e8m0 bytes), K % G == 0, G = K / 32 in the
standard. element is "e2m1", "e4m3" or "e5m2"; e2m1 codes are uint8 with the sign in bit 3 ([R, K/2] planar halves if
packed), the others PyTorch's fp8 dtypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.fake_quant_kernels.block_launch import dequantize, differentiate, quantize
from qat.fake_quant_kernels.blocks import cases
from qat.fake_quant_kernels.dispatch import Op
from qat.fake_quant_kernels.elements import (
    E2M1,
    E4M3,
    E5M2,
    E8M0,
    clipped_vjp,
    e2m1_codes,
    e2m1_numbers,
    e2m1_round_,
    group_amax,
    pack,
    scaled,
    unpack,
)

ELEMENTS = {"e2m1": E2M1, "e4m3": E4M3, "e5m2": E5M2}
DTYPES = {"e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LEAD = {"e2m1": 2, "e4m3": 8, "e5m2": 15}


def exponents_of(amax: Tensor, element: str) -> Tensor:
    """Largest magnitudes, fp32 of any shape -> e8m0 bytes."""
    field = amax.view(torch.int32) >> 23
    byte = (field - LEAD[element]).clamp_(min=0)
    return byte.masked_fill_(field == 255, 255).to(torch.uint8)


def powers_of(exponents: Tensor) -> Tensor:
    """e8m0 bytes -> fp32: 2^(byte - 127), denormal for 0, NaN for 255."""
    wide = exponents.to(torch.int32)
    bits = (wide << 23).masked_fill_(wide == 0, 0x400000).masked_fill_(wide == 255, 0x7FC00000)
    return bits.view(torch.float32)


def _rounded(v: Tensor, element: str) -> Tensor:
    """fp32 v, overwritten -> numbers of the element, in its dtype or (e2m1) fp32."""
    if element == "e2m1":
        return e2m1_round_(v)
    top = ELEMENTS[element].top
    return v.clamp_(-top, top).to(DTYPES[element])


def _encode(w: Tensor, exponents: Tensor, element: str, packed: bool) -> Tensor:
    """w [R, K] with given exponents -> codes [R, K], or [R, K/2] if packed (e2m1)."""
    u = _rounded(scaled(w, powers_of(exponents)), element).reshape(w.shape)
    if element != "e2m1":
        return u
    codes = e2m1_codes(u)
    return pack(codes) if packed else codes


def _decode(codes: Tensor, exponents: Tensor, element: str, dtype: torch.dtype, packed: bool) -> Tensor:
    """Codes -> numbers [R, K] of `dtype`."""
    if packed:
        codes = unpack(codes)
    u = e2m1_numbers(codes) if element == "e2m1" else codes.float()
    blocks = u.reshape(codes.shape[0], exponents.shape[1], codes.shape[1] // exponents.shape[1])
    return blocks.mul_(powers_of(exponents).unsqueeze(-1)).reshape(codes.shape).to(dtype)


def _fake(w: Tensor, exponents: Tensor, element: str, dtype: torch.dtype) -> Tensor:
    """w [R, K] with given exponents -> decode(encode(w)) [R, K] of `dtype`, except that a NaN stays NaN."""
    scale = powers_of(exponents)
    u = _rounded(scaled(w, scale), element).float()
    return u.mul_(scale.unsqueeze(-1)).reshape(w.shape).to(dtype)


def _encode_dynamic(w: Tensor, groups: int, element: str, packed: bool) -> tuple[Tensor, Tensor]:
    """w [R, K] -> (codes as `encode` gives, exponents uint8 [R, groups])."""
    exponents = exponents_of(group_amax(w, groups), element)
    return _encode(w, exponents, element, packed), exponents


def _fake_dynamic(w: Tensor, groups: int, element: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w [R, K] -> (numbers [R, K] of `dtype`, exponents uint8 [R, groups])."""
    exponents = exponents_of(group_amax(w, groups), element)
    return _fake(w, exponents, element, dtype), exponents


def _vjp(
    grad: Tensor, w: Tensor, exponents: Tensor, element: str, need_w: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    """grad [R, K] -> (dw in its dtype, ds fp32 [R, G]); one that is not needed is empty."""
    v, top = scaled(w, powers_of(exponents)), ELEMENTS[element].top
    u = _rounded(v.clone(), element).float() if need_scale else v
    return clipped_vjp(grad, v, u, -top, top, tuple(exponents.shape), need_w, need_scale)


# ---------------------------------------------------------------------------------------------- launchers


def _encode_triton(w: Tensor, exponents: Tensor, element: str, packed: bool) -> Tensor:
    if not w.numel():
        return _encode(w, exponents, element, packed)
    codes, _ = quantize(w, ELEMENTS[element], exponents, 0, True, torch.uint8, packed, E8M0)
    return codes.view(DTYPES[element])


def _decode_triton(codes: Tensor, exponents: Tensor, element: str, dtype: torch.dtype, packed: bool) -> Tensor:
    if not codes.numel():
        return _decode(codes, exponents, element, dtype, packed)
    return dequantize(codes.contiguous().view(torch.uint8), ELEMENTS[element], exponents, dtype, packed, E8M0)


def _fake_triton(w: Tensor, exponents: Tensor, element: str, dtype: torch.dtype) -> Tensor:
    if not w.numel():
        return _fake(w, exponents, element, dtype)
    return quantize(w, ELEMENTS[element], exponents, 0, False, dtype, kind=E8M0)[0]


def _encode_dynamic_triton(w: Tensor, groups: int, element: str, packed: bool) -> tuple[Tensor, Tensor]:
    if not w.numel():
        return _encode_dynamic(w, groups, element, packed)
    codes, exponents = quantize(w, ELEMENTS[element], None, groups, True, torch.uint8, packed, E8M0)
    return codes.view(DTYPES[element]), exponents


def _fake_dynamic_triton(w: Tensor, groups: int, element: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not w.numel():
        return _fake_dynamic(w, groups, element, dtype)
    return quantize(w, ELEMENTS[element], None, groups, False, dtype, kind=E8M0)


def _vjp_triton(
    grad: Tensor, w: Tensor, exponents: Tensor, element: str, need_w: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    if not w.numel() or not (need_w or need_scale):
        return _vjp(grad, w, exponents, element, need_w, need_scale)
    top = ELEMENTS[element].top
    return differentiate(grad, w, ELEMENTS[element], exponents, -top, top, need_w, need_scale, E8M0)


def _codes_like(w: Tensor, element: str, packed: bool) -> Tensor:
    return w.new_empty((w.shape[0], w.shape[1] // (1 + packed)), dtype=DTYPES[element])


def _bytes_like(w: Tensor, groups: int) -> Tensor:
    return w.new_empty((w.shape[0], groups), dtype=torch.uint8)


encode = Op("mx_encode", _encode, lambda w, e, element, packed: _codes_like(w, element, packed), _encode_triton)
decode = Op(
    "mx_decode",
    _decode,
    lambda c, e, element, dtype, packed: c.new_empty((c.shape[0], c.shape[1] * (1 + packed)), dtype=dtype),
    _decode_triton,
)
fake = Op("mx_fake", _fake, lambda w, e, element, dtype: w.new_empty(w.shape, dtype=dtype), _fake_triton)
encode_dynamic = Op(
    "mx_encode_dynamic",
    _encode_dynamic,
    lambda w, groups, element, packed: (_codes_like(w, element, packed), _bytes_like(w, groups)),
    _encode_dynamic_triton,
)
fake_dynamic = Op(
    "mx_fake_dynamic",
    _fake_dynamic,
    lambda w, groups, element, dtype: (w.new_empty(w.shape, dtype=dtype), _bytes_like(w, groups)),
    _fake_dynamic_triton,
)
vjp = Op(
    "mx_vjp",
    _vjp,
    lambda grad, w, e, element, need_w, need_scale: (
        grad.new_empty(grad.shape if need_w else (0,)),
        grad.new_empty(e.shape if need_scale else (0,), dtype=torch.float32),
    ),
    _vjp_triton,
)

AOT = (
    *cases("mxfp4", E2M1, packed=True, kind=E8M0),
    *cases("mxfp8_e4m3", E4M3, kind=E8M0),
    *cases("mxfp8_e5m2", E5M2, kind=E8M0),
)
