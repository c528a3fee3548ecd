"""Fields and codes in one pass: the kernel against the reference, every bit, NaN and infinities too."""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, elements, families, same, ties, views
from torch import Tensor

from qat.fake_quant_kernels.dynamic import dynamic_absmax, dynamic_minmax

# storage, smallest, largest, half
STORAGES = [
    (torch.bfloat16, 2.0**-14, 65280.0, True),
    (torch.float32, 2.0**-110, 2.0**119, False),
    (torch.float16, 2.0**-14, 65504.0, False),
    (torch.bfloat16, 2.0**-126, 2.0**119, False),
    (torch.float8_e4m3fn, 2.0**-9, 448.0, False),
    (torch.float8_e8m0fnu, 2.0**-126, 2.0**119, False),
]
SHAPES = [(1, 1), (63, 1), (63, 9), (64, 2), (96, 4), (1000, 1), (1000, 125), (1023, 1), (1023, 31), (2100, 1)]
PACKED = [(64, 2), (64, 1), (96, 3), (2, 1), (1000, 5), (1022, 7), (1000, 1), (4200, 1), (1056, 44)]


def inputs(at: int, dtype: torch.dtype) -> list[tuple[str, int, Tensor]]:
    """(name, groups, numbers) of SHAPES[at]: all families for one of the shapes, two for the others.

    Without bf16's denormals, which the interpreter (not a GPU) widens to other numbers.
    """
    columns, groups = SHAPES[at]
    found = families((3, columns), dtype, at, columns // groups, not_finite=True)
    names = found if at == 6 else ("zero groups", "not finite")
    tiny = torch.finfo(dtype).tiny if dtype == torch.bfloat16 else 0.0
    return [(f"{name} {columns} {groups}", groups, found[name] * (found[name].abs() >= tiny)) for name in names]


@pytest.mark.parametrize("index", range(len(STORAGES)))
def test_absmax(index: int) -> None:
    """Mutation: the maximum of x in place of |x| -> red."""
    for at in range(len(SHAPES)):
        for name, groups, w in inputs(at, DTYPES[(at + index) % 3]):
            lo, hi = ((-8, 7), (0, 255), (-127, 127))[at % 3]
            how = lo, hi, *STORAGES[index][:3], False, at % 2 == 0
            same(dynamic_absmax, w, groups, 2 / (hi - lo) if lo else 1 / hi, *how, context=name)


@pytest.mark.parametrize("index", range(len(STORAGES)))
def test_minmax(index: int) -> None:
    """Mutations: the range without 0 for a zero point; a minimum that is not rounded before the scale -> red."""
    for at in range(len(SHAPES)):
        for name, groups, w in inputs(at, DTYPES[(at + index) % 3]):
            lo, hi = ((-8, 7), (0, 255))[at % 2]
            same(dynamic_minmax, w, groups, 1 / (hi - lo), lo, hi, *STORAGES[index], False, False, True, context=name)
            # e8m0 has no sign: it stores no minimum
            if STORAGES[index][0] != torch.float8_e8m0fnu:
                same(dynamic_minmax, w, groups, 1 / 15, 0, 15, *STORAGES[index], True, False, False, context=name)


@pytest.mark.parametrize("poison", [False, True])
def test_packed(poison: bool) -> None:
    """An even number of groups, one for the row, and three, which packing cuts. Mutation: the scale of a packed
    row from its lower half -> red."""
    for at, (columns, groups) in enumerate(PACKED):
        found = families((3, columns), DTYPES[at % 3], columns, columns // groups, not_finite=True)
        for name in ("ties", "not finite"):
            how, context = (True, poison), f"{name} {columns} {groups}"
            same(dynamic_absmax, found[name], groups, 1 / 7.5, -8, 7, *STORAGES[0][:3], *how, context=context)
            for minimum in (False, True):
                same(dynamic_minmax, found[name], groups, 1 / 15, 0, 15, *STORAGES[0], minimum, *how, context=context)


def test_poison() -> None:
    """NaN shows in its own group alone. Mutation: `high != high` false -> red."""
    w = torch.randn(3, 64)
    w[1, 40], w[2, 3] = float("nan"), float("inf")
    for op, rest in ((dynamic_absmax, ()), (dynamic_minmax, (True, False)), (dynamic_minmax, (True, True))):
        how = (w, 4, 1 / 15, *((-8, 7) if op is dynamic_absmax else (0, 15)), *STORAGES[0][:3], *rest, False)
        for poison in (False, True):
            found, _ = same(op, *how, poison)
            assert found[1].isnan().nonzero().tolist() == ([[1, 2]] if poison else [])


def test_exact_ties() -> None:
    for dtype in DTYPES:
        w, step = ties((9, 96), dtype, 1, 16)
        found, _ = same(dynamic_absmax, w, 6, 1 / 7, -8, 7, torch.float32, 2.0**-110, 2.0**119, False, False)
        assert torch.equal(found[1], step), "the sample has no exact ties any more"


@pytest.mark.parametrize("index", range(len(STORAGES)))
def test_scales_halfway_between_stored_numbers(index: int) -> None:
    """Groups of one number, which is the scale before it is stored. Mutation: e8m0 adds 0x3FFFFF -> red."""
    storage, smallest, largest, half = STORAGES[index]
    drop = {torch.float16: 13, torch.float8_e4m3fn: 20, torch.float8_e8m0fnu: 23}.get(storage, 16)
    bits = (torch.randint(100, 150, (4, 120), generator=torch.Generator().manual_seed(1)) << 23 >> drop << drop).int()
    if drop < 23:
        bits += torch.arange(120, dtype=torch.int32) % (1 << (23 - drop)) << drop
    w = (bits + (torch.arange(-1, 3, dtype=torch.int32).clamp(max=1)[:, None] + (1 << (drop - 1)))).view(torch.float32)
    found, _ = same(dynamic_absmax, w, 120, 1.0, -8, 7, storage, smallest, largest, False, False)
    assert storage == torch.float32 or bool((found[1] != w).all())
    if storage != torch.float8_e8m0fnu:
        same(dynamic_minmax, -w, 120, 1.0, 0, 15, storage, smallest, largest, half, True, False, False)


def test_long_rows_and_layouts() -> None:
    """Rows beyond what a program holds take two passes, with the same numbers."""
    before = elements["dynamic_absmax"]
    w = torch.randn(2, 17000)
    same(dynamic_absmax, w, 1, 1 / 127, -127, 127, *STORAGES[1][:3], False, True)
    same(dynamic_minmax, w, 1, 1 / 255, 0, 255, *STORAGES[1], False, False, True)
    assert elements["dynamic_absmax"] == before + 2 * 17001
    small = torch.randn(6, 60)
    for view in views(small).values():
        same(dynamic_absmax, view, 4, 1 / 7.5, -8, 7, *STORAGES[0][:3], True, False)
        same(dynamic_minmax, view, 4, 1 / 15, 0, 15, *STORAGES[0], True, False, False)
    for empty in (small[:0], small[:, :0]):
        same(dynamic_absmax, empty, 2, 1 / 7.5, -8, 7, *STORAGES[0][:3], False, False)
        same(dynamic_minmax, empty, 2, 1 / 15, 0, 15, *STORAGES[0], True, False, False)
