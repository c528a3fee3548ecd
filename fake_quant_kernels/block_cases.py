"""What the compile gate compiles of `blocks`, for each format."""

from __future__ import annotations

from qat.fake_quant_kernels.blocks import TILE, dequantize_kernel, quantize_kernel, vjp_kernel
from qat.fake_quant_kernels.dispatch import AotCase
from qat.fake_quant_kernels.elements import E4M3_TIMES, FP32, Element

_INTEGERS = ("units", "size", "chunks", "per_row", "row_stride", "half", "scale_stride", "hop")


def cases(name: str, element: Element, packed: bool = False, kind: int = FP32) -> tuple[AotCase, ...]:
    """What the compile gate compiles for a format: bf16 numbers in groups of 32 (e2m1 with a tensor scale: 16)."""
    scales = "*fp32" if kind == FP32 else "*u8"
    size = 16 if kind >= E4M3_TIMES else 32
    pointers = {"stored": scales, "levels": "*fp32", "tensor_scale": "*fp32"}
    integers = dict.fromkeys(_INTEGERS, "i32")
    # what the launcher finds divisible by 16; a 1 would be a constant of its own
    aligned = ("stored", "levels", "tensor_scale", "out", "units", "size", "row_stride", "half", "scale_stride", "hop")
    parts = element.constants()
    found = []
    for codes, dynamic, halves in ((0, 1, 1), (0, 0, 1), (1, 1, 1), (1, 1, 2))[: 3 + packed]:
        signature = {"w": "*bf16", **pointers, "out": "*u8" if codes else "*bf16", **integers}
        signature |= dict.fromkeys(("inv_peak", "smallest", "largest"), "fp32")
        constants = {"DYNAMIC": bool(dynamic), "LOOP": False, "CODES": bool(codes), "HALVES": halves, "SHARED": False}
        constants |= {"KIND": kind, "STORAGE": 2, **parts, "EVEN": True, "NB": TILE // halves // size, "BS": size}
        title = f"{name}_{'encode' if codes else 'fake'}{'_dynamic' * dynamic}{'_packed' * (halves - 1)}"
        found.append(AotCase(title, quantize_kernel, signature, constants, aligned=("w", *aligned)))
    place = {"EVEN": True, "NB": TILE // size, "BS": size}
    signature = {"codes": "*u8", **pointers, "out": "*bf16", **integers}
    constants = {"HALVES": 1, "KIND": kind, **parts, **place}
    del constants["TOP"]
    found.append(AotCase(f"{name}_decode", dequantize_kernel, signature, constants, aligned=("codes", *aligned)))
    if packed:
        constants = {**constants, "HALVES": 2}
        name_ = f"{name}_decode_packed"
        found.append(AotCase(name_, dequantize_kernel, signature, constants, aligned=("codes", *aligned)))
    signature = {"grad": "*bf16", "w": "*bf16", **pointers, "dw": "*bf16", "ds": "*fp32"}
    signature |= {**dict.fromkeys(("units", "size", "chunks"), "i32"), "low": "fp32", "high": "fp32"}
    constants = {"NEED_W": True, "NEED_SCALE": True, "KIND": kind, **parts, **place}
    del constants["SIGN"]
    aligned = ("grad", "w", "stored", "levels", "tensor_scale", "dw", "ds", "units", "size")
    found.append(AotCase(f"{name}_vjp", vjp_kernel, signature, constants, aligned=aligned))
    return tuple(found)
