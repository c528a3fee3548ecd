"""How operations on rows [R, K] with fields [R, G] or [1, 1] walk over them, on CPUs and in kernels.

In plain torch: chunks of rows, each worked on in several passes over buffers that stay in a core's cache. (Fresh memory
for each pass would cost more than the pass.)

In kernels: units of `size` neighbouring numbers that share a scale, cut into tiles [BN units, BL numbers]. Units are
the groups; where the halves of a row are packed into each other (`pack`) and G is odd, they are halves of groups. A
unit of the low half then goes with the one `per_half` units further.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels.device import clip, rint
from qat.fake_quant_kernels.dispatch import Device, tl

# numbers of a chunk: 2 MiB in fp32, a core's second-level cache; smaller ones are slowed by calls
_CHUNK = 1 << 19
# numbers of a tile: 16 for each thread of 4 warps, so that codes are stored by 16 bytes
TILE = 2048


def code_dtype(lo: int) -> torch.dtype:
    """int8 for a grid with negative codes, else uint8."""
    return torch.int8 if lo < 0 else torch.uint8


def empty_codes(w: Tensor, lo: int, packed: bool) -> Tensor:
    """Uninitialised codes of w [R, K]: int8 / uint8 [R, K], packed uint8 [R, K/2]. Raises QATError for an odd K."""
    rows, columns = w.shape
    if not packed:
        return w.new_empty((rows, columns), dtype=code_dtype(lo))
    if columns % 2:
        raise QATError(f"4-bit halves need an even number of columns, not {columns}; keep these codes as bytes")
    return w.new_empty((rows, columns // 2), dtype=torch.uint8)


def chunks(w: Tensor, buffers: int) -> list[tuple[slice, list[Tensor | None]]]:
    """Slices of the rows of w, each with fp32 buffers of its shape.

    All rows at once and no buffers where a compiler fuses the passes, on other devices, for few numbers and for fp64.
    """
    rows, columns = w.shape
    at_once = torch.compiler.is_compiling() or w.device.type != "cpu" or w.dtype == torch.float64
    if at_once or rows * columns <= _CHUNK:
        return [(slice(None), [None] * buffers)]
    height = max(1, _CHUNK // columns)
    memory = torch.empty((buffers, height, columns), dtype=torch.float32, device=w.device)
    return [(slice(at, at + height), [each[: rows - at] for each in memory.unbind(0)]) for at in range(0, rows, height)]


def eager_on_cpu(t: Tensor) -> bool:
    """Whether the host can look at the numbers of t without waiting for anything."""
    if t.device.type != "cpu" or type(t) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    # vmap's tensors look like any other
    return not torch._C._are_functorch_transforms_active()


def no_nan(t: Tensor) -> bool:
    """Whether t, not empty and `eager_on_cpu`, holds no NaN. By numpy: a tensor operation would cost more."""
    return not bool(np.isnan(t.numpy().max()))


def grouped(t: Tensor, groups: int) -> Tensor:
    """Rows [R, K] -> [R, G, K/G], a view where rows are whole, over which `broadcast` fields go; of one group [R, K] as
    it is."""
    return t if groups == 1 else t.reshape(t.shape[0], groups, t.shape[1] // groups)


def broadcast(field: Tensor) -> Tensor:
    """A field [R, G] as it goes over numbers that are `grouped`."""
    return field if field.shape[1] == 1 else field.unsqueeze(-1)


def fp32_chunks(w: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Slices of the rows of w, those rows in fp32, and a buffer of their shape."""
    casts = w.dtype != torch.float32
    for rows, (buffer, *wide) in chunks(w, 1 + casts):
        x = part(w, rows)
        if casts:
            x = x.float() if wide[0] is None else wide[0].copy_(x)
        yield rows, x, buffer


def part(t: Tensor | None, rows: slice) -> Any:
    """The rows of numbers [R, K], of a field [R, G] or of None; a shared field [1, 1] as it is."""
    # a view takes longer than a look
    return t if t is None or rows.stop is None or t.shape[0] == 1 else t[rows]


def geometry(rows: int, columns: int, groups: int, packed: bool) -> tuple[int, int, int, int]:
    """(units, size, per_half, SPLIT) of [rows, columns] with `groups` scales in a row; SPLIT: units are half groups."""
    if not packed:
        return rows * groups, columns // groups, 1, 0
    per_half = groups if groups % 2 else groups // 2
    return rows * per_half, columns // (2 * per_half), per_half, groups % 2


def tiling(units: int, size: int) -> tuple[int, int, int]:
    """(programs, BN, BL): tiles of whole units where they are small, of parts of one or two where they are long."""
    wide = min(1024, 1 << max(0, size - 1).bit_length())
    high = min(TILE // wide, 1 << max(0, units - 1).bit_length())
    return -(-units // high) * -(-size // wide), high, wide


@Device
def tile(size: Any, BN: tl.constexpr, BL: tl.constexpr) -> Any:
    """The units n [BN] of this program and its places j [BL] within a unit."""
    across = (size + BL - 1) // BL
    program = tl.program_id(0)
    return program // across * BN + tl.arange(0, BN), program % across * BL + tl.arange(0, BL)


@Device
def places(unit: Any, j: Any, size: Any) -> Any:
    """Offsets [BN, BL] of the numbers j of each unit; 64 bits, because a tensor may have more than 2^31 of them."""
    return unit.to(tl.int64)[:, None] * size + j[None, :]


@Device
def field_of(at: Any, unit: Any, mask: Any, SHARED: tl.constexpr, SPLIT: tl.constexpr) -> Any:
    """A field of each unit as [BN, 1]; 1 for units that do not exist."""
    if SHARED:
        unit = unit * 0
    return tl.load(at + (unit >> SPLIT), mask=mask, other=1.0)[:, None]


@Device
def rounded(x: Any, r: Any, z: Any, m: Any, lo: Any, hi: Any, ZERO: tl.constexpr, MINIMUM: tl.constexpr) -> Any:
    """The equations of `affine`: fp32 numbers [BN, BL] -> codes as int32, NaN as q = 0; r, z, m [BN, 1]."""
    if MINIMUM:
        x = x - m
    low, high = lo, hi
    if ZERO:
        low, high = lo - z, hi - z
    q = rint(clip(x * r, low, high))
    q = tl.where(q != q, 0.0, q)
    if ZERO:
        q = q + z
    return q.to(tl.int32)


@Device
def nibbles(low: Any, high: Any) -> Any:
    """Two 4-bit codes, int32 -> their byte."""
    return (low & 15) | ((high & 15) << 4)
