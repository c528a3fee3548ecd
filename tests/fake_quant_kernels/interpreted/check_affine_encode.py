"""Codes: the kernel against the reference, every bit, NaN and infinities too."""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, families, generator, same, ties, views
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels.affine_encode import affine_encode

# columns and groups: odd, not powers of two, whole rows longer than a tile, one number in a group
SHAPES = [(1, 1), (63, 1), (63, 9), (64, 2), (96, 4), (1000, 1), (1000, 125), (1023, 1), (1023, 33), (2100, 1)]
GRIDS = [(-8, 7), (-7, 7), (0, 15), (-128, 127), (0, 255), (-1, 0), (0, 1)]


def fields(w: Tensor, groups: int, kind: str, lo: int, hi: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales that let about a tenth of normal numbers clip; groups 0: one for the tensor."""
    shape = (1, 1) if groups == 0 else (w.shape[0], groups)
    g = generator(groups)
    scale = (torch.rand(shape, generator=g) + 0.5) * 3.0 / (hi - lo + 1)
    zero = torch.randint(lo, hi + 1, shape, generator=g).float() if kind == "int" else None
    minimum = torch.randn(shape, generator=g) - 1 if kind == "float" else None
    return scale, zero, minimum


@pytest.mark.parametrize("dtype", DTYPES)
def test_families(dtype: torch.dtype) -> None:
    """Mutation: clip after rint by lo..hi - 1 -> red."""
    for at, (columns, groups) in enumerate(SHAPES):
        for name, w in families((3, columns), dtype, at, columns // groups, not_finite=True).items():
            lo, hi = GRIDS[at % len(GRIDS)]
            kind = ("none", "int", "float")[at % 3]
            same(affine_encode, w, *fields(w, groups, kind, lo, hi), lo, hi, False, context=f"{name} {columns} {kind}")


@pytest.mark.parametrize("kind", ["none", "int", "float"])
def test_every_grid(kind: str) -> None:
    """Mutation: low = lo + z -> red."""
    for lo, hi in GRIDS:
        for groups in (0, 1, 5):
            w = families((5, 40), torch.float32, lo + hi, not_finite=True)["not finite"]
            same(affine_encode, w, *fields(w, groups, kind, lo, hi), lo, hi, False, context=f"{lo}..{hi} {groups}")


@pytest.mark.parametrize("kind", ["none", "int", "float"])
def test_packed(kind: str) -> None:
    """An even and an odd number of groups, one for the row, one for all. Mutation: SPLIT = 0 throughout -> red."""
    for columns, groups in [(64, 2), (64, 1), (64, 0), (96, 3), (2, 1), (1000, 5), (1000, 0), (1022, 7), (4200, 1)]:
        for lo, hi in ((-8, 7), (0, 15)):
            for dtype in DTYPES:
                w = families((3, columns), dtype, columns, not_finite=True)["not finite"]
                same(affine_encode, w, *fields(w, groups, kind, lo, hi), lo, hi, True, context=f"{columns} {groups}")


def test_exact_ties() -> None:
    """Mutation: the reciprocal by an approximate division, or floor(x + 0.5) as rounding -> red."""
    for dtype in DTYPES:
        w, step = ties((9, 96), dtype, 1, 16)
        same(affine_encode, w, step, None, None, -8, 7, False)
        same(affine_encode, w, step * 0.999, torch.ones_like(step), None, -8, 7, True)


def test_layouts() -> None:
    w = torch.randn(6, 60)
    scale, zero, _ = fields(w, 4, "int", -8, 7)
    assert zero is not None
    for view in views(w).values():
        same(affine_encode, view, scale, zero, None, -8, 7, False)
        same(affine_encode, view, views(scale)["every second"], views(zero)["transposed"], None, -8, 7, True)
    for empty in (torch.empty(0, 8), torch.empty(4, 0)):
        same(affine_encode, empty, torch.ones(empty.shape[0], 1), None, None, -8, 7, True)
    with pytest.raises(QATError, match="even number of columns"):
        affine_encode.triton(torch.ones(2, 3), torch.ones(2, 1), None, None, -8, 7, True)
