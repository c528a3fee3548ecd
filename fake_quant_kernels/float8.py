"""Small floats: numbers of e4m3fn, e5m2 or e2m1 times a scale.

    v = w * (1 / s)                 one IEEE fp32 reciprocal per scale
    code = fp8(clamp(v, -top, top)) half to even, denormals included; top = 448 (e4m3fn), 57344 (e5m2), 6 (e2m1)
    w_hat = code * s                in fp32, then one cast

Formats: Micikevicius et al. 2022, table 1; OCP OFP8 v1.0; e2m1: OCP MX v1.0, section 5.3.3. Values beyond the largest
number saturate, infinities too; NaN stays NaN (as a code of e2m1, which has none, it is 0), and the sign of 0 stays.
Dynamic scales are s = project(amax |w| * (1 / top)) of each group; for one scale of the whole tensor take `amax` first,
`tensor_scale` of it, and the operations with a given scale.

Backward: dw = g * (|v| <= top), or g itself with dynamic scales (then there is nothing to compute), and

    ds = sum_group g * (code - v * (|v| <= top))        LSQ, Esser et al. 2020, equation 3

Shapes: w [R, K] in any float dtype, read as fp32; scale fp32 [R, G] or [1, 1], K % G == 0 (tensor [1, 1]; channel and
token [R, 1]; group [R, G]). Codes have PyTorch's fp8 dtype, so that an fp8 matmul takes them as they are; those of e2m1
are uint8 with the sign in bit 3, [R, K/2] planar halves if packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.block_launch import dequantize, differentiate, quantize
from qat.fake_quant_kernels.blocks import cases
from qat.fake_quant_kernels.dispatch import AotCase, Kernel, Op, tl
from qat.fake_quant_kernels.elements import (
    E2M1,
    E4M3,
    E5M2,
    Element,
    apart,
    clipped_vjp,
    e2m1_codes,
    e2m1_numbers,
    e2m1_round_,
    group_amax,
    magnitude_bits,
    pack,
    scaled,
    unpack,
)
from qat.fake_quant_kernels.storage import project

# dtype of the codes -> the element
ELEMENTS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2, torch.uint8: E2M1}
# numbers of a program of `amax`
_RUN = 16384


def _rounded(v: Tensor, float8: torch.dtype) -> Tensor:
    """fp32 v, overwritten -> fp8 codes, or numbers of e2m1 in fp32."""
    if float8 == torch.uint8:
        return e2m1_round_(v)
    top = ELEMENTS[float8].top
    return v.clamp_(-top, top).to(float8)


def _encode(w: Tensor, scale: Tensor, float8: torch.dtype, packed: bool = False) -> Tensor:
    """w [R, K] with given scales -> codes [R, K] of dtype `float8`, or [R, K/2] if packed (e2m1)."""
    found = _rounded(scaled(w, scale), float8).reshape(w.shape)
    if float8 != torch.uint8:
        return found
    codes = e2m1_codes(found)
    return pack(codes) if packed else codes


def _decode(codes: Tensor, scale: Tensor, dtype: torch.dtype, packed: bool = False, again: bool = False) -> Tensor:
    """Codes -> numbers [R, K] of `dtype`; again: as in `affine_decode`."""
    narrow = codes.dtype == torch.uint8
    codes = apart(codes)
    if packed:
        codes = unpack(codes)
    wide = e2m1_numbers(codes) if narrow else codes.float()
    blocks = wide.reshape(codes.shape[0], scale.shape[1], codes.shape[1] // scale.shape[1])
    return blocks.mul_(scale.unsqueeze(-1)).reshape(codes.shape).to(dtype)


def _fake(w: Tensor, scale: Tensor, float8: torch.dtype, dtype: torch.dtype) -> Tensor:
    """w [R, K] with given scales -> decode(encode(w)) [R, K] of `dtype`."""
    u = _rounded(scaled(w, scale), float8).float()
    return u.mul_(scale.unsqueeze(-1)).reshape(w.shape).to(dtype)


def _found(
    w: Tensor, groups: int, float8: torch.dtype, storage: torch.dtype, smallest: float, largest: float
) -> Tensor:
    return project(group_amax(w, groups) * (1.0 / ELEMENTS[float8].top), storage, smallest, largest)


def _encode_dynamic(
    w: Tensor, groups: int, float8: torch.dtype, storage: torch.dtype, smallest: float, largest: float
) -> tuple[Tensor, Tensor]:
    """w [R, K] -> (codes [R, K] of dtype `float8`, the scales fp32 [R, groups] that were found)."""
    scale = _found(w, groups, float8, storage, smallest, largest)
    return _encode(w, scale, float8), scale


def _fake_dynamic(
    w: Tensor,
    groups: int,
    float8: torch.dtype,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """w [R, K] -> (numbers [R, K] of `dtype`, the scales fp32 [R, groups] that were found)."""
    scale = _found(w, groups, float8, storage, smallest, largest)
    return _fake(w, scale, float8, dtype), scale


def _vjp(
    grad: Tensor, w: Tensor, scale: Tensor, float8: torch.dtype, need_w: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    """grad [R, K] -> (dw in its dtype, ds fp32 in the shape of the scales); one that is not needed is empty."""
    top = ELEMENTS[float8].top
    v = scaled(w, scale)
    u = _rounded(v.clone(), float8).float() if need_scale else v
    return clipped_vjp(grad, v, u, -top, top, tuple(scale.shape), need_w, need_scale)


def _amax(w: Tensor) -> Tensor:
    """w [R, K] -> its largest magnitude, fp32 [1, 1]; NaN if there is one; of nothing: 0."""
    return w.abs().amax().float().reshape(1, 1) if w.numel() else torch.zeros(1, 1, device=w.device)


def tensor_scale(amax: Tensor, inv_peak: float, storage: torch.dtype, smallest: float, largest: float) -> Tensor:
    """The stored scale of `amax` (any shape): project(amax * inv_peak)."""
    return project(amax * inv_peak, storage, smallest, largest)


# ---------------------------------------------------------------------------------------------- launchers


@Kernel
def amax_kernel(w: Any, out: Any, count: Any, runs: Any, EVEN: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Bits of the largest magnitude of each program's share: out int32 [programs]."""
    start = tl.program_id(0).to(tl.int64) * runs * BLOCK
    offsets = tl.arange(0, BLOCK)
    best = tl.zeros([BLOCK], tl.int32)
    for run in range(0, runs):
        at = start + run * BLOCK
        x = tl.load(w + at + offsets) if EVEN else tl.load(w + at + offsets, offsets < count - at, other=0.0)
        best = tl.maximum(best, magnitude_bits(x))
    tl.store(out + tl.program_id(0), tl.max(best, 0))


def _amax_triton(w: Tensor) -> Tensor:
    count = w.numel()
    if not count:
        return _amax(w)
    w, block = w.contiguous(), 4096
    # at most 1024 programs for the second pass to look through, each with at least _RUN numbers
    runs = max(_RUN // block, -(-count // (block * 1024)))
    programs = -(-count // (block * runs))
    parts = torch.empty(programs, dtype=torch.int32, device=w.device)
    even = count % (block * runs) == 0
    amax_kernel[(programs,)](w, parts, count, runs, EVEN=even, BLOCK=block, num_warps=8)
    return parts.amax().view(torch.float32).reshape(1, 1)


def _encode_triton(w: Tensor, scale: Tensor, float8: torch.dtype, packed: bool = False) -> Tensor:
    if not w.numel():
        return _encode(w, scale, float8, packed)
    return quantize(w, ELEMENTS[float8], scale, 0, True, torch.uint8, packed)[0].view(float8)


def _decode_triton(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, packed: bool = False, again: bool = False
) -> Tensor:
    if not codes.numel():
        return _decode(codes, scale, dtype, packed)
    return dequantize(codes.contiguous().view(torch.uint8), ELEMENTS[codes.dtype], scale, dtype, packed)


def _fake_triton(w: Tensor, scale: Tensor, float8: torch.dtype, dtype: torch.dtype) -> Tensor:
    if not w.numel():
        return _fake(w, scale, float8, dtype)
    return quantize(w, ELEMENTS[float8], scale, 0, False, dtype)[0]


def _dynamic(
    w: Tensor,
    groups: int,
    codes: bool,
    dtype: torch.dtype,
    element: Element,
    storage: torch.dtype,
    smallest: float,
    largest: float,
) -> tuple[Tensor, Tensor]:
    return quantize(
        w,
        element,
        None,
        groups,
        codes,
        dtype,
        inv_peak=1.0 / element.top,
        storage=storage,
        smallest=smallest,
        largest=largest,
    )


def _encode_dynamic_triton(
    w: Tensor, groups: int, float8: torch.dtype, storage: torch.dtype, smallest: float, largest: float
) -> tuple[Tensor, Tensor]:
    if not w.numel():
        return _encode_dynamic(w, groups, float8, storage, smallest, largest)
    codes, scale = _dynamic(w, groups, True, torch.uint8, ELEMENTS[float8], storage, smallest, largest)
    return codes.view(float8), scale


def _fake_dynamic_triton(
    w: Tensor,
    groups: int,
    float8: torch.dtype,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if not w.numel():
        return _fake_dynamic(w, groups, float8, storage, smallest, largest, dtype)
    return _dynamic(w, groups, False, dtype, ELEMENTS[float8], storage, smallest, largest)


def _vjp_triton(
    grad: Tensor, w: Tensor, scale: Tensor, float8: torch.dtype, need_w: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    if not w.numel() or not (need_w or need_scale):
        return _vjp(grad, w, scale, float8, need_w, need_scale)
    element = ELEMENTS[float8]
    return differentiate(grad, w, element, scale, -element.top, element.top, need_w, need_scale)


def _scales_like(w: Tensor, groups: int) -> Tensor:
    return w.new_empty((w.shape[0], groups), dtype=torch.float32)


encode = Op(
    "float8_encode",
    _encode,
    lambda w, s, float8, packed=False: w.new_empty((w.shape[0], w.shape[1] // (1 + packed)), dtype=float8),
    _encode_triton,
)
decode = Op(
    "float8_decode",
    _decode,
    lambda c, s, dtype, packed=False, again=False: c.new_empty((c.shape[0], c.shape[1] * (1 + packed)), dtype=dtype),
    _decode_triton,
)
fake = Op("float8_fake", _fake, lambda w, s, float8, dtype: w.new_empty(w.shape, dtype=dtype), _fake_triton)
encode_dynamic = Op(
    "float8_encode_dynamic",
    _encode_dynamic,
    lambda w, groups, float8, *rest: (w.new_empty(w.shape, dtype=float8), _scales_like(w, groups)),
    _encode_dynamic_triton,
)
fake_dynamic = Op(
    "float8_fake_dynamic",
    _fake_dynamic,
    lambda w, groups, *rest: (w.new_empty(w.shape, dtype=rest[-1]), _scales_like(w, groups)),
    _fake_dynamic_triton,
)
vjp = Op(
    "float8_vjp",
    _vjp,
    lambda grad, w, s, float8, need_w, need_scale: (
        grad.new_empty(grad.shape if need_w else (0,)),
        s.new_empty(s.shape if need_scale else (0,)),
    ),
    _vjp_triton,
)
amax = Op("amax", _amax, lambda w: w.new_empty((1, 1), dtype=torch.float32), _amax_triton)

AOT = (
    *cases("e4m3", E4M3),
    *cases("e5m2", E5M2),
    AotCase(
        "amax",
        amax_kernel,
        {"w": "*bf16", "out": "*i32", "count": "i64", "runs": "i32"},
        {"EVEN": True, "BLOCK": 4096},
        num_warps=8,
        aligned=("w", "out", "count"),
    ),
)
