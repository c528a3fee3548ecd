"""codebook: Triton against the reference on every input family, table, dtype, layout and place of the scales.

Mutations of `elements.nearest` and `blocks` that were tried, and what turned red:

    v <= midpoint -> v < midpoint                               test_midpoints
    two midpoints of the tree exchanged (m5 and m9)             test_families
    code & 15 of the upper half left out in dequantize_kernel   test_families
"""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, families, generator, same, views, within
from torch import Tensor

from qat.fake_quant_kernels import codebook
from qat.fake_quant_kernels.elements import scaled

TABLES = {
    "nf4": codebook.NF4,
    "fp4": codebook.FP4,
    "bnb_fp4": codebook.BNB_FP4,
    "iq4_nl": codebook.IQ4_NL,
    "ternary": codebook.TERNARY,
    "seq2": codebook.SEQ2,
    "five": (-2.0, -0.5, 0.0, 1.0, 3.0),
    "two": (-1.0, 1.0),
}
FP16 = (torch.float16, 2.0**-14, 65504.0)


def scales(rows: int, groups: int, seed: int) -> Tensor:
    return 0.05 + torch.rand(rows, groups, generator=generator(seed))


@pytest.mark.parametrize("name", TABLES)
def test_families(name: str) -> None:
    levels = torch.tensor(TABLES[name])
    s, inv = scales(3, 4, 1), 1.0 / float(levels.abs().max())
    for dtype in DTYPES if name == "nf4" else DTYPES[:1]:
        for family, w in families((3, 64), dtype, 0, 16, not_finite=True).items():
            context = f"{name} {family} {dtype}"
            found, _ = same(codebook.encode_dynamic, w, levels, 4, inv, *FP16, False, context=context)
            same(codebook.fake, w, s, levels, torch.float16, context=context)
            if name not in ("nf4", "five", "seq2"):
                continue
            same(codebook.encode_dynamic, w, levels, 4, inv, *FP16, True, context=context)
            same(codebook.fake_dynamic, w, levels, 4, inv, *FP16, torch.float32, context=context)
            same(codebook.encode, w, s, levels, False, context=context)
            same(codebook.encode, w, s, levels, True, context=context)
            same(codebook.decode, found[0], found[1], levels, torch.float32, False, context=context)
            same(codebook.decode, codebook.pack(found[0]), found[1], levels, torch.float32, True, context=context)
            g = torch.randn(3, 64, generator=generator(2))
            same(codebook.vjp, g, w, s, levels, -1.0, 1.0, True, False, context=context)


@pytest.mark.parametrize("name", TABLES)
def test_midpoints(name: str) -> None:
    """Exact midpoints, levels and their neighbours: the tie goes to the lower level in both. Mutation: <= to <."""
    levels = torch.tensor(TABLES[name])
    middle = (levels[1:] + levels[:-1]) * 0.5
    points = torch.cat((levels, middle))
    up, down = torch.full_like(points, torch.inf), torch.full_like(points, -torch.inf)
    w = torch.cat((points, torch.nextafter(points, up), torch.nextafter(points, down))).reshape(1, -1)
    for power in (-20, 0, 7):
        s = torch.tensor([[2.0**power]])
        found, _ = same(codebook.encode, w * s, s, levels, False, context=name)
        n = len(levels)
        assert torch.equal(found[0][0, n : 2 * n - 1], torch.arange(n - 1, dtype=torch.uint8))
        same(codebook.fake, w * s, s, levels, torch.float32, context=name)


@pytest.mark.parametrize("columns", [1, 63, 1000, 1023, 4100])
@pytest.mark.parametrize("groups", [0, 1])
def test_sizes(columns: int, groups: int) -> None:
    """Odd rows, blocks longer than a tile, one scale for the tensor (groups = 0)."""
    levels = torch.tensor(codebook.NF4)
    w = torch.randn(5, columns, generator=generator(columns))
    s = scales(5, 1, 3) if groups else scales(1, 1, 3)
    g = torch.randn(w.shape, generator=generator(4))
    for packed in (False, True) if columns % 2 == 0 else (False,):
        found, _ = same(codebook.encode, w, s, levels, packed)
        same(codebook.decode, found[0], s, levels, torch.float32, packed)
        same(codebook.encode_dynamic, w, levels, 1, 1.0, *FP16, packed)
    same(codebook.fake_dynamic, w, levels, 1, 1.0, *FP16, torch.float32)
    found, _ = same(codebook.vjp, g, w, s, levels, -1.0, 1.0, True, True, but=(1,))
    v = scaled(w, s).double()
    inside = (v >= -1) & (v <= 1)
    u = levels.double()[codebook.nearest(v.float(), levels).long()]
    terms = g.double().reshape(v.shape) * (u - v * inside)
    exact, size = terms.sum(-1), (g.double().reshape(v.shape).abs() * (u.abs() + v.abs() * inside)).sum(-1)
    within("codebook_vjp", found[1], exact.sum_to_size(s.shape), size.sum_to_size(s.shape), 24)


@pytest.mark.parametrize(("columns", "groups"), [(48, 2), (126, 2), (72, 3), (4096, 4), (20000, 1), (40000, 2)])
def test_groups(columns: int, groups: int) -> None:
    """Groups that are no powers of two, odd numbers of groups with packed codes, blocks that are read twice."""
    levels = torch.tensor(codebook.FP4)
    rows = 9 if columns < 1000 else 1
    w = torch.randn(rows, columns, generator=generator(columns))
    s = scales(rows, groups, 5)
    for packed in (False, True):
        found, _ = same(codebook.encode_dynamic, w, levels, groups, 1.0 / 6.0, *FP16, packed)
        same(codebook.decode, *found, levels, torch.float32, packed)
        same(codebook.encode, w, s, levels, packed)
    same(codebook.fake_dynamic, w, levels, groups, 1.0 / 6.0, *FP16, torch.float32)


def test_layouts_and_nothing() -> None:
    levels = torch.tensor(codebook.NF4)
    w, s = torch.randn(4, 32, generator=generator(0)), scales(4, 2, 1)
    for name, view in views(w).items():
        same(codebook.encode, view, s, levels, True, context=name)
        same(codebook.fake_dynamic, view, levels, 2, 1.0, *FP16, torch.float32, context=name)
        same(codebook.vjp, view, view, s.T.contiguous().T, levels, -1.0, 1.0, True, False, context=name)
    for shape in ((0, 32), (4, 0)):
        empty = torch.empty(shape)
        same(codebook.encode_dynamic, empty, levels, 2, 1.0, *FP16, True)
        same(codebook.fake, empty, s[: shape[0]], levels, torch.float32)
        same(codebook.vjp, empty, empty, s[: shape[0]], levels, -1.0, 1.0, True, True)
