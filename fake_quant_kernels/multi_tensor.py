"""`dynamic_absmax` of many weights in one launch: made for the codes of a whole model, once after each optimizer step.

    s_t, codes_t = dynamic absmax of w_t        for all weights t of a list, of any [R_t, K_t], in place

A model has hundreds of weights, and many are so small that starting a kernel takes longer than running it. Here a
program finds its weight by bisection: table row t holds the addresses and the shape of weight t, starts[t] the number
of its first program,

    t = max { t : starts[t] <= program },       tile = program - starts[t]

Weights whose groups have the same power of two of numbers share a launch: one for the model where scales are per group,
one for each power of two of row lengths where they are per row. `MultiAbsmax` makes the tables when it first sees the
tensors and whenever one has moved; otherwise a step copies nothing to the device and waits for nothing.

w_t in one float dtype, read as fp32; codes_t and scale_t as `dynamic` makes them, allocated by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels.device import project
from qat.fake_quant_kernels.dispatch import AotCase, Kernel, on_device_of_first, tl, uses_triton
from qat.fake_quant_kernels.dynamic import dynamic_absmax
from qat.fake_quant_kernels.rows import TILE, code_dtype, geometry, nibbles, rounded
from qat.fake_quant_kernels.storage import storage_code

# numbers of the longest group that one program holds
_LONGEST = 16384
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# for each table in a plan: weights, programs, BN, BL, warps, HALVES, EVEN
_NUMBERS = 7
_SCHEMA = (
    "(Tensor[] weights, Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor[] tables, int[] plan, int[] alone, "
    "float inv_reach, int lo, int hi, ScalarType storage, float smallest, float largest, bool packed, bool poison) "
    "-> ()"
)


def _reference(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    tables: Sequence[Tensor],
    plan: Sequence[int],
    alone: Sequence[int],
    *settings: Any,
) -> None:
    """One weight after the other; the tables are not read."""
    inv_reach, lo, hi, storage, smallest, largest, packed, poison = settings
    for w, code, scale in zip(weights, codes, scales, strict=True):
        found, s = dynamic_absmax(w, scale.shape[1], inv_reach, lo, hi, storage, smallest, largest, packed, poison)
        code.copy_(found)
        scale.copy_(s)


def _launch(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    tables: Sequence[Tensor],
    plan: Sequence[int],
    alone: Sequence[int],
    *settings: Any,
) -> None:
    """The tables' launches, and the weights `alone` that no table holds."""
    inv_reach, lo, hi, storage, smallest, largest, _, poison = settings
    for i in range(len(tables) // 2):
        count, programs, high, wide, warps, halves, even = plan[_NUMBERS * i : _NUMBERS * (i + 1)]
        _absmax_kernel[(programs,)](
            *(tables[2 * i], tables[2 * i + 1], count, inv_reach, float(lo), float(hi), smallest, largest),
            DTYPE=_DTYPES.index(weights[0].dtype),
            SIGNED=lo < 0,
            STORAGE=storage_code(storage),
            POISON=poison,
            HALVES=halves,
            EVEN=bool(even),
            BN=high,
            BL=wide,
            STEPS=count.bit_length(),
            num_warps=warps,
        )
    if alone:
        w, code, scale = ([each[t] for t in alone] for each in (weights, codes, scales))
        _reference(w, code, scale, [], [], [], *settings)


_op = torch.library.custom_op(
    "qat::multi_absmax", _reference, mutates_args=("codes", "scales"), device_types="cpu", schema=_SCHEMA
)
_op.register_kernel("cuda")(on_device_of_first(_launch))
_op.register_fake(lambda *_: None)


@Kernel
def _absmax_kernel(
    table: Any,
    starts: Any,
    count: Any,
    inverse: Any,
    lo: Any,
    hi: Any,
    smallest: Any,
    largest: Any,
    DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
    STORAGE: tl.constexpr,
    POISON: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """HALVES 0 not packed, 1 of groups, 2 of one group; EVEN: addresses and sizes are multiples of 16."""
    program = tl.program_id(0)
    first, last = program * 0, program * 0 + count
    for _ in tl.static_range(STEPS):
        middle = (first + last) // 2
        # beyond the last weight starts holds the number of programs
        after = tl.load(starts + middle) <= program
        first, last = tl.where(after, middle, first), tl.where(after, last, middle)
    # addresses of weight, codes and scales; units, size, per_half (`rows.geometry`)
    row = table + first * 6
    if DTYPE == 0:
        w = tl.load(row).to(tl.pointer_type(tl.float32))
    elif DTYPE == 1:
        w = tl.load(row).to(tl.pointer_type(tl.float16))
    else:
        w = tl.load(row).to(tl.pointer_type(tl.bfloat16))
    if SIGNED and HALVES == 0:
        codes = tl.load(row + 1).to(tl.pointer_type(tl.int8))
    else:
        codes = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
    scale = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    units, size, per_half = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    if EVEN:
        # on the pointers: a promise on the integers is lost in the cast
        w, codes, size = tl.multiple_of(w, 16), tl.multiple_of(codes, 16), tl.multiple_of(size, 16)
    n = (program - tl.load(starts + first)).to(tl.int64) * BN + tl.arange(0, BN)
    j = tl.arange(0, BL)[None, :]
    known = n < units
    mask = known[:, None] & (j < size)
    unit = n
    if HALVES > 0:
        unit = n + n // per_half * per_half
    x = tl.load(w + unit[:, None] * size + j, mask=mask, other=0.0).to(tl.float32)
    y = x
    if HALVES > 0:
        y = tl.load(w + (unit + per_half)[:, None] * size + j, mask=mask, other=0.0).to(tl.float32)
    # as integers magnitudes are in the same order, NaN above infinity: the maximum passes NaN on
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    more = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if HALVES == 2:
        bits, unit = tl.maximum(bits, more), n
    high = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    s = project(high * inverse, STORAGE, smallest, largest)
    if POISON:
        s = tl.where(high != high, high, s)
    tl.store(scale + unit, s, mask=known)
    r = tl.math.div_rn(1.0, s)[:, None]
    q = rounded(x, r, r, r, lo, hi, False, False)
    if HALVES > 0:
        if HALVES == 1:
            high = tl.max(more, axis=1).to(tl.float32, bitcast=True)
            s = project(high * inverse, STORAGE, smallest, largest)
            if POISON:
                s = tl.where(high != high, high, s)
            tl.store(scale + unit + per_half, s, mask=known)
            r = tl.math.div_rn(1.0, s)[:, None]
        q = nibbles(q, rounded(y, r, r, r, lo, hi, False, False))
    tl.store(codes + n[:, None] * size + j, q.to(codes.dtype.element_ty), mask=mask)


class MultiAbsmax:
    """Settings and tables for one list of weights; calling it fills their codes and scales.

    inv_reach, lo, hi, storage, smallest, largest, packed, poison as in `dynamic.absmax`. One object for each list: it
    keeps the tables of the last tensors that it was called with.
    """

    def __init__(
        self,
        inv_reach: float,
        lo: int,
        hi: int,
        storage: torch.dtype,
        smallest: float,
        largest: float,
        packed: bool = False,
        poison: bool = False,
    ) -> None:
        self.settings = (inv_reach, lo, hi, storage, smallest, largest, packed, poison)
        self.key: tuple[Any, ...] = ()
        self.tables: list[Tensor] = []
        self.plan: list[int] = []
        self.alone: list[int] = []

    def __call__(self, weights: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        """weights [R, K] each; codes [R, K] (packed [R, K/2]) and scales fp32 [R, G] are overwritten.

        Raises QATError where dtypes, devices or shapes do not go together.
        """
        if not weights:
            return
        if not uses_triton(weights[0].device):
            self._check(weights, codes, scales)
            _reference(weights, codes, scales, [], [], [], *self.settings)
            return
        key = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for each in (weights, codes, scales) for t in each)
        if key != self.key:
            self._check(weights, codes, scales)
            self._build(weights, codes, scales)
            self.key = key
        run = _op if weights[0].is_cuda else _launch
        run(weights, codes, scales, self.tables, self.plan, self.alone, *self.settings)

    def _check(self, weights: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        if not len(weights) == len(codes) == len(scales):
            raise QATError(
                f"{len(weights)} weights, {len(codes)} codes and {len(scales)} scales: one of each is needed"
            )
        packed = self.settings[6]
        held = torch.uint8 if packed else code_dtype(self.settings[1])
        dtype, device = weights[0].dtype, weights[0].device
        for t, (w, code, scale) in enumerate(zip(weights, codes, scales, strict=True)):
            if w.dtype != dtype or w.dtype not in _DTYPES or not w.device == code.device == scale.device == device:
                raise QATError(
                    f"weight {t} is {w.dtype} on {w.device}, the first {dtype} on {device}: use a list for each"
                )
            rows, columns = w.shape
            if (
                code.dtype != held
                or code.shape != (rows, columns // 2 if packed else columns)
                or (packed and columns % 2)
            ):
                raise QATError(
                    f"codes {t} are {code.dtype} {tuple(code.shape)} for a weight {tuple(w.shape)}, not {held}"
                )
            if scale.dtype != torch.float32 or scale.shape[0] != rows or (columns and columns % scale.shape[1]):
                raise QATError(f"scales {t} are {scale.dtype} {tuple(scale.shape)} for a weight {tuple(w.shape)}")

    def _build(self, weights: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        """One table for each kind of tile."""
        rows: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}
        self.tables, self.plan, self.alone = [], [], []
        for t, (w, code, scale) in enumerate(zip(weights, codes, scales, strict=True)):
            if not w.numel():
                # a group of nothing still has a scale
                self.alone += [t] * bool(scale.numel())
                continue
            units, size, per_half, split = geometry(w.shape[0], w.shape[1], scale.shape[1], self.settings[6])
            together = w.is_contiguous() and code.is_contiguous() and scale.is_contiguous()
            if size > _LONGEST or (split and scale.shape[1] > 1) or not together:
                self.alone.append(t)
                continue
            at = (w.data_ptr(), code.data_ptr(), scale.data_ptr())
            halves = 1 + split if self.settings[6] else 0
            even = int(not any(number % 16 for number in (*at[:2], size)))
            tile = (1 << (size - 1).bit_length(), halves, even)
            rows.setdefault(tile, []).append((*at, units, size, per_half))
        device = weights[0].device
        for (wide, halves, even), table in rows.items():
            high, warps = max(1, TILE // wide), max(4, min(16, wide // 512))
            starts = [0]
            for units in (row[3] for row in table):
                starts.append(starts[-1] + -(-units // high))
            self.tables += [torch.tensor(table, device=device), torch.tensor(starts, dtype=torch.int32, device=device)]
            self.plan += [len(table), starts[-1], high, wide, warps, halves, even]


def _case(name: str, wide: int, dtype: int, halves: int = 0) -> AotCase:
    numbers = dict.fromkeys(("inverse", "lo", "hi", "smallest", "largest"), "fp32")
    constants = {"SIGNED": True, "STORAGE": 2, "POISON": True, "EVEN": True, "STEPS": 9}
    return AotCase(
        f"multi absmax {name}",
        _absmax_kernel,
        {"table": "*i64", "starts": "*i32", "count": "i32", **numbers},
        {"DTYPE": dtype, "HALVES": halves, "BN": max(1, TILE // wide), "BL": wide, **constants},
        num_warps=max(4, min(16, wide // 512)),
    )


AOT = (
    _case("group 32 bf16", 32, 2),
    _case("group 128 fp32", 128, 0),
    _case("group 32 bf16 packed", 32, 2, 1),
    _case("row 4096 bf16", 4096, 2),
    _case("row 16384 fp32", 16384, 0),
    _case("row 4096 bf16 packed", 2048, 2, 2),
)
