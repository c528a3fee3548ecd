"""float8: Triton's integer arithmetic against PyTorch's casts, on all numbers that are hard to round.

Mutations that were tried, and what turned red:

    127 + LOWEST -> 126 + LOWEST in float_round (denormals)     test_every_code
    size > TOP left out                                         test_families
    sign taken from u after adding (-0 lost)                    test_every_code
    only the first half of `runs` in amax_kernel                test_amax
"""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, families, generator, same, views, within
from torch import Tensor

from qat.fake_quant_kernels import float8
from qat.fake_quant_kernels.elements import scaled

F8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP16 = (torch.float16, 2.0**-14, 65504.0)


def scales(rows: int, groups: int, seed: int) -> Tensor:
    return 0.05 + torch.rand(rows, groups, generator=generator(seed))


@pytest.mark.parametrize("f8", F8)
def test_every_code(f8: torch.dtype) -> None:
    """All codes, all midpoints between them and the neighbours of both, as bits: signs of zero and NaN too."""
    every = torch.arange(256, dtype=torch.uint8).view(f8)
    same(float8.decode, every.reshape(1, 256), torch.ones(1, 1), torch.float32)
    numbers = every.float()
    numbers = numbers[numbers.isfinite()].sort().values
    points = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([-0.0, torch.inf, torch.nan, 1e30])))
    up, down = torch.full_like(points, torch.inf), torch.full_like(points, -torch.inf)
    w = torch.cat((points, torch.nextafter(points, up), torch.nextafter(points, down))).reshape(1, -1)
    one = torch.ones(1, 1)
    found = float8.encode.triton(w, one, f8).view(torch.uint8)
    wanted = w.clamp(-float8.ELEMENTS[f8].top, float8.ELEMENTS[f8].top).to(f8).view(torch.uint8)
    assert torch.equal(found, wanted), "codes differ as bytes"
    same(float8.encode, w, one, f8)
    for power in (-30, 30):
        same(float8.fake, w * 2.0**power, one * 2.0**power, f8, torch.float32)


@pytest.mark.parametrize("f8", F8)
def test_families(f8: torch.dtype) -> None:
    s, g = scales(3, 4, 1), torch.randn(3, 64, generator=generator(2))
    for dtype in DTYPES:
        for family, w in families((3, 64), dtype, 0, 16, largest=7, not_finite=True).items():
            if dtype == torch.bfloat16 and family in ("tiny", "denormals"):
                # the interpreter reads denormal bf16 numbers as others
                continue
            context = f"{family} {dtype}"
            found, _ = same(float8.encode_dynamic, w, 4, f8, *FP16, context=context)
            same(float8.encode_dynamic, w, 1, f8, torch.bfloat16, 2.0**-14, 65280.0, context=context)
            same(float8.encode_dynamic, w, 2, f8, torch.float32, 2.0**-110, 2.0**119, context=context)
            same(float8.fake_dynamic, w, 4, f8, *FP16, torch.float32, context=context)
            same(float8.encode, w, s, f8, context=context)
            same(float8.fake, w, s, f8, torch.float16, context=context)
            same(float8.decode, *found, torch.float32, context=context)
            same(float8.vjp, g, w, s, f8, True, False, context=context)


@pytest.mark.parametrize("packed", [False, True])
def test_e2m1(packed: bool) -> None:
    """Four-bit floats with fp32 scales, one code in a byte or two. Mutation: `packed` not handed to the launcher."""
    e2m1 = torch.uint8
    for groups in (1, 2, 4):
        s, g = scales(3, groups, 1), torch.randn(3, 64, generator=generator(2))
        for dtype in DTYPES:
            for family, w in families((3, 64), dtype, 0, 16, largest=7, not_finite=True).items():
                if dtype == torch.bfloat16 and family in ("tiny", "denormals"):
                    continue
                context = f"{family} {dtype} {groups}"
                found, _ = same(float8.encode, w, s, e2m1, packed, context=context)
                same(float8.decode, found[0], s, torch.float32, packed, context=context)
                same(float8.fake, w, s, e2m1, torch.float16, context=context)
                same(float8.vjp, g, w, s, e2m1, True, False, context=context)


@pytest.mark.parametrize("columns", [1, 63, 1000, 1023, 20000])
@pytest.mark.parametrize("place", ["tensor", "row"])
def test_sizes(columns: int, place: str) -> None:
    w = torch.randn(3, columns, generator=generator(columns)) * 300
    s = scales(3, 1, 3) if place == "row" else scales(1, 1, 3)
    g = torch.randn(w.shape, generator=generator(4))
    f8 = F8[0]
    found, _ = same(float8.encode, w, s, f8)
    same(float8.decode, found[0], s, torch.float32)
    same(float8.encode_dynamic, w, 1, f8, *FP16)
    found, _ = same(float8.vjp, g, w, s, f8, True, True, but=(1,))
    v = scaled(w, s).double()
    inside = v.abs() <= 448
    u = v.float().clamp(-448, 448).to(f8).double()
    g = g.double().reshape(v.shape)
    exact, size = (g * (u - v * inside)).sum(-1), (g.abs() * (u.abs() + v.abs() * inside)).sum(-1)
    within("float8_vjp", found[1], exact.sum_to_size(s.shape), size.sum_to_size(s.shape), 24)


def test_amax() -> None:
    """Mutation: half of the runs -> red (the largest number is moved through the tensor)."""
    for columns in (1, 63, 5000, 70000):
        w = torch.randn(3, columns, generator=generator(columns))
        for at in (0, columns // 2, 3 * columns - 1):
            w.view(-1)[at] = -100.0 - at
            found, _ = same(float8.amax, w)
            assert float(found[0]) == 100.0 + at
        w.view(-1)[columns] = torch.nan
        assert float(same(float8.amax, w)[0][0]) != 0
    same(float8.amax, torch.randn(64, 4096, generator=generator(0), dtype=torch.float32).to(torch.bfloat16))
    same(float8.amax, torch.empty(0, 4))


def test_layouts_and_nothing() -> None:
    w, s = torch.randn(4, 32, generator=generator(0)), scales(4, 2, 1)
    for name, view in views(w).items():
        same(float8.encode_dynamic, view, 2, F8[0], *FP16, context=name)
        same(float8.vjp, view, view, s, F8[0], True, False, context=name)
    codes = w.to(F8[1])
    same(float8.decode, codes.T.contiguous().T, s, torch.float32)
    for shape in ((0, 32), (4, 0)):
        empty = torch.empty(shape)
        same(float8.encode_dynamic, empty, 2, F8[0], *FP16)
        same(float8.vjp, empty, empty, s[: shape[0]], F8[0], True, True)
