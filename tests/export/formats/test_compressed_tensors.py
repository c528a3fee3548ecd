from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qat
from qat.errors import ExportError
from qat.export import export
from qat.export.formats.compressed_tensors import CompressedTensors
from qat.layout import Layout
from qat.qtensor import QTensor
from qat.specs import QuantSpec
from qat.verify import verify

KEEP_HEAD = {"match": ["lm_head"], "keep_float": True}
BY_ROW = {"granularity": "channel", "group_size": None}
DYNAMIC = {"bits": 8, "granularity": "token", "quantizer": "absmax", "scale": "fp32"}
STATIC = {"bits": 8, "granularity": "tensor", "quantizer": "ema"}
ASYMMETRIC = {"zero_point": "int", "quantizer": "minmax"}

GRIDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "int1": ({"bits": 1, "quantizer": "mse"}, None),
    "int2": ({"bits": 2}, None),
    "int2 ternary": ({"bits": 2, "narrow": True}, None),
    "int3": ({"bits": 3}, None),
    "int4": ({"bits": 4}, None),
    "int4 by row": ({"bits": 4, **BY_ROW}, None),
    "int5": ({"bits": 5}, None),
    "int8": ({"bits": 8}, None),
    "int8 by tensor": ({"bits": 8, "granularity": "tensor", "group_size": None}, None),
    "w8a8 dynamic": ({"bits": 8, **BY_ROW}, DYNAMIC),
    "w8a8 static": ({"bits": 8, **BY_ROW}, STATIC),
    "w8a8 static with a zero point": ({"bits": 8, **BY_ROW}, {**STATIC, "zero_point": "int"}),
    "w4a8": ({"bits": 4}, DYNAMIC),
    "asymmetric int4": ({"bits": 4, **ASYMMETRIC}, None),
    "asymmetric int8 by tensor": ({"bits": 8, "granularity": "tensor", "group_size": None, **ASYMMETRIC}, None),
}


def load(folder: Path, dequantize: bool = False) -> Any:
    """The folder as transformers loads it, with its weights unpacked (it does so in the first forward)."""
    config = transformers.CompressedTensorsConfig(dequantize=True) if dequantize else None
    options = {} if config is None else {"quantization_config": config}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        loaded(torch.tensor([[1, 2, 3]]))
    return loaded


def assert_same_weights(loaded: Any, bundle: qat.Bundle) -> None:
    state = loaded.state_dict()
    for name, trained in bundle.items():
        assert torch.equal(state[name], trained.dequantize()), name
    for name, value in bundle.floats.items():
        assert torch.equal(state[name], value), name


# Turned red by: the offset 2^(b-1) left out for signed codes, zero points packed along the row, int-quantized written
# for weight-only, a group without `format`, `lm_head` missing from `ignore`.
@pytest.mark.consumer
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_transformers_loads_the_trained_weights(
    name: str, make_model: Any, quantize: Any, tmp_path: Path, ran: Any
) -> None:
    weight, given = GRIDS[name]
    model = make_model()
    ids = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(1))
    bundle = quantize(model, weight, input=given, seen=ids, head=KEEP_HEAD)
    receipt = export(bundle, tmp_path / "out", "compressed-tensors")
    assert receipt.reader.startswith("compressed-tensors 0.") and receipt.max_abs_diff == 0.0
    loaded = load(tmp_path / "out", dequantize="asymmetric" in name)
    assert_same_weights(loaded, bundle)
    with torch.no_grad():
        ours, theirs = model(ids).logits, loaded(ids).logits
    ran("compressed-tensors", "transformers", f"Llama, {name}", logits=(ours - theirs).abs().max())
    if given is DYNAMIC:
        # compressed-tensors divides by the scale where we multiply by its reciprocal: now and then a code of an input
        # (never of a weight) is one off
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0.1 * float(ours.abs().max()))
    else:
        assert torch.equal(theirs, ours)
    assert loaded.generate(ids[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


@pytest.mark.consumer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(dtype: torch.dtype, make_model: Any, quantize: Any, tmp_path: Path) -> None:
    bundle = quantize(make_model(dtype=dtype), {"bits": 4}, head=KEEP_HEAD)
    export(bundle, tmp_path / "out", "compressed-tensors")
    loaded = load(tmp_path / "out")
    assert loaded.dtype == dtype
    assert_same_weights(loaded, bundle)


@pytest.mark.consumer
@pytest.mark.parametrize("tied", [False, True])
def test_mixed_grids_in_one_model(tied: bool, make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path) -> None:
    bundle = quantize(
        make_model(tie_word_embeddings=tied),
        {"bits": 4},
        head=KEEP_HEAD,
        down={"match": ["*down_proj"], "weight": {"bits": 8, **BY_ROW, "quantizer": "absmax"}},
        v={"match": ["*v_proj"], "weight": {"bits": 8, **BY_ROW, "quantizer": "absmax"}, "input": DYNAMIC},
        o={"match": ["*.0.*o_proj"], "keep_float": True},
    )
    export(bundle, tmp_path / "out", "compressed-tensors", tokenizer=tokenizer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert sorted(config["ignore"]) == ["lm_head", "model.layers.0.self_attn.o_proj"]
    loaded = load(tmp_path / "out")
    assert_same_weights(loaded, bundle)
    assert isinstance(loaded.model.layers[0].self_attn.o_proj.weight, torch.Tensor)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("x + y")["input_ids"] == tokenizer("x + y")["input_ids"]


ENCODER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("BertConfig", {**ENCODER, "vocab_size": 64}),
    "ViTForImageClassification": ("ViTConfig", {**ENCODER, "image_size": 16, "patch_size": 8}),
    "MixtralForCausalLM": ("MixtralConfig", {**ENCODER, "num_key_value_heads": 2, "vocab_size": 64}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64},
    ),
}


@pytest.mark.consumer
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_architectures(name: str, quantize: Any, tmp_path: Path) -> None:
    from compressed_tensors.compressors import decompress_module

    config, sizes = OTHERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    keep = {"match": ["*lm_head", "classifier"], "keep_float": True, "optional": True}
    bundle = quantize(model, {"bits": 4}, keep=keep)
    export(bundle, tmp_path / "out", "compressed-tensors")
    # T5 initializes itself through weights that a packed layer does not have
    options: dict[str, Any] = {}
    if name.startswith("T5"):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = type(model).from_pretrained(tmp_path / "out", **options)
    for module in loaded.modules():
        decompress_module(module)
    assert_same_weights(loaded, bundle)


def test_a_model_inside_another_module(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()
            self.probe = torch.nn.Linear(64, 2)

    bundle = quantize(Wrapper(), {"bits": 4}, head={"match": ["*lm_head", "probe"], "keep_float": True})
    export(bundle, tmp_path / "out", "compressed-tensors")
    names = {row.name for row in verify(tmp_path / "out")}
    assert "model.layers.0.mlp.up_proj.weight" in names and not any("probe" in name for name in names)
    outside = quantize(Wrapper(), {"bits": 4}, head={"match": ["*lm_head"], "keep_float": True})
    with pytest.raises(ExportError, match="probe: outside the transformers model"):
        export(outside, tmp_path / "other", "compressed-tensors")


# Turned red by writing every tensor into the first shard's name, or by an index that forgets a shard.
@pytest.mark.consumer
def test_shards(make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompressedTensors, "shard_bytes", 30_000)
    bundle = quantize(make_model(), {"bits": 4}, head=KEEP_HEAD)
    export(bundle, tmp_path / "out", "compressed-tensors")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_same_weights(load(tmp_path / "out"), bundle)
    verify(tmp_path / "out")


# Turned red by an offset or a stride of our own unpacking.
def test_our_own_unpacking_reads_the_same(
    make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(sorted(GRIDS)):
        weight, given = GRIDS[name]
        model = make_model(num_hidden_layers=1)
        bundle = quantize(model, weight, input=given, seen=torch.arange(20).reshape(2, 10), head=KEEP_HEAD)
        export(bundle, tmp_path / str(number), "compressed-tensors")
        with monkeypatch.context() as patch:
            patch.setattr(CompressedTensors, "installed", lambda self: False)
            assert {row.reader for row in verify(tmp_path / str(number))} == {"qat"}


# Turned red by the error told as damage of the file.
def test_a_package_that_cannot_be_imported_is_no_damaged_file(
    make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    export(quantize(make_model(num_hidden_layers=1), {}, head=KEEP_HEAD), tmp_path / "out", "compressed-tensors")
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors", None)
    with pytest.raises(ExportError) as problem:
        verify(tmp_path / "out")
    assert re.search(r"compressed-tensors [\d.]+\S*, which reads it, is installed but cannot be", str(problem.value))
    assert "pip install -U compressed-tensors" in str(problem.value) and "decoded" not in str(problem.value)


# By hand, from the layout in the module's docstring. Turned red by a zero point packed along the row.
def test_golden_layer() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    zero = torch.tensor([[1], [2]], dtype=torch.int16)
    spec = QuantSpec(bits=2, signed=False, zero_point="int", quantizer="minmax")
    weight = QTensor(codes, torch.tensor([[0.5], [2.0]]), zero, None, spec, Layout((2, 4)), torch.float32)
    packed = CompressedTensors().pack("x.weight", weight)
    assert packed["weight_packed"].tolist() == [[0b11100100], [0b00011011]]
    assert packed["weight_zero_point"].tolist() == [[0b1001]]
    assert packed["weight_scale"].tolist() == [[0.5], [2.0]] and packed["weight_shape"].tolist() == [2, 4]
    signed = QuantSpec(bits=2)
    weight = QTensor(codes.to(torch.int8) - 2, weight.scale, None, None, signed, Layout((2, 4)), torch.float32)
    packed = CompressedTensors().pack("x.weight", weight)
    assert packed["weight_packed"].tolist() == [[0b11100100], [0b00011011]] and "weight_zero_point" not in packed
    packed = CompressedTensors().pack("x.weight", weight, "int-quantized")
    assert packed["weight"].tolist() == [[-2, -1, 0, 1], [1, 0, -1, -2]] and "weight_packed" not in packed


IDS = torch.arange(20).reshape(2, 10)
BY_ROW_8 = {"bits": 8, **BY_ROW, "quantizer": "absmax"}


# Turned red by leaving the inputs out of the check of dtypes: the file holds another scale than was trained.
def test_an_input_scale_that_the_file_would_round_is_refused(
    make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = make_model(dtype=torch.bfloat16, num_hidden_layers=1)
    bundle = quantize(half, BY_ROW_8, input={**STATIC, "scale": "fp32"}, seen=IDS, head=KEEP_HEAD)
    with pytest.raises(ExportError, match=r"input scale=fp32 of model\.layers\.0\.\S+ does not fit .*bfloat16"):
        export(bundle, tmp_path / "out", "compressed-tensors")
    monkeypatch.setattr(CompressedTensors, "model_reasons", lambda *_: [])
    with pytest.raises(ExportError, match=r"its input scale stored in .* would be rounded"):
        export(bundle, tmp_path / "out", "compressed-tensors")


# Turned red by a `read` that drops `input_*`, or by ranges without records.
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_static_input_ranges_are_recorded_and_read_back(
    half: bool, make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(dtype=torch.bfloat16 if half else torch.float32, num_hidden_layers=1)
    bundle = quantize(model, BY_ROW_8, input={**STATIC, "zero_point": "int"}, seen=IDS, head=KEEP_HEAD)
    receipt = export(bundle, tmp_path / "out", "compressed-tensors")
    ranges = {name for name in (t.name for t in receipt.tensors) if name.endswith(("input_scale", "input_zero_point"))}
    assert ranges == {f"{layer}.{key}" for layer in bundle.inputs for key in ("input_scale", "input_zero_point")}
    assert ranges < {row.name for row in verify(tmp_path / "out")}
    writer = sys.modules[CompressedTensors.__module__]
    real = writer._static_input
    for key, wrong in (("input_scale", lambda t: t * 100), ("input_zero_point", lambda t: t + 1)):

        def off(*args: Any, key: str = key, wrong: Any = wrong) -> dict[str, torch.Tensor]:
            found = real(*args)
            return {**found, key: wrong(found[key])} if found else found

        monkeypatch.setattr(writer, "_static_input", off)
        with pytest.raises(ExportError, match=rf"\.{key} read back .* is not the trained value \(largest"):
            export(bundle, tmp_path / "other", "compressed-tensors")


# Turned red by no check of the floats' dtypes: config.json says bfloat16, and the loaded norms are rounded.
@pytest.mark.consumer
def test_mixed_dtypes_are_refused_and_one_dtype_loads(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    def mixed() -> Any:
        model = make_model(num_hidden_layers=1)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        return model

    words = r"embed_tokens.weight is torch.bfloat16 but .*norm.weight is torch.float32.*model\.to\(torch.bfloat16\)"
    with pytest.raises(ExportError, match=words):
        export(quantize(mixed(), {"bits": 4}, head=KEEP_HEAD), tmp_path / "out", "compressed-tensors")
    bundle = quantize(mixed().to(torch.bfloat16), {"bits": 4}, head=KEEP_HEAD)
    export(bundle, tmp_path / "out", "compressed-tensors")
    loaded = load(tmp_path / "out")
    assert_same_weights(loaded, bundle)
    assert all(loaded.state_dict()[name].dtype == value.dtype for name, value in bundle.floats.items())


# Turned red by comparing the floats alone: transformers would load bf16 layers in fp32, without their last rounding.
def test_layers_of_another_dtype_are_refused(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=1)
    model.model.layers[0].mlp.to(torch.bfloat16)
    with pytest.raises(ExportError, match=r"torch.float32 but model\.layers\.0\.mlp\.\S+ is torch.bfloat16"):
        export(quantize(model, {"bits": 4}, head=KEEP_HEAD), tmp_path / "out", "compressed-tensors")


def test_refusals(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    down = {"match": ["*down_proj"], "weight": {"bits": 8, **BY_ROW, **ASYMMETRIC}}
    cases = {
        "grids with a zero point beside other grids": quantize(make_model(), {"bits": 4}, head=KEEP_HEAD, down=down),
        "scale=fp32 does not fit a model in torch.bfloat16": quantize(
            make_model(dtype=torch.bfloat16), {"bits": 4, "scale": "fp32"}, head=KEEP_HEAD
        ),
        "cast it to float32": quantize(make_model(dtype=torch.float64), {"bits": 4}, head=KEEP_HEAD),
        "model.embed_tokens: .*not Embedding; add a rule": quantize(make_model(), {"bits": 4}, ("Linear", "Embedding")),
        "has no transformers config": quantize(torch.nn.Sequential(torch.nn.Linear(32, 4)), {"bits": 4}),
    }
    for words, bundle in cases.items():
        with pytest.raises(ExportError, match=words):
            export(bundle, tmp_path / "out", "compressed-tensors")
    assert list(tmp_path.iterdir()) == []
