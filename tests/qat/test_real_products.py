"""Codes that are multiplied as they are, in the node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.fake_quant_kernels import fp8_linear


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_fp8_codes_are_multiplied_as_they_are(granularity: str, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine can (here: where it is told so) the forward is `fp8_linear` of the codes, within its bound of
    the simulated one; gradients are those of the simulated one. Mutations: the weight's scale left out; the product
    chosen for inputs in groups."""
    slots = {"grid": "e4m3", "bits": 8, "scale": "fp32", "quantizer": "absmax"}
    rules = {"all": {"types": ["Linear"], "weight": slots, "input": {**slots, "granularity": granularity}}}
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(64, 32)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(5, 3, 64, requires_grad=True)
    found, calls, multiply = [], [], fp8_linear.fp8_linear

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return multiply(*args)

    monkeypatch.setattr(fp8_linear, "reasons", lambda *_: [])
    monkeypatch.setattr(fp8_linear, "fp8_linear", counted)
    for model, real in zip(models, (True, False), strict=True):
        qat.prepare(model, recipe(rules=rules), real=real)
        y = model(x)
        found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), [x, model[0].weight])))
    assert len(calls) == 1
    layer: Any = models[0][0]
    x_hat, w_hat = layer.input_quantizer(x).detach(), layer.weight_quantizer(layer.weight).detach()
    sizes = x_hat.abs().double() @ w_hat.abs().double().t() + layer.bias.abs()
    assert bool(((found[0][0] - found[1][0]).abs() <= fp8_linear.bound(64) * sizes).all())
    assert not torch.equal(found[0][0], torch.zeros_like(found[0][0]))
    for ours, plain in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    groups = {**slots, "granularity": "group", "group_size": 16}
    qat.unprepare(models[0])
    qat.prepare(models[0], recipe(rules={"all": {"types": ["Linear"], "weight": slots, "input": groups}}), real=True)
    models[0](x)
    assert len(calls) == 1
