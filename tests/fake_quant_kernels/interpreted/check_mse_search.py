"""The interpreted kernels of `mse_search` choose what the reference chooses, and find the same error sums, bit for bit.

Mutations that were tried, and what turned red:

    squared_error: LEVELS - 1, or tl.sum over halves    test_families (error sums)
    squared_error: no mask of the tail                  test_families[...-63] with a float minimum
    candidate: low > 0 clipped to low, not to 0         test_families[1-...]
    _search_kernel: `error <= least`                    test_families (constant, all zero)
    _search_kernel: broken = 0                          test_families (not finite)
    _partial_kernel: run * count + c -> run + c         test_long_groups
    importance of another row (period)                  test_importance
"""

import pytest
import torch
from compare import DTYPES, SIZES, families, generator, same, views
from torch import Tensor

from qat.fake_quant_kernels import mse_search

FACTORS = torch.linspace(1.0, 0.3, 4)
# storage, smallest, largest, also fp16
STORAGES = (
    (torch.bfloat16, 2.0**-14, 65280.0, True),
    (torch.float16, 2.0**-14, 65504.0, False),
    (torch.bfloat16, 2.0**-126, 2.0**119, False),
    (torch.float32, 2.0**-110, 2.0**119, False),
)
KINDS = ((0, -8, 7, 1 / 7.5), (0, 0, 3, 1 / 3), (1, -128, 127, 1 / 255), (1, 0, 15, 1 / 15), (2, 0, 7, 1 / 7))


def check(w: Tensor, groups: int, kind: int, storage: int, importance: Tensor | None = None, context: str = "") -> None:
    number, lo, hi, inv_reach = KINDS[kind]
    rest = STORAGES[storage]
    same(
        mse_search.search, w, FACTORS, groups, number, lo, hi, inv_reach, *rest, importance,
        context=f"{context} {w.dtype} {tuple(w.shape)}/{groups} {KINDS[kind]} {rest}",
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_families(kind: int, size: int) -> None:
    dtype, storage = DTYPES[(kind + size) % len(DTYPES)], (kind + size // 2) % len(STORAGES)
    for name, w in families((2, size), dtype, seed=size + kind, not_finite=True).items():
        check(w, 1, kind, storage, context=name)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_groups_and_storages(kind: int) -> None:
    """Powers of two in whole tiles and with a tail of groups; others."""
    for i, (rows, size, groups) in enumerate(((64, 32, 2), (3, 64, 4), (2, 24, 3), (5, 2, 2), (2, 1000, 3))):
        w = torch.randn(rows, size * groups, generator=generator(size)) * 3.0
        w[0, :size] = 0.0
        for storage in (i % 4, (i + 1) % 4):
            check(w, groups, kind, storage)


def test_importance() -> None:
    for rows, size, groups in ((4, 32, 2), (2, 63, 3), (3, 600, 1), (1, 16400, 1)):
        g = generator(size)
        w = torch.randn(rows, size * groups, generator=g)
        for kind in (0, 3, 4):
            for shape in ((size * groups,), (rows, size * groups)):
                importance = torch.rand(shape, generator=g)
                importance[..., : size // 2] = 0.0
                check(w, groups, kind, 0, importance, "weighted")
    check(w, groups, 0, 0, importance.bfloat16(), "weighted")


def test_long_groups() -> None:
    """Longer than a block of threads holds, with and without a tail; NaN in one group only."""
    for rows, size, groups in ((1, 34 * 512, 1), (1, 16600, 2), (2, 16385, 1)):
        w = torch.randn(rows, size * groups, generator=generator(size))
        for kind in (0, 2, 4)[: rows + 1]:
            check(w, groups, kind, 0)
        w[0, 3] = float("nan")
        check(w, groups, 4, 0)


def test_memory_layouts_and_nothing() -> None:
    w = torch.randn(6, 96, generator=generator(0))
    for name, view in views(w).items():
        check(view, 3, 0, 0, view.abs(), name)
    for shape, groups in (((0, 64), 2), ((3, 0), 1), ((3, 0), 0)):
        for kind in (0, 3, 4):
            check(torch.empty(shape), groups, kind, 0)
    with_one = torch.full((1, 1), -0.25)
    check(with_one, 1, 0, 0)
