"""Stochastic rounding: the random bits against published numbers, its mean and variance against exact ones.

Mutations of `fake_quant_kernels/stochastic_int8.py` that were tried, and the test that turned red for each:

    9 rounds of Philox, or a key's constant changed      test_philox_known_answers
    u <= fraction instead of u <                         test_integers_are_kept
    torch.round(t) instead of floor + (u < fraction)     test_mean_and_variance
    the same random bits for every row                   test_layout_of_the_random_bits
    nan_to_num of top left out                           test_not_finite
    the clamp of the scale left out                      test_scale
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.fake_quant_kernels import stochastic_int8 as module
from qat.fake_quant_kernels.stochastic_int8 import SMALLEST, op, philox, stochastic_int8, uniforms

# counter, key, result: kat_vectors of Random123, the authors' own library
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(values: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.int64) for value in values)


@pytest.mark.parametrize("counter, key, wanted", KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Mutation: any constant, or 9 rounds -> red."""
    seed = torch.tensor((key[1] << 32 | key[0]) - (1 << 64 if key[1] >> 31 else 0), dtype=torch.int64)
    found = philox(words(counter), seed)  # type: ignore[arg-type]
    assert tuple(int(word) for word in found) == wanted


def test_layout_of_the_random_bits() -> None:
    """Column j + q Q has word q of counter (j, row, 0, 0)."""
    seed = torch.tensor(987654321012345678)
    u = uniforms(3, 10, seed)
    for row in range(3):
        for column in range(10):
            q, j = divmod(column, 3)
            word = int(philox(words((j, row, 0, 0)), seed)[q])  # type: ignore[arg-type]
            assert u[row, column].item() == (word >> 8) * 2.0**-24


def test_mean_and_variance() -> None:
    """Over 4000 rounds: mean within 5 standard errors of t, variance p (1 - p). Mutation: torch.round -> red."""
    rounds, g = 4000, torch.linspace(-1.0, 1.0, 41).unsqueeze(0)
    t = g.double() * 127 / g.abs().max()
    # one row per round: rows have random bits of their own
    codes, scale = stochastic_int8(g.expand(rounds, -1), 5)
    assert bool((scale == scale[0]).all())
    p = t - t.floor()
    mean, error = codes.double().mean(0), (p * (1 - p) / rounds).sqrt()
    assert bool(((mean - t).abs() <= 5 * error + 1e-4).all())
    assert bool(((codes.double().var(0) - p * (1 - p)).abs() <= 0.03).all())
    assert bool((codes.double() - t).abs().max() < 1)
    # E[code * scale] = g, in the mean over all columns too, where errors of one sign would add up
    total = (mean - t).sum().abs()
    assert bool(total <= 5 * error.square().sum().sqrt() + 1e-3)


def test_rows_and_columns_are_independent() -> None:
    """Rounding errors of different rows, columns and seeds are uncorrelated: |r| <= 5 / sqrt(n)."""
    g = torch.full((4096, 9), 0.3)
    g[:, 0] = 1.0
    errors = torch.cat([stochastic_int8(g, seed)[0][:, 1:].double() for seed in (0, 1, 2**40)], dim=1)
    off = torch.corrcoef(errors.t()) - torch.eye(errors.shape[1])
    assert float(off.abs().max()) < 5 / 4096**0.5
    lag = torch.corrcoef(torch.stack([errors[:-1].flatten(), errors[1:].flatten()]))[0, 1]
    assert float(lag.abs()) < 5 / errors.numel() ** 0.5


def test_integers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on the grid is not moved, whatever the bits, u = 0 included. Mutation: `u <= fraction` -> red."""
    codes = torch.randint(-127, 128, (200, 1001), generator=torch.Generator().manual_seed(0))
    codes[:, 0] = 127
    for seed in range(3):
        found, scale = stochastic_int8(codes.float() * 0.25, seed)
        assert bool((scale == 0.25).all())
        assert torch.equal(found.long(), codes)
    monkeypatch.setattr(module, "uniforms", lambda rows, columns, seed: torch.zeros(rows, columns))
    assert torch.equal(stochastic_int8(codes.float() * 0.25, 0)[0].long(), codes)


def test_scale() -> None:
    """max |v| / 127 of each row, at least 2^-126. Mutation: without the clamp -> red."""
    g = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    g[2] = 0
    g[3] = 1e-44
    codes, scale = stochastic_int8(g, 1)
    wanted = (g.abs().amax(1, keepdim=True) / 127).clamp(min=SMALLEST)
    assert torch.equal(scale, wanted) and scale[2].item() == SMALLEST
    assert not bool(codes[2].any()) and int(codes.min()) >= -127
    fold = torch.rand(1, 33) + 0.5
    folded = stochastic_int8(g, 1, fold)
    straight = stochastic_int8(g * fold, 1)
    assert torch.equal(folded[0], straight[0]) and torch.equal(folded[1], straight[1])


def test_not_finite() -> None:
    """A row with a NaN or an infinity has an infinite scale and codes 0; the other rows are as without it."""
    g = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    clean = stochastic_int8(g, 3)
    g[1, 4], g[2, 0] = float("nan"), -float("inf")
    codes, scale = stochastic_int8(g, 3)
    assert scale[1:3].flatten().tolist() == [float("inf")] * 2 and not bool(codes[1:3].any())
    assert bool((codes[1:3] * scale[1:3]).isnan().all())
    for row in (0, 3):
        assert torch.equal(codes[row], clean[0][row]) and torch.equal(scale[row], clean[1][row])


def test_seeds() -> None:
    """An int and a tensor are one seed; the upper half of its 64 bits counts."""
    g = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    codes = stochastic_int8(g, 2**33 + 5)[0]
    assert torch.equal(codes, stochastic_int8(g, torch.tensor([2**33 + 5]))[0])
    assert not torch.equal(codes, stochastic_int8(g, 5)[0])
    assert not torch.equal(codes, stochastic_int8(g, -5)[0])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2, 6)])
def test_shapes(shape: tuple[int, int]) -> None:
    codes, scale = stochastic_int8(torch.ones(shape), 0)
    assert codes.shape == shape and codes.dtype == torch.int8 and bool((codes == 127).all())
    assert scale.shape == (shape[0], 1) and scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_custom_op_and_compiled(dtype: torch.dtype) -> None:
    """Inductor's code gives the same codes."""
    args = (torch.randn(5, 37).to(dtype), torch.tensor(11), torch.rand(1, 37))
    torch.library.opcheck(op.custom, args)
    if dtype != torch.float32:
        return
    wanted, found = stochastic_int8(*args), torch.compile(stochastic_int8, fullgraph=True)(*args)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
