"""`backward: int8` and `int8_dgrad`: gradients multiplied as 8-bit integers, right in the mean."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.errors import QATError, RecipeError
from qat.recipes import from_dict

WEIGHT = {"bits": 8, "granularity": "channel", "narrow": True, "quantizer": "absmax"}
TOKEN = {"bits": 8, "granularity": "token", "quantizer": "absmax"}
STATIC = {"bits": 8, "granularity": "tensor", "quantizer": "ema", "zero_point": "int"}
LEARNED = {"bits": 4, "granularity": "channel", "quantizer": "lsq"}
RUNS = 64


def recipe(backward: str | None, weight: dict[str, Any] = WEIGHT, x: dict[str, Any] | None = TOKEN, **more: Any) -> Any:
    rule = {"types": ["Linear"], "weight": weight, "input": x, "backward": backward}
    return from_dict({"name": "backward", "rules": {"linears": rule}, **more})


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32))


def prepared(backward: str | None, weight: dict[str, Any] = WEIGHT, x: dict[str, Any] | None = TOKEN) -> nn.Module:
    made = model()
    qat.prepare(made, recipe(backward, weight, x))
    made(inputs()[0])
    # static ranges are there from now on
    qat.after_optimizer_step(made)
    return made


def inputs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 20, 48, generator=g).requires_grad_(), torch.randn(3, 20, 32, generator=g)


def gradients(of: nn.Module) -> list[Tensor]:
    x, grad = inputs()
    parameters = [p for p in of.parameters() if p.requires_grad]
    return list(torch.autograd.grad(of(x), [x, *parameters], grad))


@pytest.mark.parametrize("backward", ["int8", "int8_dgrad"])
@pytest.mark.parametrize(("weight", "x"), [(WEIGHT, TOKEN), (WEIGHT, STATIC), (LEARNED, TOKEN)])
def test_gradients_are_right_in_the_mean(backward: str, weight: dict[str, Any], x: dict[str, Any]) -> None:
    """The error of one backward, about 1 %, shrinks by the root of their number. Mutation: rounding to nearest, or one
    seed for every call -> the error stays."""
    exact, rounded = gradients(prepared("float", weight, x)), prepared(backward, weight, x)
    torch.manual_seed(2)
    first = gradients(rounded)
    mean = [sum(each) / RUNS for each in zip(*(gradients(rounded) for _ in range(RUNS)), strict=True)]
    for i, (one, average, truth) in enumerate(zip(first, mean, exact, strict=True)):
        size = float(truth.norm())
        error, rest = float((one - truth).norm()) / size, float((average - truth).norm()) / size
        assert error <= 0.05, i
        assert rest <= max(error * 2.5 / RUNS**0.5, 1e-5), i
    # that of x went through two layers
    assert float((first[0] - exact[0]).norm()) > 0


def test_only_the_gradient_of_the_input_is_rounded() -> None:
    """Of the last layer the gradients of weight and bias come before any rounding."""
    exact, rounded = gradients(prepared("float")), gradients(prepared("int8_dgrad"))
    assert torch.equal(exact[-1], rounded[-1]) and torch.equal(exact[-2], rounded[-2])
    assert not torch.equal(exact[-2], gradients(prepared("int8"))[-2])


def test_seeded_runs_and_recomputed_forwards_round_alike() -> None:
    made = prepared("int8")
    x, grad = inputs()
    parameters = list(made.parameters())
    torch.manual_seed(3)
    first = torch.autograd.grad(made(x), parameters, grad)
    torch.manual_seed(3)
    again = torch.autograd.grad(made(x), parameters, grad)
    torch.manual_seed(3)
    recomputed = torch.autograd.grad(checkpoint(made, x, use_reentrant=False), parameters, grad)
    torch.manual_seed(4)
    other = torch.autograd.grad(made(x), parameters, grad)
    for a, b, c in zip(first, again, recomputed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(first[0], other[0])


def test_the_forward_is_the_same_and_evaluation_draws_nothing() -> None:
    x, _ = inputs()
    made = prepared("int8")
    assert torch.equal(made(x), prepared("float")(x))
    before = torch.get_rng_state()
    with torch.no_grad():
        made(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_ramp_has_the_float_backward() -> None:
    """On the way to the grid the weight is no product of codes and scales."""
    phases = {"qat": {"steps": -1, "ramp": 4}}
    found = []
    for backward in ("float", "int8"):
        made = model()
        qat.prepare(made, recipe(backward, phases=phases))
        qat.after_optimizer_step(made)
        found.append(gradients(made))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled() -> None:
    """In one graph; the mean over seeds is that of the float backward here too."""
    exact, made = gradients(prepared("float")), prepared("int8")
    compiled: Any = torch.compile(made, fullgraph=True)
    runs = [gradients(compiled) for _ in range(8)]
    for i, truth in enumerate(exact):
        mean = sum(run[i] for run in runs) / len(runs)
        assert float((mean - truth).norm()) <= 0.02 * float(truth.norm()), i
    assert not torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"backward": "int4", "weight": WEIGHT}, "allowed: float, int8, int8_dgrad"),
        ({"backward": "int8", "keep_float": True}, "keep_float: true is not allowed beside"),
        ({"backward": "int8_dgrad", "weight": {**WEIGHT, "granularity": "group", "group_size": 16}}, "channel"),
        ({"backward": "int8", "weight": WEIGHT}, "use int8_dgrad"),
        ({"backward": "int8", "input": TOKEN}, "this one is float"),
        ({"backward": "int8", "weight": {**WEIGHT, "narrow": False, "quantizer": "minmax", "zero_point": "int"},
          "input": TOKEN}, "without zero points"),
    ],
)  # fmt: skip
def test_refusals(rule: dict[str, Any], words: str) -> None:
    with pytest.raises((QATError, RecipeError), match=words):
        qat.prepare(model(), from_dict({"name": "no", "rules": {"all": {"types": ["Linear"], **rule}}}))


def test_other_layers_are_refused() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    weight = {"bits": 8, "granularity": "channel", "quantizer": "absmax"}
    with pytest.raises(QATError, match="is for Linear, not Conv2d"):
        qat.prepare(conv, from_dict({"name": "no", "rules": {"all": {"weight": weight, "backward": "int8_dgrad"}}}))


def test_a_later_rule_says_otherwise() -> None:
    rules = {
        "all": {"types": ["Linear"], "weight": WEIGHT, "input": TOKEN, "backward": "int8"},
        "last": {"match": ["2"], "backward": "float"},
    }
    plan = qat.prepare(copy.deepcopy(model()), from_dict({"name": "two", "rules": rules}))
    assert [row.backward for row in plan.rows] == ["int8", "float"]
    assert "backward int8" in plan.render()
