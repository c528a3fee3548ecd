"""Groups of inputs in an order of their own (`desc_act`): what a layer trains on is what it would train on with its
inputs, and the columns of its weight, put into that order by hand.

Mutations that were tried one at a time, and the test that turned red for each:

    unordered gives ordered                              test_rows_have_the_columns_in_order
    pull leaves a gradient as rows                       test_it_trains_as_a_layer_whose_inputs_were_moved
    order an integer buffer / in one part                test_no_average_and_no_cast_changes_the_order
    squares, Hessians left as the inputs lie             test_a_weighted_search, test_gptq_forms_the_groups
    no regroup in gptq                                   test_gptq_forms_the_groups
    the check of formats left out                        test_other_formats_refuse_it_before_training
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import qat
from qat.errors import QATError
from qat.export import all_formats, get_format
from qat.init.gptq import gptq, within
from qat.init.imatrix import search_weighted
from qat.init.inputs import importance
from qat.init.obs import solve
from qat.layers import weight_quantizers
from qat.layout import _KINDS, Layout
from qat.quantizers.mse import Stored, search
from qat.recipes import Recipe

Build = Callable[..., Recipe]
INPUTS, OUTPUTS, G = 64, 24, 16
ORDER = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(3)).reshape(-1, G).sort(1).values.flatten()
SHAPES = {"conv": (6, 2, 2, 2), "deconv": (2, 6, 2, 2), "experts": (2, 3, 8), "experts_t": (2, 8, 3)}


def quantizer_of(layer: nn.Module) -> Stored:
    found = weight_quantizers(layer)["weight"]
    assert isinstance(found, Stored)
    return found


def prepared(recipe: Build, order: Tensor | None = ORDER, **weight: Any) -> nn.Module:
    """Two layers; the groups of the first are of inputs in `order`, and None says the same of moved weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.Linear(OUTPUTS, 4))
    if order is None:
        model[0].weight.data = model[0].weight.data[:, ORDER]
    slot = {"granularity": "group", "group_size": G, "desc_act": order is not None, **weight}
    phases = slot.pop("phases", None)
    head = {"match": ["1"], "keep_float": True}
    rules = {"all": {"types": ["Linear"], "weight": {"bits": 4, "quantizer": "lsq", **slot}}, "head": head}
    qat.prepare(model, recipe(rules=rules, phases=phases))
    if order is not None:
        quantizer_of(model[0]).regroup(order)
        qat.initialize(model, force=True)
    return model


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_rows_have_the_columns_in_order(kind: str) -> None:
    shape = SHAPES.get(kind, (6, 8))
    w, plain = torch.randn(shape), Layout(shape, kind)
    order = torch.randperm(plain.rows_shape[1], generator=torch.Generator().manual_seed(1))
    layout = Layout(shape, kind, order)
    assert torch.equal(layout.to_rows(w), plain.to_rows(w)[:, order])
    assert torch.equal(layout.from_rows(layout.to_rows(w)), w)


CASES: dict[str, dict[str, Any]] = {
    "codes in halves": {"bits": 3},
    "codes in bytes": {"bits": 8},
    "mse": {"quantizer": "mse"},
    "zero points": {"zero_point": "int"},
    "levels": {"grid": "nf4"},
    "on the way to full strength": {"phases": {"qat": {"steps": -1, "ramp": 10}}},
    "scales alone": {"phases": {"qat": {"steps": -1, "train": "scales"}}},
}


@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in CASES), ("codes in halves", True), ("scales alone", True)]
)
def test_it_trains_as_a_layer_whose_inputs_were_moved(name: str, compiled: bool, recipe: Build) -> None:
    """Forward, the gradients of weight and scales, and what three steps make of them: the same numbers, moved."""
    x = torch.randint(-3, 4, (8, INPUTS), generator=torch.Generator().manual_seed(1)).float()
    found = []
    for order in (ORDER, None):
        torch._dynamo.reset()
        model = prepared(recipe, order, **CASES[name])
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        moved = x if order is not None else x[:, ORDER]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        seen: list[Tensor] = []
        for _ in range(3):
            run(moved).square().mean().backward()
            grads = [p.grad for n, p in model[0].named_parameters() if p.grad is not None and "bias" not in n]
            assert grads and all(bool(grad.abs().sum() > 0) for grad in grads)
            seen += [g[:, ORDER] if order is not None and g.shape == (OUTPUTS, INPUTS) else g.clone() for g in grads]  # type: ignore[index, union-attr]
            optimizer.step()
            optimizer.zero_grad()
            qat.after_optimizer_step(model, optimizer)
        weight, fake = model[0].weight.detach(), quantizer_of(model[0])(model[0].weight).detach()
        assert torch.equal(qat.convert(model, require_final=False)["0.weight"].dequantize(), fake)
        seen += [t[:, ORDER] if order is not None else t for t in (weight, fake)]
        found.append(seen)
    for own, other in zip(*found, strict=True):
        # sums over inputs in another order
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_has_the_order(recipe: Build, tmp_path: Path) -> None:
    model = prepared(recipe)
    assert [key for key in model.state_dict() if key.endswith("order")] == ["0.weight_quantizer.order"]
    torch.save(model.state_dict(), tmp_path / "x.ckpt")
    wanted = qat.convert(model)["0.weight"]
    loaded = qat.load_from_checkpoint(
        tmp_path / "x.ckpt", nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.Linear(OUTPUTS, 4))
    )
    for other in (loaded, copy.deepcopy(model)):
        found = qat.convert(other)["0.weight"]
        assert torch.equal(found.codes, wanted.codes) and torch.equal(found.dequantize(), wanted.dequantize())
        assert torch.equal(found.layout.order, ORDER)  # type: ignore[arg-type]


def test_layers_without_it_have_nothing_more(recipe: Build) -> None:
    model = prepared(recipe, None)
    quantizer = quantizer_of(model[0])
    assert quantizer.layout is quantizer.layout and quantizer.layout.order is None
    assert not any("order" in key for key in model.state_dict())


AVERAGES: dict[str, dict[str, Any]] = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    # d * a + (1 - d) * b, which is not a where b is a
    "by products": {"avg_fn": get_ema_avg_fn(0.9)},
    "by products, slow": {"avg_fn": get_ema_avg_fn(0.9999)},
}


@pytest.mark.parametrize("average", AVERAGES)
def test_no_average_and_no_cast_changes_the_order(average: str, recipe: Build) -> None:
    """Of more inputs than bf16 counts. Mutation: the numbers themselves in three parts, as scales are kept."""
    model = nn.Sequential(nn.Linear(1 << 13, 2))
    wanted = torch.randperm(1 << 13, generator=torch.Generator().manual_seed(1)).reshape(-1, G).sort(1).values.flatten()
    qat.prepare(model, recipe(granularity="group", group_size=G, desc_act=True))
    quantizer_of(model[0]).regroup(wanted)
    averaged = AveragedModel(model, use_buffers=True, **AVERAGES[average])
    for _ in range(300):
        averaged.update_parameters(model)
    for other in (averaged.module, model.to(torch.bfloat16), model.half()):
        assert torch.equal(quantizer_of(other[0]).layout.order, wanted)  # type: ignore[arg-type]


def test_a_harmed_order_is_refused(recipe: Build) -> None:
    model = prepared(recipe)
    quantizer = quantizer_of(model[0])
    quantizer.order[0, 1] = quantizer.order[0, 0]  # type: ignore[index]
    with pytest.raises(QATError, match="the order of its inputs is no permutation"):
        qat.convert(model)["0.weight"]


def inputs() -> Tensor:
    """Of very different sizes, and depending on each other."""
    g = torch.Generator().manual_seed(2)
    mixed = torch.randn(256, INPUTS, generator=g) + torch.randn(256, 1, generator=g)
    return mixed * torch.logspace(-1, 1, INPUTS)[torch.randperm(INPUTS, generator=g)]


def test_gptq_forms_the_groups(recipe: Build) -> None:
    """The largest inputs first; codes as GPTQ finds them for columns that were moved by hand."""
    x, model = inputs(), prepared(recipe, quantizer="mse")
    w = model[0].weight.detach().clone()
    row = gptq(model, [x])[0]
    sizes = x.square().mean(0)
    order = torch.argsort(sizes, descending=True).reshape(-1, G).sort(1).values.flatten()
    quantizer = quantizer_of(model[0])
    assert torch.equal(quantizer.layout.order, order)  # type: ignore[arg-type]
    fields = search(w[:, order], quantizer.spec)
    hessian = (x.mT @ x).double()[order][:, order] / len(x)
    by_hand = solve(w[:, order], hessian, fields, quantizer.spec)
    found = qat.convert(model)["0.weight"].dequantize()
    assert torch.equal(found[:, order], by_hand.weights)
    assert torch.equal(model[0].weight[:, order], within(by_hand.latents, fields, quantizer.spec))
    natural = prepared(recipe, None, quantizer="mse")
    with torch.no_grad():
        natural[0].weight.copy_(w)
    plain = gptq(natural, [x])[0]
    assert row.error is not None and plain.error is not None and row.error < plain.error, "groups of equals are no gain"


def test_a_weighted_search(recipe: Build) -> None:
    x, model = inputs(), prepared(recipe, quantizer="mse")
    search_weighted(model, [x])
    quantizer = quantizer_of(model[0])
    squares = importance(x.square().double().mean(0, keepdim=True), OUTPUTS)
    wanted = search(model[0].weight.detach()[:, ORDER], quantizer.spec, squares[:, ORDER]).scale
    assert torch.equal(quantizer.start().scale, wanted)


@pytest.mark.parametrize("name", sorted(set(all_formats()) - {"gptq"}))
def test_other_formats_refuse_it_before_training(name: str, recipe: Build) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
    plan = qat.prepare(model, recipe(granularity="group", group_size=G, desc_act=True))
    said = [why for why in get_format(name).check(plan) if why.startswith("0: desc_act")]
    assert said == [f"0: desc_act: {name} has groups of consecutive inputs; use gptq, or desc_act: false"]
    assert not any(": desc_act" in why for why in get_format("gptq").check(plan))
