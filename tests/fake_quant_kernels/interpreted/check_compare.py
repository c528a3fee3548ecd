"""The comparison itself: what a kernel does not write, an argument that it writes to, and the input families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import SIZES, assert_equal, elements, families, nan_filled, same, ties, views, within
from torch import Tensor


class Right:
    name = "right"

    @staticmethod
    def reference(x: Tensor) -> Any:
        return x + 1, x.to(torch.int8)

    def triton(self, x: Tensor) -> Any:
        return self.reference(x)


class Forgets(Right):
    """Writes all but the last number."""

    name = "forgets"

    def triton(self, x: Tensor) -> Any:
        out = torch.empty_like(x), x.new_empty(x.shape, dtype=torch.int8)
        out[0].view(-1)[:-1] = (x + 1).view(-1)[:-1]
        out[1].copy_(x)
        return out


class Writes(Right):
    name = "writes"

    def triton(self, x: Tensor) -> Any:
        return x.add_(1).clone(), (x - 1).to(torch.int8)


def test_same() -> None:
    x = torch.randn(4, 63)
    with pytest.raises(AssertionError, match="result 0: 1 of 252 differ"):
        same(Forgets(), x)
    with pytest.raises(AssertionError, match="the kernel wrote to tensor argument 0"):
        same(Writes(), x)
    for size in SIZES:
        before = elements["right"]
        same(Right(), torch.randn(2, size))
        assert elements["right"] == before + 4 * size


def test_memory() -> None:
    with nan_filled():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
            assert torch.empty(5, dtype=dtype).float().isnan().all()
            assert torch.empty_strided((5,), (2,), dtype=dtype).float().isnan().all()
        for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64):
            assert (torch.empty(5, dtype=dtype) == torch.iinfo(dtype).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size, group", [(1, None), (63, None), (64, 16), (1000, 24), (1023, 32)])
def test_inputs(dtype: torch.dtype, size: int, group: int | None) -> None:
    for name, w in families((3, size), dtype, 0, group, not_finite=True).items():
        assert w.shape == (3, size) and w.dtype == dtype
        assert bool(w.isfinite().all()) == (name != "not finite"), name
        assert name == "constant" or size == 1 or len(w.float().unique()) > (3 if "zero" not in name else 0), name
        for view in views(w).values():
            assert_equal(view, w, name)
            assert torch.equal(view.isnan(), w.isnan())


def test_zeros_and_nan() -> None:
    assert_equal(torch.tensor([0.0, float("nan")]), torch.tensor([-0.0, float("nan")]), "")
    with pytest.raises(AssertionError):
        assert_equal(torch.tensor([0.0]), torch.tensor([float("nan")]), "")
    with pytest.raises(AssertionError):
        assert_equal(torch.tensor([1.0]), torch.tensor([1.0]).double(), "")


def test_ties() -> None:
    w, step = ties((5, 64), torch.float32, 0, group=16, largest=7)
    blocks = w.view(5, 4, 16)
    assert torch.equal(blocks.abs().amax(-1) / 7, step)
    assert int(((blocks / step.unsqueeze(-1)) % 1 == 0.5).sum()) > 100


def test_within() -> None:
    terms = torch.randn(9, 1000)
    exact, magnitude = terms.double().sum(-1), terms.double().abs().sum(-1)
    within("sum", terms.sum(-1), exact, magnitude, 4)
    for wrong in (terms.sum(-1) + 1e-3, torch.full((9,), float("nan"))):
        with pytest.raises(AssertionError, match="9 of 9 sums off"):
            within("sum", wrong, exact, magnitude, 4)
