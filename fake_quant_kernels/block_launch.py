"""Launchers of the kernels in `blocks`: how numbers, scales and codes in memory are cut into programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.blocks import TILE, dequantize_kernel, quantize_kernel, vjp_kernel
from qat.fake_quant_kernels.elements import FP32, Element, pack, unpack

STORAGES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# the longest block whose numbers stay in registers while its scale is found
_LONGEST = 16384


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


def tiles(shape: tuple[int, int], scales: tuple[int, int], packed: bool, numbers: int, longest: int) -> Tiles | None:
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
    return Tiles(*place, -(-place[1] // width), max(1, numbers // width), width)


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
    cut = tiles((rows, columns), (stored.shape[0], stored.shape[1]), packed, TILE, longest)
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
