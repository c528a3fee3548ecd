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
from qat.fake_quant_kernels import int8_gradients
from qat.recipes import from_dict, to_dict

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
    made.eval()
    made(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_the_same_in_a_reentrant_checkpoint() -> None:
    """Its first forward has no gradients but draws all the same. Mutation: seeds drawn with gradients only -> red."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(48, 64), nn.Dropout(0.5))
    qat.prepare(made, recipe("int8"))
    masks: list[Tensor] = []
    made[1].register_forward_hook(lambda module, args, y: masks.append(y == 0))
    x, _ = inputs()
    checkpoint(made, x, use_reentrant=True).sum().backward()
    assert len(masks) == 2 and torch.equal(*masks)
    state = torch.get_rng_state()
    made.eval()
    made(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backward", ["int8", "int8_dgrad"])
def test_no_tokens(backward: str) -> None:
    """What a router may send to a layer. Mutation: ones in the shape of `scale[:1]` -> red."""
    made = prepared(backward)
    x = torch.empty(0, 48, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 48)
    assert all(p.grad is not None and not p.grad.any() for p in made.parameters())


def test_more_tokens_than_a_sum_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, each rounded on its own, added up. Mutation: pieces that overlap, or the first one alone -> red."""
    g, x = torch.randn(50, 8), torch.randint(0, 256, (50, 16)).to(torch.uint8)
    scale, zero = torch.rand(50, 1) + 0.5, torch.full((50, 1), 100.0)
    exact = g.t() @ ((x.float() - zero) * scale)
    monkeypatch.setattr(int8_gradients, "LONGEST", 16)
    found = int8_gradients.int8_wgrad(g, x, scale, torch.tensor([5]), torch.float32, zero)
    assert float((found - exact).norm()) <= 0.02 * float(exact.norm())


def test_bits_of_a_phase() -> None:
    """Packed codes are found again for the backward. Mutation: packed bytes handed to the product -> red."""
    phases = {"qat": {"steps": -1, "bits": {"linears": 4}}}
    exact, rounded = model(), model()
    qat.prepare(exact, recipe("float", phases=phases))
    qat.prepare(rounded, recipe("int8", phases=phases))
    for truth, found in zip(gradients(exact), gradients(rounded), strict=True):
        assert float((found - truth).norm()) <= 0.05 * float(truth.norm())


def test_records_of_versions_without_the_word_stay_the_same() -> None:
    assert all("backward" not in rule for rule in to_dict(recipe(None))["rules"].values())
    assert to_dict(recipe("int8"))["rules"]["linears"]["backward"] == "int8"
    assert from_dict(to_dict(recipe("int8"))) == recipe("int8") and from_dict(to_dict(recipe(None))) == recipe(None)


def test_a_rule_about_gradients_alone() -> None:
    """It lists no layer and unlists none, and says nothing about layers that stay in float."""
    rules = {
        "first": {"match": ["0"], "weight": WEIGHT, "input": TOKEN},
        "last": {"match": ["2"], "keep_float": True},
        "fast": {"types": ["Linear"], "backward": "int8"},
    }
    plan = qat.prepare(model(), from_dict({"name": "two", "strict": True, "rules": rules}))
    assert [row.backward for row in (*plan.rows, *plan.float_rows)] == ["int8", "float"]


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
    runs = [gradients(compiled) for _ in range(RUNS)]
    for i, truth in enumerate(exact):
        mean = sum(run[i] for run in runs) / RUNS
        error, rest = float((runs[0][i] - truth).norm()), float((mean - truth).norm())
        assert rest <= max(error * 2.5 / RUNS**0.5, 1e-5 * float(truth.norm())), i
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
