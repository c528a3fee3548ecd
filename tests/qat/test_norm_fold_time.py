"""Folded batch norms while variances move, models are loaded, and codes were made before.

Mutations tried, one at a time, each turns a test red: scales that stay; scales that grow from those of the last step;
a loaded pair that grows from the searched one; no look at the variance before a search, in eval, in `convert`, after a
load.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from folded_nets import LATE, X, deployed, net, recipe, seasoned, train
from torch import Tensor, nn

import qat
from qat.norm_fold import folds_of
from qat.quantizers import quantizers
from qat.steps import latents

LONG = {"learn": {"steps": 50}, "settle": {"freeze_batch_norm": True}}


def vary(model: Any, factor: Any) -> None:
    """Other variances, as training or an edit would leave them."""
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.running_var.mul_(factor)


def error(layer: Any) -> float:
    """Of the rounding, relative to what is rounded."""
    w = latents(layer, "weight")
    return float((layer.weight_quantizer(w).detach() - w).square().sum() / w.square().sum())


def like(model: nn.Module, other: nn.Module, x: Tensor = X) -> bool:
    """Both give about the same."""
    a, b = model.eval()(x).detach(), other.eval()(x).detach()
    return float((a - b).square().mean()) < 0.02 * float(b.square().mean())


# ---- a search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mse", "lsq"])
def test_scales_are_searched_under_the_variance_of_now(name: str) -> None:
    source = net()
    vary(source, 0.01)
    plain, late, early = copy.deepcopy(source), net(), copy.deepcopy(source)
    qat.prepare(late, recipe(phases=LATE, quantizer=name))
    late.load_state_dict(source.state_dict())
    qat.prepare(early, recipe(phases=LATE, quantizer=name))
    assert torch.equal(late[0].weight_quantizer.start_scale, early[0].weight_quantizer.start_scale)  # type: ignore
    assert torch.equal(late.eval()(X), early.eval()(X)) and like(late, plain)
    with torch.device("meta"):
        made = bare()
    qat.prepare(made, recipe(phases=LATE, quantizer=name))
    made.to_empty(device="cpu")
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    made.load_state_dict(source.state_dict())
    assert torch.equal(made.eval()(X), early(X))


def bare() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU()
    )


# ---- scales that stay, relative to f --------------------------------------------------------------------------------

KEPT = [name for name, cls in quantizers().items() if cls.for_weights and cls.keeps_fields]


def words(name: str) -> dict[str, Any]:
    if name == "dual_lsq":
        return {"grid": "fp4"}
    return {"zero_point": "float"} if name in ("mse", "lsq_plus") else {}


@pytest.mark.parametrize("name", KEPT)
def test_scales_follow_the_variance(name: str) -> None:
    model = net().train()
    qat.prepare(model, recipe(phases=LONG, quantizer=name, bits=4, **words(name)))
    before = [error(model[i]) for i in (0, 3)]  # type: ignore[index]
    x = model.eval()(X).detach()
    for factor in (100.0, 0.1, 0.001):
        vary(model, torch.tensor(factor))
        qat.after_optimizer_step(model)
        now = [error(model[i]) for i in (0, 3)]  # type: ignore[index]
        assert now == pytest.approx(before, rel=0.2), factor
    vary(model, 100.0)
    qat.weights_changed(model)
    assert torch.allclose(model.eval()(X), x, rtol=1e-3, atol=1e-3)


def test_no_rounding_adds_up() -> None:
    model = net().train()
    qat.prepare(model, recipe(phases=LONG, bits=4))
    start = model[0].weight_quantizer.start_scale.clone()  # type: ignore[union-attr, operator]
    for _ in range(40):
        vary(model, 1.003)
        qat.weights_changed(model)
    with torch.no_grad():
        for i in (1, 4):
            model[i].running_var.copy_(seasoned(net())[i].running_var)  # type: ignore[index, operator, union-attr]
    qat.weights_changed(model)
    assert torch.equal(model[0].weight_quantizer.start_scale, start)  # type: ignore[union-attr]


@pytest.mark.parametrize("slot", [{"granularity": "tensor"}, {"scale": "fp32"}, {"scale": "nvfp4", "grid": "fp4"}])
def test_scales_of_all_kinds_follow(slot: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = seasoned(nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16)))
    if "grid" in slot:
        slot = {**slot, "granularity": "group", "group_size": 16}
    qat.prepare(model, recipe(types=["Linear"], phases=LONG, quantizer="mse", **{"bits": 4, **slot}))
    with torch.no_grad():
        model[1].running_var[1:] *= 0.01  # type: ignore[index, operator]
        model[1].running_var[0] *= 30.0  # type: ignore[index, operator]
    qat.weights_changed(model)
    followed = error(model[0])
    qat.initialize(model, force=True)
    assert followed < 1.3 * error(model[0])


def test_a_loaded_pair_is_where_scales_start() -> None:
    model = net().train()
    qat.prepare(model, recipe(phases=LONG, bits=4))
    train(model, 2)
    vary(model, 50.0)
    qat.after_optimizer_step(model)
    resumed = net().train()
    qat.prepare(resumed, recipe(phases=LONG, bits=4))
    with torch.no_grad():
        # where a scale happens to be that of the checkpoint
        resumed[0].weight_quantizer.start_scale.copy_(model[0].weight_quantizer.start_scale)  # type: ignore
    qat.weights_changed(resumed)
    resumed.load_state_dict(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    for other in (resumed, copy.deepcopy(model)):
        vary(other, 0.02)
        qat.after_optimizer_step(other)
        assert error(other[0]) < 0.05  # type: ignore[index]


# ---- the freeze ------------------------------------------------------------------------------------------------------


def test_nothing_is_final_before_the_freeze() -> None:
    model = net().train()
    qat.prepare(model, recipe(phases=LATE))
    for step in range(4):
        assert qat.apply_schedule(model).final == (step >= 2)
        if step < 2:
            with pytest.raises(qat.ExportError, match="it is from step 2 on"):
                qat.convert(model)
        train(model, 1)


def test_statistics_that_are_frozen_are_not_found_anew_without_a_word() -> None:
    model = net().train()
    qat.prepare(model, recipe(phases=LATE))
    assert qat.reestimate_batch_norm(model, [X]) == 2
    train(model, 2)
    with pytest.raises(qat.QATError, match="before the first step of that phase"):
        qat.reestimate_batch_norm(model, [X])


# ---- variances that something else changes --------------------------------------------------------------------------


def test_frozen_variances_that_are_edited_are_followed() -> None:
    model = net()
    qat.prepare(model, recipe())
    plain = net()
    for of in (plain, model):
        vary(of, 50.0)
    assert like(model, plain)
    for of in (plain, model.train()):
        vary(of, 0.001)
    assert torch.equal(deployed(model)(X), model.eval()(X)) and like(model, plain)


def test_an_average_of_state_dicts_is_followed() -> None:
    model = net().train()
    qat.prepare(model, recipe(phases=LATE))
    average = copy.deepcopy(model)
    vary(model, 100.0)
    train(model, 3)
    qat.apply_schedule(average, 3)
    average.eval()(X)
    with torch.no_grad():
        for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            if a.is_floating_point():
                a.copy_(b)
    assert torch.equal(average(X), model.eval()(X))
    assert torch.equal(deployed(average)(X), average(X))


def test_a_part_is_loaded() -> None:
    whole = nn.ModuleDict({"net": net()})
    qat.prepare(whole, recipe())
    source = net()
    vary(source, 50.0)
    whole["net"].load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(folds_of(whole)[0].factors[1], source[1].running_var)  # type: ignore[index]
    assert torch.equal(whole["net"][0].folded_variance, source[1].running_var)  # type: ignore[index]
    assert like(whole["net"], source)
