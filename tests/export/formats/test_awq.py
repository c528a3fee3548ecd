from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qat
from qat.errors import ExportError
from qat.export import export
from qat.export.formats.awq import Awq
from qat.export.packed_groups import undisturbed
from qat.init.file import start_from_file
from qat.layout import Layout
from qat.qtensor import QTensor
from qat.specs import QuantSpec
from qat.verify import verify

WHY = "GPTQModel is not installed: pip install 'lightning-qat[gptq]'"
KEEP_HEAD = {"match": ["*lm_head"], "keep_float": True}
BY_ROW = {"granularity": "channel", "group_size": None}
BY_TENSOR = {"granularity": "tensor", "group_size": None}
ASYMMETRIC = {"zero_point": "int", "quantizer": "minmax"}
IDS = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(1))

GRIDS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4},
    "int4 narrow": {"bits": 4, "narrow": True},
    "int4 groups of 16": {"bits": 4, "group_size": 16},
    "int4 by row": {"bits": 4, **BY_ROW},
    "int4 by tensor": {"bits": 4, **BY_TENSOR},
    "int4 fp16 scales": {"bits": 4, "scale": "fp16"},
    "int4 scales of either sign": {"bits": 4, "signed_scale": True, "quantizer": "mse"},
    "asymmetric": {"bits": 4, **ASYMMETRIC},
    "asymmetric, signed codes, by row": {"bits": 4, "signed": True, **BY_ROW, **ASYMMETRIC},
}


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """GPTQModel compiles its kernels in torch, which takes longer than these models."""
    import torch._dynamo

    with torch._dynamo.config.patch(disable=True):
        yield


@undisturbed()
def by_gptqmodel(folder: Path, dtype: torch.dtype) -> Any:
    gptqmodel = pytest.importorskip("gptqmodel", reason=WHY)
    backend = gptqmodel.BACKEND.AWQ_TORCH
    return gptqmodel.GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=dtype).model


@undisturbed()
def by_transformers(folder: Path, dtype: torch.dtype, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    pytest.importorskip("gptqmodel", reason=WHY)
    config = transformers.AwqConfig(backend="torch_awq")
    return kind.from_pretrained(folder, dtype=dtype, device_map="cpu", quantization_config=config)


def assert_same_weights(loaded: Any, bundle: qat.Bundle) -> None:
    """What the loaded layers compute with is what was trained."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    state = loaded.state_dict()
    for name, trained in bundle.items():
        layer = loaded.get_submodule(name.removesuffix(".weight"))
        assert type(layer).__name__ == "AwqTorchLinear", name
        # as its forward does; in float16 for a model in float32
        scales = layer.scales.to(torch.float16 if loaded.dtype == torch.float32 else loaded.dtype)
        weight = dequantize_gemm(layer.qweight, layer.qzeros, scales, layer.bits, layer.group_size)
        assert torch.equal(weight.T.to(loaded.dtype), trained.dequantize()), name
    for name, value in bundle.floats.items():
        assert torch.equal(state[name], value), name


def kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of the next tokens' distributions, mean over tokens."""
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def assert_same_outputs(loaded: Any, model: Any) -> None:
    """Their layers multiply in 16 bits, where sums depend on their order."""
    with torch.no_grad():
        assert kl(model(IDS).logits, loaded(IDS).logits) < (1e-3 if loaded.dtype == torch.bfloat16 else 1e-5)


# Turned red by: columns in their natural order, 2^(bits-1) left out for signed codes, zero points less one.
@pytest.mark.consumer
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_both_loaders_have_the_trained_weights(
    name: str, make_model: Any, quantize: Any, tokenizer: Any, ran: Any, tmp_path: Path
) -> None:
    with undisturbed():
        pytest.importorskip("gptqmodel", reason=WHY)
    model = make_model(dtype=torch.float16, num_hidden_layers=1)
    bundle = quantize(model, GRIDS[name], head=KEEP_HEAD)
    receipt = export(bundle, tmp_path / "out", "awq", tokenizer=tokenizer)
    assert receipt.reader.startswith("gptqmodel 7.") and receipt.max_abs_diff == 0.0
    for load in (by_gptqmodel, by_transformers):
        loaded = load(tmp_path / "out", torch.float16)
        assert_same_weights(loaded, bundle)
        assert_same_outputs(loaded, model)
        with torch.no_grad():
            value = kl(model(IDS).logits, loaded(IDS).logits)
        program = "GPTQModel" if load is by_gptqmodel else "transformers"
        ran("awq", program, f"Llama in float16, {name}", kl=value)


@pytest.mark.consumer
@pytest.mark.parametrize("name", ["int4", "asymmetric"])
def test_bfloat16(name: str, make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16, num_hidden_layers=1)
    bundle = quantize(model, GRIDS[name], head=KEEP_HEAD)
    export(bundle, tmp_path / "out", "awq", tokenizer=tokenizer)
    for load in (by_gptqmodel, by_transformers):
        loaded = load(tmp_path / "out", torch.bfloat16)
        assert_same_weights(loaded, bundle)
        assert_same_outputs(loaded, model)


@pytest.mark.consumer
def test_float32(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=1)
    bundle = quantize(model, {"bits": 4}, head=KEEP_HEAD)
    export(bundle, tmp_path / "out", "awq")
    loaded = by_transformers(tmp_path / "out", torch.float32)
    assert_same_weights(loaded, bundle)
    assert_same_outputs(loaded, model)
    assert loaded.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)
    wide = quantize(make_model(num_hidden_layers=1), {"bits": 4, **ASYMMETRIC}, head=KEEP_HEAD)
    with pytest.raises(ExportError, match=r"a model in float32: loaders compute weights of awq in float16"):
        export(wide, tmp_path / "wide", "awq")


# Turned red by: a float layer left out of `dynamic` or of `modules_to_not_convert`, an index that forgets a shard.
@pytest.mark.consumer
@pytest.mark.parametrize("tied", [False, True])
def test_layers_in_float_biases_and_shards(
    tied: bool, make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Awq, "shard_bytes", 30_000)
    model = make_model(dtype=torch.float16, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    model.generation_config.max_new_tokens = 7
    bundle = quantize(
        model,
        {"bits": 4, **ASYMMETRIC},
        head=KEEP_HEAD,
        o={"match": ["*.0.*o_proj", "*.1.*gate_proj"], "keep_float": True},
    )
    export(bundle, tmp_path / "out", "awq", tokenizer=tokenizer)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["modules_to_not_convert"] == ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj"]
    for load in (by_gptqmodel, by_transformers):
        loaded = load(tmp_path / "out", torch.float16)
        assert_same_weights(loaded, bundle)
        assert_same_outputs(loaded, model)
        assert isinstance(loaded.model.layers[0].self_attn.o_proj, torch.nn.Linear)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert loaded.generation_config.max_new_tokens == 7
    verify(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("x + y")["input_ids"] == tokenizer("x + y")["input_ids"]


@pytest.mark.consumer
def test_an_encoder(quantize: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=320, initializer_range=0.15))
    bundle = quantize(model.half().eval(), {"bits": 4}, keep={"match": ["cls.*"], "keep_float": True})
    export(bundle, tmp_path / "out", "awq")
    loaded = by_transformers(tmp_path / "out", torch.float16, type(model))
    assert_same_weights(loaded, bundle)
    assert_same_outputs(loaded, model)


# Turned red by an offset, a stride or an order of our own unpacking.
def test_our_own_unpacking_reads_the_same(
    make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(sorted(GRIDS)):
        bundle = quantize(make_model(num_hidden_layers=1, dtype=torch.float16), GRIDS[name], head=KEEP_HEAD)
        with monkeypatch.context() as patch:
            patch.setattr(Awq, "installed", lambda self: False)
            export(bundle, tmp_path / str(number), "awq")
            assert {row.reader for row in verify(tmp_path / str(number))} == {"qat"}


@pytest.mark.parametrize("name", ["int4 by tensor", "asymmetric"])
def test_step_0_is_the_file(name: str, make_model: Any, quantize: Any, tmp_path: Path) -> None:
    weight = {**GRIDS[name], "quantizer": "mse"}
    source = quantize(make_model(dtype=torch.float16, num_hidden_layers=1), weight, head=KEEP_HEAD)
    export(source, tmp_path / "out", "awq")
    model = make_model(dtype=torch.float16, num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        quantize(model, {**weight, "quantizer": "lsq"}, head=KEEP_HEAD)
        assert sorted(start_from_file(model, tmp_path / "out")) == sorted(source)
        assert torch.equal(model(IDS).logits, source.module(IDS).logits)


# By hand, from the layout in the module's docstring.
def test_golden_layer() -> None:
    codes = torch.arange(8, dtype=torch.uint8).reshape(8, 1).expand(8, 2).contiguous()
    zero = torch.arange(8, 16, dtype=torch.int16).reshape(8, 1)
    scale = torch.full((8, 1), 0.5)
    scale[3] = 2.0
    spec = QuantSpec(4, False, zero_point="int", quantizer="minmax")
    weight = QTensor(codes, scale, zero, None, spec, Layout((8, 2)), torch.float32)
    packed = Awq().pack("x.weight", weight)
    # from the lowest nibble: columns 0, 2, 4, 6, 1, 3, 5, 7
    assert packed["qweight"].tolist() == [[0x75316420], [0x75316420]]
    assert packed["qzeros"].tolist() == [[0xFDB9ECA8 - (1 << 32)]]
    assert packed["scales"].tolist() == [[0.5, 0.5, 0.5, 2.0, 0.5, 0.5, 0.5, 0.5]]
    assert packed["scales"].dtype == torch.float16 and "g_idx" not in packed
    signed = QTensor(codes.to(torch.int8) - 8, scale, None, None, QuantSpec(4), Layout((8, 2)), torch.float32)
    packed = Awq().pack("x.weight", signed)
    assert packed["qweight"].tolist() == [[0x75316420], [0x75316420]]
    assert packed["qzeros"].tolist() == [[0x88888888 - (1 << 32)]]


def test_refusals(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=64, n_positions=32)
    )
    odd = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=68, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    half = {"dtype": torch.bfloat16, "num_hidden_layers": 1}
    cases = {
        r"scale=fp16 does not fit a model in torch\.bfloat16": (make_model(**half), {"bits": 4, "scale": "fp16"}),
        r"bits=3: awq has 4; nearest: bits: 4": (make_model(), {"bits": 3}),
        r"bits=8: awq has 4; nearest: bits: 4": (make_model(), {"bits": 8}),
        r"group_size=256: gptqmodel has groups of 16, 32, 64, 128; use one of them or granularity: channel": (
            make_model(hidden_size=256, intermediate_size=256),
            {"bits": 4, "group_size": 256},
        ),
        r"awq holds quantized Linear layers, not Conv1D; add a rule": (gpt2, {"bits": 4}),
        r"proj\.weight has 68 outputs, which awq packs by 8": (
            transformers.LlamaForCausalLM(odd),
            {"bits": 4, **BY_ROW},
        ),
    }
    for words, (model, weight) in cases.items():
        bundle = quantize(model, weight, ("Linear", "Conv1D"), head={**KEEP_HEAD, "optional": True})
        with pytest.raises(ExportError, match=words):
            export(bundle, tmp_path / "out", "awq")
    down = {"match": ["*down_proj"], "weight": {"bits": 4, "granularity": "group", "group_size": 16}}
    with pytest.raises(ExportError, match=r"groups of 16, 32: awq has one group size for all layers"):
        export(quantize(make_model(), {"bits": 4}, head=KEEP_HEAD, down=down), tmp_path / "out", "awq")
    with pytest.raises(ExportError, match=r"lm_head: transformers leaves the output head of awq models in float"):
        export(quantize(make_model(), {"bits": 4}), tmp_path / "out", "awq")
    assert list(tmp_path.iterdir()) == []
