"""Bytes and host reads are what they are said to be, on models whose bytes are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.common import Variant

MIB = 1 << 20
# x is 1 MiB and needs no gradient; one linear of 512 x 512 saves x alone
X = torch.ones(512, 512)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(512, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum()


class Saves(Plain):
    """Keeps one more MiB for backward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().sum()


class Keeps(Plain):
    """A cache of half a MiB beside the state: filled once, refilled in place, or dropped and made anew."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.cache = how, {}  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        codes = self.linear.weight.detach().to(torch.float16)
        if "codes" in self.cache and self.how == "in place":
            self.cache["codes"].copy_(codes)
        elif "codes" not in self.cache or self.how == "anew":
            self.cache["codes"] = codes
        return super().forward(x)


class Reads(Plain):
    """Three reads of a value by the host."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if float(y.detach()) > 1e30 or y.isnan() or len(x[0, :3].nonzero()) == 7:
            return y * 2
        return y


def measured(make: Callable[[], Any], parts: int = 1) -> memory.Memory:
    before = memory.storages()
    model = make()
    variant = Variant("tool", "weight", model, model, torch.optim.SGD(model.parameters(), lr=1e-3))
    if isinstance(model, Keeps) and model.how == "dropped":
        variant.after = model.cache.clear
    for _ in range(2):
        variant.step(X, parts)
    return memory.measure(variant, X, parts, memory.held(variant, before))


@pytest.mark.parametrize("parts", [1, 8])
def test_alive(parts: int) -> None:
    """What autograd saves, without gradients. Mutation: gradients not taken off."""
    plain, saves = measured(Plain, parts), measured(Saves, parts)
    assert 0 <= plain.alive < 4096
    assert MIB <= saves.alive < MIB + 4096
    # forward: y; backward: its gradient and the weight's
    assert saves.peak >= saves.alive + MIB


@pytest.mark.parametrize("how", ["once", "in place", "anew", "dropped"])
@pytest.mark.parametrize("parts", [1, 8])
def test_a_cache_counts_once_however_it_is_kept(how: str, parts: int) -> None:
    """Mutations: `+ kept` left out (once, in place); the recorded step before the others left out (anew)."""
    found = measured(lambda: Keeps(how), parts)
    assert MIB // 2 <= found.alive < MIB // 2 + 4096
    assert found.peak >= measured(Plain, parts).peak + MIB // 2


def test_host_reads() -> None:
    assert measured(Plain).syncs == 0
    assert measured(Reads).syncs == 3
