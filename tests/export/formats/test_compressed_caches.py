"""Quantized caches of keys and values in compressed-tensors: what is written, and what its own code makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qat
from qat.errors import ExportError
from qat.export import all_formats, export, get_format
from qat.export.format import read_back
from qat.export.receipt import Receipt
from qat.verify import verify

KEEP_HEAD = {"match": ["lm_head"], "keep_float": True}
CACHE = {"granularity": "tensor", "quantizer": "ema", "scale": "e8m0"}
GRIDS = {"e4m3": {"grid": "e4m3"}, "int8": {"bits": 8}}
IDS = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(1))


def rule(**changes: Any) -> dict[str, Any]:
    return {"cache": {**CACHE, "grid": "e4m3", **changes}}


def kept(model: Any) -> dict[str, torch.Tensor]:
    """What the cache of a model holds after one pass, by layer."""
    with torch.no_grad():
        layers = model(IDS, use_cache=True).past_key_values.layers
    return {f"{i}.{which}": getattr(layer, which) for i, layer in enumerate(layers) for which in ("keys", "values")}


# Turned red by: keys rounded before their rotation (`output` in place of `cache`), the scale of the values stored for
# the keys, `kv_cache_scheme` left null, num_bits 4.
@pytest.mark.consumer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_its_cache_holds_what_ours_holds(
    name: str, dtype: torch.dtype, make_model: Any, quantize: Any, tmp_path: Path, ran: Any
) -> None:
    """Scales, and with them as powers of two the keys and values, bit for bit: the weights of the layer are theirs."""
    model = make_model(dtype=dtype)
    # angles in fp32, as from_pretrained has them
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(8)
    bundle = quantize(model, {"bits": 4}, head=KEEP_HEAD, seen=IDS, cache={"cache": {**CACHE, **GRIDS[name]}})
    receipt = export(bundle, tmp_path / "out", "compressed-tensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours, theirs, state = kept(model), kept(loaded), loaded.state_dict()
    for layer, given in bundle.caches.items():
        assert loaded.get_submodule(layer).quantization_scheme.input_activations.num_bits == 8
        for which, (_, fields) in given.items():
            scale = state[f"{layer}.{which}_scale"]
            other = given["v" if which == "k" else "k"][1]
            assert other is not None and not torch.equal(scale.float(), other.scale.reshape(1))
            assert fields is not None and scale.dtype == dtype and scale.shape == (1,)
            assert torch.equal(scale.float(), fields.scale.reshape(1))
            assert receipt.caches[layer][which]["scale"] == fields.scale.item()
    assert len(theirs) == 4
    for key, values in ours.items():
        assert torch.equal(theirs[key], values), key
    with torch.no_grad():
        diff = (model(IDS).logits - loaded(IDS).logits).abs().max()
    ran("compressed-tensors", "transformers", f"Llama, cache {name} {dtype}", logits=diff)
    assert float(diff) == 0.0
    tokens = loaded.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0))


@pytest.mark.consumer
def test_other_scales_differ_where_a_quotient_is_no_product(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    """It divides by the scale where training multiplies with the reciprocal: a number next to a tie, one code apart."""
    model = make_model()
    bundle = quantize(model, {"bits": 8}, head=KEEP_HEAD, seen=IDS, cache=rule(grid="int", scale="portable"))
    export(bundle, tmp_path / "out", "compressed-tensors")
    ours, theirs = kept(model), kept(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    caches = list(bundle.caches.values())
    for key in ("0.keys", "0.values"):
        fields = caches[0][key[2]][1]
        assert fields is not None
        apart = (ours[key] - theirs[key]).abs() / fields.scale
        assert float((apart > 0.5).float().mean()) < 1e-3 and float(apart.max()) < 1.5


@pytest.mark.consumer
def test_a_cache_alone(make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    recipe = qat.recipes.from_dict({"name": "cache", "rules": {"cache": rule(quantizer="lsq")}})
    qat.prepare(model, recipe)
    model.train()(IDS, labels=IDS).loss.backward()
    qat.after_optimizer_step(model)
    model.eval()
    export(qat.convert(model), tmp_path / "out", "compressed-tensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours, theirs = kept(model), kept(loaded)
    assert all(torch.equal(theirs[key], values) for key, values in ours.items())


def test_verify_covers_the_scales(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    bundle = quantize(make_model(), {"bits": 4}, head=KEEP_HEAD, seen=IDS, cache=rule())
    export(bundle, tmp_path / "out", "compressed-tensors")
    names = {row.name for row in verify(tmp_path / "out")}
    assert {"model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.v_scale"} <= names
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.v_scale"] *= 2
    save_file(tensors, path, {"format": "pt"})
    records = Receipt.load(tmp_path / "out").tensors
    with pytest.raises(ExportError, match=r"self_attn\.v_scale read back by .* is not the trained value"):
        read_back(get_format("compressed-tensors"), tmp_path / "out", records)


def test_the_config_by_hand(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    bundle = quantize(make_model(), {"bits": 4}, head=KEEP_HEAD, seen=IDS, cache=rule())
    export(bundle, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    assert config["kv_cache_scheme"] == {**scheme, "group_size": None}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cache": rule(granularity="token", quantizer="absmax")}, "has 8 bits and one scale per layer; nearest: .*e4m3"),
    ({"cache": rule(grid="int", bits=4)}, "has 8 bits and one scale per layer"),
    ({"cache": rule(grid="int", narrow=True)}, "has 8 bits and one scale per layer"),
    ({"cache": rule(grid="int", zero_point="int", scale="portable")}, "has 8 bits and one scale per layer"),
    ({"cache": rule(grid="e5m2")}, "has 8 bits and one scale per layer"),
    ({"a": {"match": ["*.0.*"], **rule()}, "b": {"match": ["*.1.*"], **rule(grid="int")}}, "on different grids"),
    ({"cache": {"match": ["*.0.*"], **rule()}}, r"layers\.1\.self_attn has no cache rule"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_the_scheme_cannot_say_is_refused(number: int, make_model: Any, quantize: Any) -> None:
    rules, why = REFUSED[number]
    bundle = quantize(make_model(), {"bits": 4}, head=KEEP_HEAD, seen=IDS, **rules)
    found = get_format("compressed-tensors").check(bundle)
    assert len(found) == 1
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found[0])


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, "fp32"), (torch.float16, "e8m0")], ids=["bf16", "fp16"])
def test_a_scale_that_the_dtype_rounds_is_refused(
    dtype: torch.dtype, scale: str, make_model: Any, quantize: Any
) -> None:
    bundle = quantize(make_model(dtype=dtype), {"bits": 4}, head=KEEP_HEAD, seen=IDS, cache=rule(scale=scale))
    found = get_format("compressed-tensors").check(bundle)
    assert len(found) == 1 and f"cache scale={scale} of model.layers" in found[0] and "use portable" in found[0]


def test_latents_are_refused(make_model: Any, quantize: Any) -> None:
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {
        "n_routed_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "num_key_value_heads": 4,
    }
    model = make_model("DeepseekV3", **sizes, **experts, first_k_dense_replace=2)
    bundle = quantize(model, {"bits": 4, "granularity": "channel", "group_size": None}, seen=IDS, cache=rule())
    found = get_format("compressed-tensors").check(bundle)
    assert any("self_attn caches latents, for which vLLM has one scale" in why for why in found)


@pytest.mark.parametrize("name", sorted(set(all_formats()) - {"compressed-tensors"}))
def test_no_other_format_drops_a_cache(name: str, make_model: Any) -> None:
    rules = {"all": {"types": ["Linear"], "weight": {"bits": 4}}, "cache": rule()}
    plan = qat.plan(make_model(), qat.recipes.from_dict({"name": "small", "rules": rules}))
    found = [why for why in get_format(name).check(plan) if "cache" in why]
    assert len(found) == 1 and f"{name} holds no scales of a cache; use compressed-tensors" in found[0]
