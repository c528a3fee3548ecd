"""Folding: the same function, numbers that are easier to quantize, and a model that says what was done.

Mutations that were tried one at a time, and the test that turned red for each:

    a gain not folded / a bias of o or down not turned / v's bias not turned     test_the_function_stays
    heads turned in blocks of the wrong size                                     test_own_networks
    the reader's own weight not made for a tied head                             test_a_tied_head
    scaling: multiply and divide exchanged, a bias not divided                   test_scaling_keeps_the_function
    AWQ judged without the input's quantizer, or always power 0                  test_awq_is_judged_by_the_recipe
    the record not written / `folded` not asked                                  test_not_twice, test_checkpoints
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.errors import QATError
from qat.fold.hadamard import Rotation, core, core_order
from qat.hf import load_model
from qat.layers import input_quantizer, weight_quantizers
from qat.recipes import from_dict
from qat.recipes.schema import Network
from qat.steps import qat_layers

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
}
IDS = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(5))


def transformer(kind: str = "Llama", hidden: int = 96, **changes: Any) -> Any:
    """A two-layer model whose gains and biases say where they belong."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **HEADS, "initializer_range": 0.1, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * 0.5)
    return model


class Own(nn.Module):
    """One block with positions as a parameter, biases everywhere, 3 heads of 24 numbers, an MLP without a gate."""

    def __init__(self, norm: Callable[..., nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions = nn.Embedding(50, 72), nn.Parameter(torch.randn(1, 24, 72))
        self.norm1, self.norm2, self.norm = norm(72), norm(72), norm(72)
        self.q, self.k, self.v, self.o = (nn.Linear(72, 72) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(72, 100), nn.Linear(100, 72), nn.Linear(72, 50)
        for module in (self.norm1, self.norm2, self.norm):
            if isinstance(module.weight, Tensor):
                nn.init.uniform_(module.weight, 0.5, 2.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[:, : ids.shape[1]]
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (3, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm(x))


OWN: dict[str, Any] = {
    "writes": ["embedding", "positions", "o", "down"],
    "reads": {"norm1": ["q", "k", "v"], "norm2": ["up"], "norm": ["head"]},
    "values": {"v": "o"},
    "head_dim": 24,
}
W4A4: dict[str, Any] = {
    "weight": {"bits": 4, "granularity": "channel", "quantizer": "mse"},
    "input": {"bits": 4, "granularity": "token", "quantizer": "absmax"},
}


def recipe(method: str = "none", rule: dict[str, Any] | None = None, head: bool = False, **more: Any) -> Any:
    """Every Linear but the head; `more` are words of `fold`, or whole parts of the recipe."""
    words = {key: more.pop(key) for key in ("seed", "alpha", "batches", "network") if key in more}
    rules: dict[str, Any] = {"linears": {"types": ["Linear"], **(rule or W4A4)}}
    if not head:
        rules["head"] = {"match": ["*head"], "keep_float": True}
    return from_dict({"name": "folded", "rules": rules, "fold": {"method": method, **words}, **more})


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out = model(ids % 50 if isinstance(model, Own) else ids)
    return out if isinstance(out, Tensor) else out.logits


def departs(model: nn.Module, before: nn.Module) -> tuple[float, float]:
    """Largest difference of logits to those of `before` in fp64, of `model` and of `before` in fp32."""
    exact = logits(copy.deepcopy(before).double())
    return float((logits(model) - exact).abs().max()), float((logits(before) - exact).abs().max())


# ---- matrices ------------------------------------------------------------------------------------------------------


def test_cores_are_hadamard_matrices() -> None:
    """Mutations: the other sign of Paley's border, the first construction for all primes -> red."""
    orders = {core_order(n) for n in range(1, 513)} - {0}
    assert {1, 12, 20, 28, 36, 60, 108} <= orders
    for order in orders:
        matrix = core(order)
        assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64)), order
    found = {n: core_order(n) for n in (96, 384, 576, 896, 2048, 3584, 5120, 24, 7, 52)}
    assert found == {96: 12, 384: 12, 576: 36, 896: 28, 2048: 1, 3584: 28, 5120: 20, 24: 12, 7: 0, 52: 0}


@pytest.mark.parametrize("size", [1, 2, 7, 24, 52, 64, 96, 120])
def test_rotations(size: int) -> None:
    x = torch.randn(3, 2, size, dtype=torch.float64)
    turn = Rotation(size, 4)
    matrix = turn(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(turn(x), x @ matrix)
    assert torch.equal(turn(x), Rotation(size, 4)(x))
    assert size < 3 or not torch.equal(turn(x), Rotation(size, 5)(x))
    if core_order(size):
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


# ---- rotation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_function_stays(name: str) -> None:
    """The rotated model is at most four times as far from the exact logits as the model was that it was made from: each
    weight is rounded once more."""
    kind, changes = MODELS[name]
    before = transformer(kind, **changes)
    model = copy.deepcopy(before)
    names = list(model.state_dict())
    qat.fold.rotate(model)
    ours, theirs = departs(model, before)
    assert ours <= 4 * theirs
    assert not torch.allclose(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert all(bool((layer.input_layernorm.weight == 1).all()) for layer in model.model.layers)
    assert list(model.state_dict()) == names


def test_a_tied_head(tmp_path: Path) -> None:
    """It becomes a matrix of its own, in the config too: the model is saved and loaded by transformers alone."""
    before = transformer("Qwen2", tie_word_embeddings=True)
    model = copy.deepcopy(before)
    qat.fold.rotate(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings
    assert model.lm_head.weight.requires_grad and before.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_own_networks() -> None:
    """As above, and in fp64 up to 1e-12 of the largest logit."""
    before = Own()
    model = copy.deepcopy(before)
    holder = nn.ModuleDict({"inner": model})
    qat.fold.rotate(holder, 3, network=Network(**OWN))
    ours, theirs = departs(model, before)
    assert ours <= 4 * theirs
    assert qat.fold.folded(holder)[0]["seed"] == 3
    exact = before.double()
    wanted = logits(exact)
    qat.fold.rotate(exact, network=Network(**OWN))
    assert (logits(exact) - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    spread = model.embedding.weight.abs().amax() / model.embedding.weight.square().mean().sqrt()
    assert spread < 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm": nn.LayerNorm}, "norm1.*LayerNorm.*bias.*needs RMSNorm"),
        ({"norm": lambda n: nn.LayerNorm(n, bias=False)}, "no RMSNorm"),
        ({"writes": ["embedding", "o", "down"]}, "positions has the width 72"),
        ({"writes": ["embedding", "positions", "o", "down", "up"]}, "up has 100 features and embedding has 72"),
        ({"writes": ["embeddings"]}, "'embeddings' names nothing"),
        ({"writes": ["embedding", "positions", "o", "norm1"]}, "norm1 is a RMSNorm; rotation knows Linear"),
        ({"reads": {"norm1": ["embedding"], "norm2": ["up"], "norm": ["head"]}}, "embedding is a Embedding; what is"),
        ({"head_dim": None}, "no heads of None"),
        ({"head_dim": 25}, "no heads of 25"),
        ({"network": None}, "nothing is known of Own.*fold.network"),
    ],
)
def test_what_cannot_be_rotated(change: dict[str, Any], says: str) -> None:
    """Refused before anything changes. Mutation: each check left out -> red."""
    model = Own(change.pop("norm", nn.RMSNorm))
    before = copy.deepcopy(model.state_dict())
    network = None if "network" in change else Network(**{**OWN, **change})
    with pytest.raises(QATError, match=says):
        qat.fold.rotate(model, network=network)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not qat.fold.folded(model)


def test_weights_that_are_not_there() -> None:
    with torch.device("meta"):
        model = transformer()
    with pytest.raises(QATError, match=r"embed_tokens\.weight is sharded or not loaded"):
        qat.fold.rotate(model)
    with pytest.raises(QATError, match="input_layernorm is sharded or not loaded"):
        qat.fold.smooth(model, recipe(), [IDS])


def test_gains_that_are_not_factors() -> None:
    """Gemma's norm multiplies by 1 + weight: not folded as if it were weight."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    with pytest.raises(QATError, match="does not multiply by its weight alone"):
        qat.fold.rotate(Own(GemmaRMSNorm), network=Network(**OWN))


def test_unknown_architectures() -> None:
    with pytest.raises(QATError, match=r"architecture gemma.*known: llama, mistral, qwen2, qwen3.*fold\.network"):
        qat.fold.rotate(transformer("Gemma"))


# ---- scaling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["smooth", "awq"])
@pytest.mark.parametrize("name", ["llama", "qwen2, tied", "own"])
def test_scaling_keeps_the_function(method: str, name: str) -> None:
    """Within four times the rounding of the float model, as above; on a prepared model too."""
    before = Own(nn.LayerNorm) if name == "own" else transformer(MODELS[name][0], **MODELS[name][1])
    if name == "own":
        nn.init.normal_(before.norm1.bias)
        before.eval()
    words = recipe(method, network=OWN if name == "own" else None)
    batches = [IDS % 50, IDS.flip(0) % 50]
    found = []
    for prepared in (False, True):
        model = copy.deepcopy(before)
        if prepared:
            qat.prepare(model, words)
        qat.fold.apply(model, words, batches)
        found.append(copy.deepcopy(model.state_dict()))
        assert [entry["method"] for entry in qat.fold.folded(model)] == [method]
        qat.unprepare(model)
        ours, theirs = departs(model, before)
        assert ours <= 4 * theirs
        changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[key])]
        assert any("norm" in key for key in changed) and not any("head" in key for key in changed)
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def error(model: nn.Module, reference: Tensor, rule: dict[str, Any]) -> float:
    """Mean KL of the quantized model to the reference logits."""
    model = copy.deepcopy(model)
    qat.prepare(model, recipe(rule=rule))
    p, q = reference.log_softmax(-1), logits(model).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def planted(where: str) -> Any:
    """A Llama with two channels that are ten or thirty times as large: on the stream, or after a norm's gain."""
    model = transformer(hidden=64)
    with torch.no_grad():
        for channel in (5, 40):
            if where == "stream":
                model.model.embed_tokens.weight[:, channel] *= 10
            for layer in model.model.layers:
                readers = {
                    layer.input_layernorm: [getattr(layer.self_attn, f"{p}_proj") for p in "qkv"],
                    layer.post_attention_layernorm: [layer.mlp.gate_proj, layer.mlp.up_proj],
                }
                for norm, linears in readers.items():
                    norm.weight[channel] *= 30 if where == "gain" else 1
                    for linear in linears:
                        linear.weight[:, channel] /= 30 if where == "gain" else 10
    return model


@pytest.mark.parametrize(("method", "where"), [("rotate", "stream"), ("smooth", "gain"), ("awq", "gain")])
def test_planted_outliers_are_easier_to_quantize(method: str, where: str) -> None:
    """KL at W4A4 falls to less than 0.6 of it. Mutation: seed or factors of nothing but ones -> red."""
    model = planted(where)
    wanted = logits(model)
    before = error(model, wanted, W4A4)
    qat.fold.apply(model, recipe(method), [IDS])
    after = error(model, wanted, W4A4)
    assert after < 0.6 * before, (before, after)


def first_error(model: nn.Module) -> float:
    """Squared error of the queries, keys and values of the first block at W4A4, relative to their size."""
    exact, rounded = copy.deepcopy(model), copy.deepcopy(model)
    qat.prepare(rounded, recipe())
    seen: dict[nn.Module, list[Tensor]] = {exact: [], rounded: []}
    for network, outputs in seen.items():
        for part in "qkv":
            layer = network.get_submodule(f"model.layers.0.self_attn.{part}_proj")
            layer.register_forward_hook(lambda _, __, y, outputs=outputs: outputs.append(y))
        logits(network)
    pairs = list(zip(*seen.values(), strict=True))
    return sum(float((y - x).square().sum()) for x, y in pairs) / sum(float(x.square().sum()) for x, _ in pairs)


def test_awq_is_judged_by_the_recipe() -> None:
    """For weights alone other factors are best than for weights and inputs together, which are best at W4A4."""
    model = transformer(hidden=64)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5:10] *= 8
    block = "model.layers.*."
    network = {"reads": {f"{block}input_layernorm": [f"{block}self_attn.{p}_proj" for p in "qkv"]}}
    errors = [first_error(model)]
    for rule in ({"weight": W4A4["weight"]}, W4A4):
        folded = copy.deepcopy(model)
        qat.fold.apply(folded, recipe("awq", rule, network=network), [IDS])
        errors.append(first_error(folded))
    assert errors[0] > errors[1] > errors[2], errors


def test_a_network_that_is_described_wrongly_is_noticed() -> None:
    """v reads norm1 too; without it the function changes."""
    network = {**OWN, "values": {}, "reads": {"norm1": ["q", "k"], "norm2": ["up"], "norm": ["head"]}}
    for method in ("smooth", "awq"):
        with pytest.raises(QATError, match="changed what the model computes"):
            qat.fold.apply(Own(), recipe(method, network=network), [IDS % 50])


def test_what_cannot_be_scaled() -> None:
    with pytest.raises(QATError, match=r"give qat\.fold\.apply batches"):
        qat.fold.apply(Own(), recipe("smooth", network=OWN))
    with pytest.raises(QATError, match="no batches"):
        qat.fold.awq(Own(), recipe("awq"), [], network=Network(**OWN))
    with pytest.raises(QATError, match="no layer of the recipe reads"):
        only = from_dict({"name": "x", "rules": {"q": {"match": ["head"], **W4A4}}})
        qat.fold.smooth(Own(), only, [IDS % 50], network=Network(reads={"norm1": ["q", "k", "v"]}))


# ---- prepared, saved, exported -------------------------------------------------------------------------------------


def test_not_twice() -> None:
    words = recipe("rotate")
    model = transformer()
    with pytest.raises(QATError, match=r"fold\.method=rotate.*qat\.fold\.apply"):
        qat.prepare(model, words)
    assert not qat.is_prepared(model)
    qat.fold.apply(model, words)
    once = copy.deepcopy(model.state_dict())
    qat.fold.apply(model, words)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())
    with pytest.raises(QATError, match="rotated already"):
        qat.fold.rotate(copy.deepcopy(model))
    qat.prepare(model, words)
    qat.prepare(model, words)
    with pytest.raises(QATError, match="prepared already"):
        qat.fold.rotate(model)
    model = transformer()
    words = recipe("smooth")
    qat.prepare(model, words)
    for verb in (qat.after_optimizer_step, qat.convert):
        with pytest.raises(QATError, match=r"fold.method=smooth.*qat.fold.apply\(model, recipe, batches\)"):
            verb(model)
    qat.fold.apply(model, words, [IDS])
    qat.after_optimizer_step(model)
    with pytest.raises(QATError, match="done to this model already"):
        qat.fold.smooth(model, words, [IDS])


def test_float_weights_that_come_later_are_not_folded() -> None:
    model = transformer()
    words = recipe("awq")
    plain = copy.deepcopy(model.state_dict())
    qat.fold.apply(model, words, [IDS])
    qat.prepare(model, words)
    model.load_state_dict(plain, strict=False)
    with pytest.raises(QATError, match="not folded"):
        qat.after_optimizer_step(model)


@pytest.mark.parametrize("method", ["rotate", "smooth", "awq"])
@pytest.mark.parametrize("by_word", [True, False])
def test_checkpoints(method: str, by_word: bool, tmp_path: Path) -> None:
    """`qat.load_from_checkpoint` rebuilds what the fold changed, from the float architecture alone; a model that is
    not folded in the same way refuses the state."""
    before = transformer(tie_word_embeddings=True)
    model = copy.deepcopy(before)
    words = recipe(method)
    qat.fold.apply(model, words, [IDS])
    if not by_word:
        words = recipe()
    qat.prepare(model, words)
    qat.after_optimizer_step(model)
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "x")
    fresh = copy.deepcopy(before)
    loaded = qat.load_from_checkpoint(tmp_path / "x", fresh)
    assert torch.equal(logits(fresh), logits(model))
    assert fresh.config.tie_word_embeddings == (method != "rotate")
    assert [entry["method"] for entry in qat.fold.folded(loaded)] == [method]
    assert [entry["method"] for entry in qat.fold.folded(copy.deepcopy(fresh))] == [method]
    other = copy.deepcopy(before)
    qat.prepare(other, recipe())
    if by_word or method == "rotate":
        with pytest.raises(QATError, match=r"other rules or phases|not rotated"):
            other.load_state_dict(model.state_dict(), strict=False)


def test_own_networks_in_checkpoints(tmp_path: Path) -> None:
    model = Own()
    words = recipe("rotate", network=OWN, seed=7)
    qat.fold.apply(model, words)
    qat.prepare(model, words)
    torch.save(model.state_dict(), tmp_path / "x")
    fresh = Own()
    qat.load_from_checkpoint(tmp_path / "x", fresh)
    assert torch.equal(logits(fresh), logits(model))


GRIDS: dict[str, dict[str, Any]] = {
    "lsq": {"bits": 4, "granularity": "channel", "quantizer": "lsq"},
    "lsq, both signs": {"bits": 3, "granularity": "group", "group_size": 32, "quantizer": "lsq", "signed_scale": True},
    "mse, zero point": {"bits": 4, "granularity": "group", "group_size": 32, "quantizer": "mse", "zero_point": "int"},
    "absmax": {"bits": 8, "granularity": "channel", "quantizer": "absmax"},
    "minmax": {"bits": 4, "granularity": "tensor", "quantizer": "minmax", "zero_point": "float"},
    "nf4": {"bits": 4, "granularity": "group", "group_size": 32, "quantizer": "mse", "grid": "nf4"},
    "seq": {"bits": 2, "granularity": "channel", "quantizer": "lsq", "grid": "seq"},
}


@pytest.mark.parametrize("method", ["rotate", "smooth", "awq"])
@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_the_law_after_folding(method: str, grid: str) -> None:
    """quantizer(w) == integers(w).dequantize(), bit for bit, after a step of training on folded weights."""
    model = transformer(tie_word_embeddings=True)
    words = recipe(method, {**W4A4, "weight": GRIDS[grid]})
    qat.fold.apply(model, words, [IDS])
    qat.prepare(model, words)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    qat.after_optimizer_step(model, optimizer)
    count = 0
    bundle = qat.convert(model)
    for name, layer in qat_layers(model).items():
        for key, quantizer in weight_quantizers(layer).items():
            fake = quantizer(layer._parameters[key]).detach()
            assert torch.equal(fake, bundle[f"{name}.{key}"].dequantize()), name
            count += 1
        assert input_quantizer(layer) is not None
    assert count == 14


@pytest.mark.parametrize("method", ["smooth", "awq"])
def test_scales_are_searched_on_folded_weights(method: str) -> None:
    """Mutation: a prepared model keeps those of the weights before."""
    words = recipe(method, rule={"weight": {"bits": 4, "granularity": "channel", "quantizer": "mse"}})
    first, second = transformer(), transformer()
    qat.fold.apply(first, words, [IDS])
    qat.prepare(first, words)
    qat.prepare(second, words)
    qat.fold.apply(second, words, [IDS])
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) or "extra_state" in name, name


def test_another_seed_is_another_fold() -> None:
    model = transformer()
    qat.fold.apply(model, recipe("rotate"))
    with pytest.raises(QATError, match="not folded so"):
        qat.prepare(model, recipe("rotate", seed=1))
