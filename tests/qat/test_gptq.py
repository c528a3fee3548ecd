"""GPTQ on whole models: the walk through them against the plain way, and what it leaves as it was.

Mutations that were tried one at a time, and the test that turned red for each:

    a row that GPTQ makes worse takes it all the same     test_every_layer_sees_the_quantized_layers_before_it
    scales_fit left out / done layers stay in float       test_training_starts_from_gptq
    layers that are still to come quantized               test_tied_weights_are_done_once_and_unused_ones_not
    weights tied to an embedding rounded                  test_what_is_left_and_why
    a phase's bits, flags, schedule, use_cache kept       test_everything_is_as_before
    use_cache left on / outputs of a block not followed   test_blocks_run_alone
    a block run without the autocast in which it ran      test_every_layer_sees_the_quantized_layers_before_it
    moments of the input before it is quantized           test_the_quantized_input_counts
    walk: stop after the first call of a group, all of a block in one group, a version not looked at, a block that
    works on what is kept, a link from another block      test_every_layer_sees_the_quantized_layers_before_it
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qat
from qat.errors import QATError
from qat.init.gptq import gptq
from qat.init.inputs import Moments
from qat.init.obs import errors_of, hat, solve
from qat.init.walk import Forward, call_model
from qat.layers import QATLayer, input_quantizer, weight_quantizers
from qat.qtensor import Fields
from qat.quantizers.mse import search
from qat.recipes import Recipe
from qat.specs import QuantSpec
from qat.steps import qat_layers

Build = Callable[..., Recipe]
# ---- models ----------------------------------------------------------------------------------------------------------


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2, **more}))


def tokens(count: int = 2) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (2, 12 + i), generator=g)} for i in range(count)]


class Net(nn.Module):
    """Convolutions of all kinds, then blocks with what a walk could trip over: another name for an argument, work in
    place, something between two blocks, a layer beside the way, a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 12, 2, stride=2, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 8, 3, stride=2, groups=2, output_padding=1),
        )
        self.blocks = nn.ModuleList(Block(i) for i in range(4))
        self.norm = nn.LayerNorm(8)
        self.side, self.head = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x).flatten(2).mT
        mask = x.mean(1, keepdim=True)
        x = self.blocks[0](x, mask)
        side = self.side(x)
        x = self.blocks[1](x, mask)
        x = self.blocks[2](self.norm(x), mask=mask)
        x = self.blocks[3](x=x.relu_(), mask=mask)
        y: Tensor = side + self.head(x) + self.head(x.flip(1))
        return y


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.index = index

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.index == 1:
            x.add_(mask)
        h = self.up(x)
        if self.index == 2:
            x.add_(h.mean(-1, keepdim=True))
        h = self.down(torch.relu(h) * self.gate(x))
        return x.add_(h) if self.index == 1 else x + h * mask


def pictures(count: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(3, 3, 6, 6, generator=g) for _ in range(count)]


CONVS = ["Linear", "Conv2d", "ConvTranspose2d"]


def best(w: Tensor, hessian: Tensor, fields: Fields, spec: QuantSpec) -> Tensor:
    """GPTQ, except for rows that it makes worse."""
    found, nearest = solve(w, hessian, fields, spec).weights, hat(w, fields, spec)
    better = errors_of(found - w, hessian) <= errors_of(nearest - w, hessian)
    return torch.where(better.unsqueeze(1), found, nearest)


def in_bf16(model: nn.Module, batch: Any) -> Any:
    """A forward under autocast, as a trainer's bf16-mixed runs it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(**batch)


def plainly(model: nn.Module, batches: list[Any], forward: Forward = call_model) -> None:
    """One layer at a time, the whole model for each, everything that came before quantized."""
    order: dict[str, None] = {}
    layers = qat_layers(model)
    names = {layer: name for name, layer in layers.items()}

    def run(seen: Callable[..., None], *watched: QATLayer) -> None:
        handles = [w.register_forward_pre_hook(seen, with_kwargs=True) for w in watched]
        for batch in batches:
            forward(model, batch)
        for handle in handles:
            handle.remove()

    for layer in layers.values():
        layer._qat.active = False
    run(lambda layer, args, kwargs: order.setdefault(names[layer]), *layers.values())
    for name in order:
        layer, moments = layers[name], Moments()
        run(moments.add, layer)
        quantizer, weight = weight_quantizers(layer)["weight"], layer.weight
        assert isinstance(weight, nn.Parameter)
        w = quantizer.layout.to_rows(weight.detach())
        fields, hessians = quantizer.fields(w), moments.mean(layer)
        run_length = len(w) // len(hessians)
        found = []
        for i, hessian in enumerate(hessians):
            own = slice(i * run_length, (i + 1) * run_length)
            own_fields = Fields(*(None if f is None else f[own] for f in fields))  # type: ignore[arg-type]
            found.append(best(w[own], hessian, own_fields, quantizer.spec))
        weight.copy_(quantizer.layout.from_rows(torch.cat(found)))
        layer._qat.active = True


@pytest.mark.parametrize("kind", ["llama", "autocast", "net", "gpt2"])
@torch.no_grad()
def test_every_layer_sees_the_quantized_layers_before_it(kind: str, recipe: Build) -> None:
    model: nn.Module
    batches: list[Any] = tokens()
    types = ["Linear"]
    forward = in_bf16 if kind == "autocast" else call_model
    if kind in ("llama", "autocast"):
        model = llama()
    elif kind == "net":
        model, batches, types = Net(), pictures(), CONVS
    else:
        torch.manual_seed(0)
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2))
        types = ["Conv1D"]
    model.eval()
    qat.prepare(model, recipe(types=types, bits=3, quantizer="mse"))
    expected = copy.deepcopy(model)
    plainly(expected, batches, forward)
    rows = gptq(model, batches, latent=False, forward=forward)
    assert all(row.note == "" for row in rows) and len(rows) == len(qat_layers(model))
    assert all(row.error <= row.rtn for row in rows)  # type: ignore[operator]
    assert sum(row.error for row in rows) < 0.9 * sum(row.rtn for row in rows)  # type: ignore[misc]
    for name, layer in qat_layers(model).items():
        assert torch.equal(layer.weight, expected.get_submodule(name).weight), name  # type: ignore[arg-type]


@pytest.mark.parametrize("forward", [None, in_bf16])
def test_blocks_run_alone(forward: Any, recipe: Build) -> None:
    model, batches = llama(), tokens()
    qat.prepare(model, recipe(types=["Linear"], bits=3))
    runs: Counter[str] = Counter()
    counted = {"embed": model.model.embed_tokens} | {f"block {i}": b for i, b in enumerate(model.model.layers)}
    for name, module in counted.items():
        module.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    gptq(model, batches, forward=forward)
    # survey (one batch); for both batches the first block's inputs and lm_head's
    assert runs["embed"] == 1 + 2 * 2
    # survey; per batch: to catch the first block's inputs, four groups, the output for the next block, lm_head
    assert [runs[f"block {i}"] for i in range(3)] == [1 + 2 * (1 + 4 + 1 + 1), 1 + 2 * (4 + 1 + 1), 1 + 2 * (4 + 1)]


@pytest.mark.parametrize("quantizer", ["mse", "lsq"])
@torch.no_grad()
def test_training_starts_from_gptq(quantizer: str, recipe: Build) -> None:
    model, batches = llama(), tokens()
    qat.prepare(model, recipe(types=["Linear"], bits=2, granularity="group", group_size=16, quantizer=quantizer))
    before, nearest = {n: p.clone() for n, p in model.named_parameters()}, model(**batches[0]).logits
    rounded = copy.deepcopy(model)
    gptq(model, batches)
    gptq(rounded, batches, latent=False)
    logits = model(**batches[0]).logits
    assert torch.equal(logits, rounded(**batches[0]).logits) and not torch.equal(logits, nearest)
    proj, other = model.model.layers[1].mlp.up_proj, rounded.model.layers[1].mlp.up_proj
    assert not torch.equal(proj.weight, other.weight)
    assert torch.equal(proj.weight_quantizer(proj.weight), other.weight)
    # what is not rounded stays
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.weight" for name in qat_layers(model)}
    # the fields stay while the weights do, in training mode too
    qat.initialize(model)
    model.train()
    assert torch.equal(model(**batches[0]).logits, logits)
    bundle = qat.convert(model)
    assert torch.equal(bundle["model.layers.1.mlp.up_proj.weight"].dequantize(), other.weight)


def test_weights_of_bfloat16(recipe: Build) -> None:
    model, batches = llama().bfloat16(), tokens()
    qat.prepare(model, recipe(types=["Linear"], bits=4))
    rounded = copy.deepcopy(model)
    gptq(model, batches)
    gptq(rounded, batches, latent=False)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, rounded(**batches[0]).logits)


def test_everything_is_as_before(recipe: Build) -> None:
    model, batches = llama(), tokens()
    phases = {"warm": {"steps": 4, "quantize": True, "ramp": 3, "bits": {"all": 8}}, "rest": {"steps": -1}}
    qat.prepare(model, recipe(types=["Linear"], bits=3, phases=phases))
    model.train()
    model.model.layers[0].eval()
    training = {name: module.training for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    qat.apply_schedule(model)
    state = [(x._qat.active, float(x._qat.blend), x.weight_quantizer.live_spec) for x in qat_layers(model).values()]  # type: ignore[arg-type, union-attr]
    assert state[0][:2] == (True, 0.25) and state[0][2].bits == 8
    plain = llama()
    qat.prepare(plain, recipe(types=["Linear"], bits=3))
    gptq(plain, batches)
    for bad in (False, True):
        if bad:
            with pytest.raises(IndexError):
                gptq(model, [{"input_ids": torch.tensor([[64]])}])
        else:
            gptq(model, batches)
            # for the bits that are deployed, not for those of the phase
            assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
        assert training == {name: module.training for name, module in model.named_modules()}
        assert hooks == {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
        found = [(x._qat.active, float(x._qat.blend), x.weight_quantizer.live_spec) for x in qat_layers(model).values()]  # type: ignore[arg-type, union-attr]
        assert found == state
        assert model.config.use_cache is True


# ---- which layers, which inputs --------------------------------------------------------------------------------------


def test_what_is_left_and_why(recipe: Build) -> None:
    model, batches = llama(tie_word_embeddings=True, num_hidden_layers=1), tokens()
    qat.prepare(model, recipe(types=["Linear", "Embedding"], bits=3))
    embedding = model.model.embed_tokens.weight.clone()
    notes = {row.name: row for row in gptq(model, batches)}
    assert "no Hessian" in notes["model.embed_tokens"].note and notes["model.embed_tokens"].error is None
    assert notes["lm_head"].note == "tied to model.embed_tokens, which is left"
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert notes["model.layers.0.mlp.up_proj"].note == ""


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.never = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor, offset: float = 0.0) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)) + offset)
        return y


def test_tied_weights_are_done_once_and_unused_ones_not(recipe: Build) -> None:
    model, x = Tied(), torch.randn(90, 32, generator=torch.Generator().manual_seed(0))
    qat.prepare(model, recipe(types=["Linear"], bits=3))
    w, never = model.a.weight.detach().clone(), model.never.weight.detach().clone()
    moments = Moments()
    layers = qat_layers(model)
    with torch.no_grad():
        hidden = torch.relu(nn.functional.linear(x, w, model.a.bias)) + 0.5
    moments.add(layers["a"], (x,), {})
    moments.add(layers["b"], (hidden,), {})
    rows = gptq(model, [(x, 0.5)])
    assert [row.note for row in rows] == ["", "tied to a", "it did not run on these batches"]
    spec = weight_quantizers(layers["a"])["weight"].spec
    expected = best(w, moments.mean(layers["a"])[0], search(w, spec), spec)
    assert torch.equal(model.a.weight_quantizer(model.a.weight), expected)  # type: ignore[operator]
    assert model.b.weight is model.a.weight and torch.equal(model.never.weight, never)
    by_hand = copy.deepcopy(model)
    gptq(by_hand, [x], forward=lambda m, b: m(b, offset=0.5))
    gptq(model, [(x, 0.5)])
    assert torch.equal(by_hand.a.weight, model.a.weight)


def test_refusals(recipe: Build) -> None:
    model, batches = llama(num_hidden_layers=1), tokens()
    with pytest.raises(QATError, match=r"not prepared"):
        gptq(model, batches)
    qat.prepare(model, recipe(types=["Linear"], quantizer="absmax"))
    weight = model.lm_head.weight.clone()
    with pytest.raises(QATError, match=r"q_proj follow its weight.*use quantizer mse or lsq"):
        gptq(model, batches)
    assert torch.equal(model.lm_head.weight, weight)
    model = Tied()
    qat.prepare(model, recipe(types=["Linear"]))
    with pytest.raises(QATError, match="no batches"):
        gptq(model, [])
    with pytest.raises(QATError, match=r"^a: .*not finite"):
        gptq(model, [torch.full((2, 32), torch.nan)])


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_the_quantized_input_counts(granularity: str, recipe: Build) -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(50, 16) * torch.linspace(0.1, 3, 16)
    quantizer = "absmax" if granularity == "token" else "lsq"
    qat.prepare(
        model, recipe(types=["Linear"], bits=3, input={"bits": 4, "granularity": granularity, "quantizer": quantizer})
    )
    layer, w = qat_layers(model)["0"], model[0].weight.detach().clone()
    spec = weight_quantizers(layer)["weight"].spec
    with torch.no_grad():
        seen = input_quantizer(layer)(x)  # type: ignore[misc]
        gptq(model, [x])
    assert not torch.equal(seen, x)
    expected = best(w, (seen.t() @ seen).double() / 50, search(w, spec), spec)
    assert torch.equal(weight_quantizers(layer)["weight"](layer.weight), expected)
