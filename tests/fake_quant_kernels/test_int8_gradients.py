"""dx and dw from codes: their mean over many seeds is the gradient of the simulated layer, and their variance is small.

Mutations of `fake_quant_kernels/int8_gradients.py` that were tried, and the test that turned red for each:

    w_scale not folded into g                            test_unbiased[dx...]
    x_scale not folded into g                            test_unbiased[dw...]
    the offset of the zero points left out               test_unbiased[dw zero], test_unbiased[dw unsigned]
    `* scale` of the offset left out                     test_unbiased[dw zero]
    floor instead of stochastic rounding                 test_unbiased
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels.int8_gradients import int8_dgrad, int8_wgrad

TOKENS, INPUTS, OUTPUTS = 24, 20, 36
SEEDS = 300


def inputs(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """g [T, O], x_codes [T, K], x_scale, w_codes [O, K], w_scale, x_zero of the case."""
    r = torch.Generator().manual_seed(3)
    g = torch.randn(TOKENS, OUTPUTS, generator=r) * torch.logspace(-2, 1, TOKENS).unsqueeze(1)
    x = torch.randint(-128, 128, (TOKENS, INPUTS), generator=r, dtype=torch.int8)
    w = torch.randint(-128, 128, (OUTPUTS, INPUTS), generator=r, dtype=torch.int8)
    tensor = kind.endswith("tensor")
    x_scale = torch.rand((1, 1) if tensor else (TOKENS, 1), generator=r) + 0.1
    w_scale = torch.rand((1, 1) if tensor else (OUTPUTS, 1), generator=r) + 0.1
    zero = None
    if kind.endswith(("zero", "unsigned")):
        zero = torch.randint(-128, 128, (TOKENS, 1), generator=r).float()
    if kind.endswith("unsigned"):
        return g, (x.short() + 128).to(torch.uint8), x_scale, w, w_scale, None if zero is None else zero + 128
    return g, x, x_scale, w, w_scale, zero


def case(kind: str) -> tuple[Callable[[int], Tensor], Tensor, Tensor]:
    """The gradient as a function of the seed, its exact value by autograd in fp64, and its variance's bound."""
    g, x, x_scale, w, w_scale, zero = inputs(kind)
    shift = 0.0 if zero is None else zero.double()
    x_hat = ((x.double() - shift) * x_scale).requires_grad_()
    w_hat = (w.double() * w_scale).requires_grad_()
    dx, dw = torch.autograd.grad(torch.nn.functional.linear(x_hat, w_hat), (x_hat, w_hat), g.double())
    if kind.startswith("dx"):
        step = (g * w_scale.t()).abs().amax(1, keepdim=True).double() / 127
        bound = 0.25 * step**2 * w.double().square().sum(0)
        return lambda seed: int8_dgrad(g, w, w_scale, seed, torch.float32), dx, bound
    step = (g.t() * x_scale.t()).abs().amax(1, keepdim=True).double() / 127
    bound = 0.25 * step**2 * (x.double() - shift).square().sum(0)
    return lambda seed: int8_wgrad(g, x, x_scale, seed, torch.float32, zero), dw, bound


@pytest.mark.parametrize("kind", ["dx", "dx tensor", "dw", "dw tensor", "dw zero", "dw unsigned"])
def test_unbiased(kind: str) -> None:
    """Mean within 5 standard errors, variance below the docstring's bound (and 1.4 for its own error)."""
    gradient, exact, bound = case(kind)
    drawn = torch.stack([gradient(seed) for seed in range(SEEDS)]).double()
    error = (bound / SEEDS).sqrt()
    assert bool(((drawn.mean(0) - exact).abs() <= 5 * error).all())
    assert bool((drawn.var(0) <= 1.4 * bound).all())
    # and they are not just far from each other: the bound is within a few times of what is there
    assert float((drawn.var(0) / bound).mean()) > 0.3


def test_reproducible_and_cast() -> None:
    """One seed, one gradient; a tensor on the device is a seed too."""
    g, x, x_scale, w, w_scale, zero = inputs("dw zero")
    for call in (
        lambda seed, dtype: int8_dgrad(g, w, w_scale, seed, dtype),
        lambda seed, dtype: int8_wgrad(g, x, x_scale, seed, dtype),
        lambda seed, dtype: int8_wgrad(g, x, x_scale, seed, dtype, zero),
    ):
        once = call(9, torch.float32)
        assert torch.equal(once, call(torch.tensor(9), torch.float32))
        assert not torch.equal(once, call(10, torch.float32))
        half = call(9, torch.bfloat16)
        assert half.dtype == torch.bfloat16 and torch.equal(half, once.to(torch.bfloat16))


def test_not_finite_is_seen() -> None:
    """An infinite gradient of one token makes that token's dx, and every dw of its column, not finite."""
    g, x, x_scale, w, w_scale, _ = inputs("dx")
    g[4, 7] = float("inf")
    dx = int8_dgrad(g, w, w_scale, 0, torch.float32)
    assert not bool(dx[4].isfinite().any()) and bool(dx[[0, 5]].isfinite().all())
    dw = int8_wgrad(g, x, x_scale, 0, torch.float32)
    assert not bool(dw[7].isfinite().any()) and bool(dw[[0, 8]].isfinite().all())


def test_refuses_long_sums() -> None:
    with pytest.raises(QATError, match="up to 131071 fit"):
        int8_dgrad(torch.ones(1, 131072), torch.ones(131072, 1, dtype=torch.int8), torch.ones(1, 1), 0, torch.float32)
