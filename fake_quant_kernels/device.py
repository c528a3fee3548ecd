"""Arithmetic that kernels share, written so that the interpreter, CUDA and plain torch give the same bits."""

from __future__ import annotations

from typing import Any

from qat.fake_quant_kernels.dispatch import Device, tl


@Device
def rint(t: Any) -> Any:
    """Round half to even, |t| < 2^22: adding 1.5 * 2^23 leaves no bits behind the point. NaN stays NaN."""
    return (t + 12582912.0) - 12582912.0


@Device
def clip(t: Any, low: Any, high: Any) -> Any:
    """torch.clamp: NaN stays NaN."""
    return tl.where(t != t, t, tl.minimum(tl.maximum(t, low), high))


@Device
def to_bf16(x: Any) -> Any:
    """fp32 -> the nearest bf16 number, half to even, as fp32; finite x below bf16's largest number.

    On bits, because the interpreter's own cast truncates.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)


@Device
def stored(x: Any, storage: tl.constexpr) -> Any:
    """Finite fp32 within a storage's range -> its nearest number: storage 0 fp32, 1 fp16, 2 bf16, 3 e8m0, 4 e4m3."""
    if storage == 1:
        x = x.to(tl.float16).to(tl.float32)
    elif storage == 2:
        x = to_bf16(x)
    elif storage == 3:
        x = ((x.to(tl.int32, bitcast=True) + 0x400000) & 0x7F800000).to(tl.float32, bitcast=True)
    elif storage == 4:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFFF + ((bits >> 20) & 1)
        normal = (bits & -1048576).to(tl.float32, bitcast=True)
        # below 2^-6 the numbers are 2^-9 apart
        x = tl.where(tl.abs(x) < 0.015625, rint(x * 512.0) * 0.001953125, normal)
    return x


@Device
def project(scale: Any, storage: tl.constexpr, smallest: Any, largest: Any) -> Any:
    """`qat.fake_quant_kernels.storage.project`; storage as in `stored`."""
    scale = tl.where(scale != scale, largest, tl.minimum(tl.maximum(scale, smallest), largest))
    return stored(scale, storage)
