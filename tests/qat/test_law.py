"""The law: what is trained is what is packed, bit for bit.

    quantizer(w) == quantizer.integers(w).dequantize() == unpack(pack(quantizer.integers(w))).dequantize()

for every quantizer of the registry, every spec that it takes, every dtype, and every state that training brings a
quantizer into. A new quantizer or format is covered the moment its file exists. The number of cases is asserted, kept
as a property of the test, and printed at the end of the run.

Mutations that were tried one at a time, and the test that turned red for each:

    scale used as computed, not as stored: absmax, lsq, ranges      test_law_for_weights, test_law_for_inputs
    minimum used as computed, not as stored                         test_law_for_weights, test_law_for_inputs
    zero point not rounded / not clamped to the codes               test_law_for_weights, test_any_finite_values
    a stored scale kept in one bf16 part less                       test_law_for_weights, test_any_finite_values
    freeze() forgets theta / a frozen quantizer goes on reading it  test_law_for_weights
    forward or integers() on the deployed bits during a phase       test_law_for_weights
    forward or integers() in the weight's dtype instead of fp32     test_law_for_weights, test_law_for_inputs
    codes always int8                                               test_law_for_weights
    dequantize() casts the scale before the product                 test_law_for_weights
    integers() stores every scale as bf16                           test_law_for_weights
    integers() accepts NaN / a NaN reaches the scale                test_numbers_that_are_not_finite
    portable scales beyond fp16's range                             test_numbers_that_are_not_finite, test_numbers.py
    portable minima not numbers of fp16 / experts_t not permuted    test_numbers.py

What forward and integers() share cannot break the law (a wrong rounding is wrong in both): those mutations are the
business of tests/fake_quant_kernels/test_affine.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qat
from qat.codes import packs
from qat.export.format import Format
from qat.fake_quant_kernels import rowwise4
from qat.fake_quant_kernels.pack import HALVES, PLAIN, ROWS
from qat.grids import KINDS as GRID_KINDS
from qat.layout import Layout
from qat.plan import PlanRow
from qat.quantizers import Fields, Quantizer, _least_squares, _super_blocks, make_quantizer, mse, quantizers
from qat.registry import discover
from qat.scales import SCALE_GRIDS, TwoLevel
from qat.specs import QuantSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIGNS = ((True, False), (False, False), (True, True))
SIZE = 32
SHAPE = (3, 2 * SIZE)
# at least this many equalities; a registry that grows may only add to them
WEIGHT_CASES = {
    "absmean": 370,
    "ewgs": 51000,
    "lsq_plus": 21000,
    "quest": 5500,
    "dual_lsq": 8000,
    "absmax": 8900,
    "lsq": 64000,
    "minmax": 8200,
    "mse": 19900,
}
INPUT_CASES = {"lsq_plus": 3600, "pact": 4900, "absmax": 2400, "ema": 8600, "lsq": 8600, "minmax": 2100, "local": 108}


def specs(quantizer: str, granularities: tuple[str, ...], activation: bool) -> Iterator[QuantSpec]:
    """Every spec that the quantizer does not refuse."""
    axes = product(GRID_KINDS, range(1, 9), SIGNS, granularities, ("none", "int", "float"), SCALE_GRIDS, (False, True))
    for kind, bits, (signed, narrow), granularity, zero, scale, either in axes:
        two_level = dict(getattr(SCALE_GRIDS[scale], "words", ()))
        size = two_level.get("group_size", SIZE) if granularity == "group" else None
        spec = QuantSpec(bits, signed, narrow, granularity, size, zero, scale, quantizer, kind, either)
        if not quantizers()[quantizer].reasons(spec, activation=activation):
            yield spec
            # where a range comes from changes no arithmetic: one width and one kind of scales will do
            share = replace(spec, percentile=90.0)
            few = bits == 3 and scale == "portable"
            if few and not quantizers()[quantizer].reasons(share, activation=activation):
                yield share
            ordered = replace(spec, desc_act=True)
            if few and not quantizers()[quantizer].reasons(ordered, activation=activation):
                yield ordered


def shape_of(spec: QuantSpec) -> tuple[int, int]:
    """Of a weight whose rows can be cut into the spec's groups."""
    run = spec.scale_grid.run if isinstance(spec.scale_grid, TwoLevel) else 1
    return SHAPE[0], 2 * max(SIZE, run)


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers whose rows and groups have different maxima, one group of zeros and one constant."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * torch.logspace(-2, 1, shape[-1] // 8).repeat_interleave(8)
    w = w * torch.linspace(0.1, 3, shape[-2]).unsqueeze(1)
    w[..., 0, :SIZE] = 0.0
    w[..., 1, :SIZE] = -0.37
    return w.to(dtype)


def assert_law(quantizer: Quantizer, w: Tensor, held_by: list[Format], count: Counter[str]) -> None:
    """The equalities for one tensor, counted in `count`: "forward", and one for each format."""
    spec = quantizer.live_spec
    fake = quantizer(w).detach()
    tensor = quantizer.integers(w)
    context = f"{spec} {w.dtype}"
    assert fake.dtype == w.dtype and fake.shape == w.shape, context
    assert bool(torch.isfinite(fake).all()), context
    assert torch.equal(fake, tensor.dequantize()), context
    if spec.is_int:
        lo, hi = spec.int_grid.qmin, spec.int_grid.qmax
        assert int(tensor.codes.min()) >= lo and int(tensor.codes.max()) <= hi, context
    assert tensor.codes.dtype == spec.grid.code_dtype and tensor.scale.dtype == spec.scale_grid.dtype, context
    scale = tensor.scale.float()
    size = scale.abs() if spec.signed_scale else scale
    assert bool((torch.isfinite(scale) & (size > 0)).all()), context
    assert torch.equal(spec.scale_grid.project(size), size), f"{context}: the stored scale is not on its grid"
    if isinstance(spec.scale_grid, TwoLevel):
        decoded = spec.scale_grid.decode(dict(tensor.parts))
        for found, wanted in zip(decoded, (tensor.scale, tensor.minimum), strict=True):
            assert (found is None) == (wanted is None) and (found is None or torch.equal(found, wanted)), context
    else:
        assert not tensor.parts, context
    if tensor.zero_point is not None:
        assert lo <= int(tensor.zero_point.min()) <= int(tensor.zero_point.max()) <= hi, context
    if tensor.minimum is not None:
        assert tensor.minimum.dtype == spec.scale_grid.dtype, context
        assert torch.equal(spec.scale_grid.project_minimum(tensor.minimum.float()), tensor.minimum.float()), context
    layout = quantizer.layout.of(w)
    rows = layout.to_rows(w)
    for form in (PLAIN, HALVES) if packs(spec, rows.shape[1]) else (PLAIN,):
        # what a layer computes with, and what its cache keeps
        codes, fields = quantizer.quantize(rows, spec, form=form)
        hat = spec.grid.decode(codes, *fields, w.dtype, form == HALVES)
        assert torch.equal(layout.from_rows(hat), fake), f"{context}: layer, {form}"
        count["layer"] += 1
    fp16 = spec.is_int and spec.zero_point == "none" and spec.scale_grid.name in ("portable", "fp16")
    groups = spec.groups(rows.shape[1])
    # which holds the scale that its codes were made with
    fp16 = fp16 and not quantizer.codes_fixed
    if fp16 and packs(spec, rows.shape[1]) and spec.granularity != "tensor" and rowwise4.fits(rows, groups):
        codes, fields = quantizer.quantize(rows, spec, form=ROWS)
        if rowwise4.holds(fields.scale):
            hat = rowwise4.decode(codes, w.dtype).view(rows.shape)
            assert torch.equal(layout.from_rows(hat), fake), f"{context}: {ROWS}"
            count[ROWS] += 1
    count["forward"] += 1
    for fmt in held_by:
        if not torch.equal(scale.to(w.dtype).float(), scale):
            # a file keeps scales in the model's dtype; a model in a dtype that cannot hold them is refused as a whole
            continue
        packed = fmt.pack("layer.weight", tensor)
        back = fmt.unpack(packed, spec, tensor.layout, tensor.out_dtype)
        assert torch.equal(back.dequantize(), fake), f"{context}: {fmt.name}"
        # torch compares no 8-bit floats
        same_codes = torch.equal(back.codes.view(torch.uint8), tensor.codes.view(torch.uint8))
        assert same_codes or fmt.name == "gguf", f"{context}: {fmt.name}"
        count[fmt.name] += 1


def holders(spec: QuantSpec) -> list[Format]:
    """The formats of the registry that take this grid for a Linear layer."""
    row = PlanRow("layer", "Linear", "rule", spec, None, SHAPE[0] * SHAPE[1], {"weight": "linear"}, SHAPE[1])
    found = [cls() for cls in discover("qat.export.formats", Format, "qat.formats").values()]
    return [fmt for fmt in found if not fmt.row_reasons(row) and (fmt.desc_act or not spec.desc_act)]


def shuffle(quantizer: Quantizer, seed: int) -> None:
    """Groups of inputs in any order, where the quantizer keeps one."""
    if isinstance(quantizer, mse.Stored) and quantizer.spec.desc_act:
        columns = quantizer.layout.rows_shape[1]
        quantizer.regroup(torch.randperm(columns, generator=torch.Generator().manual_seed(seed)))


def states(quantizer: Quantizer, seed: int) -> Iterator[str]:
    """Bring a quantizer through what training does to it; its name is for messages."""
    yield "as searched"
    for other in (2, 8):
        if quantizer.spec.kind == "int" and quantizer.spec.bits != other:
            quantizer.set_bits(other)
            yield f"a phase of {other} bits"
    quantizer.set_bits(None)
    if not quantizer.learned():
        return
    g = torch.Generator().manual_seed(seed)

    def move() -> None:
        for parameter in quantizer.learned():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=g).to(parameter.dtype)

    for step in range(2):
        move()
        yield f"learned, step {step}"
    quantizer.codes_fixed = True
    move()
    yield "learned, with fixed codes"
    quantizer.codes_fixed = False
    with torch.no_grad():
        before = quantizer.qparams(torch.zeros(quantizer.layout.rows_shape))
        quantizer.freeze()
        quantizer.frozen = True
        assert same(quantizer.qparams(torch.zeros(quantizer.layout.rows_shape)), before), "freezing moved a scale"
    yield "frozen"
    move()
    assert same(quantizer.qparams(torch.zeros(quantizer.layout.rows_shape)), before), "a frozen scale moved"
    yield "frozen, with the optimizer's momentum"


def same(fields: Fields, others: Fields) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(fields, others, strict=True))


def said(count: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in count.items())


@pytest.fixture(autouse=True, scope="module")
def short_search() -> Iterator[None]:
    """The law holds for any scale: a search of 4 candidates instead of 60 is as good here, and much faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mse, "CANDIDATES", 4)
        patch.setattr(_least_squares, "STARTS", (0.5,))
        patch.setattr(_least_squares, "ROUNDS", 1)
        patch.setattr(_super_blocks, "STARTS", (1.0,))
        patch.setattr(_super_blocks, "ROUNDS", 1)
        yield


def for_weights() -> list[str]:
    return [name for name, cls in quantizers().items() if cls.for_weights]


def for_inputs() -> list[str]:
    return [name for name, cls in quantizers().items() if cls.for_activations]


@pytest.mark.parametrize("name", for_weights())
def test_law_for_weights(name: str, record_property: Callable[[str, object], None]) -> None:
    count: Counter[str] = Counter()
    for index, spec in enumerate(specs(name, ("tensor", "channel", "group"), False)):
        held_by = holders(spec)
        for dtype in DTYPES:
            w = sample(shape_of(spec), dtype, index)
            quantizer = make_quantizer(spec, Layout(shape_of(spec)))
            for parameter in quantizer.learned():
                parameter.data = parameter.data.to(dtype)
            shuffle(quantizer, index)
            quantizer.init_from(w)
            for _ in states(quantizer, index):
                now = held_by if quantizer.live_spec.bits == spec.bits else []
                assert_law(quantizer, w, now, count)
    record_property("cases", f"{count.total()} equalities ({said(count)})")
    assert count.total() >= WEIGHT_CASES.get(name, 1)
    if name in ("absmax", "mse", "lsq"):
        found = {(spec.kind, spec.signed_scale) for spec in specs(name, ("channel",), False)}
        # absmax would put both levels of a binary grid at the largest weight
        wanted = set(GRID_KINDS) - ({"binary"} if name == "absmax" else set())
        assert {kind for kind, _ in found} == wanted and (("int", True) in found) == (name != "absmax")
    # a form that nothing fits would pass
    assert count[ROWS] or name not in ("absmax", "mse", "lsq") or not rowwise4._exact()
    assert {fmt.name for spec in specs(name, ("channel", "group"), False) for fmt in holders(spec)} <= set(count)


@pytest.mark.parametrize("name", for_inputs())
def test_law_for_inputs(name: str, record_property: Callable[[str, object], None]) -> None:
    count: Counter[str] = Counter()
    for index, spec in enumerate(specs(name, ("tensor", "token", "group"), True)):
        for dtype in DTYPES:
            quantizer = make_quantizer(spec, Layout((1, 1), "tokens"))
            for step in range(3 if quantizer.static_activations else 1):
                x = sample((2, 3, 2 * SIZE), dtype, index + step)
                assert_law(quantizer, x, [], count)
                quantizer.observe(x.reshape(-1, x.shape[-1]))
                quantizer.commit()
                for parameter in quantizer.learned():
                    parameter.data += 0.02
            if quantizer.static_activations:
                quantizer.freeze()
                quantizer.frozen = True
                assert_law(quantizer, sample((4, 2 * SIZE), dtype, index), [], count)
    record_property("cases", f"{count.total()} equalities ({said(count)})")
    assert count.total() >= INPUT_CASES.get(name, 1)


KINDS = {
    "linear": (6, 8),
    "embedding": (6, 8),
    "transposed": (8, 6),
    "conv": (6, 2, 2, 2),
    "deconv": (2, 6, 2, 2),
    "experts": (2, 3, 8),
    "experts_t": (2, 8, 3),
}


@pytest.mark.parametrize("name", for_weights())
@pytest.mark.parametrize("kind", KINDS)
def test_law_for_every_layout(kind: str, name: str) -> None:
    cases = (("tensor", None, False), ("channel", None, False), ("group", 2, False), ("group", 2, True))
    for granularity, size, desc_act in cases:
        zero = "none" if "none" in quantizers()[name].zero_points else "int"
        # which is not for integers
        codes = "fp4" if name == "dual_lsq" else "int"
        spec = QuantSpec(4, zero == "none", False, granularity, size, zero, "portable", name, codes, desc_act=desc_act)
        w = torch.randn(KINDS[kind], generator=torch.Generator().manual_seed(1))
        quantizer = make_quantizer(spec, Layout(KINDS[kind], kind))
        shuffle(quantizer, 2)
        quantizer.init_from(w)
        assert torch.equal(quantizer(w), quantizer.integers(w).dequantize())


FAMILIES = {
    "zeros": [0.0, -0.0],
    "constants": [0.37, -0.37],
    "denormals": [1e-40, -3e-42, 1.4e-45],
    "tiny": [1e-30, -1e-38],
    "huge": [3e38, -3e38],
    "ties": [0.5, 1.5, -2.5, 3.5, -0.5],
    "ordinary": [0.1, -1.7, 2.3, -0.003],
}


def every_spec() -> st.SearchStrategy[QuantSpec]:
    found = [spec for name in for_weights() for spec in specs(name, ("tensor", "channel", "group"), False)]
    return st.sampled_from(found)


@given(every_spec(), st.data(), st.sampled_from(DTYPES))
def test_any_finite_values(spec: QuantSpec, data: st.DataObject, dtype: torch.dtype) -> None:
    pool = data.draw(st.lists(st.sampled_from(sorted(FAMILIES)), min_size=1, max_size=3))
    values = data.draw(st.lists(st.sampled_from([v for f in pool for v in FAMILIES[f]]), min_size=4, max_size=16))
    columns = shape_of(spec)[1]
    w = torch.tensor(values).repeat(columns // len(values) + 1)[:columns].reshape(1, -1).to(dtype)
    w = w.nan_to_num(posinf=torch.finfo(dtype).max, neginf=torch.finfo(dtype).min)
    quantizer = make_quantizer(spec, Layout(tuple(w.shape)))
    quantizer.init_from(w)
    fake, tensor = quantizer(w).detach(), quantizer.integers(w)
    assert torch.equal(fake, tensor.dequantize())
    assert not bool(torch.isnan(fake).any())
    scale = tensor.scale.float().abs() if spec.signed_scale else tensor.scale.float()
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    assert torch.equal(spec.scale_grid.project(scale), scale)


@given(every_spec(), st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.integers(0, 2 * SIZE - 1))
def test_numbers_that_are_not_finite(spec: QuantSpec, value: float, at: int) -> None:
    """Codes are refused in words; a forward never makes a scale that is NaN, infinite or not positive."""
    w = torch.linspace(-1, 1, shape_of(spec)[1]).reshape(1, -1)
    quantizer = make_quantizer(spec, Layout(tuple(w.shape)))
    quantizer.init_from(w)
    w[0, at] = value
    with pytest.raises(qat.QATError, match="not finite"):
        quantizer.integers(w)

    def usable(scale: Tensor) -> bool:
        return bool((torch.isfinite(scale) & ((scale.abs() if spec.signed_scale else scale) > 0)).all())

    found = quantizer.fields(w)
    assert usable(found.scale)
    for field in (found.zero, found.minimum):
        assert field is None or bool(torch.isfinite(field).all())
    quantizer.init_from(w)
    found = quantizer.fields(w)
    assert usable(found.scale)


def test_an_input_that_is_not_finite_leaves_the_range_as_it_was() -> None:
    for name in ("ema", "lsq"):
        spec = QuantSpec(8, False, False, "tensor", None, "int", "portable", name)
        quantizer = make_quantizer(spec, Layout((1, 1), "tokens"))
        good = torch.linspace(-1, 2, 64).reshape(2, 32)
        quantizer.observe(good)
        quantizer.commit()
        before = quantizer.qparams(good)
        for value in (float("nan"), float("inf")):
            quantizer.observe(torch.full((2, 32), value))
            quantizer.commit()
        assert all(a is b or torch.equal(a, b) for a, b in zip(before, quantizer.qparams(good), strict=True)), name
