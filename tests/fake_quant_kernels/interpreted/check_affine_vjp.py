"""Gradients: dw bit for bit; the sums, whose order differs, against sums in fp64 of the reference's own fp32 terms."""

from __future__ import annotations

import pytest
import torch
from check_affine_encode import GRIDS, SHAPES, fields
from compare import DTYPES, families, same, views, within
from torch import Tensor

from qat.fake_quant_kernels.affine_vjp import affine_vjp

# a tree over 1024 numbers and the partial sums of a row, each addition within half an ulp, and the product's own
ULPS = 16.0


def sums(found: Tensor, scale: Tensor, w: Tensor, terms: Tensor) -> None:
    blocks = terms.double().reshape(w.shape[0], scale.shape[1], -1)
    exact, magnitude = blocks.sum(-1), blocks.abs().sum(-1)
    within("affine_vjp", found, exact.sum_to_size(scale.shape), magnitude.sum_to_size(scale.shape), ULPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "int", "float"])
def test_families(kind: str, dtype: torch.dtype) -> None:
    """Mutations: clipped == v as clipped != v; rint left out of ds; `across` one too small -> red."""
    for at, (columns, groups) in enumerate([*SHAPES, (1000, 0), (5000, 1), (63, 0)]):
        lo, hi = GRIDS[at % len(GRIDS)]
        for name in ("normal", "ties", "zero groups"):
            w = families((3, columns), dtype, at, columns // max(groups, 1))[name]
            g = torch.randn(w.shape, generator=torch.Generator().manual_seed(at)).to(dtype)
            s, z, m = fields(w, groups, kind, lo, hi)
            found, _ = same(
                affine_vjp, g, w, s, z, m, lo, hi, True, True, True, context=f"{name} {columns} {groups}", but=(1, 2)
            )
            # the terms once more, one group for each number: sums of one term are the terms
            each = [
                None if t is None else t.expand(3, s.shape[1]).repeat_interleave(columns // s.shape[1], 1)
                for t in (s, z, m)
            ]
            _, ds, lost = affine_vjp.reference(g, w, *each, lo, hi, True, True, True)
            sums(found[1], s, w, ds)
            sums(found[2], s, w, lost)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_needs(needs: tuple[bool, bool, bool]) -> None:
    """What is not needed is empty."""
    w, g = torch.randn(3, 24), torch.randn(3, 24)
    s, z, _ = fields(w, 3, "int", -8, 7)
    found, _ = same(affine_vjp, g, w, s, z, None, -8, 7, *needs, but=(1, 2))
    assert [t.numel() > 0 for t in found] == list(needs)


def test_numbers_that_are_not_finite() -> None:
    w = families((3, 24), torch.float32, 0, not_finite=True)["not finite"]
    w[:, 3] = 3e38
    s, g = torch.full((3, 2), 1e-5), torch.randn(3, 24)
    found, wanted = same(affine_vjp, g, w, s, None, None, -8, 7, True, True, True, but=(1, 2))
    assert torch.equal(found[1].isnan(), wanted[1].isnan()) and bool(found[2].isfinite().all())


def test_layouts() -> None:
    w, g = torch.randn(6, 60), torch.randn(6, 60)
    s, z, _ = fields(w, 4, "int", -8, 7)
    assert z is not None
    for name, view in views(w).items():
        same(affine_vjp, views(g)[name], view, s, views(z)["transposed"], None, -8, 7, True, True, True, but=(1, 2))
    for empty in (w[:0], w[:, :0]):
        rows = torch.ones(empty.shape[0], 1)
        same(affine_vjp, empty, empty, rows, None, None, -8, 7, True, True, True)
