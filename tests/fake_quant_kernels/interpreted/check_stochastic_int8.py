"""The kernel draws the reference's random bits and rounds to the same codes, for every family of numbers.

The interpreter decodes bf16's subnormal numbers wrongly: they are zero here.

Mutations of the kernel that were tried, all red here: `bits >> 7`; a quarter's mask left out; c1 taken as the row
within the program; NaN not counted as infinity; FS always 1; the random bits of two quarters swapped.
"""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, SIZES, families, generator, same, views

from qat.fake_quant_kernels.stochastic_int8 import op

SEED = torch.tensor(-(2**62) + 12345)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, 5, 64, 4096])
def test_families(size: int, dtype: torch.dtype) -> None:
    for name, g in families((3, size), dtype, seed=size, largest=127, not_finite=True).items():
        if dtype == torch.bfloat16:
            g = torch.where(g.abs() < torch.finfo(dtype).tiny, 0.0, g)
        same(op, g, SEED, None, context=f"{name} {size} {dtype}")


@pytest.mark.parametrize("size", [1, 63, 1000, 8200, 9001])
def test_folds(size: int) -> None:
    """One factor for all columns or one for each; rows that are longer than a program's tile take the loop."""
    g = torch.randn(5, size, generator=generator(size))
    g[1] = 0
    g[2, ::7] = float("nan")
    for columns in (1, size):
        fold = torch.rand(1, columns, generator=generator(1)) + 0.1
        same(op, g, SEED, fold, context=f"fold {columns} of {size}")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (130, 16), (33, 2048), (1, 16384)])
def test_shapes(shape: tuple[int, int]) -> None:
    same(op, torch.randn(shape, generator=generator(0)), SEED, None, context=str(shape))


def test_layouts_and_seeds() -> None:
    g = torch.randn(6, 100, generator=generator(0))
    for name, view in views(g).items():
        same(op, view, SEED, None, context=name)
    for seed in (0, 1, -1, 2**40 + 7):
        same(op, g, torch.tensor([seed]), None, context=f"seed {seed}")
