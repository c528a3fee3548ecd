"""NVFP4 of inputs: blocks' scales from each input, the tensor's from an average.

Mutations tried, one at a time: the batch's own largest scale though something was seen; codes shared by layers whose
averages differ; a gradient only where nothing clips: each turns a test red.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.layout import Layout
from qat.quantizers import make_quantizer, quantizer_class
from qat.quantizers.local import Local
from qat.specs import QuantSpec

SCALES = ("nvfp4", "nvfp4_over", "nvfp4_portable")
FP4: dict[str, Any] = {"grid": "fp4", "bits": 4, "granularity": "group", "group_size": 16}
X = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def spec(scale: str = "nvfp4", quantizer: str = "local", kind: str = "fp4", size: int = 16) -> QuantSpec:
    return QuantSpec(kind=kind, granularity="group", group_size=size, scale=scale, quantizer=quantizer)


def seen(scale: str, x: torch.Tensor) -> Local:
    quantizer = make_quantizer(spec(scale), Layout((1, 1), "tokens"))
    assert isinstance(quantizer, Local)
    quantizer.observe(x)
    quantizer.commit()
    return quantizer


@pytest.mark.parametrize("scale", SCALES)
def test_a_token_does_not_depend_on_its_batch(scale: str) -> None:
    quantizer = seen(scale, X * 3)
    loud = torch.cat((X, 50 * X))
    assert torch.equal(quantizer(loud)[:6], quantizer(X))
    assert torch.equal(quantizer(X), quantizer.integers(X).dequantize())
    fields = quantizer.kept()
    assert torch.allclose(fields.scale, (X * 3).abs().max() / 6)
    # the largest block that there is room for: 6 times the largest scale, which a power of two rounds up
    top = float(quantizer(1e6 * X).abs().max())
    assert 0.99 <= top / float((X * 3).abs().max()) <= (2.0 if scale == "nvfp4_portable" else 1.01)


def test_until_something_was_seen_the_input_is_its_own_range() -> None:
    fresh = make_quantizer(spec(), Layout((1, 1), "tokens"))
    assert torch.equal(fresh(X), seen("nvfp4", X)(X))


def test_layers_with_averages_of_their_own_share_no_codes() -> None:
    model = nn.ModuleList([nn.Linear(32, 8, bias=False) for _ in range(2)])
    rules = {"all": {"weight": {"bits": 8}, "input": {**FP4, "scale": "nvfp4", "quantizer": "local"}}}
    qat.prepare(model, qat.recipes.from_dict({"name": "n", "rules": rules}))
    layers: list[Any] = list(model)[:2]
    for layer, size in zip(layers, (1.0, 0.02), strict=True):
        layer.input_quantizer.observe(size * X)
        layer.input_quantizer.commit()
    model.eval()
    for layer in layers:
        wanted = nn.functional.linear(layer.input_quantizer(X), layer.weight_quantizer(layer.weight))
        torch.testing.assert_close(layer(X), wanted)
    x = X.clone().requires_grad_()
    layers[1](x).sum().backward()
    wanted = layers[1].weight_quantizer(layers[1].weight).detach().sum(0).expand(6, 32)
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("scale", SCALES)
def test_four_bits_of_weights_and_inputs_train(scale: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    target = nn.Linear(32, 8)(X).detach()
    slot = {**FP4, "scale": scale}
    rules = {"all": {"weight": {**slot, "quantizer": "lsq"}, "input": {**slot, "quantizer": "local"}}}
    qat.prepare(model, qat.recipes.from_dict({"name": "n", "rules": rules}))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (model(X) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)
    assert losses[-1] < 0.2 * losses[0]
    state = model.state_dict()
    again = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    qat.prepare(again, qat.recipes.from_dict({"name": "n", "rules": rules}))
    again.load_state_dict(state)
    assert torch.equal(again.eval()(X), model.eval()(X))


def test_what_is_refused() -> None:
    def reasons(given: QuantSpec, activation: bool = True) -> str:
        return "; ".join(quantizer_class(given.quantizer).reasons(given, activation=activation))

    assert not reasons(spec())
    assert "use quantizer=local" in reasons(spec(quantizer="absmax"))
    assert "is for scale=nvfp4 and its kin, not 'portable'" in reasons(spec("portable"))
    nested = reasons(spec("bnb_nested", kind="nf4", size=64))
    assert "is for weights" in nested and "use quantizer=local" not in nested
    assert "not for weights" in reasons(spec(), activation=False)
    assert "use granularity=tensor, not group" in reasons(spec("portable", "ema"))
