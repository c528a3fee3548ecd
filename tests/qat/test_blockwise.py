"""Block-wise training (`qat.init.blockwise`).

Mutations tried, one at a time: inputs of the float model for the quantized blocks; float outputs asked for after the
block before has changed; a block that became worse kept; scales not folded at the end; codes left fixed: each turns a
test red.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qat
from qat.init.blockwise import blockwise
from qat.steps import learned_scales

IDS = [torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(4)]
SCALES = {"qat": {"steps": -1, "train": "scales"}}


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(**{**sizes, **heads, "initializer_range": 0.1, **changes})
    return transformers.LlamaForCausalLM(config)


def hidden(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]


def given(block: Any, model: Any) -> list[Tensor]:
    """What a block gives for each batch."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, args, output: seen.append(output))
    for ids in IDS:
        hidden(model, ids)
    handle.remove()
    return seen


def prepared(recipe: Any, model: Any = None, **words: Any) -> Any:
    model = llama() if model is None else model
    slot = {"bits": 2, "granularity": "group", "group_size": 16, "quantizer": "lsq"}
    phases = words.pop("phases", None)
    rules = {"linears": {"types": ["Linear", "Embedding"], "weight": {**slot, **words}}}
    rules["head"] = {"match": ["lm_head"], "keep_float": True}
    qat.prepare(model, recipe(rules=rules, phases=phases))
    return model


@pytest.mark.parametrize("quantizer", ["lsq", "mse", "absmax"])
def test_blocks_come_nearer_to_the_float_model(recipe: Any, quantizer: str) -> None:
    model = prepared(recipe, quantizer=quantizer)
    plain, wanted = hidden(model, IDS[0]), hidden(llama(), IDS[0])
    outside = {name: p.detach().clone() for name, p in model.named_parameters() if ".layers." not in name}
    rows = blockwise(model, [{"input_ids": ids} for ids in IDS], epochs=8, lr=2e-3)
    assert [row.name for row in rows] == [f"model.layers.{i}" for i in range(3)]
    assert all(row.after < 0.7 * row.before and row.steps == 32 for row in rows)
    error, before = (float((h - wanted).square().sum()) for h in (hidden(model, IDS[0]), plain))
    assert error < 0.8 * before
    last = [given(m.model.layers[2], m) for m in (model, llama())]
    off = sum(float((a - b).double().square().sum()) for a, b in zip(*last, strict=True))
    assert rows[2].after == pytest.approx(off / sum(float(b.double().square().sum()) for b in last[1]), rel=1e-5)
    assert all(torch.equal(p, outside[name]) for name, p in model.named_parameters() if name in outside)
    assert all(p.grad is None for p in model.parameters())
    assert all(bool((p == 0).all()) for p in learned_scales(model).values())
    # PTQ only: what was trained is what is packed
    model.eval()
    bundle = qat.convert(model)
    served = llama()
    served.load_state_dict({**bundle.floats, **{name: q.dequantize() for name, q in bundle.items()}})
    assert torch.equal(served.eval()(IDS[1]).logits, model(IDS[1]).logits)
    kept = {name: q.scale for name, q in bundle.items()}
    qat.initialize(model)
    assert all(torch.equal(q.scale, kept[name]) for name, q in qat.convert(model).items()), "scales are searched again"


def test_inputs_are_those_of_the_quantized_and_targets_those_of_the_float_model(recipe: Any) -> None:
    """The error before a block is trained, by hand: its quantized form after the trained blocks before it."""
    model = prepared(recipe)
    rows = blockwise(model, IDS, epochs=2, lr=1e-3)
    mixed, float_model = prepared(recipe), llama()
    mixed.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    qat.weights_changed(mixed)
    states: list[Any] = []
    for m in (mixed, float_model):
        with torch.no_grad():
            states.append([m(ids, output_hidden_states=True, use_cache=False).hidden_states[2] for ids in IDS])
    error = sum(float((a - b).square().sum()) for a, b in zip(*states, strict=True))
    size = sum(float(b.square().sum()) for b in states[1])
    assert rows[1].before == pytest.approx(error / size, rel=1e-4)


def test_then_scales_alone(recipe: Any) -> None:
    """EfficientQAT's two phases: weights are trained block by block although the phases train scales alone."""
    model = prepared(recipe, phases=SCALES)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = blockwise(model, IDS, epochs=4, lr=2e-3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert len(moved) == 3 * 9 and all(row.after < row.before for row in rows)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(learned_scales(model))
    codes = {name: q.codes for name, q in qat.convert(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for ids in IDS:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)
    assert all(torch.equal(q.codes, codes[name]) for name, q in qat.convert(model).items())


def test_one_block_has_gradients_and_optimizer_state_at_a_time(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(recipe)
    names = {id(p): name for name, p in model.named_parameters()}
    seen: list[set[str]] = []

    class Watched(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            seen.append({names[id(p)].split(".")[2] for group in self.param_groups for p in group["params"]})
            with_grad = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None}
            assert with_grad == seen[-1]
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    blockwise(model, IDS, epochs=1)
    assert seen == [{str(i)} for i in range(3) for _ in IDS]


def test_a_block_that_became_worse_is_put_back(recipe: Any) -> None:
    model = prepared(recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = blockwise(model, IDS, epochs=1, lr=30.0)
    assert all(row.steps == 0 and row.after == row.before for row in rows)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_model_is_left_as_it_was_found(recipe: Any) -> None:
    model = prepared(recipe, phases={"wait": {"steps": 5, "quantize": False}, "qat": {"steps": -1}}).train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    frozen = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    had = {name: p.requires_grad for name, p in model.named_parameters()}
    blockwise(model, IDS, epochs=1)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == had
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, frozen)
    assert all(m.training for m in model.modules()) and model.config.use_cache
    assert not model.model.layers[0].mlp.up_proj._qat.active


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
        return x


class Chain(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Between(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def cases() -> Iterator[Any]:
    x = torch.randn(3, 8)
    yield lambda: Twice(), x, "cannot be trained alone"
    yield lambda: Between(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])), x, "between layers.0 and layers.1"
    yield lambda: nn.Sequential(nn.Linear(8, 8)), x, "the model has no blocks"
    yield lambda: nn.ModuleList([Twice().layers[0]]).append(nn.Linear(8, 8)).bfloat16(), x.bfloat16(), "in float32"
    yield lambda: Twice(), None, "was given no batches"


@pytest.mark.parametrize(("make", "x", "why"), list(cases()))
def test_what_cannot_be_trained_block_by_block_is_refused(recipe: Any, make: Any, x: Any, why: str) -> None:
    model = make()
    model = Chain(model) if isinstance(model, nn.ModuleList) else model
    qat.prepare(model, recipe())
    with pytest.raises(qat.QATError, match=why):
        blockwise(model, [] if x is None else [x], epochs=1)


def test_a_loss_that_is_not_finite_is_an_error(recipe: Any) -> None:
    model = Chain(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))
    qat.prepare(model, recipe())
    with pytest.raises(qat.QATError, match="not finite at step 0"):
        blockwise(model, [torch.full((2, 8), float("nan"))], epochs=1)
    assert all(p.grad is None for p in model.parameters())


def test_adapters_are_what_is_trained_of_a_block(recipe: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=8, target_modules="all-linear"))
    model = prepared(recipe, model, quantizer="absmax")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = blockwise(model, IDS, epochs=8, lr=3e-3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == 3 * 7 * 2 and all(".lora_" in name for name in moved)
    assert all(row.after < row.before for row in rows)


def test_scales_of_inputs_wait_for_training(recipe: Any) -> None:
    """Their ranges are seen in training; a block leaves them, and no gradient of theirs."""
    model = Chain(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))
    qat.prepare(model, recipe(input={"bits": 8, "granularity": "tensor", "quantizer": "lsq"}))
    blockwise(model, [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)], epochs=2)
    scales = [layer.input_quantizer.theta for layer in model.layers]
    assert all(p.requires_grad and not bool(p.any()) for p in scales)
    assert all(p.grad is None for p in model.parameters())
