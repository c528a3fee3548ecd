"""The cache slot of a rule: keys, after their rotation, and values are rounded as they enter the cache."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import qat
from qat.attention import attention_op
from qat.init.blockwise import blockwise
from qat.init.gptq import gptq
from qat.layers import original_class, rounded
from qat.layout import Layout
from qat.quantizers import make_quantizer
from qat.specs import QuantSpec

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8}
STATIC = {"grid": "e4m3", "granularity": "tensor", "quantizer": "ema"}
LEARNED = {"bits": 8, "granularity": "tensor", "quantizer": "lsq"}
TOKEN = {"bits": 4, "granularity": "token", "quantizer": "absmax"}
IDS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))


def make(kind: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **HEADS, "initializer_range": 0.2, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rules(slot: dict[str, Any], **rule: Any) -> dict[str, Any]:
    return {"cache": {**rule, "cache": slot}}


def seen(model: Any, steps: int = 1) -> Any:
    """The model after a few training steps' forwards, in eval mode again."""
    for _ in range(steps):
        model.train()(IDS)
        qat.after_optimizer_step(model)
    return model.eval()


def kept(model: Any, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


# Turned red by: key and value quantizers swapped, rounding what `cache.update` gives back instead of what it gets.
@pytest.mark.parametrize("slot", [STATIC, LEARNED, TOKEN], ids=["ema", "lsq", "token"])
def test_what_the_cache_keeps_is_what_the_quantizers_make_of_rotated_keys_and_values(
    recipe: Any, slot: dict[str, Any]
) -> None:
    model, plain = make(num_hidden_layers=1), make(num_hidden_layers=1)
    qat.prepare(model, recipe(rules=rules(slot)))
    seen(model)
    attention = model.model.layers[0].self_attn
    key, value = kept(plain)
    ours = kept(model)
    assert torch.equal(ours[0], attention.key_quantizer(key)) and not torch.equal(ours[0], key)
    assert torch.equal(ours[1], attention.value_quantizer(value)) and not torch.equal(ours[1], value)
    assert torch.equal(ours[0], attention.key_quantizer.integers(key).dequantize())
    if slot is not TOKEN:
        scales = [q.kept().scale for q in (attention.key_quantizer, attention.value_quantizer)]
        assert all(scale.shape == (1, 1) for scale in scales) and not torch.equal(*scales)
    else:
        spec = QuantSpec(4, True, False, "token", None, "none", "portable", "absmax")
        assert torch.equal(ours[0], make_quantizer(spec, Layout((1, 1), "tokens"))(key))


@pytest.mark.parametrize("slot", [STATIC, TOKEN], ids=["ema", "token"])
def test_decoding_with_a_cache_gives_what_one_pass_gives(recipe: Any, slot: dict[str, Any]) -> None:
    model = make()
    qat.prepare(model, recipe(rules=rules(slot)))
    seen(model)
    with torch.no_grad():
        whole = model(IDS, use_cache=True)
        without = model(IDS, use_cache=False)
        first = model(IDS[:, :5], use_cache=True)
        rest = model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.equal(whole.logits, without.logits)
    torch.testing.assert_close(rest.logits, whole.logits[:, 5:], rtol=1e-4, atol=1e-4)
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(IDS[:1], **greedy)
    assert torch.equal(tokens, model.generate(IDS[:1], **greedy, use_cache=False))
    assert torch.equal(tokens, model.generate(IDS[:1], **greedy, cache_implementation="static"))


def test_scales_learn_and_settle(recipe: Any) -> None:
    model = make()
    qat.prepare(
        model, recipe(rules=rules({**LEARNED, "bits": 3}), phases={"a": {"steps": 6}, "b": {"freeze_scales": True}})
    )
    attention = model.model.layers[1].self_attn
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    scales = []
    for _ in range(9):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        assert attention.key_quantizer.theta.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)
        scales.append((attention.key_quantizer.kept().scale.item(), attention.value_quantizer.kept().scale.item()))
    assert len(set(scales[:6])) == 6 and len(set(scales[6:])) == 1


def test_the_gradient_of_keys_and_values_stops_where_the_grid_clips(recipe: Any) -> None:
    model = make(num_hidden_layers=1)
    qat.prepare(model, recipe(rules=rules({**STATIC, "percentile": 60.0})))
    seen(model)
    attention = model.model.layers[0].self_attn
    value = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(2)).mul(4).requires_grad_()
    reach = attention.value_quantizer.kept().scale * attention.value_quantizer.spec.grid.reach
    rounded(attention, attention.value_quantizer, value).sum().backward()
    assert value.grad is not None
    assert torch.equal(value.grad, (value.abs() <= reach).float()) and 0 < value.grad.mean() < 1


def test_phases_ramps_and_unprepare(recipe: Any) -> None:
    model, plain = make(num_hidden_layers=1), make(num_hidden_layers=1)
    phases = {"wait": {"steps": 1, "quantize": False}, "qat": {"steps": -1, "ramp": 3}}
    plan = qat.prepare(model, recipe(rules=rules(STATIC), phases=phases))
    assert "cache e4m3 tensor portable ema" in plan.render() and plan.coverage == 0
    raw = kept(plain)
    assert all(map(torch.equal, kept(model), raw))
    assert torch.equal(model(IDS, labels=IDS).loss, plain(IDS, labels=IDS).loss)
    seen(model)
    attention = model.model.layers[0].self_attn
    half = torch.lerp(raw[0], attention.key_quantizer(raw[0]), torch.tensor(0.25))
    assert torch.equal(kept(model)[0], half)
    state = set(plain.state_dict())
    assert {key for key in model.state_dict() if "quantizer" not in key and "qat_state" not in key} == state
    qat.unprepare(model)
    assert type(model.model.layers[0].self_attn) is type(plain.model.layers[0].self_attn)
    assert set(model.state_dict()) == state and all(map(torch.equal, kept(model), raw))


def test_checkpoints_and_copies(recipe: Any, tmp_path: Path) -> None:
    model = make()
    qat.prepare(model, recipe(rules={**rules(LEARNED), "all": {"types": ["Linear"], "weight": {"bits": 4}}}))
    seen(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded: Any = qat.load_from_checkpoint(tmp_path / "model.pt", make())
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, kept(other), kept(model)))
    ours, theirs = qat.convert(model).caches, qat.convert(loaded).caches
    assert set(ours) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    for name, given in ours.items():
        for which, (_, fields) in given.items():
            other = theirs[name][which][1]
            assert fields is not None and other is not None and torch.equal(fields.scale, other.scale)


def test_gradient_checkpointing_changes_nothing(recipe: Any) -> None:
    grads = []
    for use in (False, True):
        model = make()
        qat.prepare(model, recipe(rules=rules(LEARNED)))
        if use:
            model.gradient_checkpointing_enable()
        model.train()(IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_it_compiles_into_one_graph(recipe: Any) -> None:
    torch._dynamo.reset()
    model = make(num_hidden_layers=1)
    qat.prepare(model, recipe(rules=rules(LEARNED)))
    seen(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=True).logits, model(IDS).logits, rtol=0, atol=1e-5)
    model.train()(IDS, labels=IDS).loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    compiled(IDS, labels=IDS, use_cache=False).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


OTHERS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64},
    "Gemma3Text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen3": {},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "DeepseekV3": {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    | {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "head_dim": 4},
}


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_other_architectures(recipe: Any, kind: str) -> None:
    model, plain = make(kind, **OTHERS[kind]), make(kind, **OTHERS[kind])
    plan = qat.prepare(model, recipe(rules=rules({**STATIC, "scale": "e8m0"})))
    assert len(plan.rows) == 2 and all("Attention" in row.type for row in plan.rows)
    seen(model)
    attention = model.get_submodule(plan.rows[0].name)
    quantizers = attention.key_quantizer, attention.value_quantizer
    for quantizer, ours, raw in zip(quantizers, kept(model)[:2], kept(plain)[:2], strict=True):
        assert torch.equal(ours, quantizer(raw)) and not torch.equal(ours, raw)


def test_weights_and_caches_in_one_rule_and_what_a_plan_lists(recipe: Any) -> None:
    weight = {"bits": 4, "granularity": "channel", "quantizer": "absmax"}
    both = {"all": {"weight": weight, "cache": STATIC}, "first": {"match": ["*layers.0.self_attn"], "keep_float": True}}
    plan = qat.plan(make(), recipe(rules=both, strict=True))
    rows = {row.name: row for row in plan.rows}
    assert rows["model.layers.1.self_attn"].cache is not None and rows["lm_head"].cache is None
    assert "model.layers.0.self_attn" not in rows and len(rows) == 17
    with pytest.raises(qat.QATError, match=r"strict: 1 layers stay in float .*layers\.0\.self_attn"):
        qat.plan(
            make(),
            recipe(
                rules={"all": both["all"], "cache": {**rules(STATIC, match=["*.1.*"])["cache"]}}
                | {"all": {"weight": weight}},
                strict=True,
            ),
        )
    # a rule for caches says nothing about linears, and attention is no layer without such a rule
    assert [row.name for row in qat.plan(make(), recipe(rules=rules(STATIC, types=["Attention"]))).rows] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    assert not any(row.type == "LlamaAttention" for row in qat.plan(make(), recipe()).float_rows)


class Bare(nn.Module):
    """Attention that takes a cache and keeps nothing in it."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return self.k_proj(x)


class BareAttention(Bare):
    pass


class OddAttention(Bare):
    def forward(self, x: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return x if past_key_values is None else past_key_values.get_linear_cache(0)  # type: ignore[no-any-return]


def test_what_cannot_be_is_refused(recipe: Any) -> None:
    own = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.raises(qat.QATError, match=r"rules\.cache\.cache matches no attention: .*here: MultiheadAttention"):
        qat.prepare(own, recipe(rules=rules(STATIC)))
    with pytest.raises(qat.QATError, match=r"rules\.cache\.cache matches no attention"):
        qat.prepare(make(), recipe(rules=rules(STATIC, types=["Linear"])))
    bart = transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=64)
    for key in ("encoder_attention_heads", "decoder_attention_heads"):
        setattr(bart, key, 2)
    with pytest.raises(qat.QATError, match=r"across an encoder has a cache of another kind"):
        qat.prepare(transformers.BartForConditionalGeneration(bart), recipe(rules=rules(STATIC)))
    with pytest.raises(qat.QATError, match=r"finds a tensor's scale in the tokens at hand.*quantizer=ema"):
        qat.prepare(make(), recipe(rules=rules({**TOKEN, "granularity": "tensor"})))
    with pytest.raises(qat.QATError, match=r"cache: group_size=5 does not divide the 8"):
        qat.prepare(make(), recipe(rules=rules({**TOKEN, "granularity": "group", "group_size": 5})))
    model = make()
    qat.prepare(model, recipe(rules=rules(STATIC)))
    with pytest.raises(qat.ExportError, match=r"layers\.0\.self_attn: the range of its key was never seen"):
        qat.convert(model)
    bare = nn.Sequential(BareAttention())
    assert attention_op(bare[0]) is not None and attention_op(Bare()) is None
    qat.prepare(bare, recipe(rules=rules(STATIC)))
    with pytest.raises(qat.QATError, match=r"BareAttention gave no keys and values to `past_key_values.update`"):
        bare(torch.randn(2, 8))
    assert original_class(bare[0]) is BareAttention
    odd = nn.Sequential(OddAttention())
    qat.prepare(odd, recipe(rules=rules(STATIC)))
    with pytest.raises(AttributeError, match=r"OddAttention asks its cache for 'get_linear_cache' where there is none"):
        odd(torch.randn(2, 8))


def test_a_forward_replaced_on_the_instance_is_refused(recipe: Any) -> None:
    """As hooks of accelerate do it: keys and values would stay in float without a word."""
    model = make()
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward
    with pytest.raises(qat.QATError, match=r"layers\.1\.self_attn .*forward was replaced on the instance"):
        qat.prepare(model, recipe(rules=rules(TOKEN)))


@pytest.mark.parametrize("kind", ["Llama4Text", "Mpt"])
def test_attention_that_asks_how_long_the_cache_is(recipe: Any, kind: str) -> None:
    """Also where there is none, in training; before their start step caches change nothing."""
    sizes: dict[str, Any] = {"num_local_experts": 2, "no_rope_layers": [1, 0], "intermediate_size_mlp": 64}
    if kind == "Mpt":
        config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64, max_seq_len=32)
        torch.manual_seed(0)
        model: Any = transformers.MptForCausalLM(config).eval()
    else:
        model = make(kind, **sizes)
    plain = copy.deepcopy(model)
    qat.prepare(model, recipe(rules=rules(STATIC), phases={"wait": {"steps": 1, "quantize": False}, "qat": {}}))
    assert torch.equal(model(IDS, use_cache=False).logits, plain(IDS, use_cache=False).logits)
    seen(model, 2)
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
    assert not torch.equal(whole, plain(IDS, use_cache=False).logits)


def test_inits_look_at_the_same_model(recipe: Any) -> None:
    weight = {"bits": 4, "granularity": "channel", "quantizer": "lsq"}
    for init in (gptq, blockwise):
        model = make()
        qat.prepare(model, recipe(rules={"all": {"types": ["Linear"], "weight": weight}, **rules(LEARNED)}))
        init(model, [IDS])
        seen(model)
        assert len(kept(model)) == 4


def test_records_without_the_word_stay_the_same(recipe: Any) -> None:
    assert "cache" not in qat.recipes.to_dict(recipe())["rules"]["all"]
    given = recipe(rules=rules(STATIC))
    data = qat.recipes.to_dict(given)
    assert qat.recipes.from_dict(data) == given and data["rules"]["cache"]["cache"]["quantizer"] == "ema"
