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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.dispatch import Device, Kernel, tl
from qat.fake_quant_kernels.elements import (
    FP32,
    Element,
    element_code,
    element_number,
    float_value,
    magnitude_bits,
    pack,
    scale_value,
    stored_scale,
    unpack,
)

STORAGES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# numbers in a tile, and the longest block whose numbers stay in registers while its scale is found
TILE, _LONGEST = 2048, 16384


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
        u = tl.load(levels + nibble) if LEVELS > 0 else float_value(nibble, MANTISSA, LOWEST, SIGN)
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


@dataclass(frozen=True)
class Tiles:
    """How units lie in memory and are cut: the integer arguments of the kernels, and how many programs there are."""

    units: int
    size: int
    per_row: int
    row_stride: int
    half: int
    scale_stride: int
    hop: int
    chunks: int
    rows_in_tile: int
    columns_in_tile: int

    @property
    def grid(self) -> tuple[int]:
        return (-(-self.units // self.rows_in_tile) * self.chunks,)

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.units, self.size, self.chunks, self.per_row, self.row_stride, self.half, self.scale_stride, self.hop

    def constants(self) -> dict[str, Any]:
        even = self.units % self.rows_in_tile == 0 and self.size % self.columns_in_tile == 0
        return {"EVEN": even, "NB": self.rows_in_tile, "BS": self.columns_in_tile}

    @property
    def warps(self) -> int:
        """16 numbers for a thread; 32 in the longest blocks."""
        return min(16, max(1, self.rows_in_tile * self.columns_in_tile // 512))


def tiles(shape: tuple[int, int], scales: tuple[int, int], packed: bool, tile: int, longest: int) -> Tiles | None:
    """For numbers of `shape` [R, K] with `scales` [R, G] or [1, 1]; None where packed blocks do not pair up."""
    (rows, columns), blocks = shape, scales[0] * scales[1]
    if not packed:
        place = (blocks, rows * columns // blocks, 1, 0, 0, 0, 0)
    elif scales[1] == 1:
        place = (rows, columns // 2, 1, columns, columns // 2, int(blocks > 1), 0)
    elif scales[1] % 2 == 0:
        pairs = scales[1] // 2
        place = (rows * pairs, columns // scales[1], pairs, columns, columns // 2, scales[1], pairs)
    else:
        return None
    if packed and place[0] >= 1 << 31:
        return None
    width = min(1 << max(0, place[1] - 1).bit_length(), longest)
    return Tiles(*place, -(-place[1] // width), max(1, tile // width), width)


def quantize(
    w: Tensor,
    element: Element,
    scale: Tensor | None,
    groups: int,
    codes: bool,
    dtype: torch.dtype,
    packed: bool = False,
    kind: int = FP32,
    levels: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    inv_peak: float = 1.0,
    storage: torch.dtype = torch.float32,
    smallest: float = 0.0,
    largest: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Launches `quantize_kernel`: (uint8 codes or numbers of `dtype`, what is stored as scales).

    scale: as stored; None: found, with `groups` of a row. w must not be empty.
    """
    w = w.contiguous()
    rows, columns = w.shape
    if scale is None:
        stored = torch.empty(rows, groups, dtype=torch.float32 if kind == FP32 else torch.uint8, device=w.device)
    else:
        stored = scale.contiguous()
    longest = _LONGEST if scale is None else TILE
    cut = tiles((rows, columns), (stored.shape[0], stored.shape[1]), packed, TILE >> packed, longest)
    if packed and (columns % 2 or cut is None or (scale is None and cut.chunks > 1)):
        rest = (kind, levels, tensor_scale, inv_peak, storage, smallest, largest)
        out, stored = quantize(w, element, scale, groups, True, dtype, False, *rest)
        return pack(out), stored
    assert cut is not None
    loop = scale is None and cut.chunks > 1
    out = torch.empty(rows, columns // (1 + packed), dtype=torch.uint8 if codes else dtype, device=w.device)
    numbers = cut.numbers
    if loop:
        numbers = (*numbers[:2], 1, *numbers[3:])
    quantize_kernel[(cut.units,) if loop else cut.grid](
        w, stored, w if levels is None else levels, w if tensor_scale is None else tensor_scale, out, *numbers,
        inv_peak, smallest, largest,
        DYNAMIC=scale is None, LOOP=loop, CODES=codes, HALVES=1 + packed, SHARED=packed and cut.hop == 0, KIND=kind,
        STORAGE=STORAGES[storage], **element.constants(), **cut.constants(), num_warps=cut.warps,
    )  # fmt: skip
    return out, stored


def dequantize(
    codes: Tensor,
    element: Element,
    scale: Tensor,
    dtype: torch.dtype,
    packed: bool = False,
    kind: int = FP32,
    levels: Tensor | None = None,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """Launches `dequantize_kernel`: uint8 codes and stored scales -> numbers of `dtype`. Not empty."""
    rows, columns = codes.shape[0], codes.shape[1] * (1 + packed)
    cut = tiles((rows, columns), (scale.shape[0], scale.shape[1]), packed, TILE, TILE)
    if cut is None:
        return dequantize(unpack(codes), element, scale, dtype, False, kind, levels, tensor_scale)
    codes, scale = codes.contiguous(), scale.contiguous()
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    constants = element.constants()
    del constants["TOP"]
    dequantize_kernel[cut.grid](
        codes, scale, codes if levels is None else levels, codes if tensor_scale is None else tensor_scale, out,
        *cut.numbers, HALVES=1 + packed, KIND=kind, **constants, **cut.constants(), num_warps=cut.warps,
    )  # fmt: skip
    return out


def differentiate(
    grad: Tensor,
    w: Tensor,
    element: Element,
    scale: Tensor,
    low: float,
    high: float,
    need_w: bool,
    need_scale: bool,
    kind: int = FP32,
    levels: Tensor | None = None,
    tensor_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches `vjp_kernel`: (dw in the dtype of grad, ds fp32 in the shape of the scales), empty where not needed."""
    grad, w, scale = grad.contiguous(), w.contiguous(), scale.contiguous()
    cut = tiles((w.shape[0], w.shape[1]), (scale.shape[0], scale.shape[1]), False, TILE, TILE)
    assert cut is not None
    dw = torch.empty_like(grad) if need_w else grad.new_empty(0)
    ds = torch.empty((cut.units, cut.chunks) if need_scale else 0, dtype=torch.float32, device=w.device)
    constants = element.constants()
    del constants["SIGN"]
    vjp_kernel[cut.grid](
        grad, w, scale, w if levels is None else levels, w if tensor_scale is None else tensor_scale, dw, ds,
        cut.units, cut.size, cut.chunks, low, high,
        NEED_W=need_w, NEED_SCALE=need_scale, KIND=kind, **constants, **cut.constants(), num_warps=cut.warps,
    )  # fmt: skip
    return dw, (ds if cut.chunks == 1 else ds.sum(1)).reshape(scale.shape) if need_scale else ds
