"""Bits by layer: what is chosen, what is counted, and that it is better than the same bits everywhere."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat import distill
from qat.allocate import Unit, _solve, with_bits
from qat.convert import example
from qat.export import all_formats, get_format
from qat.layout import Layout
from qat.plan import PlanRow
from qat.recipes import from_dict
from qat.recipes.schema import Recipe, Rule, Slot
from qat.specs import QuantSpec

VOCAB = 32


class Chain:
    """Tokens of order 2: of each pair of tokens four others follow, the first mostly."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.table = torch.randint(VOCAB, (VOCAB, VOCAB, 4), generator=self.random)

    def __call__(self, rows: int) -> Tensor:
        """int64 [rows, 24]"""
        ids = torch.randint(VOCAB, (rows, 24), generator=self.random)
        pick = torch.multinomial(torch.tensor([0.7, 0.15, 0.1, 0.05]), rows * 24, True, generator=self.random)
        for t, branch in zip(range(2, 24), pick.view(24, rows), strict=False):
            ids[:, t] = self.table[ids[:, t - 2], ids[:, t - 1], branch]
        return ids


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A Llama that has learned, tokens to calibrate on, and tokens that it never saw."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=32, **sizes))
    chain, optimizer = Chain(), torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(200):
        ids = chain(32)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 2.5, "it has not learned, log 32 is 3.47"
    return model.eval(), chain(16), chain(128)


def recipe_of(bits: int = 3, **more: Any) -> Recipe:
    weight = {"bits": bits, "granularity": "group", "group_size": 32, "scale": "exl2", "quantizer": "mse"}
    rules = {"linears": {"types": ["Linear"], "weight": weight}, "head": {"match": ["*lm_head"], "keep_float": True}}
    return from_dict({"name": "x", "rules": rules, "export": {"targets": ["exl2"]}, **more})


def kl(model: nn.Module, recipe: Recipe, ids: Tensor) -> float:
    """Of rounding to nearest, to the float model."""
    with torch.no_grad():
        reference = model(ids).logits
        qat.prepare(model, recipe)
        found = distill.kl(model(ids).logits, reference)
    qat.unprepare(model)
    return float(found)


def stored(model: nn.Module, recipe: Recipe) -> float:
    qat.prepare(model, recipe, search=False)
    found = get_format("exl2").bits_per_weight(qat.convert(model, require_final=False))
    qat.unprepare(model)
    return found


def test_it_beats_the_same_bits_everywhere(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    """On tokens that neither training nor the choice saw, after rounding to nearest, at no more bits.

    Mutations: the loss of another layer (units reversed), losses squared away (all alike), bits that rise with the loss
    they would save turned around.
    """
    model, calibration, unseen = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    budget = stored(model, recipe_of())
    found = qat.allocate(model, recipe_of(), [calibration], budget)
    assert found.reached["exl2"] <= budget and found.reached["exl2"] == stored(model, found.recipe)
    assert kl(model, found.recipe, unseen) < 0.8 * kl(model, recipe_of(), unseen)
    # the model is as it was
    after = model.state_dict()
    assert not qat.is_prepared(model) and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_losses_are_measured_one_layer_at_a_time(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, calibration, _ = trained
    found = qat.allocate(model, recipe_of(), [calibration], 8.0, choices=[2, 8])
    few = [layer for layer, bits in found.bits.items() if bits == 2]
    assert set(found.bits) == {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)} - {
        "lm_head"
    }
    alone = 0.0
    for layer, bits in found.bits.items():
        weight = recipe_of(bits).rules["linears"].weight
        alone += kl(model, Recipe(rules={"one": Rule(match=[layer], weight=weight)}), calibration)
    assert few and math.isclose(found.loss, alone, rel_tol=1e-4)


def test_a_head_that_exl2_does_not_count_keeps_its_bits(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Mutation: all weights counted, where the head would take part."""
    model, calibration, _ = trained
    weight = {"bits": 6, "granularity": "group", "group_size": 32, "scale": "exl2", "quantizer": "mse"}
    recipe = recipe_of(4)
    recipe = replace(recipe, rules={**recipe.rules, "head": Rule(match=["lm_head"], weight=Slot(**weight))})
    found = qat.allocate(model, recipe, [calibration], 5.0, choices=[4, 5])
    assert "lm_head" not in found.bits and len(found.bits) == 14 and found.reached["exl2"] <= 5.0
    head = next(row for row in qat.plan(model, found.recipe).rows if row.name == "lm_head")
    assert head.weight is not None and head.weight.bits == 6 and head.rule == "head"


def brute(units: list[Unit], limits: list[float]) -> float:
    """The least sum of losses."""
    every = itertools.product(*(unit.slots for unit in units))
    held = [
        choice
        for choice in every
        if all(
            sum(unit.stored[bits][i] for unit, bits in zip(units, choice, strict=True)) <= limit
            for i, limit in enumerate(limits)
        )
    ]
    return min(sum(unit.losses[bits] for unit, bits in zip(units, choice, strict=True)) for choice in held)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_one(seed: int) -> None:
    """Against trying all, with one target and with two that count differently, and losses of all sizes."""
    chance = torch.Generator().manual_seed(seed)
    units = []
    for size in torch.randint(1, 9, (6,), generator=chance).tolist():
        slots = {bits: Slot(bits=bits) for bits in (2, 3, 4, 8)}
        sizes = {bits: [size * bits * 1e6, size * max(bits, 4) * 1e6][: 1 + seed % 2] for bits in slots}
        scale = 10.0 ** float(torch.randint(-7, 0, (1,), generator=chance))
        losses = {bits: scale * 4.0**-bits * float(torch.rand(1, generator=chance) + 0.5) for bits in slots}
        units.append(Unit(["a"], "r", slots, sizes, losses))
    total = sum(unit.stored[2][0] / 2 for unit in units)
    limits = [total * 3.7, total * 4.4][: 1 + seed % 2]
    chosen = _solve(units, limits)
    for i, limit in enumerate(limits):
        assert sum(unit.stored[bits][i] for unit, bits in zip(units, chosen, strict=True)) <= limit
    got = sum(unit.losses[bits] for unit, bits in zip(units, chosen, strict=True))
    assert got <= brute(units, limits) * 1.001


def test_a_target_that_only_the_fewest_bits_reach() -> None:
    units = [Unit(["a"], "r", {2: Slot(bits=2), 3: Slot(bits=3)}, {2: [2e9], 3: [3e9]}, {2: 1.0, 3: 0.1})] * 3
    assert _solve(units, [6e9]) == [2, 2, 2]
    assert sorted(_solve(units, [7e9])) == [2, 2, 3]
    # less than the solver's tolerance below the next
    assert _solve(units, [7e9 - 1]) == [2, 2, 2]


def test_grids_with_other_bits() -> None:
    plain = Slot(bits=4, granularity="group", group_size=32, quantizer="lsq")
    assert with_bits(plain, 3) == Slot(bits=3, granularity="group", group_size=32, quantizer="lsq")
    kquant = Slot(bits=4, granularity="group", group_size=32, zero_point="float", scale="q4_k", quantizer="mse")
    words = {"granularity": "group", "group_size": 16, "scale": "q6_k", "quantizer": "mse"}
    wanted = Slot(bits=6, signed_scale=True, **words)
    assert with_bits(kquant, 6) == wanted
    assert with_bits(wanted, 4) == kquant and with_bits(Slot(bits=6, **words), 6) == Slot(bits=6, **words)
    assert with_bits(kquant, 7) is None
    assert with_bits(Slot(bits=4, grid="nf4"), 4) is None


def test_stored_bits_are_those_of_the_files() -> None:
    """For every format and grids of several kinds: what it packs, also where that is extrapolated from fewer rows."""
    seen = set()
    for name, cls in all_formats().items():
        fmt = cls()
        for bits, zero, group in itertools.product((2, 3, 4, 5, 8), ("none", "int", "float"), (32, None)):
            for scale, layout in itertools.product(
                ("portable", "exl2", "q4_k"), (Layout((192, 256)), Layout((256, 192), "transposed"))
            ):
                where = "group" if group else "channel"
                spec = QuantSpec(bits, zero == "none", False, where, group, zero, scale, "mse")
                columns = layout.rows_shape[1]
                if spec.reasons() or spec.shape_reasons(columns):
                    continue
                if fmt.row_reasons(PlanRow("m.x", "Linear", "r", spec, None, 1, {"weight": layout.kind}, columns)):
                    continue
                packed = fmt.pack("m.x.weight", example(spec, layout, torch.float32)).values()
                whole = sum(8 * tensor.numel() * tensor.element_size() for tensor in packed)
                assert fmt.stored_bits(spec, layout, torch.float32) == whole, f"{name}: {spec} {layout}"
                seen.add(name)
    assert {"exl2", "gguf", "compressed-tensors", "gptq", "onnx", "torchao"} <= seen


def test_tied_layers_get_the_same_bits() -> None:
    """Mutation: a rule that names the owner of a weight alone, which `make_plan` refuses."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes))
    weight = {"bits": 4, "granularity": "group", "group_size": 32, "scale": "portable", "quantizer": "mse"}
    recipe = from_dict({"name": "x", "rules": {"all": {"weight": weight}}, "export": {"targets": ["mlx"]}})
    ids = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))
    found = qat.allocate(model, recipe, [ids], 5.5)
    assert found.bits["lm_head"] == found.bits["model.embed_tokens"] and len(set(found.bits.values())) > 1
    assert found.reached["mlx"] <= 5.5
    rows = {row.name: row.weight for row in qat.plan(model, found.recipe).rows}
    assert {name: spec.bits for name, spec in rows.items() if spec} == found.bits


def test_what_is_refused_before_anything_is_measured(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, calibration, _ = trained

    def forward(*_: Any) -> Any:
        raise AssertionError("the model ran")

    def refused(recipe: Recipe, bits: float, says: str, batches: list[Any] | None = None, **more: Any) -> None:
        given = [calibration] if batches is None else batches
        with pytest.raises(qat.QATError, match=says) as caught:
            qat.allocate(model, recipe, given, bits, forward=forward, **more)
        assert "\n" not in str(caught.value) and not qat.is_prepared(model)

    refused(recipe_of(), 4.0, "there is no batch to measure losses on", [])
    refused(recipe_of(), 4.0, "loss='ce' is unknown; use one of kl, ", loss="ce")
    refused(recipe_of(), 2.0, "2 bits per weight are too few: exl2 stores at least 2.5")
    refused(recipe_of(), math.nan, "nan bits per weight are too few")
    refused(recipe_of(), 9.0, "9 bits per weight are too many: exl2 stores at most 8.5")
    refused(recipe_of(export={"targets": []}), 4.0, "export.targets is empty")
    refused(recipe_of(), 4.0, "no layer can have 7 bits .*exl2 has 2, 3, 4, 5, 6, 8", choices=[4, 7])
    weight = {"bits": 8, "granularity": "channel", "quantizer": "mse"}
    rules = {"linears": {"types": ["Linear"], "weight": weight}, "head": {"match": ["lm_head"], "keep_float": True}}
    refused(from_dict({"rules": rules, "export": {"targets": ["bitsandbytes"]}}), 8.3, "no layer whose bits could vary")


def test_adapters_come_after_the_choice() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(qat.QATError, match=r"has adapters of peft; give the model that they are put on"):
        qat.allocate(adapted, recipe_of(), [torch.zeros(1, 4, dtype=torch.long)], 4.0)


def test_a_model_without_a_config_and_a_loss_of_its_own() -> None:
    """A plain network; what `forward` returns is compared by the loss that is named."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
            self.example_input_array = torch.zeros(2, 32)

        def forward(self, x: Tensor) -> Tensor:
            # b hardly matters
            return F.relu(self.a(x)) + 1e-3 * self.b(x)

    torch.manual_seed(0)
    weight = {"bits": 4, "granularity": "channel", "scale": "fp32", "quantizer": "mse"}
    recipe = from_dict({"rules": {"all": {"weight": weight}}, "export": {"targets": ["onnx"]}})
    found = qat.allocate(Net(), recipe, [torch.randn(64, 32)], 7.2, loss="mse")
    assert found.bits["a"] > found.bits["b"]
