"""The one rounding against two that share no code with it: NumPy in fp32, and torch's own fake quantization.

Mutations of `fake_quant_kernels/affine.py` that were tried, and the test that turned red for each:

    r = 1 / s used as w / s                       test_equals_numpy
    torch.round -> torch.floor                    test_equals_numpy, test_equals_torch_fake_quantize
    upper bound hi - z -> hi - z - 1              test_equals_numpy, test_equals_torch_fake_quantize
    ds without `- value` inside                   test_gradients_are_those_of_torch_learnable_fake_quantize
    inside: >= low -> > low                       test_gradients_on_the_bounds_count_as_inside
    part: a chunk's rows of the scale -> all      test_chunks_change_nothing
    sub_(128.0) left out (uint8 above 127)        test_equals_numpy, test_codes_and_their_types
    nan_to_num_ left out of encode                test_a_nan_has_the_code_of_zero
    packed: halves swapped                        test_packed_codes_are_the_codes
    poisoned: infinities not replaced             test_poisoned
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels import rows as rows_module
from qat.fake_quant_kernels.affine import affine_fake, decode, encode, fake_quantize, poisoned, rounded, vjp
from qat.fake_quant_kernels.affine_decode import affine_decode
from qat.fake_quant_kernels.affine_encode import affine_encode
from qat.fake_quant_kernels.affine_vjp import affine_vjp

RANGES = [(-8, 7), (-7, 7), (0, 15), (-128, 127), (0, 255), (-1, 0), (0, 1), (-2, 1)]
KINDS = ["none", "int", "float"]


def numpy_encode(
    w: np.ndarray, s: np.ndarray, z: np.ndarray | None, m: np.ndarray | None, lo: int, hi: int
) -> np.ndarray:
    """The docstring's formulas, one group at a time, every operation in float32."""
    one, codes = np.float32(1), np.empty_like(w)
    groups = s.shape[1]
    size = w.shape[1] // groups
    for row in range(w.shape[0]):
        for group in range(groups):
            at = (0, 0) if s.size == 1 else (row, group)
            block = w[row, group * size : (group + 1) * size]
            r = one / s[at]
            if m is not None:
                block = block - m[at]
            zero = np.float32(0) if z is None else z[at]
            value = np.minimum(np.maximum(block * r, np.float32(lo) - zero), np.float32(hi) - zero)
            codes[row, group * size : (group + 1) * size] = np.rint(value) + zero
    return codes


def numpy_decode(q: np.ndarray, s: np.ndarray, z: np.ndarray | None, m: np.ndarray | None) -> np.ndarray:
    size = q.shape[1] // s.shape[1]
    wide = [None if t is None else np.broadcast_to(t.repeat(size, 1), q.shape) for t in (s, z, m)]
    value = (q if wide[1] is None else q - wide[1]) * wide[0]
    return value if wide[2] is None else value + wide[2]


def fields(kind: str, groups: int, lo: int, hi: int, seed: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 24, generator=g) * torch.logspace(-3, 2, 5).unsqueeze(1)
    shape = (1, 1) if groups == 0 else (5, groups)
    s = torch.rand(shape, generator=g) * w.abs().max() / max(hi - lo, 1) + 1e-4
    z = torch.randint(lo, hi + 1, shape, generator=g).float() if kind == "int" else None
    m = torch.randn(shape, generator=g) if kind == "float" else None
    return w, s, z, m


@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_numpy(kind: str, groups: int) -> None:
    for seed, (lo, hi) in enumerate(RANGES * 6):
        w, s, z, m = fields(kind, groups, lo, hi, seed)
        # exact ties and values on the bounds, where a wrong rounding shows
        w[:, :8] = (torch.arange(8) - 3.5) * s[:, :1]
        codes = encode(w, s, z, m, lo, hi)
        parts = [None if t is None else t.numpy() for t in (s, z, m)]
        assert np.array_equal(codes.numpy(), numpy_encode(w.numpy(), *parts, lo, hi))
        assert codes.min() >= lo and codes.max() <= hi
        expected = numpy_decode(codes.numpy(), *parts)
        assert np.array_equal(decode(codes, s, z, m).numpy(), expected)
        assert np.array_equal(fake_quantize(w, s, z, m, lo, hi).numpy(), expected)


def test_the_reciprocal_is_taken_once_per_scale() -> None:
    """Some numbers fall on other codes with a division: the arithmetic that is named is the one that is used."""
    s = torch.linspace(0.003, 0.2, 64).unsqueeze(1)
    w = (torch.arange(0, 127, dtype=torch.float32) + 0.5).reshape(1, -1) * s
    codes = encode(w, s, None, None, -128, 127)
    assert torch.equal(codes.float(), torch.round(w * (1.0 / s)))
    assert not torch.equal(codes.float(), torch.round(w / s)), "the sample no longer tells the two apart"


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("lo", "hi"), RANGES)
def test_equals_torch_fake_quantize(lo: int, hi: int, zero: bool) -> None:
    w, s, z, _ = fields("int" if zero else "none", 1, lo, hi, 3)
    torch_zero = torch.zeros(5, dtype=torch.int32) if z is None else z[:, 0].int()
    if not lo <= int(torch_zero.min()) or not int(torch_zero.max()) <= hi:
        pytest.skip("torch wants the zero point within the codes")
    expected = torch.fake_quantize_per_channel_affine(w, s[:, 0], torch_zero, 0, lo, hi)
    assert torch.equal(fake_quantize(w, s, z, None, lo, hi), expected)


@pytest.mark.parametrize(("lo", "hi"), [(-8, 7), (0, 15), (-128, 127)])
def test_gradients_are_those_of_torch_learnable_fake_quantize(lo: int, hi: int) -> None:
    w, s, z, _ = fields("int", 1, lo, hi, 11)
    s = s / 3
    g = torch.randn_like(w)
    ours = [w.clone().requires_grad_(), s.clone().requires_grad_()]
    fake_quantize(ours[0], ours[1], z, None, lo, hi).backward(g)
    theirs = [w.clone().requires_grad_(), s[:, 0].clone().requires_grad_()]
    zero = z[:, 0].clone().requires_grad_()
    torch._fake_quantize_learnable_per_channel_affine(*theirs, zero, 0, lo, hi, 1.0).backward(g)
    assert torch.equal(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(
        ours[1].grad[:, 0], theirs[1].grad, rtol=1e-4, atol=1e-4 * float(theirs[1].grad.abs().max())
    )


def ste(w: Tensor, s: Tensor, z: Tensor | None, m: Tensor | None, lo: int, hi: int) -> Tensor:
    """Plain autograd: a straight-through round inside the clamp, everything else as written."""
    blocks = w.reshape(w.shape[0], s.shape[1], -1)
    s, z, m = (None if t is None else t.unsqueeze(-1) for t in (s, z, m))
    zero = 0.0 if z is None else z
    v = (blocks if m is None else blocks - m) * (1.0 / s)
    clamped = torch.where(v < lo - zero, lo - zero + v * 0, torch.where(v > hi - zero, hi - zero + v * 0, v))
    rounded = clamped + (torch.round(clamped) - clamped).detach()
    out = rounded * s
    return (out if m is None else out + m).reshape(w.shape)


@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_plain_autograd(kind: str, groups: int) -> None:
    w, s, z, m = fields(kind, groups, -8, 7, 5)
    w, s = w.double(), s.double() / 3
    z, m = (None if t is None else t.double() for t in (z, m))
    g = torch.randn_like(w)
    found = []
    for function in (fake_quantize, ste):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (w, s, z, m)]
        function(*leaves, -8, 7).backward(g)
        found.append([None if t is None else t.grad for t in leaves])
    for ours, plain in zip(*found, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_gradients_on_the_bounds_count_as_inside() -> None:
    w = torch.tensor([[-8.0, 7.0, -8.01, 7.01]], requires_grad=True)
    fake_quantize(w, torch.ones(1, 1), None, None, -8, 7).sum().backward()
    assert w.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_a_value_beyond_fp32_gives_no_nan() -> None:
    w, s = torch.tensor([[3e38, -3e38, 0.1]], requires_grad=True), torch.full((1, 1), 1e-5, requires_grad=True)
    fake_quantize(w, s, None, None, -8, 7).sum().backward()
    assert w.grad.tolist() == [[0.0, 0.0, 0.0]] and s.grad.tolist() == [[7.0 - 8.0 + 7.0]]


def test_identity_passes_every_gradient() -> None:
    w = torch.tensor([[-80.0, 0.3, 80.0]], requires_grad=True)
    fake_quantize(w, torch.ones(1, 1), None, None, -8, 7, True).backward(torch.tensor([[1.0, 2.0, 3.0]]))
    assert w.grad.tolist() == [[1.0, 2.0, 3.0]]


@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8),
    st.floats(min_value=2.0**-110, max_value=2.0**119, width=32),
    st.sampled_from(RANGES),
    st.integers(0, 255),
)
def test_codes_stay_within_the_grid(values: list[float], scale: float, bounds: tuple[int, int], zero: int) -> None:
    """Any weight, infinite ones too, and any scale that can be stored."""
    lo, hi = bounds
    w, s = torch.tensor([values]), torch.full((1, 1), scale)
    z = torch.full((1, 1), float(min(max(zero, lo), hi)))
    for each in (None, z):
        codes = encode(w, s, each, None, lo, hi)
        assert bool(((codes >= lo) & (codes <= hi) & (codes == codes.round())).all())
        assert bool(torch.isfinite(decode(codes, s, each, None)).all())


@pytest.mark.parametrize(("lo", "hi"), RANGES)
def test_codes_and_their_types(lo: int, hi: int) -> None:
    """int8 where there are negative codes, else uint8, at both ends of the grid; from weights of any float dtype."""
    w = torch.tensor([[-1e9, lo, 0.0, hi, 1e9]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        codes = encode(w.to(dtype), torch.ones(1, 1), None, None, lo, hi)
        assert codes.dtype == (torch.int8 if lo < 0 else torch.uint8)
        assert codes.tolist() == [[lo, lo, 0, hi, hi]]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = decode(codes, torch.full((1, 1), 0.5), None, torch.ones(1, 1), dtype)
        expected = torch.tensor([[lo / 2 + 1, lo / 2 + 1, 1.0, hi / 2 + 1, hi / 2 + 1]]).to(dtype)
        assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_packed_codes_are_the_codes(groups: int, kind: str) -> None:
    for lo, hi in ((-8, 7), (0, 15), (-2, 1)):
        w, *found = fields(kind, groups, lo, hi, 2)
        codes, packed = encode(w, *found, lo, hi), encode(w, *found, lo, hi, True)
        half = [[(int(a) % 16) + 16 * (int(b) % 16) for a, b in zip(r[:12], r[12:], strict=True)] for r in codes]
        assert packed.dtype == torch.uint8 and packed.tolist() == half
        for dtype in (torch.float32, torch.bfloat16):
            both = [decode(packed, *found, dtype, True, lo < 0), decode(codes, *found, dtype)]
            assert torch.equal(*both) and torch.equal(decode(codes.float(), *found, dtype), both[1])
    with pytest.raises(QATError, match="even number of columns"):
        encode(w[:, :23], torch.ones(5, 1), None, None, -8, 7, True)


def test_a_nan_has_the_code_of_zero() -> None:
    w = torch.tensor([[float("nan"), float("inf"), float("-inf"), 1.0] * 9])
    for scale in (1.0, float("nan")):
        s = torch.full((1, 1), scale)
        ends = [7, -8, 1] if scale == 1.0 else [0, 0, 0]
        assert encode(w, s, None, None, -8, 7).tolist() == [[0, *ends] * 9]
        shifted = [7, -8, 4] if scale == 1.0 else [3, 3, 3]
        assert encode(w, s, torch.full((1, 1), 3.0), None, -8, 7).tolist() == [[3, *shifted] * 9]
        assert bool(torch.isnan(fake_quantize(w, s, None, None, -8, 7)[0, ::4]).all())
        # a scale that was poisoned shows in every number
        assert bool(torch.isnan(decode(encode(w, s, None, None, -8, 7), s, None, None)).all()) == (scale != scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_chunks_change_nothing(groups: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in chunks of two, the last of one, give what all rows at once give."""

    def everything() -> list[Tensor]:
        w, s, z, m = fields(kind, groups, -8, 7, 4)
        g = torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        w, s = w.to(dtype), s / 3
        codes, packed = encode(w, s, z, m, -8, 7), encode(w, s, z, m, -8, 7, True)
        numbers = [decode(codes, s, z, m), decode(packed, s, z, m, dtype, True)]
        grads = vjp(g, w, s, z, m, -8, 7, False, True, True, True, True)
        spent = g.clone()
        over = vjp(spent, w, s, z, m, -8, 7, False, True, True, True, True, spend=True)
        assert over[0] is spent and all(torch.equal(a, b) for a, b in zip(grads, over, strict=True) if a is not None)  # type: ignore[arg-type]
        return [codes, packed, *numbers, fake_quantize(w, s, z, m, -8, 7), *(t for t in grads if t is not None)]

    whole = everything()
    monkeypatch.setattr(rows_module, "_CHUNK", 60)
    assert len(rows_module.chunks(torch.empty(5, 24), 0)) == 3
    for one, other in zip(whole, everything(), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if groups or one.numel() > 1:
            assert torch.equal(one, other)
        else:
            # one scale: the chunks' sums are added up in another order
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_sums_are_within_ulps_of_those_in_double(groups: int, kind: str) -> None:
    """Terms of one ulp, 24 or 120 of them: 16 ulps of the sum of magnitudes. Mutation: rint left out of ds -> red."""
    w, s, z, m = fields(kind, groups, -8, 7, 6)
    s, g = s / 3, torch.randn_like(w)
    found = vjp(g, w, s, z, m, -8, 7, False, True, True, True, True)
    wide = [None if t is None else t.double() for t in (g, w, s, z, m)]
    exact = vjp(*wide, -8, 7, False, True, True, True, True)
    # terms are at most |g| * 8 (ds) or |g| * s
    magnitude = float(g.abs().sum()) * 8 * max(1.0, float(s.max()))
    assert torch.equal(found[0].double(), exact[0]) and sum(t is not None for t in found) == 2 + (kind != "none")
    for ours, double in zip(found[1:], exact[1:], strict=True):
        assert (ours is None) == (double is None)
        if ours is not None and double is not None:
            assert ours.dtype == torch.float32 and ours.shape == s.shape
            assert float((ours.double() - double).abs().max()) <= 16 * 2.0**-23 * magnitude


def test_identity_returns_the_gradient_itself() -> None:
    w, s, z, m = fields("none", 1, -8, 7, 1)
    g = torch.randn_like(w)
    found = vjp(g, w, s, z, m, -8, 7, True, True, False, False, False)
    assert found[0] is g and found[1:] == (None, None, None)
    with_scale = vjp(g, w, s, z, m, -8, 7, True, True, True, True, True)
    assert with_scale[0] is g and with_scale[1] is not None and with_scale[2:] == (None, None)


def test_poisoned() -> None:
    s, w = torch.rand(2, 3), torch.randn(2, 6)
    w[0, 0], w[1, 1] = float("inf"), float("-inf")
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(poisoned(s, w.to(dtype)), s)
    assert torch.equal(poisoned(s, w[:0]), s)
    w[0, 3] = float("nan")
    assert bool(torch.isnan(poisoned(s, w)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_operators(kind: str) -> None:
    """Schema, shapes of the fake results, no aliases: what torch.compile relies on where the operators are opaque."""
    w, *found = fields(kind, 2, -8, 7, 1)
    for packed in (False, True):
        codes = affine_encode(w, *found, -8, 7, packed)
        torch.library.opcheck(affine_encode.custom, (w, *found, -8, 7, packed))
        torch.library.opcheck(affine_decode.custom, (codes, *found, torch.bfloat16, packed, True))
    torch.library.opcheck(affine_fake.custom, (w, *found, -8, 7, torch.float32))
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(affine_vjp.custom, (w.clone(), w, *found, -8, 7, *needs))


def test_compiled_equals_eager() -> None:
    """Mutation: one of two roundings dropped by the compiler would show as other codes."""
    w, s, z, _ = fields("int", 3, -8, 7, 8)

    def everything(w: Tensor, s: Tensor, z: Tensor) -> list[Tensor]:
        codes, packed = encode(w, s, z, None, -8, 7), encode(w, s, z, None, -8, 7, True)
        dw, *_ = vjp(w, w, s, z, None, -8, 7, False, True, False, False, False)
        assert dw is not None
        return [
            codes,
            packed,
            decode(packed, s, z, None, torch.bfloat16, True),
            fake_quantize(w, s, z, None, -8, 7),
            dw,
        ]

    w = w.bfloat16()
    compiled = torch.compile(everything, fullgraph=True)(w, s, z)
    for a, b in zip(everything(w, s, z), compiled, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "int", "float"])
def test_gradient_and_rounding_in_one_pass(kind: str, dtype: torch.dtype) -> None:
    """As one after the other, every bit; more rows than a chunk. Mutations: `_put_hat` after `terms` became the scale's
    products; without the minimum; `_around` the outermost codes themselves."""
    g = torch.Generator().manual_seed(0)
    for rows, columns in ((9, 64), (3000, 256)):
        w = torch.randn(rows, columns, generator=g).to(dtype)
        grad = torch.randn(rows, columns, generator=g)
        scale = torch.rand(rows, 4, generator=g) * 0.3 + 0.05
        zero = torch.randint(-3, 4, scale.shape, generator=g).float() if kind == "int" else None
        minimum = torch.randn(scale.shape, generator=g) if kind == "float" else None
        if kind == "none" and dtype == torch.float32:
            # on the outermost codes and next to them
            ends = torch.tensor([-8.0, 7.0]).repeat_interleave(3)
            w[0, :6] = torch.nextafter(ends, ends + torch.tensor([-1.0, 0.0, 1.0]).repeat(2))
            scale[0, 0] = 1.0
        fields = scale, zero, minimum
        for needs in itertools.product((True, False), repeat=2):
            hat = torch.full((rows, columns), torch.nan, dtype=dtype)
            need_w, need_fields = needs
            how = (*fields, -8, 7, False, need_w, need_fields, need_fields, need_fields)
            both = vjp(grad.clone(), w, *how, True, hat)
            alone = vjp(grad.clone(), w, *how, True)
            if need_w and kind != "int":
                v = (w.float().view(rows, 4, -1) - (0 if minimum is None else minimum[..., None])) * (1 / scale)[
                    ..., None
                ]
                assert torch.equal(alone[0], grad * ((v >= -8) & (v <= 7)).view(rows, columns))  # type: ignore[arg-type]
            assert torch.equal(hat, rounded(w, *fields, -8, 7, dtype))
            assert torch.equal(hat, decode(encode(w, *fields, -8, 7), *fields, dtype))
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(both, alone, strict=True))
