"""What a step may and may not do: backward belongs to its own forward, and the host waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qat


def test_backward_uses_the_scales_of_its_own_forward(recipe: Any) -> None:
    """Mutation: `call.again(learned)` left out of backward."""
    model = nn.Sequential(nn.Linear(16, 4))
    phases = {"eight": {"steps": 1, "bits": {"all": 8}}, "four": {"steps": -1}}
    qat.prepare(model, recipe(phases=phases))
    x = torch.randn(3, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    y = model(x)
    qat.after_optimizer_step(model)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    assert not torch.equal(torch.autograd.grad(model(x).sum(), x)[0], expected)

    theta = model[0].weight_quantizer.theta
    changed = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    changed["0.weight_quantizer.theta"].data.fill_(0.02)
    y = torch.func.functional_call(model, changed, (x,))
    (found,) = torch.autograd.grad(y.square().sum(), changed["0.weight_quantizer.theta"])
    with torch.no_grad():
        theta.fill_(0.02)
    (wanted,) = torch.autograd.grad(model(x).square().sum(), theta)
    assert torch.equal(found, wanted) and float(wanted.abs().max()) > 0


class _Syncs(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight", ["absmax", "mse", "lsq"])
@pytest.mark.parametrize("inputs", [None, "absmax", "ema", "lsq"])
def test_no_host_sync_in_a_step(weight: str, inputs: str | None, recipe: Any) -> None:
    """From the second step on (a learned input range settles in the first). Mutation: a float(...) in any qparams."""
    granularity = "token" if inputs == "absmax" else "tensor"
    slot = None if inputs is None else {"bits": 8, "granularity": granularity, "quantizer": inputs}
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    rule = {"weight": {"bits": 4, "granularity": "group", "group_size": 8, "quantizer": weight}, "input": slot}
    qat.prepare(model, recipe(rules={"all": rule}))
    for step in range(3):
        watch = _Syncs()
        with watch:
            model(torch.randn(3, 16)).sum().backward()
            qat.after_optimizer_step(model)
        assert step == 0 or watch.count == 0
