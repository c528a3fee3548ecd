"""Weights that go to and fro: counted, dampened, frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.oscillation import MOMENTUM, Oscillation, dampening, share, tracked
from qat.steps import qat_layers


def recipe(weight: dict[str, object] | None = None, **phase: object) -> qat.recipes.Recipe:
    slot = {"bits": 3, "quantizer": "lsq", **(weight or {})}
    return qat.recipes.from_dict(
        {"name": "n", "rules": {"all": {"types": ["Linear", "Conv2d"], "weight": slot}}, "phases": {"qat": phase}}
    )


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 5))


def train(model: nn.Module, steps: int, lr: float = 0.05) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        # halves of one step: what counts is the optimizer's step
        for _ in range(2):
            x = torch.randn(4, 2, 4, 4, generator=generator)
            # noise as the target: weights are pushed to and fro
            ((model(x) - torch.randn(4, 5, generator=generator)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)


def by_hand(codes: list[int], threshold: float) -> tuple[float, float, int, bool]:
    """Algorithm 1 for one weight: frequency, mean, its code, whether it is frozen."""
    f, mean, direction, last, frozen = 0.0, float(codes[0]), 0, codes[0], False
    for code in codes[1:]:
        code = last if frozen else code
        move = (code > last) - (code < last)
        f = MOMENTUM * (move != 0 and move == -direction) + (1 - MOMENTUM) * f
        mean = MOMENTUM * code + (1 - MOMENTUM) * mean
        direction = move or direction
        if threshold and f > threshold and not frozen:
            frozen, code = True, round(mean)
        last = code
    return f, mean, last, frozen


@pytest.mark.parametrize("threshold", [0.0, 0.025])
def test_counts_are_those_of_the_algorithm(threshold: float) -> None:
    columns = [[0, 1] * 6, [0, 0, 1, 1] * 3, [3, 2, 1, 0] * 3, [2] * 12, [-1, 1, 1, -1, -1, 0, 1, 0, 1, 0, -1, -1]]
    counts = Oscillation(1, len(columns))
    for step in range(12):
        counts.step(torch.tensor([[column[step] for column in columns]], dtype=torch.int8), threshold)
    expected = [by_hand(column, threshold) for column in columns]
    assert torch.allclose(counts.frequency[0] / 2.0**30, torch.tensor([e[0] for e in expected]), atol=1e-6)
    assert torch.allclose(counts.mean[0] / 2.0**20, torch.tensor([e[1] for e in expected]), atol=1e-4)
    assert counts.codes[0].tolist() == [e[2] for e in expected]
    assert counts.frozen[0].tolist() == [e[3] for e in expected]
    assert any(e[3] for e in expected) == bool(threshold) and not all(e[3] for e in expected)


@pytest.mark.parametrize("weight", [{}, {"bits": 2, "grid": "seq"}, {"zero_point": "int"}, {"zero_point": "float"}])
def test_frozen_weights_stay_and_are_what_is_exported(weight: dict[str, object]) -> None:
    model = net()
    qat.prepare(model, recipe(weight, freeze_oscillating=0.009))
    train(model, 40)
    frozen = {name: counts.frozen.clone() for name, (*_, counts) in tracked(model).items()}
    codes = {name: counts.codes.clone() for name, (*_, counts) in tracked(model).items()}
    assert any(bool(mask.any()) for mask in frozen.values()) and not all(bool(mask.all()) for mask in frozen.values())
    train(model, 10)
    bundle = qat.convert(model)
    for name, (layer, key, quantizer, counts) in tracked(model).items():
        still = frozen[name]
        assert bool(counts.frozen[still].all())
        assert torch.equal(bundle[name].codes[still].short(), codes[name][still])
        held = layer._parameters[key]
        assert torch.equal(quantizer(held), bundle[name].dequantize())
        # on the code itself, at the scale of now
        rows = quantizer.layout.to_rows
        assert torch.equal(rows(held.detach())[still], rows(bundle[name].dequantize())[still])


def test_counts_go_on_from_a_checkpoint() -> None:
    model = net()
    wanted = recipe(freeze_oscillating=0.02)
    qat.prepare(model, wanted)
    train(model, 30)
    other = net()
    qat.prepare(other, wanted)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for one in (model, other):
        train(one, 15)
    ours, theirs = model.state_dict(), other.state_dict()
    names = [key for key in ours if ".oscillation." in key]
    assert len(names) == 12 and all(torch.equal(ours[key], theirs[key]) for key in names)
    assert any(bool(ours[key].any()) for key in names if key.endswith("frozen"))
    # not among what a deployment gets
    assert not any("oscillation" in key for key in qat.convert(model).floats)


def test_no_cast_touches_the_counts() -> None:
    counts = Oscillation(1, 3).to(torch.bfloat16)
    assert not any(buffer.is_floating_point() for buffer in counts.buffers())


def test_counting_begins_anew_with_the_quantization() -> None:
    model = net()
    made = recipe()
    made.phases = qat.recipes.from_dict(
        {
            "name": "n",
            "rules": {"all": {"types": ["Linear"], "weight": {"bits": 3, "quantizer": "lsq"}}},
            "phases": {"float": {"steps": 2, "quantize": False}, "q": {"steps": -1, "freeze_oscillating": 0.5}},
        }
    ).phases
    qat.prepare(model, made)
    train(model, 2)
    assert not any(bool(counts.seen) for *_, counts in tracked(model).values())
    train(model, 1)
    assert all(bool(counts.seen) for *_, counts in tracked(model).values())
    assert all(found == (0.0, 0.0) for found in share(model).values())


def test_dampening_draws_weights_inside_the_grid_onto_their_codes() -> None:
    model = net()
    qat.prepare(model, recipe(dampen=0.5))
    layer = qat_layers(model)["2"]
    quantizer = layer.weight_quantizer
    scale = quantizer.qparams(layer.weight)[0].detach()
    with torch.no_grad():
        layer.weight[0, 0] = 50.0 * scale[0, 0]
        model[0].weight.copy_(model[0].weight_quantizer(model[0].weight))
    qat.weights_changed(model)
    loss = qat.dampening(model)
    loss.backward()
    fake = quantizer(layer.weight).detach()
    w = layer.weight.detach()
    inside = torch.maximum(torch.minimum(w, 3 * scale), -4 * scale)
    assert torch.allclose(loss.detach(), 0.5 * (fake - inside).square().sum())
    expected = torch.where(w == inside, w - fake, 0.0)
    assert torch.allclose(layer.weight.grad, expected, atol=1e-7) and float(layer.weight.grad[0, 0]) == 0.0
    assert quantizer.theta.grad is None
    assert float(dampening(model, 0.0)) == 0.0


def test_what_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(qat.QATError, match="codes whose order"):
        qat.prepare(net(), recipe({"grid": "e4m3", "bits": 8}, freeze_oscillating=0.1))
    with pytest.raises(qat.QATError, match="bfloat16 may round"):
        qat.prepare(net().bfloat16(), recipe(freeze_oscillating=0.1))
    model = net()
    qat.prepare(model, recipe())
    assert tracked(model) == {}


def test_nothing_is_computed_without_a_strength() -> None:
    model = net()
    qat.prepare(model, recipe())
    found: Tensor = qat.dampening(model)
    assert not found.requires_grad and float(found) == 0.0


def test_scales_that_would_follow_the_weights_are_refused() -> None:
    """A weight on the extra negative code would raise the scale, and the scale the weight, step by step."""
    for quantizer in ("absmax", "quest"):
        with pytest.raises(qat.QATError, match=r"freeze_oscillating.*follow"):
            recipe({"quantizer": quantizer}, freeze_oscillating=0.02)
    words = recipe(freeze_oscillating=0.02)
    words.rules["all"].weight.quantizer = "absmax"  # type: ignore[union-attr]
    with pytest.raises(qat.QATError, match="follow"):
        qat.prepare(net(), words)


def test_a_float_checkpoint_loads() -> None:
    """Strictly, as it does without the word. Mutation: the counts are missed."""
    state = net().state_dict()
    model = net()
    qat.prepare(model, recipe(freeze_oscillating=0.02))
    assert model.load_state_dict(state).missing_keys == []
    train(model, 2)
    saved = model.state_dict()
    lacks = {key: value for key, value in saved.items() if not key.endswith("oscillation.codes")}
    with pytest.raises(RuntimeError, match=r"oscillation\.codes"):
        model.load_state_dict(lacks)
