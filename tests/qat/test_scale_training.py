"""`phases.*.train: scales`: codes stay, learned scales move, nothing else has a gradient.

Mutations tried, one at a time: integers of the learned scale instead of the stored one; the zero point left out of the
gradient's sum; the compact form of codes kept; parameters left with their gradients; `unprepare` that does not give
them back: each turns a test red.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.steps import learned_scales, qat_layers

SCALES = {"qat": {"steps": -1, "train": "scales"}}
KINDS = {
    "group": {"bits": 4, "granularity": "group", "group_size": 16},
    "channel": {"bits": 3},
    "tensor": {"bits": 3, "granularity": "tensor"},
    "int zero": {"bits": 4, "granularity": "group", "group_size": 16, "zero_point": "int"},
    "minimum": {"bits": 4, "granularity": "group", "group_size": 16, "zero_point": "float"},
    "signed": {"bits": 2, "granularity": "group", "group_size": 16, "signed_scale": True},
    "nf4": {"bits": 4, "grid": "nf4", "granularity": "group", "group_size": 16},
    "fp32": {"bits": 4, "granularity": "group", "group_size": 16, "scale": "fp32"},
}
X = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8))


def trained(model: nn.Module, steps: int, **cached: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    target = net()(X).detach()
    losses = []
    for _ in range(steps):
        loss = (model(X) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)
    assert set(map(id, optimizer.state)) == set(map(id, learned_scales(model).values()))
    return losses


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_stay_and_scales_learn(recipe: Any, kind: str, cached: bool) -> None:
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    qat.prepare(model, recipe(phases=SCALES, types=["Linear"], **KINDS[kind]), code_cache=cached)
    first = {name: (q.codes, q.scale) for name, q in qat.convert(model).items()}
    losses = trained(model, 25)
    assert losses[-1] < losses[0]
    bundle = qat.convert(model)
    for name, q in bundle.items():
        assert torch.equal(q.codes, first[name][0]) and not torch.equal(q.scale, first[name][1])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    served = net()
    served.load_state_dict({**bundle.floats, **{name: q.dequantize() for name, q in bundle.items()}})
    assert torch.equal(served(X), model(X))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_scale_is_that_of_its_product(recipe: Any, kind: str, cached: bool) -> None:
    """Of (code - zero) * s, by autograd over the decoded integers; and the quantizer's own forward has the same."""
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    qat.prepare(model, recipe(phases=SCALES, **{"scale": "fp32", **KINDS[kind]}), code_cache=cached)
    quantizer = model[0].weight_quantizer
    quantizer.theta.data.uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(2))
    qat.weights_changed(model)
    model(X).square().sum().backward()
    found = quantizer.theta.grad.clone()
    q = quantizer.integers(model[0].weight)
    scale = q.scale.float().clone().requires_grad_()
    zero = None if q.zero_point is None else q.zero_point.float()
    numbers = q.spec.grid.decode(q.codes, torch.ones_like(scale), zero, None if q.minimum is None else 0 * q.minimum)
    grouped = numbers.reshape(*scale.shape, -1) * scale.unsqueeze(-1)
    w = (grouped if q.minimum is None else grouped + q.minimum.unsqueeze(-1)).reshape(16, 32)
    (X @ w.t()).square().sum().backward()
    # theta = log(s / s0) / 10
    torch.testing.assert_close(found, scale.grad * scale.detach() * 10, rtol=1e-4, atol=1e-2)
    quantizer.theta.grad = None
    (X @ quantizer(model[0].weight).t()).square().sum().backward()
    torch.testing.assert_close(found, quantizer.theta.grad, rtol=1e-4, atol=1e-2)


def test_only_scales_have_a_gradient_until_unprepare(recipe: Any) -> None:
    model = net()
    model[1].bias.requires_grad_(False)
    had = {name: p.requires_grad for name, p in model.named_parameters()}
    model[3].weight.requires_grad_(False)
    qat.prepare(model, recipe(phases=SCALES, types=["Linear"]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(learned_scales(model))
    assert len(learned_scales(model)) == 2
    qat.prepare(model, recipe(phases=SCALES, types=["Linear"]))
    qat.unprepare(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {**had, "3.weight": False}


def test_a_checkpoint_keeps_the_codes(recipe: Any, tmp_path: Any) -> None:
    model = net()
    qat.prepare(model, recipe(phases=SCALES, types=["Linear"]))
    trained(model, 5)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    back = qat.convert(qat.load_from_checkpoint(tmp_path / "x.pt", net()))
    for name, q in qat.convert(model).items():
        assert torch.equal(back[name].codes, q.codes) and torch.equal(back[name].scale, q.scale)


def test_a_nan_in_a_weight_shows(recipe: Any) -> None:
    model = net()
    qat.prepare(model, recipe(phases=SCALES, types=["Linear"]))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    qat.weights_changed(model)
    assert bool(torch.isnan(model(X)).any())


def test_inputs_go_on_learning(recipe: Any) -> None:
    slot = {"bits": 4, "granularity": "tensor", "quantizer": "lsq"}
    model = net()
    qat.prepare(model, recipe(phases=SCALES, types=["Linear"], input=slot))
    trained(model, 4)
    layers: list[Any] = list(qat_layers(model).values())
    assert all(float(layer.input_quantizer.theta.abs().sum()) > 0 for layer in layers)
    assert not any(layer.input_quantizer.codes_fixed for layer in layers)


def test_a_ramp_learns_its_share(recipe: Any) -> None:
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    qat.prepare(model, recipe(phases={"qat": {"steps": -1, "train": "scales", "ramp": 3}}))

    def gradient() -> Tensor:
        model[0].weight_quantizer.theta.grad = None
        model(X).sum().backward()
        return model[0].weight_quantizer.theta.grad  # type: ignore[no-any-return]

    quarter = gradient()
    qat.apply_schedule(model, 9)
    torch.testing.assert_close(quarter, gradient() / 4, rtol=1e-5, atol=1e-6)
