"""Grids, scale grids, specs, layouts and QTensors: the data that everything above speaks in."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qat
from qat.grids import GRIDS, IntGrid
from qat.layout import Layout
from qat.qtensor import QTensor, tensor_sha256
from qat.quantizers import make_quantizer, mse, quantizer_class, quantizers
from qat.quantizers._parts import joined, split
from qat.quantizers._ranges import fields_of_range, range_of_fields, scales_of_amax
from qat.recipes.checks import SCALES
from qat.scales import SCALE_GRIDS, TwoLevel, scale_grid
from qat.specs import QuantSpec

# bits, signed, narrow -> qmin, qmax
TRUTH = [
    (8, True, False, -128, 127),
    (8, True, True, -127, 127),
    (8, False, False, 0, 255),
    (5, True, False, -16, 15),
    (4, True, False, -8, 7),
    (4, True, True, -7, 7),
    (4, False, False, 0, 15),
    (3, True, True, -3, 3),
    (2, True, False, -2, 1),
    (2, True, True, -1, 1),
    (2, False, False, 0, 3),
    (1, True, False, -1, 0),
    (1, False, False, 0, 1),
]


@pytest.mark.parametrize(("bits", "signed", "narrow", "qmin", "qmax"), TRUTH)
def test_integer_grids(bits: int, signed: bool, narrow: bool, qmin: int, qmax: int) -> None:
    grid = IntGrid(bits, signed, narrow)
    assert (grid.qmin, grid.qmax, grid.steps) == (qmin, qmax, qmax - qmin)
    assert grid.reasons() == []
    assert torch.tensor([qmin, qmax]).to(grid.code_dtype).tolist() == [qmin, qmax]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (IntGrid(0), "not in 1..8"),
        (IntGrid(9), "not in 1..8"),
        (IntGrid(4, False, True), "narrow"),
        (IntGrid(1, True, True), "ternary"),
    ],
)
def test_grids_that_do_not_exist(grid: IntGrid, words: str) -> None:
    assert any(words in reason for reason in grid.reasons())


# ---- scales ----------------------------------------------------------------------------------------------------------

ANY = st.lists(st.floats(width=32), min_size=1, max_size=8).map(torch.tensor)


@given(ANY, st.sampled_from(sorted(SCALE_GRIDS)))
def test_a_stored_scale_is_finite_positive_and_stays(values: Tensor, name: str) -> None:
    grid = SCALE_GRIDS[name]
    for function in (grid.project, *([] if name == "e8m0" else [grid.project_minimum])):
        stored = function(values)
        assert stored.dtype == torch.float32 and bool(torch.isfinite(stored).all())
        assert torch.equal(stored.to(grid.dtype).float(), stored)
        assert torch.equal(function(stored), stored)
    assert bool((grid.project(values) >= grid.smallest).all())


@given(ANY)
def test_a_portable_number_is_the_same_in_every_dtype(values: Tensor) -> None:
    grid = SCALE_GRIDS["portable"]
    for stored in (grid.project(values), grid.project_minimum(values)):
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(stored.to(dtype).float(), stored)


@pytest.mark.parametrize("name", SCALE_GRIDS)
def test_projection_is_nearest_and_straight_through(name: str) -> None:
    grid = SCALE_GRIDS[name]
    values = torch.logspace(-4, 4, 200).requires_grad_()
    stored = grid.project(values)
    step = 2.0**-1 if name == "e8m0" else {1: 2.0**-8, 2: 2.0**-11, 3: 0.0}[grid.parts]
    assert bool(((stored - values).abs() <= step * values.clamp(2.0**-14)).all())
    (grad,) = torch.autograd.grad(stored.sum(), values)
    assert torch.equal(grad, torch.ones(200))
    ends = grid.project(torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -1.0]))
    assert ends.tolist() == [grid.largest, grid.largest, grid.smallest, grid.smallest, grid.smallest]
    # the largest code times the largest scale is still a number
    assert torch.isfinite(torch.tensor(grid.largest) * 255)


def test_unknown_scales_are_refused() -> None:
    with pytest.raises(qat.RecipeError, match="use one of portable"):
        scale_grid("fp8")


@given(ANY, st.sampled_from(sorted(SCALE_GRIDS)))
def test_split_numbers_survive_bf16_storage(values: Tensor, name: str) -> None:
    grid = SCALE_GRIDS[name]
    for stored in (grid.project(values), *([] if name == "e8m0" else [grid.project_minimum(values)])):
        parts = split(stored, grid.parts)
        assert torch.equal(parts.to(torch.bfloat16).float(), parts)
        assert torch.equal(joined(parts), stored) and torch.equal(joined(parts.bfloat16()), stored)


@pytest.mark.parametrize("zero_point", ["none", "int", "float"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ranges_and_fields_are_inverse(bits: int, zero_point: str) -> None:
    spec = QuantSpec(bits, zero_point == "none", granularity="tensor", zero_point=zero_point)
    fields = fields_of_range(torch.tensor([[-1.3]]), torch.tensor([[2.7]]), spec)
    back = fields_of_range(*range_of_fields(fields, spec), spec)
    assert all(a is b or torch.equal(a, b) for a, b in zip(fields, back, strict=True))


# ---- specs -----------------------------------------------------------------------------------------------------------


def test_specs_round_trip_and_name_themselves() -> None:
    spec = QuantSpec(3, False, False, "group", 64, "int", "fp16", "minmax")
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert str(spec) == "uint3 g64 zp fp16 minmax"
    assert spec.bits_per_weight(128) == 3 + (16 + 3) / 64
    assert QuantSpec(4).bits_per_weight(100) == 4 + 16 / 100
    assert QuantSpec(4, granularity="tensor").bits_per_weight(100) == 4
    assert QuantSpec(4, granularity="tensor").groups(100) == 1 and spec.groups(128) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 9}, "not in 1..8"),
        ({"granularity": "row"}, "granularity='row' is unknown"),
        ({"granularity": "group"}, "group_size goes with 'group'"),
        ({"group_size": 32}, "group_size goes with 'group'"),
        ({"granularity": "group", "group_size": 0}, "not positive"),
        ({"zero_point": "half"}, "zero_point='half' is unknown"),
        ({"zero_point": "float"}, "needs signed=false"),
        ({"scale": "fp8"}, "scale='fp8' is unknown"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_impossible_specs_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(qat.RecipeError, match=words):
        QuantSpec.from_dict(change)


def test_groups_that_do_not_divide_name_those_that_do() -> None:
    spec = QuantSpec(4, granularity="group", group_size=48)
    assert spec.shape_reasons(96) == []
    assert "[16, 32, 64]" in spec.shape_reasons(64)[0]
    assert "granularity=channel" in spec.shape_reasons(7)[0]


def test_quantizers_refuse_what_they_are_not_for() -> None:
    def reasons(name: str, **spec: Any) -> str:
        activation = spec.pop("activation", False)
        return "; ".join(quantizer_class(name).reasons(QuantSpec(quantizer=name, **spec), activation=activation))

    assert "not for weights" in reasons("ema", granularity="tensor")
    assert "not for inputs" in reasons("mse", granularity="tensor", activation=True)
    assert "keeps one scale per input" in reasons("lsq", granularity="token", activation=True)
    assert "no output channels" in reasons("absmax", granularity="channel", activation=True)
    assert "a weight has no tokens" in reasons("absmax", granularity="token")
    assert "has zero_point none, not 'int'" in reasons("absmax", zero_point="int")
    assert "has zero_point int, float" in reasons("minmax")
    with pytest.raises(qat.QATError, match="quantizer='lqs' is unknown; use one of absmax"):
        quantizer_class("lqs")


# ---- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "linear": ((3, 4), (3, 4)),
    "embedding": ((5, 4), (5, 4)),
    "transposed": ((4, 3), (3, 4)),
    "conv": ((6, 2, 3, 5), (6, 30)),
    "deconv": ((2, 6, 3, 5), (6, 30)),
    "experts": ((2, 3, 4), (6, 4)),
    "experts_t": ((2, 4, 3), (6, 4)),
    "tokens": ((2, 3, 4), (6, 4)),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_are_inverse(kind: str) -> None:
    shape, rows_shape = LAYOUTS[kind]
    layout = Layout(shape, kind)
    w = torch.arange(torch.Size(shape).numel()).reshape(shape)
    rows = layout.to_rows(w)
    assert tuple(rows.shape) == layout.rows_shape == rows_shape
    assert torch.equal(layout.from_rows(rows), w)


def test_rows_are_what_feeds_one_output() -> None:
    w = torch.randn(4, 3)
    assert torch.equal(Layout((4, 3), "transposed").to_rows(w)[1], w[:, 1])
    w = torch.randn(2, 6, 3, 5)
    assert torch.equal(Layout(tuple(w.shape), "deconv").to_rows(w)[4], w[:, 4].reshape(-1))
    w = torch.randn(2, 4, 3)
    assert torch.equal(Layout(tuple(w.shape), "experts_t").to_rows(w)[3 + 1], w[1, :, 1])


# ---- QTensor ---------------------------------------------------------------------------------------------------------


def test_a_qtensor_is_its_equation() -> None:
    codes = torch.tensor([[0, 3, 1, 2], [3, 3, 0, 0]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 2.0], [1.0, 4.0]])
    zero = torch.tensor([[1, 0], [3, 2]], dtype=torch.int16)
    layout = Layout((2, 4))
    spec = QuantSpec(2, False, granularity="group", group_size=2, zero_point="int", scale="fp32", quantizer="minmax")
    tensor = QTensor(codes, scale, zero, None, spec, layout, torch.bfloat16)
    assert tensor.dequantize().dtype == torch.bfloat16
    assert tensor.dequantize().tolist() == [[-0.5, 1.0, 2.0, 4.0], [0.0, 0.0, -8.0, -8.0]]
    floated = QTensor(codes, scale, None, zero.float(), spec, layout, torch.float32)
    assert floated.dequantize().tolist() == [[1.0, 2.5, 2.0, 4.0], [6.0, 6.0, 2.0, 2.0]]
    assert tensor.dequantize(torch.float64).dtype == torch.float64


def test_hashes_are_of_numbers() -> None:
    a = torch.tensor([[0.0, 1.0], [2.0, -3.0]])
    assert tensor_sha256(a) == tensor_sha256(a.t().contiguous().t()) == tensor_sha256(torch.where(a == 0, -a, a))
    assert tensor_sha256(a) != tensor_sha256(a.t()) and tensor_sha256(a) != tensor_sha256(a.half())
    assert tensor_sha256(torch.empty(0)) == tensor_sha256(torch.empty(0, 3))


# ---- how scales are found --------------------------------------------------------------------------------------------


def test_the_search_is_never_worse_than_absmax() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(8, 64, generator=g) ** 3
    for bits, granularity in itertools.product((1, 2, 3, 4, 8), ("tensor", "channel", "group")):
        size = 16 if granularity == "group" else None
        zero = "float" if bits == 1 else "none"
        spec = QuantSpec(bits, zero == "none", False, granularity, size, zero, "portable", "mse")
        searched, dynamic = (
            make_quantizer(QuantSpec.from_dict({**spec.to_dict(), "quantizer": name}), Layout((8, 64)))
            for name in ("mse", "minmax" if bits == 1 else "absmax")
        )
        searched.init_from(w)
        assert float((searched(w) - w).square().sum()) <= float((dynamic(w) - w).square().sum())


def test_absmax_keeps_the_error_within_half_a_step() -> None:
    w = torch.linspace(-3, 3, 64).reshape(2, 32)
    for bits in range(2, 9):
        quantizer = make_quantizer(QuantSpec(bits, scale="fp32"), Layout((2, 32)))
        assert float(((quantizer(w) - w).abs() / quantizer.qparams(w).scale).max()) <= 0.5001


def test_a_learned_scale_follows_its_formula() -> None:
    from qat.quantizers.lsq import RATE

    spec = QuantSpec(4, scale="fp32", quantizer="lsq")
    quantizer: Any = make_quantizer(spec, Layout((3, 8)))
    w = torch.randn(3, 8)
    quantizer.init_from(w)
    start = quantizer.qparams(w).scale
    quantizer.theta.data += torch.tensor([[0.0], [0.1], [-0.1]])
    torch.testing.assert_close(quantizer.qparams(w).scale, start * torch.exp(RATE * quantizer.theta))
    quantizer.theta.data.fill_(-1e4)
    assert float(quantizer.qparams(w).scale.detach().min()) == spec.scale_grid.smallest
    quantizer.theta.data.fill_(1e4)
    assert float(quantizer.qparams(w).scale.detach().max()) == spec.scale_grid.largest


@pytest.mark.parametrize("scale", SCALE_GRIDS)
def test_stored_scales_survive_a_cast_of_the_module(scale: str) -> None:
    """bf16-true casts every buffer: searched and frozen scales are sums of bf16 numbers, so nothing is lost."""
    w = torch.randn(4, 256)
    grid = SCALE_GRIDS[scale]
    words: dict[str, Any] = dict(grid.words) if isinstance(grid, TwoLevel) else {"signed": False, "zero_point": "float"}
    for name in ("mse", "lsq"):
        spec = QuantSpec(**{"bits": 4, "scale": scale, "quantizer": name, **words})
        if spec.granularity == "group" and spec.group_size is None:
            spec = replace(spec, group_size=64)
        quantizer = make_quantizer(spec, Layout((4, 256)))
        quantizer.init_from(w)
        before = quantizer.integers(w)
        after = quantizer.to(torch.bfloat16).integers(w)
        assert torch.equal(before.codes, after.codes) and torch.equal(before.scale, after.scale)
        assert (before.minimum is None) == (spec.zero_point == "none")
        assert before.minimum is None or (after.minimum is not None and torch.equal(before.minimum, after.minimum))


def test_a_moving_range(recipe: Any) -> None:
    from qat.quantizers.ema import MOMENTUM

    quantizer: Any = make_quantizer(
        QuantSpec(8, False, False, "tensor", None, "int", "fp32", "ema"), Layout((1, 1), "tokens")
    )
    low, high = 0.0, 0.0
    for step, (now_low, now_high) in enumerate([(-1.0, 1.0), (-2.0, 5.0), (-0.5, 0.5)]):
        quantizer.observe(torch.tensor([[now_low, now_high]]))
        quantizer.observe(torch.tensor([[0.0, now_high / 2]]))
        quantizer.commit()
        share = 1.0 if step == 0 else MOMENTUM
        low, high = low + share * (now_low - low), high + share * (now_high - high)
        torch.testing.assert_close(joined(quantizer.range), torch.tensor([-low, high]))
    before = joined(quantizer.range)
    quantizer.commit()
    quantizer.frozen = True
    quantizer.observe(torch.tensor([[-99.0, 99.0]]))
    quantizer.commit()
    assert torch.equal(joined(quantizer.range), before)


@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_ranges_that_hold_a_share_of_the_numbers(zero: str) -> None:
    """Of each group of a weight at the start, of each step's inputs; the numbers beyond clip. Mutations: the share of
    signed numbers without a zero point; `rank` one more; the low end not mirrored; ema with all numbers: red."""
    spec = QuantSpec(8, zero == "none", False, "group", 100, zero, "fp32", "lsq", percentile=90.0)
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 200, generator=g)
    quantizer: Any = make_quantizer(spec, Layout(tuple(w.shape)))
    quantizer.init_from(w)
    kept = torch.sort(w.view(3, 2, 100)).values
    magnitude = torch.sort(w.view(3, 2, 100).abs()).values[..., 89]
    low, high = (-magnitude, magnitude) if zero == "none" else (kept[..., 10], kept[..., 89])
    assert torch.equal(quantizer.start().scale, fields_of_range(low, high, spec).scale)
    clipped = (quantizer(w).abs() < w.abs() - 0.05).view(3, 2, 100).sum(-1)
    assert int(clipped.max()) <= (10 if zero == "none" else 20) and int(clipped.min()) > 0

    spec = QuantSpec(8, zero == "none", False, "tensor", None, zero, "fp32", "ema", percentile=90.0)
    moving: Any = make_quantizer(spec, Layout((1, 1), "tokens"))
    moving.observe(w[:1, :100])
    moving.commit()
    torch.testing.assert_close(joined(moving.range), torch.stack([-low[0, 0], high[0, 0]]))
    learned: Any = make_quantizer(replace(spec, quantizer="lsq"), Layout((1, 1), "tokens"))
    learned.observe(w[:1, :100])
    learned.commit()
    torch.testing.assert_close(learned.start().scale, moving.qparams(w).scale)


def test_quantizers_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes of one name are an error that names both."""
    from qat.quantizers import base
    from qat.registry import discover

    class Absmax(base.Quantizer):
        name = "absmax"

    try:
        with pytest.raises(qat.QATError, match="are both called 'absmax'"):
            discover.__wrapped__("qat.quantizers", base.Quantizer, "qat.quantizers")
    finally:
        # a class is found as long as it has its name
        Absmax.name = ""


@pytest.mark.parametrize("scale", ["portable", "e8m0"])
@pytest.mark.parametrize("kind", sorted(GRIDS))
def test_searched_scales_of_every_kind_are_the_best_candidates(kind: str, scale: str) -> None:
    """No candidate has less error, and the search is better than the widest range. Mutations: `error > least`; the
    candidates without the smaller ones."""
    bits = GRIDS[kind].bits
    spec = QuantSpec(bits, granularity="group", group_size=32, scale=scale, quantizer="mse", kind=kind)
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-2, 1, 6).unsqueeze(1)
    amax = w.reshape(6, 2, 32).abs().amax(-1)

    def error(s: Tensor) -> Tensor:
        fake = spec.grid.fake_quantize(w, s, None, None)
        return (fake.double() - w.double()).square().reshape(6, 2, 32).sum(-1)

    found = error(mse.search(w, spec).scale)
    if scale == "e8m0":
        others = [scales_of_amax(amax, spec).scale * factor for factor in (2.0, 1.0, 0.5)]
    else:
        others = [scales_of_amax(amax * factor, spec).scale for factor in torch.linspace(1, 0.2, 60).tolist()]
    assert all(bool((found <= error(other) * (1 + 1e-6)).all()) for other in others)
    # a power of two shifts the codes of 8-bit floats and changes none of their numbers
    same = scale == "e8m0" and kind in ("e4m3", "e5m2")
    assert same or float(found.sum()) < float(error(others[0]).sum())


def test_a_scale_takes_the_sign_that_serves_it() -> None:
    """The extra negative code goes to the longer side. Mutation: the mirrored search left out."""
    spec = QuantSpec(3, granularity="group", group_size=8, quantizer="mse", signed_scale=True)
    side = torch.tensor([-1.0, -0.8, -0.2, 0.1, 0.3, 0.5, 0.7, 0.75])
    w = torch.stack([side, -side])
    scale = mse.search(w, spec).scale
    assert scale.sign().tolist() == [[1.0], [-1.0]] and float(scale.sum()) == 0.0

    def error(s: Tensor) -> Tensor:
        return (spec.grid.fake_quantize(w, s, None, None) - w).square().sum(1, keepdim=True)

    plain = mse.search(w, QuantSpec(3, granularity="group", group_size=8, quantizer="mse")).scale
    assert float(error(scale)[1]) < float(error(plain)[1]) and float(error(scale)[0]) == float(error(plain)[0])


# ---- scales of two levels --------------------------------------------------------------------------------------------

TWO_LEVELS = [name for name, grid in SCALE_GRIDS.items() if isinstance(grid, TwoLevel)]


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_scales_of_two_levels(name: str) -> None:
    """As near as the codes allow, in what a file holds, with gradients as if nothing had been rounded. Mutations:
    `decode` takes no minima; a sign is lost; `stored` detaches."""
    grid = SCALE_GRIDS[name]
    assert isinstance(grid, TwoLevel)
    words = dict(grid.words)
    g = torch.Generator().manual_seed(3)
    scale = (torch.rand(3, 32, generator=g) + 0.1).requires_grad_()
    minimum = -torch.rand(3, 32, generator=g) if words.get("zero_point") == "float" else None
    stored, low = grid.stored(scale, minimum)
    parts = grid.encode(scale.detach(), minimum)
    assert torch.equal(stored, grid.decode(parts)[0]) and (low is None) == (minimum is None)
    steps = {"q2_k": 15, "q3_k": 31, "q4_k": 63, "q5_k": 63, "q6_k": 127}
    if name in steps:
        half = 0.51 * float(scale.detach().max()) / steps[name]
        assert int(parts["sc"].min()) >= 1 and int(parts["sc"].max()) == steps[name]
        assert parts["d"].dtype == torch.float16 and float((stored - scale).detach().abs().max()) <= half
        if low is not None and minimum is not None:
            assert float((low - minimum).abs().max()) <= 0.51 * float(-minimum.min()) / steps[name]
            assert float(grid.stored(scale, minimum.abs())[1].abs().max()) == 0.0  # type: ignore[union-attr]
        else:
            assert torch.equal(grid.stored(-scale, None)[0], -stored)
    else:
        assert float(((stored - scale).abs() / scale).detach().max()) <= (0.07 if name.startswith("nvfp4") else 0.16)
    (grad,) = torch.autograd.grad(stored.sum(), scale)
    assert torch.equal(grad, torch.ones_like(scale))


def test_scales_of_two_levels_are_for_one_kind_of_tensor() -> None:
    """In words, with what to write instead."""
    assert set(SCALE_GRIDS) == set(SCALES)
    found = QuantSpec(4, granularity="group", group_size=32, scale="q4_k").reasons()
    assert found == ["scale='q4_k' stores scales of one kind of tensor only; use signed=False, zero_point=float"]
    spec = QuantSpec(3, granularity="group", group_size=16, scale="q3_k")
    assert not spec.reasons() and not spec.shape_reasons(512)
    assert spec.shape_reasons(384) == ["scale='q3_k' needs rows of a multiple of 256 numbers, not 384"]
    sizes = {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "nvfp4": 4.5, "bnb_nested": 4.125}
    sizes["exl2"] = 4.0625
    for name, size in sizes.items():
        grid = SCALE_GRIDS[name]
        assert isinstance(grid, TwoLevel)
        spec = QuantSpec(**{"bits": 4, "scale": name, "group_size": 64, **dict(grid.words)})
        assert spec.bits_per_weight(512) == size
    assert any("is for weights" in reason for reason in make_reasons("absmax", "nvfp4"))


def make_reasons(quantizer: str, scale: str) -> list[str]:
    grid = SCALE_GRIDS[scale]
    assert isinstance(grid, TwoLevel)
    spec = QuantSpec(**{"bits": 4, "scale": scale, "quantizer": quantizer, **dict(grid.words)})
    return quantizers()[quantizer].reasons(spec, activation=True)


def test_a_nested_offset_does_not_depend_on_threads() -> None:
    """Mutation: the mean in fp32."""
    grid = SCALE_GRIDS["bnb_nested"]
    assert isinstance(grid, TwoLevel)
    threads = torch.get_num_threads()
    try:
        for seed in range(8):
            scale = torch.rand(1024, 256, generator=torch.Generator().manual_seed(seed)) + 0.01
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(grid.encode(scale, None)["offset"])
            assert all(torch.equal(found[0], other) for other in found)
    finally:
        torch.set_num_threads(threads)
