"""A recipe resolved on a model: who gets what, and every refusal with the names that help."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.errors import QATError
from qat.plan import make_plan, matches
from qat.recipes import Rule


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(64, 64, 3)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)


W4 = {"bits": 4, "granularity": "channel"}
W8 = {"bits": 8, "granularity": "channel"}


def bits(plan: qat.Plan) -> dict[str, int]:
    return {row.name: row.weight.bits for row in plan.rows if row.weight is not None}


@pytest.mark.parametrize(
    ("match", "types", "hit"),
    [
        (["*"], [], True),
        (["blocks.*.up"], [], True),
        (["blocks.0.*"], ["Linear"], True),
        (["blocks.0.*"], ["Conv1d"], False),
        (["up"], [], False),
        (["re:.*\\.(up|down)"], [], True),
        (["re:blocks"], [], False),
        (["BLOCKS*"], [], False),
        (["nothing", "*up"], [], True),
    ],
)
def test_matches(match: list[str], types: list[str], hit: bool) -> None:
    assert matches(Rule(match=match, types=types), ("blocks.0.up",), ("Linear", "Linear")) is hit


def test_later_rules_replace_slots(recipe: Any) -> None:
    rules = {
        "all": {"types": ["Linear"], "weight": W4},
        "down": {"match": ["*.down"], "weight": W8},
        "inputs": {"match": ["re:blocks\\.0\\..*"], "input": {"bits": 8, "granularity": "token"}},
        "head": {"match": ["head"], "keep_float": True},
        "back": {"match": ["conv"], "weight": W8, "input": {"bits": 8, "granularity": "tensor", "quantizer": "ema"}},
    }
    plan = qat.plan(Model(), recipe(rules=rules))
    assert bits(plan) == {"blocks.0.up": 4, "blocks.0.down": 8, "blocks.1.up": 4, "blocks.1.down": 8, "conv": 8}
    assert [row.name for row in plan.rows if row.input is not None] == ["blocks.0.up", "blocks.0.down", "conv"]
    assert {row.name: row.listed for row in plan.float_rows} == {"embed": False, "head": True}
    covered = 4 * 64 * 128 + 64 * 64 * 3
    total = sum(p.numel() for p in Model().parameters())
    assert plan.total_params == total and plan.coverage == pytest.approx(100 * covered / total)
    text = plan.render()
    for words in ("blocks.1.down", "int8 channel portable absmax", "head", f"{plan.coverage:.2f} %"):
        assert words in text


def test_expected_bytes(recipe: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    rules = {"all": {"weight": {"bits": 4, "granularity": "group", "group_size": 32}}}
    assert qat.plan(model, recipe(rules=rules)).bytes == 32 * 64 // 2 + 32 * 2 * 2


def refused(words: str, recipe: Any, model: nn.Module | None = None) -> None:
    with pytest.raises(qat.QATError, match=words) as caught:
        qat.plan(model or Model(), recipe)
    assert "\n" not in str(caught.value)


def test_a_rule_that_matches_nothing_names_the_nearest_layers(recipe: Any) -> None:
    rules = {"all": {"weight": W4}, "odd": {"match": ["blocks.*.uq"], "weight": W8}}
    refused(r"rules\.odd matches no layer .*nearest layer names: .*blocks\.0\.up", recipe(rules=rules))
    rules["odd"]["optional"] = True
    qat.plan(Model(), recipe(rules=rules))
    refused("rules.all matches no layer", recipe(types=["Conv3d"]))


def test_refusals(recipe: Any) -> None:
    refused("'Linaer' is not a type that can be quantized; did you mean 'Linear'", recipe(types=["Linaer"]))
    refused(
        "group_size=48 does not divide the 64 inputs of a row; use one of", recipe(granularity="group", group_size=48)
    )
    refused("rules.all matches no layer .*none at all", recipe(), nn.Sequential(nn.LayerNorm(3)))
    optional = {"all": {"weight": W4, "optional": True}}
    refused("no rule quantizes any layer of this model", recipe(rules=optional), nn.Sequential(nn.LayerNorm(3)))
    tokens = {"bits": 8, "granularity": "token", "quantizer": "absmax"}
    refused("the input of Conv1d has no tokens", recipe(types=["Conv1d"], input=tokens))
    refused("a signed 1-bit grid", recipe(bits=1, quantizer="absmax"))
    embedding = nn.ModuleDict({"e": nn.Embedding(5, 8, max_norm=1.0), "s": nn.Embedding(5, 8, sparse=True)})
    refused("max_norm renormalises the weight", recipe(), embedding)
    refused("sparse=True gives sparse gradients", recipe(), embedding)


def test_strict(recipe: Any) -> None:
    rules = {"all": {"types": ["Linear"], "weight": W4}}
    refused(r"strict: 2 layers stay in float without being listed \(embed, conv\)", recipe(rules=rules, strict=True))
    rules["rest"] = {"match": ["embed", "conv"], "keep_float": True}
    qat.plan(Model(), recipe(rules=rules, strict=True))


def test_bare_parameters_are_seen(recipe: Any) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 4))
            self.gain = nn.Parameter(torch.zeros(4))
            self.linear = nn.Linear(4, 4)

    plan = qat.plan(Bare(), recipe())
    assert [(row.type, row.note) for row in plan.float_rows] == [("Bare", "no layer that can be quantized")]
    refused("strict: 1 layers stay in float", recipe(strict=True), Bare())


@pytest.mark.parametrize("how", ["parametrized", "spectral norm", "lazy"])
def test_weights_that_are_no_plain_parameters(how: str, recipe: Any) -> None:
    layer: Any = {
        "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
        "spectral norm": lambda: nn.utils.spectral_norm(nn.Conv1d(4, 4, 3)),
        "lazy": lambda: nn.LazyConv1d(4, 3),
    }[how]()
    model = nn.ModuleDict({"odd": layer, "plain": nn.Linear(8, 8)})
    plan = qat.plan(model, recipe(types=["Linear"]))
    assert [row.name for row in plan.float_rows] == ["odd"] and "no plain parameter" in plan.float_rows[0].note
    refused("odd .*no plain parameter", recipe(), model)


def tied(second: nn.Module) -> nn.Module:
    model = nn.ModuleDict({"a": nn.Embedding(8, 8), "b": second})
    model["b"].weight = model["a"].weight
    return model


def test_tied_weights_have_one_grid(recipe: Any) -> None:
    rules = {"a": {"match": ["a"], "weight": W4}, "b": {"match": ["b"], "weight": W8}}
    refused(r"share one weight but not one grid \(a: int4 .*, b: int8", recipe(rules=rules), tied(nn.Linear(8, 8)))
    refused(r"a: float, b: int4", recipe(types=["Linear"]), tied(nn.Linear(8, 8)))
    same = {"a": {"match": ["a"], "weight": W4}, "b": {"match": ["b"], "weight": W4}}
    qat.plan(tied(nn.Linear(8, 8)), recipe(rules=same))
    phases = {"high": {"steps": 5, "bits": {"a": 8}}, "low": {}}
    refused("share one weight but not one grid", recipe(rules=same, phases=phases), tied(nn.Linear(8, 8)))


def test_tied_to_a_layer_that_is_not_listed(recipe: Any) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    model = tied(nn.Linear(8, 8))
    model["a"] = Scaled(8, 8)
    model["b"].weight = model["a"].weight
    refused(r"a: float, b: int4", recipe(), model)


class _Inside(nn.Module):
    """A Hugging Face-like model inside a training module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.net.config = SimpleNamespace(model_type="any")  # type: ignore[assignment]


def test_a_recipe_means_the_same_for_a_model_and_for_the_module_around_it(recipe: Any) -> None:
    """Mutation: `names = (name, name)` in make_plan, and `last` is quantized in the module only."""
    rules = {"all": {"types": ["Linear"], "weight": W4}, "last": {"match": ["1"], "keep_float": True, "optional": True}}
    outer = _Inside()
    bare = [(row.name, row.weight) for row in make_plan(outer.net, recipe(rules=rules)).rows]
    around = [(row.name.removeprefix("net."), row.weight) for row in make_plan(outer, recipe(rules=rules)).rows]
    assert bare == around
    assert [name for name, _ in bare] == ["0"]


def test_a_loop_whose_optimizer_lacks_the_scales_is_told(recipe: Any) -> None:
    """Mutation: `if optimizers and not state.checked` -> `if False`."""
    model = nn.Sequential(nn.Linear(8, 8))
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    qat.prepare(model, recipe())
    with pytest.raises(QATError, match=r"1 learned scales are in no optimizer, 0\.weight_quantizer\.theta"):
        qat.after_optimizer_step(model, early)
    qat.after_optimizer_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
