"""Fake quantization in one pass: the kernel against the reference, every bit; NaN stays where it is."""

from __future__ import annotations

import pytest
import torch
from check_affine_encode import GRIDS, SHAPES, fields
from compare import DTYPES, families, same, views

from qat.fake_quant_kernels.affine import affine_fake


@pytest.mark.parametrize("dtype", DTYPES)
def test_families(dtype: torch.dtype) -> None:
    """Mutation: NaN as q = 0 -> red."""
    for at, (columns, groups) in enumerate([*SHAPES, (1000, 0)]):
        lo, hi = GRIDS[at % len(GRIDS)]
        for kind in ("none", "int", "float"):
            for name in ("normal", "ties", "magnitudes", "not finite"):
                w = families((3, columns), dtype, at, columns // max(groups, 1), not_finite=True)[name]
                # the interpreter truncates a cast to bf16, a GPU rounds
                out = (torch.float32, torch.float16)[at % 2]
                same(affine_fake, w, *fields(w, groups, kind, lo, hi), lo, hi, out, context=f"{name} {columns} {kind}")


def test_layouts() -> None:
    w = torch.randn(6, 60)
    scale, zero, _ = fields(w, 4, "int", -8, 7)
    for view in views(w).values():
        same(affine_fake, view, views(scale)["transposed"], zero, None, -8, 7, torch.float32)
    same(affine_fake, w[:0], scale[:0], None, None, -8, 7, torch.float32)
