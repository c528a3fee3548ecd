"""The search over candidate scales against the plain formula: one pass over the weight for each candidate.

Mutations of `fake_quant_kernels/mse_search.py` that were tried, and the first test that turned red for each:

    _chosen: the last of equal errors                  test_chooses_what_the_plain_formula_chooses
    _errors: bounds lo, hi with a zero point           test_chooses_what_the_plain_formula_chooses
    _errors: .add_(offset) left out                    test_chooses_what_the_plain_formula_chooses
    _errors: the tail `rest` left out                  test_chooses_what_the_plain_formula_chooses
    _steps: halves instead of neighbours               test_chooses_what_the_plain_formula_chooses
    _reference: pieces added one after the other       test_error_sums_are_the_tree_of_neighbours
    _reference: importance of group 0 for all          test_importance
    _chosen: NaN not taken for infinite                test_not_finite_groups_keep_the_whole_range
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.fake_quant_kernels import mse_search
from qat.qtensor import Fields
from qat.quantizers import mse
from qat.quantizers.mse import CANDIDATES, SMALLEST_FACTOR, search
from qat.scales import SCALE_GRIDS
from qat.specs import QuantSpec

SIGNS = ((True, False), (False, False), (True, True))
FACTORS = torch.linspace(1.0, SMALLEST_FACTOR, CANDIDATES)


@pytest.fixture(autouse=True)
def candidates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the candidates is left out (`qat.quantizers._least_squares`)."""
    monkeypatch.setattr(mse, "refined", lambda w, spec, found, importance: (found[0], torch.zeros_like(found[0].scale)))


def specs() -> Iterator[QuantSpec]:
    """Every spec that can be, but for the sizes of groups."""
    axes = product(range(1, 9), SIGNS, ("tensor", "channel", "group"), ("none", "int", "float"), SCALE_GRIDS)
    for bits, (signed, narrow), granularity, zero, scale in axes:
        spec = QuantSpec(bits, signed, narrow, granularity, 24 if granularity == "group" else None, zero, scale, "mse")
        # powers of two have candidates of their own, and what all rows share is chosen for all of them
        if not spec.reasons() and scale not in ("e8m0", "exl2"):
            yield spec


def plain_fields(low: Tensor, high: Tensor, spec: QuantSpec) -> Fields:
    grid, stored = spec.grid, spec.scale_grid
    if spec.zero_point == "float":
        minimum = stored.project_minimum(low)
        return Fields(stored.project((high - minimum) * (1.0 / grid.steps)), None, minimum)
    if spec.zero_point == "int":
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = stored.project((high - low) * (1.0 / grid.steps))
        return Fields(scale, (grid.qmin - torch.round(low * (1.0 / scale))).clamp(grid.qmin, grid.qmax), None)
    reach = grid.steps / 2 if grid.signed else grid.qmax
    return Fields(stored.project(torch.maximum(-low, high) * (1.0 / reach)), None, None)


def plain_errors(blocks: Tensor, fields: Fields, spec: QuantSpec) -> Tensor:
    """Squared errors of blocks [R, G, g] under fields [R, G], with the dtype of the blocks."""
    scale, zero, minimum = (None if t is None else t.unsqueeze(-1) for t in fields)
    grid = spec.grid
    assert scale is not None
    if minimum is not None:
        value = torch.round(torch.clamp((blocks - minimum) * (1.0 / scale), grid.qmin, grid.qmax)) * scale + minimum
    else:
        shift = torch.zeros_like(scale) if zero is None else zero
        codes = torch.round(torch.clamp(blocks * (1.0 / scale), grid.qmin - shift, grid.qmax - shift)) + shift
        value = (codes - shift) * scale
    return (value - blocks).square()


def plain_search(blocks: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Fields:
    """The formula, in the open: the first of the least torch.sum."""
    low, high = blocks.amin(-1), blocks.amax(-1)
    best, least = plain_fields(low, high, spec), torch.full(low.shape, torch.inf)
    for factor in FACTORS.tolist():
        found = plain_fields(low * factor, high * factor, spec)
        errors = plain_errors(blocks, found, spec)
        error = (errors if importance is None else errors * importance).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = Fields(
            *(None if a is None or b is None else torch.where(better, a, b) for a, b in zip(found, best, strict=True))  # type: ignore[arg-type]
        )
    return best


def blocks_of(w: Tensor, spec: QuantSpec) -> Tensor:
    return w.reshape(1, 1, -1) if spec.granularity == "tensor" else w.reshape(w.shape[0], spec.groups(w.shape[1]), -1)


def sample(rows: int, columns: int, seed: int) -> Tensor:
    """Heavy tails, rows and columns of different size, one group of zeros, one constant, one of one sign."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * torch.rand(rows, columns, generator=g).reciprocal().clamp(max=9.0)
    w = w * torch.linspace(0.05, 3.0, rows).unsqueeze(1)
    w[0, :24], w[1, :24] = 0.0, -0.37
    w[2] = w[2].abs() + 0.5
    return w


def arguments(spec: QuantSpec, groups: int) -> tuple[Any, ...]:
    """The operation's arguments after the weight."""
    grid, stored = spec.grid, spec.scale_grid
    kind = ("none", "int", "float").index(spec.zero_point)
    reach = grid.steps if kind else grid.steps / 2 if grid.signed else grid.qmax
    bounds = (stored.dtype, stored.smallest, stored.largest, stored.name == "portable")
    return (FACTORS, groups, kind, grid.qmin, grid.qmax, 1.0 / reach, *bounds)


def assert_fields(found: Fields, wanted: Fields, context: str) -> int:
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None), context
        if a is not None and b is not None:
            assert a.dtype == torch.float32
            assert torch.equal(a, b), f"{context}: {int((a != b).sum())} of {a.numel()} differ"
    return found.scale.numel()


def test_chooses_what_the_plain_formula_chooses(record_property: Any) -> None:
    """Mutation: decode without the minimum in _errors -> red."""
    count = 0
    for i, spec in enumerate(specs()):
        w = sample(5, 48, seed=i)
        count += assert_fields(search(w, spec), plain_search(blocks_of(w, spec), spec), str(spec))
    assert count > 3000
    record_property("cases", f"{count} groups")


@pytest.mark.parametrize("size", [1, 2, 31, 33, 63, 1000, 1023, 1 << 14])
def test_sizes(size: int) -> None:
    for zero, spec in (
        (z, QuantSpec(4, signed=False, zero_point=z, quantizer="mse")) for z in ("none", "int", "float")
    ):
        w = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
        assert_fields(search(w, spec), plain_search(blocks_of(w, spec), spec), f"{size} {zero}")


def test_nearly_all_choices_are_the_plain_ones_and_all_are_as_good(record_property: Any) -> None:
    """Where two candidates are closer than the rounding of a sum, the order of the sum decides: an error within it."""
    spec = QuantSpec(4, granularity="group", group_size=32, quantizer="mse")
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(7))
    blocks = blocks_of(w, spec)
    found, wanted = search(w, spec), plain_search(blocks, spec)
    different = int((found.scale != wanted.scale).sum())
    assert different <= found.scale.numel() * 1e-3
    mine, theirs = (plain_errors(blocks, fields, spec).double().sum(-1) for fields in (found, wanted))
    assert bool((mine <= theirs * (1 + 2 * (5 + 3) * 2.0**-24)).all())
    record_property("cases", f"{different} of {found.scale.numel()} groups differ")


def tree(terms: np.ndarray) -> np.float32:
    """The docstring's order, one number at a time."""
    while len(terms) > 1:
        pairs = [np.float32(terms[i] + terms[i + 1]) for i in range(0, len(terms) - 1, 2)]
        terms = np.array(pairs + list(terms[len(terms) - len(terms) % 2 :]), dtype=np.float32)
    return terms[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [1, 5, 24, 32, 63, 100, 256, 1000, 1023])
@pytest.mark.parametrize("piece", [64, 1 << 16])
def test_error_sums_are_the_tree_of_neighbours(size: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the work is cut. Mutation: even, odd = halves in _steps -> red."""
    monkeypatch.setattr(mse_search, "_PIECE", piece)
    spec = QuantSpec(3, quantizer="mse")
    w = torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    scale, offset, error = mse_search.search.reference(w, *arguments(spec, 1))
    assert offset.shape == (0,) and scale.shape == error.shape == (4, 1)
    terms = plain_errors(blocks_of(w, spec), Fields(scale, None, None), spec)[:, 0]
    assert error[:, 0].tolist() == [float(tree(row.numpy())) for row in terms]
    exact = terms.double().sum(-1)
    assert bool(((error[:, 0].double() - exact).abs() <= exact * np.ceil(np.log2(max(size, 2))) * 2.0**-24).all())


def test_ties_go_to_the_widest_range() -> None:
    """Zeros are exact under every candidate; 3 is as far from 4 as from 2."""
    spec = QuantSpec(8, scale="fp32", quantizer="mse")
    scale, _, error = mse_search.search.reference(torch.zeros(2, 40), *arguments(spec, 1))
    assert torch.equal(scale, torch.full((2, 1), spec.scale_grid.smallest)) and not error.any()
    # codes -1..1, scales 4 and 2, and the 4 that sets the range is of no importance
    w, importance = torch.tensor([[4.0, 3.0, -3.0]]), torch.tensor([0.0, 1.0, 1.0])
    tied = (torch.tensor([1.0, 0.5]), 1, 0, -1, 1, 1.0, torch.float32, 2.0**-110, 2.0**119, False, importance)
    scale, _, error = mse_search.search.reference(w, *tied)
    assert float(scale) == 4.0 and float(error) == 2.0
    scale, _, error = mse_search.search.reference(w, tied[0][1:], *tied[1:])
    assert float(scale) == 2.0 and float(error) == 2.0


def test_importance() -> None:
    """Weighted sums, per column and per number; numbers of no importance are clipped away."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(70, 96, generator=g)
    for zero in ("none", "int", "float"):
        spec = QuantSpec(3, signed=False, granularity="group", group_size=32, zero_point=zero, quantizer="mse")
        for shape in ((96,), (70, 96)):
            importance = torch.rand(shape, generator=g).square()
            scale, offset, _ = mse_search.search.reference(w, *arguments(spec, 3), importance)
            kind = spec.zero_point
            found = Fields(scale, offset if kind == "int" else None, offset if kind == "float" else None)
            wide = importance.expand(70, 96).reshape(70, 3, 32)
            assert_fields(found, plain_search(blocks_of(w, spec), spec, wide), f"{kind} {shape}")
    w[:, 0] = 6.0
    unweighted = mse_search.search.reference(w, *arguments(QuantSpec(3, quantizer="mse"), 1))[0]
    importance = torch.ones(96)
    importance[0] = 0.0
    weighted = mse_search.search.reference(w, *arguments(QuantSpec(3, quantizer="mse"), 1), importance)[0]
    assert bool((weighted < unweighted).all())


def test_not_finite_groups_keep_the_whole_range() -> None:
    """No candidate has a finite error: the first, as storage bounds it. The other groups are as ever."""
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    w[0, 3], w[1, 40] = torch.nan, torch.inf
    for zero in ("none", "int", "float"):
        spec = QuantSpec(8, False, granularity="group", group_size=32, zero_point=zero, scale="fp16", quantizer="mse")
        found, wanted = search(w, spec), plain_search(blocks_of(w.nan_to_num(0.0, 0.0), spec), spec)
        assert float(found.scale[0, 0]) == float(found.scale[1, 1]) == spec.scale_grid.largest
        assert all(t is None or bool(torch.isfinite(t).all()) for t in found)
        error = mse_search.search.reference(w, *arguments(spec, 2))[2]
        assert torch.equal(error.isinf(), torch.tensor([[True, False], [False, True], [False, False]]))
        for at in ((0, 1), (1, 0), (2, 0), (2, 1)):
            assert all(a is None or b is None or a[at] == b[at] for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0)])
def test_nothing(shape: tuple[int, int]) -> None:
    for spec in specs():
        if spec.bits == 4 and spec.scale == "portable":
            found = search(torch.empty(shape), spec)
            rows = 1 if spec.granularity == "tensor" else shape[0]
            groups = 1 if spec.granularity == "tensor" else spec.groups(shape[1])
            assert found.scale.shape == (rows, groups)
            assert bool((found.scale == spec.scale_grid.smallest).all())


def test_other_dtypes_and_layouts() -> None:
    """bf16 is read as fp32; the order in memory does not matter."""
    spec = QuantSpec(4, granularity="group", group_size=16, zero_point="int", quantizer="mse")
    w = torch.randn(48, 20, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = mse_search.search.reference(w.t().float().contiguous(), *arguments(spec, 3))
    found = mse_search.search.reference(w.t(), *arguments(spec, 3))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_opcheck() -> None:
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    for zero in ("none", "float"):
        spec = QuantSpec(4, False, granularity="group", group_size=32, zero_point=zero, quantizer="mse")
        args = (w, FACTORS[:3], *arguments(spec, 2)[1:])
        torch.library.opcheck(mse_search.search.custom, args)
        torch.library.opcheck(mse_search.search.custom, (*args, torch.rand(64)))
