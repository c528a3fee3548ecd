"""Blocks of numbers that share a scale: the kernels behind `codebook`, `float8`, `mx` and `nvfp4`.

    v = w * (1 / s)         one IEEE fp32 reciprocal per block
    u = nearest number of the element's grid (`elements`), saturating
    w_hat = u * s           in fp32, then one cast

Backward, with `inside` = (low <= v <= high):

    dw = g * inside
    ds = sum_block g * (u - v * inside)         LSQ, Esser et al. 2020, equation 3, for any grid

A block is any run of numel / blocks neighbours in row-major order: groups, rows, or the whole tensor. `packed` codes
(4 bits) are planar halves: byte j of a row holds column j in its low and column j + K/2 in its high nibble.

One program takes a tile of NB units of BS numbers; a unit is a block, or two of them half a row apart where codes are
packed. Blocks longer than a tile are cut where the scale is given, and read twice where it is found (LOOP).
"""

from __future__ import annotations

from typing import Any

from qat.fake_quant_kernels.dispatch import AotCase, Device, Kernel, tl
from qat.fake_quant_kernels.elements import (
    E2M1,
    E4M3_TIMES,
    FP32,
    Element,
    element_code,
    element_number,
    float_value,
    level_of,
    magnitude_bits,
    scale_value,
    stored_scale,
)

# numbers of one tile: 16 for a thread
TILE = 2048


@Device
def get(pointer: Any, mask: Any, EVEN: tl.constexpr) -> Any:
    return tl.load(pointer) if EVEN else tl.load(pointer, mask, other=0)


@Device
def put(pointer: Any, value: Any, mask: Any, EVEN: tl.constexpr) -> None:
    if EVEN:
        tl.store(pointer, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask)


@Kernel
def quantize_kernel(
    w: Any,
    stored: Any,
    levels: Any,
    tensor_scale: Any,
    out: Any,
    units: Any,
    size: Any,
    chunks: Any,
    per_row: Any,
    row_stride: Any,
    half: Any,
    scale_stride: Any,
    hop: Any,
    inv_peak: Any,
    smallest: Any,
    largest: Any,
    DYNAMIC: tl.constexpr,
    LOOP: tl.constexpr,
    CODES: tl.constexpr,
    HALVES: tl.constexpr,
    SHARED: tl.constexpr,
    KIND: tl.constexpr,
    STORAGE: tl.constexpr,
    LEVELS: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    SIGN: tl.constexpr,
    TOP: tl.constexpr,
    EVEN: tl.constexpr,
    NB: tl.constexpr,
    BS: tl.constexpr,
) -> None:
    """NB units of `size` numbers each; a unit is a block, or with HALVES = 2 two of them, half a row apart."""
    pid = tl.program_id(0)
    unit = (pid // chunks).to(tl.int64) * NB + tl.arange(0, NB)
    first = (pid % chunks).to(tl.int64) * BS
    cols = tl.arange(0, BS)
    live = unit < units
    if HALVES == 2:
        # a division by 32 bits; `tiles` keeps larger ones away
        row = unit.to(tl.int32) // per_row
        part = unit - row.to(tl.int64) * per_row
        row = row.to(tl.int64)
        start, at = row * row_stride + part * size, row * scale_stride + part
    else:
        start, at = unit * size, unit
    from_ = w + (start + first)[:, None] + cols[None, :]
    mask = live[:, None] & (cols < size - first)[None, :]
    if LOOP:
        top_bits = tl.zeros([NB], tl.int32)
        for begin in range(0, size, BS):
            inside = live[:, None] & (begin + cols < size)[None, :]
            top_bits = tl.maximum(top_bits, tl.max(magnitude_bits(tl.load(from_ + begin, inside, other=0.0)), 1))
        kept = stored_scale(top_bits, tensor_scale, inv_peak, smallest, largest, KIND, STORAGE, TOP)
        kept = kept.to(stored.dtype.element_ty)
        tl.store(stored + at, kept, live)
        s = scale_value(kept, tensor_scale, KIND)
        r = tl.math.div_rn(1.0, s)
        for begin in range(0, size, BS):
            inside = live[:, None] & (begin + cols < size)[None, :]
            v = tl.load(from_ + begin, inside, other=0.0).to(tl.float32) * r[:, None]
            to = out + start[:, None] + (begin + cols)[None, :]
            if CODES:
                code = element_code(v, levels, LEVELS, MANTISSA, LOWEST, SIGN, TOP)
                tl.store(to, code.to(out.dtype.element_ty), inside)
            else:
                u = element_number(v, levels, LEVELS, MANTISSA, LOWEST, TOP)
                tl.store(to, (u * s[:, None]).to(out.dtype.element_ty), inside)
    else:
        x = get(from_, mask, EVEN)
        if HALVES == 2:
            y = get(from_ + half, mask, EVEN)
        if DYNAMIC:
            bits = tl.max(magnitude_bits(x), 1)
            if HALVES == 2:
                more = tl.max(magnitude_bits(y), 1)
                if SHARED:
                    bits = tl.maximum(bits, more)
                else:
                    kept = stored_scale(more, tensor_scale, inv_peak, smallest, largest, KIND, STORAGE, TOP)
                    kept = kept.to(stored.dtype.element_ty)
                    tl.store(stored + at + hop, kept, live)
                    s_y = scale_value(kept, tensor_scale, KIND)
            kept = stored_scale(bits, tensor_scale, inv_peak, smallest, largest, KIND, STORAGE, TOP)
            kept = kept.to(stored.dtype.element_ty)
            tl.store(stored + at, kept, live)
            s = scale_value(kept, tensor_scale, KIND)
            if SHARED:
                s_y = s
        else:
            s = scale_value(tl.load(stored + at, live, other=1), tensor_scale, KIND)
            if HALVES == 2:
                s_y = scale_value(tl.load(stored + at + hop, live, other=1), tensor_scale, KIND)
        v = x.to(tl.float32) * tl.math.div_rn(1.0, s)[:, None]
        to = out + (unit * size + first)[:, None] + cols[None, :]
        if CODES:
            code = element_code(v, levels, LEVELS, MANTISSA, LOWEST, SIGN, TOP)
            if HALVES == 2:
                v = y.to(tl.float32) * tl.math.div_rn(1.0, s_y)[:, None]
                code |= element_code(v, levels, LEVELS, MANTISSA, LOWEST, SIGN, TOP) << 4
            put(to, code, mask, EVEN)
        else:
            put(to, element_number(v, levels, LEVELS, MANTISSA, LOWEST, TOP) * s[:, None], mask, EVEN)


@Kernel
def dequantize_kernel(
    codes: Any,
    stored: Any,
    levels: Any,
    tensor_scale: Any,
    out: Any,
    units: Any,
    size: Any,
    chunks: Any,
    per_row: Any,
    row_stride: Any,
    half: Any,
    scale_stride: Any,
    hop: Any,
    HALVES: tl.constexpr,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    SIGN: tl.constexpr,
    EVEN: tl.constexpr,
    NB: tl.constexpr,
    BS: tl.constexpr,
) -> None:
    """Codes, packed if HALVES = 2 -> numbers; units as in `quantize_kernel`."""
    pid = tl.program_id(0)
    unit = (pid // chunks).to(tl.int64) * NB + tl.arange(0, NB)
    first = (pid % chunks).to(tl.int64) * BS
    cols = tl.arange(0, BS)
    live = unit < units
    mask = live[:, None] & (cols < size - first)[None, :]
    from_ = codes + (unit * size + first)[:, None] + cols[None, :]
    code = get(from_, mask, EVEN).to(tl.int32)
    if HALVES == 2:
        # a division by 32 bits; `tiles` keeps larger ones away
        row = unit.to(tl.int32) // per_row
        part = unit - row.to(tl.int64) * per_row
        row = row.to(tl.int64)
        start, at = row * row_stride + part * size, row * scale_stride + part
    else:
        start, at = unit * size, unit
    for h in tl.static_range(HALVES):
        nibble = (code >> (4 * h)) & 15 if HALVES == 2 else code
        u = level_of(nibble, levels, LEVELS) if LEVELS > 0 else float_value(nibble, MANTISSA, LOWEST, SIGN)
        s = scale_value(tl.load(stored + at + h * hop, live, other=1), tensor_scale, KIND)
        put(out + (start + first + h * half)[:, None] + cols[None, :], u * s[:, None], mask, EVEN)


@Kernel
def vjp_kernel(
    grad: Any,
    w: Any,
    stored: Any,
    levels: Any,
    tensor_scale: Any,
    dw: Any,
    ds: Any,
    units: Any,
    size: Any,
    chunks: Any,
    low: Any,
    high: Any,
    NEED_W: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    TOP: tl.constexpr,
    EVEN: tl.constexpr,
    NB: tl.constexpr,
    BS: tl.constexpr,
) -> None:
    """dw, and for each unit and chunk its part of the scale's gradient: ds [units, chunks]."""
    pid = tl.program_id(0)
    unit = (pid // chunks).to(tl.int64) * NB + tl.arange(0, NB)
    first = (pid % chunks).to(tl.int64) * BS
    cols = tl.arange(0, BS)
    live = unit < units
    mask = live[:, None] & (cols < size - first)[None, :]
    offsets = (unit * size + first)[:, None] + cols[None, :]
    x, g = get(w + offsets, mask, EVEN).to(tl.float32), get(grad + offsets, mask, EVEN)
    s = scale_value(tl.load(stored + unit, live, other=1), tensor_scale, KIND)
    v = x * tl.math.div_rn(1.0, s)[:, None]
    inside = (v >= low) & (v <= high)
    if NEED_W:
        put(dw + offsets, tl.where(inside, g, 0.0), mask, EVEN)
    if NEED_SCALE:
        u = tl.where(v != v, 0.0, element_number(v, levels, LEVELS, MANTISSA, LOWEST, TOP))
        terms = (u - tl.where(inside, v, 0.0)) * g.to(tl.float32)
        if not EVEN:
            terms = tl.where(mask, terms, 0.0)
        tl.store(ds + unit * chunks + pid % chunks, tl.sum(terms, 1), live)


_INTEGERS = ("units", "size", "chunks", "per_row", "row_stride", "half", "scale_stride", "hop")


def cases(name: str, element: Element, packed: bool = False, kind: int = FP32) -> tuple[AotCase, ...]:
    """What the compile gate compiles for a format: bf16 numbers in groups of 32 (e2m1 with a tensor scale: 16)."""
    scales = "*fp32" if kind == FP32 else "*u8"
    size = 16 if kind >= E4M3_TIMES else 32
    pointers = {"stored": scales, "levels": "*fp32", "tensor_scale": "*fp32"}
    integers = dict.fromkeys(_INTEGERS, "i32")
    parts = element.constants()
    place = {"EVEN": True, "NB": TILE // size, "BS": size}
    found = []
    for codes, dynamic, halves in ((0, 1, 1), (0, 0, 1), (1, 1, 1), (1, 1, 2))[: 3 + packed]:
        signature = {"w": "*bf16", **pointers, "out": "*u8" if codes else "*bf16", **integers}
        signature |= dict.fromkeys(("inv_peak", "smallest", "largest"), "fp32")
        constants = {"DYNAMIC": bool(dynamic), "LOOP": False, "CODES": bool(codes), "HALVES": halves, "SHARED": False}
        constants |= {"KIND": kind, "STORAGE": 2, **parts, **place}
        title = f"{name}_{'encode' if codes else 'fake'}{'_dynamic' * dynamic}{'_packed' * (halves - 1)}"
        # two halves of a long table at once
        most = 192 if halves == 2 and element.levels > 4 else 128
        found.append(AotCase(title, quantize_kernel, signature, constants, max_registers=most))
    signature = {"codes": "*u8", **pointers, "out": "*bf16", **integers}
    constants = {"HALVES": 1, "KIND": kind, **parts, **place}
    del constants["TOP"]
    found.append(AotCase(f"{name}_decode", dequantize_kernel, signature, constants))
    if packed:
        constants = {**constants, "HALVES": 2}
        found.append(AotCase(f"{name}_decode_packed", dequantize_kernel, signature, constants))
    signature = {"grad": "*bf16", "w": "*bf16", **pointers, "dw": "*bf16", "ds": "*fp32"}
    signature |= {**dict.fromkeys(("units", "size", "chunks"), "i32"), "low": "fp32", "high": "fp32"}
    constants = {"NEED_W": True, "NEED_SCALE": True, "KIND": kind, **parts, **place}
    del constants["SIGN"]
    found.append(AotCase(f"{name}_vjp", vjp_kernel, signature, constants))
    return tuple(found)


AOT = cases("fp4", E2M1, packed=True)
