"""two_level: super-blocks in one pass, squared scales and double quantization, Triton against the reference.

Mutations that were tried, and what turned red:

    sc's lower bound 1 -> 0                                     test_kquants (zero groups)
    low = min(x) without 0                                      test_kquants (constant)
    j * j + j + 0.5 -> j * j + j + 1                            test_exl2
    `first` (codes whose number is positive) left out           test_double
"""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, families, generator, same, views

from qat.fake_quant_kernels import two_level


@pytest.mark.parametrize("name", two_level.KQUANTS)
def test_kquants(name: str) -> None:
    how = two_level.KQUANTS[name]
    for dtype in DTYPES:
        for family, w in families((3, 512), dtype, 0, how[0], not_finite=True).items():
            if dtype == torch.bfloat16 and family in ("tiny", "denormals", "magnitudes"):
                # the interpreter reads denormal bf16 numbers as others
                continue
            context = f"{name} {family} {dtype}"
            same(two_level.kquant_dynamic, w, *how, True, torch.float32, context=context)
            same(two_level.kquant_dynamic, w * 0.01, *how, False, torch.float32, context=context)


@pytest.mark.parametrize("rows", [0, 1, 11])
def test_kquant_shapes(rows: int) -> None:
    how = two_level.KQUANTS["Q5_K"]
    w = torch.randn(rows, 768, generator=generator(rows))
    same(two_level.kquant_dynamic, w, *how, False, torch.float16)
    for name, view in views(w).items() if rows else ():
        same(two_level.kquant_dynamic, view, *how, True, torch.float32, context=name)
    same(two_level.kquant_dynamic, torch.empty(3, 0), *how, True, torch.float32)


def test_exl2() -> None:
    """Every k, every midpoint and its neighbours. Mutation: another midpoint -> red."""
    j = torch.arange(0.0, 18.0)
    points = torch.cat((j * j, j * j + j + 0.5))
    up = torch.full_like(points, torch.inf)
    points = torch.cat((points, torch.nextafter(points, up), torch.nextafter(points, -up), torch.tensor([torch.nan])))
    for largest in (1.0, 0.013, 2.0**-16, 60000.0):
        m = torch.tensor([[largest]]).half().float()
        s0 = (points * two_level.exl2_step(m)).reshape(-1, 1)
        found, _ = same(two_level.exl2_encode, s0, m)
        same(two_level.exl2_decode, found[0], m)
    for shape in ((1, 1), (63, 3), (7, 1000), (0, 4)):
        s0 = torch.rand(shape, generator=generator(1)) * 0.02
        m = two_level.exl2_largest(s0) if shape[0] else torch.ones(1, shape[1])
        found, _ = same(two_level.exl2_encode, s0.T.contiguous().T, m)
        same(two_level.exl2_decode, found[0], m)


@pytest.mark.parametrize("count", [0, 1, 63, 256, 1000, 1023])
def test_double(count: int) -> None:
    """Mutation: codes whose number is not positive are kept -> the last family's scales are <= 0."""
    table = two_level.dynamic_map()
    for spread in (0.1, 1.0, 30.0):
        a = torch.exp(torch.randn(count, generator=generator(count)) * spread)
        offset = a.mean().reshape(1) if count else torch.ones(1)
        found, _ = same(two_level.double_encode, a, offset, table)
        decoded, _ = same(two_level.double_decode, *found, offset, table)
        assert bool((decoded[0] > 0).all())
    odd = torch.rand(4, 100, generator=generator(2))
    odd[0, 3], odd[2, 7] = torch.nan, torch.inf
    same(two_level.double_encode, odd, torch.tensor([0.5]), table)
    same(two_level.double_encode, odd[:, ::2], torch.tensor([0.5]), table)
    midpoints = (table[1:] + table[:-1]) * 0.5
    same(two_level.double_encode, torch.cat((midpoints + 0.0, torch.ones(1))), torch.zeros(1), table)
