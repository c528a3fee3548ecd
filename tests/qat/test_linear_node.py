"""The node of linear layers in eager mode gives what the general one gives, and keeps no more.

Mutations: an x of integers cast; no cast of x in backward; `dws` of `pulled` left out; x kept where its codes are;
`keep` not looked at; `_plain` without `blend`, without `frozen`: each turns a test red.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import qat
from qat import layers
from qat.linear_node import QuantizedLinear
from tests.qat.conftest import Build

GROUP = {"bits": 4, "granularity": "group", "group_size": 8}
TOKEN = {"bits": 8, "granularity": "token", "scale": "fp32", "quantizer": "absmax"}
RULES: dict[str, dict[str, Any]] = {
    "absmax": {"weight": {**GROUP, "quantizer": "absmax"}},
    "minmax": {"weight": {**GROUP, "quantizer": "minmax", "zero_point": "float"}},
    "fixed": {"weight": {**GROUP, "quantizer": "mse"}},
    "learned": {"weight": {**GROUP, "quantizer": "lsq"}},
    "codebook": {"weight": {"grid": "nf4", "bits": 4, "granularity": "group", "group_size": 8, "quantizer": "absmax"}},
    "w8a8": {"weight": {"bits": 8, "granularity": "channel", "quantizer": "mse"}, "input": TOKEN},
}

HOW = ("bias", "no bias", "frozen weight", "replaced weight", "no cache", "bf16", "Conv1D", "checkpointed")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A number for each call of the node."""
    calls: list[int] = []
    apply = QuantizedLinear.apply

    def counted(*args: Any) -> Any:
        calls.append(1)
        return apply(*args)

    monkeypatch.setattr(QuantizedLinear, "apply", counted)
    yield calls


def _steps(
    model: nn.Module, batches: list[Tensor], autocast: bool, checkpointed: bool
) -> tuple[list[Tensor], list[int]]:
    """Outputs and gradients of optimizer steps of two micro-batches, one and one; the bytes that each forward saves."""
    optimizer, found, sizes = torch.optim.SGD(model.parameters(), lr=1e-2), [], []
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for count in (2, 1, 1):
        for batch in batches[:count]:
            x = batch.clone().requires_grad_()
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
            with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            sizes.append(sum(saved.values()))
            saved.clear()
            y.float().square().sum().backward()
            found += [y.detach(), x.grad]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)
    return found, sizes


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", RULES)
def test_same_numbers_and_bytes_as_the_general_node(
    name: str, how: str, autocast: bool, recipe: Build, used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for general in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 24, bias=how != "no bias"), nn.GELU(), nn.Linear(24, 16))
        if how == "Conv1D":
            model[0] = Conv1D(24, 32)
        if how == "bf16":
            model = model.bfloat16()
        chosen = recipe(rules={"all": {"types": ["Linear", "Conv1D"], **RULES[name]}})
        qat.prepare(model, chosen, code_cache=how != "no cache", real=False)
        qat.initialize(model)
        qat.apply_schedule(model, 0)
        if how == "frozen weight":
            model[0].weight.requires_grad_(False)
        if how == "replaced weight":
            model[0].weight = nn.Parameter(model[0].weight.detach() * 1.5)
        batches = [torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        batches = [b.to(model[0].weight.dtype) for b in batches]
        with monkeypatch.context() as patch:
            if general:
                patch.setattr(layers, "_plain", lambda *_: None)
            used.clear()
            found.append(_steps(model, batches, autocast, how == "checkpointed"))
            assert bool(used) is not general
    (ours, bytes_ours), (theirs, bytes_theirs) = found
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    assert bytes_ours == bytes_theirs


def test_a_ramp_and_frozen_scales_are_the_general_nodes(recipe: Build, used: list[int]) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    phases = {"ramp": {"steps": 4, "ramp": 3}, "frozen": {"steps": -1, "freeze_scales": True}}
    qat.prepare(model, recipe(types=["Linear"], phases=phases))
    qat.initialize(model)
    optimizer, seen, expected = torch.optim.SGD(model.parameters(), lr=1e-3), [], []
    now = qat.apply_schedule(model, 0)
    for _ in range(6):
        used.clear()
        model(torch.ones(2, 16)).sum().backward()
        seen.append(bool(used))
        expected.append(now.strength >= 1.0 and not now.freeze_scales)
        optimizer.step()
        optimizer.zero_grad()
        now = qat.after_optimizer_step(model, optimizer)
    assert seen == expected and set(seen) == {False, True}


def test_an_input_of_integers_is_refused_as_by_torch(recipe: Build, used: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    qat.prepare(model, recipe(types=["Linear"]))
    with pytest.raises(RuntimeError, match="same dtype"):
        model(torch.ones(3, 4, dtype=torch.int64))
    assert used
