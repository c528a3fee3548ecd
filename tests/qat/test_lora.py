"""Adapters of peft inside the rounding: codes(W0 + s B A).

Mutations tried, one at a time: s left out of dA; the adapter missing among the cache's sources; the frozen weight's
theta frozen with it; the wrapper's class kept by unprepare: each turns a test red.
"""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qat
from qat import reparam
from qat.init.gptq import gptq
from qat.quantizers import quantizers
from qat.reparam import Lora
from qat.steps import qat_layers

peft = pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEAD = {"match": ["lm_head"], "keep_float": True}
IDS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(**sizes, **heads, initializer_range=0.1, use_cache=False)
    return transformers.LlamaForCausalLM(config).to(dtype)


def adapted(model: nn.Module, seed: int | None = None, **words: Any) -> Any:
    """seed: B is random instead of zero."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ALL, **words})
    found = peft.get_peft_model(model, config)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, p in found.named_parameters():
            if "lora_B" in name:
                p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return found


def of_linears(recipe: Any, **weight: Any) -> Any:
    slot = {"bits": 4, "granularity": "group", "group_size": 16, "quantizer": "lsq", **weight}
    return recipe(rules={"linears": {"types": ["Linear"], "weight": slot}, "head": HEAD})


def step(model: nn.Module, optimizer: Any) -> float:
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    qat.after_optimizer_step(model, optimizer)
    return float(loss.detach())


def trained(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    return [step(model, optimizer) for _ in range(steps)]


def deployed(bundle: qat.Bundle, dtype: torch.dtype = torch.float32) -> Any:
    """A float model with the weights of the bundle: what a consumer computes."""
    model = llama(dtype)
    model.load_state_dict({**bundle.floats, **{name: bundle[name].dequantize() for name in bundle}})
    return model.eval()


# ---- the sum -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_the_sum_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    """Products exact in fp64, added in the order of r, rounded once; in chunks or not."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 10, generator=generator), torch.randn(6, 3, generator=generator)
    w = torch.randn(10, 6, generator=generator) if transposed else torch.randn(6, 10, generator=generator)
    lora = Lora(nn.Linear(1, 1), nn.Linear(1, 1), 1.7, transposed)
    found = lora.weight(w, a, b)
    scaled = b * 1.7
    for o in range(6):
        for i in range(10):
            total = float(w[i, o] if transposed else w[o, i])
            for k in range(3):
                total += float(scaled[o, k]) * float(a[k, i])
            assert float(found[i, o] if transposed else found[o, i]) == float(torch.tensor(total, dtype=torch.float32))
    monkeypatch.setattr(reparam, "_CHUNK_CPU", 7)
    kept = w.double()
    assert torch.equal(lora.weight(w, a, b), found) and torch.equal(lora.weight(kept, a, b), found)
    assert torch.equal(kept, w.double())


# ---- one model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_starts_at_zero_changes_nothing(recipe: Any, dtype: torch.dtype) -> None:
    plain, model = llama(dtype), adapted(llama(dtype))
    qat.prepare(plain, of_linears(recipe))
    qat.prepare(model, of_linears(recipe))
    assert torch.equal(plain(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", [name for name, cls in quantizers().items() if cls.for_weights])
def test_what_is_trained_is_what_is_exported(recipe: Any, name: str, cached: bool) -> None:
    zero = "none" if "none" in quantizers()[name].zero_points else "int"
    model = adapted(llama())
    before = {key: p.detach().clone() for key, p in model.named_parameters() if "base_layer.weight" in key}
    # one has three codes and no others, and one has no integers
    codes = {"absmean": {"grid": "ternary", "bits": 2}, "dual_lsq": {"grid": "fp4", "bits": 4}}.get(name, {})
    qat.prepare(model, of_linears(recipe, quantizer=name, zero_point=zero, **codes), code_cache=cached)
    losses = trained(model)
    assert losses[-1] < losses[0]
    assert (
        all(torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before) and len(before) == 14
    )
    bundle = qat.convert(model)
    assert len(bundle) == 14 and set(bundle) | set(bundle.floats) == set(llama().state_dict())
    for key in bundle:
        plain = dict(llama().named_parameters())[key]
        assert not torch.equal(bundle.latents(key), plain), "the adapter has not moved"
    model.eval()
    assert torch.equal(deployed(bundle)(IDS).logits, model(IDS).logits)


def test_a_base_in_bf16_with_an_adapter_in_fp32(recipe: Any) -> None:
    model = adapted(llama(torch.bfloat16))
    qat.prepare(model, of_linears(recipe))
    layer = next(iter(qat_layers(model).values()))
    assert layer.weight_quantizer.theta.dtype == torch.float32 and layer.weight_quantizer.theta.requires_grad
    trained(model)
    model.eval()
    bundle = qat.convert(model)
    assert next(iter(bundle.values())).out_dtype == torch.bfloat16
    assert torch.equal(deployed(bundle, torch.bfloat16)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["absmax", "lsq"])
def test_gradients_are_those_of_the_sum(recipe: Any, name: str, cached: bool) -> None:
    """Against autograd through quantizer(W0 + s B A)."""
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), 3, target_modules=["0", "2"])
    qat.prepare(model, recipe(quantizer=name), code_cache=cached)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    model(x).square().sum().backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert not any("base_layer.weight" in key and "quantizer" not in key for key in grads)
    model.zero_grad()
    h = x
    for index in ("0", "2"):
        wrapper = model.get_submodule(f"base_model.model.{index}")
        base, a, b = wrapper.base_layer, wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        w = base.weight_quantizer(base.weight + wrapper.scaling["default"] * (b @ a))
        h = nn.functional.linear(h, w, base.bias)
        h = torch.relu(h) if index == "0" else h
    h.square().sum().backward()
    own = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert set(own) == set(grads) and any("lora_A" in key for key in own)
    for key, grad in own.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-5)


def test_nothing_as_large_as_the_weight_is_kept_for_backward(recipe: Any) -> None:
    model = adapted(nn.Sequential(nn.Linear(64, 128)), 3, target_modules=["0"])
    qat.prepare(model, recipe(bits=8, quantizer="lsq"), code_cache=False)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(2, 64)).sum()
    base = model.base_model.model.get_submodule("0").base_layer.weight
    assert kept and [t.shape for t in kept if t.numel() >= base.numel() and t.data_ptr() != base.data_ptr()] == []


def test_codes_are_made_once_per_step_of_the_adapter(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(nn.Sequential(nn.Linear(16, 8)), 3, target_modules=["0"])
    qat.prepare(model, recipe(quantizer="absmax"))
    count = [0]
    made = Lora.weight

    def counted(self: Lora, *args: Any) -> Tensor:
        count[0] += 1
        return made(self, *args)

    monkeypatch.setattr(Lora, "weight", counted)
    x = torch.randn(3, 16)
    first = model(x)
    before = count[0]
    model(x).sum().backward()
    assert count[0] == before
    factors = [p for key, p in model.named_parameters() if "lora_" in key]
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=1.0).step()
    assert torch.equal(model(x), first) and count[0] == before
    # fused AdamW moves no version counter
    torch.optim.AdamW(factors, lr=0.1, fused=True).step()
    assert not torch.equal(model(x), first) and count[0] == before + 1


def test_while_the_model_is_in_float_peft_computes(recipe: Any) -> None:
    phases = {"float": {"steps": 2, "quantize": False}, "qat": {"steps": -1}}
    plain, model = adapted(llama(), 3), adapted(llama(), 3)
    words = {"linears": {"types": ["Linear"], "weight": {"bits": 4, "quantizer": "lsq"}}, "head": HEAD}
    qat.prepare(model, recipe(rules=words, phases=phases))
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (plain, model)]
    for _ in range(2):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            m(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        qat.after_optimizer_step(model)
        same = dict(model.named_parameters())
        assert all(torch.equal(p, same[name]) for name, p in plain.named_parameters())
    # the scales were searched on the sum of this moment
    layer = next(iter(qat_layers(model).values()))
    assert layer._qat.active and layer.weight_quantizer.__dict__["searched"][0] != float(layer.weight.double().sum())
    model.eval()
    assert torch.equal(deployed(qat.convert(model))(IDS).logits, model(IDS).logits)


def test_a_ramp_goes_from_the_sum_to_its_codes(recipe: Any) -> None:
    model = adapted(nn.Sequential(nn.Linear(16, 8, bias=False)), 3, target_modules=["0"])
    qat.prepare(model, recipe(phases={"qat": {"steps": -1, "ramp": 3}}))
    layer = next(iter(qat_layers(model).values()))
    x = torch.eye(16)
    summed = layer._qat.reparams["weight"].weight(layer.weight, *layer._qat.reparams["weight"].factors)
    wanted = torch.lerp(summed, layer.weight_quantizer(summed), torch.tensor(0.25))
    torch.testing.assert_close(model(x), wanted.t(), rtol=0, atol=1e-6)


def test_conv1d_of_gpt2(recipe: Any) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32, use_cache=False)
    model = adapted(transformers.GPT2LMHeadModel(config), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    qat.prepare(model, recipe(rules={"a": {"match": ["*c_attn", "*c_fc"], "weight": {"bits": 4, "quantizer": "lsq"}}}))
    trained(model)
    bundle = qat.convert(model)
    assert "transformer.h.0.attn.c_attn.weight" in bundle
    other = transformers.GPT2LMHeadModel(config)
    other.load_state_dict({**bundle.floats, **{name: bundle[name].dequantize() for name in bundle}})
    assert torch.equal(other.eval()(IDS).logits, model.eval()(IDS).logits)


def test_compiled(recipe: Any) -> None:
    torch._dynamo.reset()
    eager = adapted(nn.Sequential(nn.Linear(16, 8)), 3, target_modules=["0"])
    model = copy.deepcopy(eager)
    for m in (eager, model):
        qat.prepare(m, recipe(quantizer="lsq"))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    for m in (eager, model):
        m.optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        outs = [eager(x), compiled(x)]
        torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-6)
        for m, y in zip((eager, model), outs, strict=True):
            y.square().sum().backward()
            m.optimizer.step()
            m.optimizer.zero_grad()
            qat.after_optimizer_step(m)
    torch._dynamo.reset()


# ---- peft's own verbs ----------------------------------------------------------------------------------------------


def test_merging_is_for_a_model_that_is_not_prepared(recipe: Any) -> None:
    """peft's merge of the same adapter differs from the exported weight by rounding to the grid only."""
    model = adapted(llama())
    qat.prepare(model, of_linears(recipe))
    trained(model)
    bundle = qat.convert(model)
    found = {name: (bundle[name].dequantize(), bundle[name].scale, bundle.latents(name)) for name in bundle}
    for verb in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(qat.QATError, match="cannot be merged"):
            verb()
    with model.disable_adapter(), pytest.raises(qat.QATError, match="cannot be disabled"):
        model(IDS)
    qat.unprepare(model)
    assert not any("QAT" in type(m).__name__ for m in model.modules())
    merged = dict(model.merge_and_unload().named_parameters())
    for name, (weight, scale, latents) in found.items():
        torch.testing.assert_close(latents, merged[name], rtol=0, atol=1e-6)
        steps = scale.float().repeat_interleave(16, 1)
        clipped = torch.minimum(torch.maximum(merged[name], -8 * steps), 7 * steps)
        assert bool(((clipped - weight).abs() <= 0.5001 * steps).all())


def test_a_copy_and_a_state_dict(recipe: Any) -> None:
    model = adapted(llama())
    qat.prepare(model, of_linears(recipe))
    trained(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    trained(other, 1)
    assert not torch.equal(other(IDS).logits, model(IDS).logits)
    layer, twin = (next(iter(qat_layers(m).values())) for m in (model, other))
    assert twin._qat.reparams["weight"].a is not layer._qat.reparams["weight"].a
    back = torch.load(io.BytesIO(_saved(model)), weights_only=False)
    assert torch.equal(back(IDS).logits, model(IDS).logits)


def _saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


def test_a_checkpoint_knows_the_scaling(recipe: Any, tmp_path: Any) -> None:
    model = adapted(llama())
    qat.prepare(model, of_linears(recipe))
    trained(model)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    back = qat.load_from_checkpoint(tmp_path / "x.pt", adapted(llama()))
    theirs, ours = qat.convert(back), qat.convert(model)
    assert all(torch.equal(theirs[name].dequantize(), ours[name].dequantize()) for name in ours)
    with pytest.raises(qat.QATError, match=r"adapters of scaling \[1.5\], this model has 14 of \[2.0\]"):
        qat.load_from_checkpoint(tmp_path / "x.pt", adapted(llama(), lora_alpha=8))
    with pytest.raises(qat.QATError):
        qat.load_from_checkpoint(tmp_path / "x.pt", llama())


def test_gptq_starts_below_a_fresh_adapter(recipe: Any) -> None:
    plain, model = llama(), adapted(llama())
    for m in (plain, model):
        qat.prepare(m, of_linears(recipe, quantizer="mse"))
        gptq(m, [{"input_ids": IDS}])
    ours, theirs = qat.convert(model), qat.convert(plain)
    assert all(torch.equal(ours[name].codes, theirs[name].codes) for name in theirs)
    late = adapted(llama(), 3)
    qat.prepare(late, of_linears(recipe, quantizer="mse"))
    with pytest.raises(qat.QATError, match="is not zero any more"):
        gptq(late, [{"input_ids": IDS}])


# ---- what is refused -----------------------------------------------------------------------------------------------


def two(model: Any) -> Any:
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=ALL))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def other_kind(model: Any) -> Any:
    return peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


REFUSED = {
    "dropout": (lambda: adapted(llama(), lora_dropout=0.1), "use lora_dropout=0"),
    "dora": (lambda: adapted(llama(), use_dora=True), "use plain LoRA"),
    "bias": (lambda: adapted(llama(), lora_bias=True), "use lora_bias=False"),
    "two": (lambda: two(adapted(llama())), r"2 adapters are active \(default, second\)"),
    "merged": (lambda: merged(adapted(llama())), "is merged; call unmerge_adapter"),
    "ia3": (lambda: other_kind(llama()), "is no LoRA of a Linear layer in float"),
    "embedding": (lambda: adapted(llama(), target_modules=["embed_tokens"]), "Embedding is no LoRA"),
    "saved": (lambda: adapted(llama(), modules_to_save=["lm_head"]), "ModulesToSaveWrapper is no LoRA"),
    "float": (lambda: adapted(llama(), target_modules=["lm_head"]), "it has an adapter but no grid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused(recipe: Any, case: str) -> None:
    make, why = REFUSED[case]
    model = make()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(qat.QATError, match=why):
        qat.prepare(model, of_linears(recipe))
    assert [type(m) for m in model.modules()] == classes


def test_a_tied_weight_has_no_adapter(recipe: Any) -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    one = recipe(types=["Linear", "Embedding"], bits=8)
    with pytest.raises(qat.QATError, match="has an adapter, but shares its weight with"):
        qat.prepare(adapted(model, target_modules=["lm_head"]), one)


def test_adapters_come_before_prepare(recipe: Any) -> None:
    model = llama()
    qat.prepare(model, of_linears(recipe))
    late = adapted(model)
    with pytest.raises(qat.QATError, match="got its adapter after"):
        qat.convert(late)
    with pytest.raises(qat.QATError, match="got its adapter after"):
        qat.prepare(late, of_linears(recipe))


def test_an_adapter_is_not_exchanged_under_way(recipe: Any) -> None:
    model = adapted(llama())
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=ALL))
    qat.prepare(model, of_linears(recipe))
    model(IDS)
    model.set_adapter("second")
    with pytest.raises(qat.QATError, match="cannot be exchanged"):
        model(IDS)
    model.set_adapter("default")
    model(IDS)
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").scale_layer(2.0)
    with pytest.raises(qat.QATError, match="scaled anew"):
        model(IDS)


def test_plan_names_and_sizes_are_those_of_the_base_model(recipe: Any) -> None:
    one = recipe(rules={"q": {"match": ["*.q_proj"], "weight": {"bits": 4}}, "e": {"match": ["re:.*norm.*"], **HEAD}})
    one.rules["e"].optional = True
    plain, model = (qat.plan(m, one) for m in (llama(), adapted(llama(), target_modules=["q_proj"])))
    assert plain.bytes == model.bytes and plain.total_params == model.total_params
    assert [row.params for row in plain.rows] == [row.params for row in model.rows]
    assert math.isclose(plain.coverage, model.coverage)


@pytest.mark.parametrize("word", ["freeze_oscillating", "dampen"])
def test_words_that_look_at_weights_are_refused(recipe: Any, word: str) -> None:
    """They would read, and write, the base weight alone."""
    words = of_linears(recipe, quantizer="lsq")
    words.phases["qat"] = qat.recipes.schema.Phase(**{word: 0.1})
    with pytest.raises(qat.QATError, match=f"{word} looks at weights.*adapter"):
        qat.prepare(adapted(llama()), words)
