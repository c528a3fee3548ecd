"""modelopt: our own reading, layouts by hand, and its own packers and tensor classes where they are installed.

Mutations that were tried one at a time, and the test that turned red for each:

    rows of int4 paired r and r + O / 2          test_golden_layers
    weight_scale_2 stored as its inverse         test_golden_layers, test_what_is_written_reads_back
    input_scale left out                         test_what_is_written_reads_back
    a mixed checkpoint named after its first     test_configuration
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.errors import ExportError
from qat.export import export
from qat.export.formats.modelopt import ModelOpt
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor
from qat.quantizers import make_quantizer
from qat.specs import QuantSpec
from qat.verify import verify

KEEP_HEAD = {"match": ["lm_head"], "keep_float": True}
BY_ROW = {"granularity": "channel", "group_size": None}
BY_TENSOR = {"granularity": "tensor", "group_size": None}
IDS = torch.arange(24).reshape(2, 12)
TOKEN = {"grid": "e4m3", "bits": 8, "granularity": "token", "quantizer": "absmax", "scale": "fp32"}
STATIC = {"grid": "e4m3", "bits": 8, "granularity": "tensor", "quantizer": "ema"}

GRIDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "FP8": ({"grid": "e4m3", "bits": 8, **BY_TENSOR}, STATIC),
    "FP8_PER_CHANNEL_PER_TOKEN": ({"grid": "e4m3", "bits": 8, **BY_ROW}, TOKEN),
    "W8A16": ({"bits": 8, "scale": "fp32", **BY_ROW}, None),
    "W4A16_AWQ": ({"bits": 4, "scale": "fp32"}, None),
    "W4A16_NVFP4": ({"grid": "fp4", "bits": 4, "scale": "nvfp4", "group_size": 16}, None),
    "W4A16_NVFP4 portable": (
        {"grid": "fp4", "bits": 4, "scale": "nvfp4_portable", "group_size": 16, "quantizer": "lsq"},
        None,
    ),
}


def spec_of(words: dict[str, Any]) -> QuantSpec:
    words = {"granularity": "group", "group_size": 32, **words}
    return QuantSpec(**{"kind" if key == "grid" else key: value for key, value in words.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_what_is_written_reads_back(
    name: str, dtype: torch.dtype, make_model: Any, quantize: Any, tmp_path: Path
) -> None:
    weight, given = GRIDS[name]
    model = make_model(dtype=dtype, attention_bias=True, tie_word_embeddings=True)
    bundle = quantize(model, weight, input=given, seen=IDS, head=KEEP_HEAD)
    receipt = export(bundle, tmp_path / "out", "modelopt")
    rows = verify(tmp_path / "out")
    assert receipt.reader == "qat" and receipt.max_abs_diff == 0.0
    assert {row.name for row in rows} >= set(bundle)
    scales = [row for row in rows if row.name.endswith("input_scale")]
    assert len(scales) == (len(bundle) if given is STATIC else 0)
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == name.split()[0] and config["exclude_modules"] == ["lm_head"]


def test_configuration(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    down = {"match": ["*down_proj"], "weight": GRIDS["FP8"][0], "input": STATIC}
    v = {"match": ["*v_proj"], "weight": GRIDS["W8A16"][0]}
    bundle = quantize(make_model(), GRIDS["W4A16_AWQ"][0], seen=IDS, head=KEEP_HEAD, down=down, v=v)
    export(bundle, tmp_path / "out", "modelopt")
    details = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    layers = details["quantized_layers"]
    assert details["quant_algo"] == config["quant_algo"] == "MIXED_PRECISION" and len(layers) == len(bundle)
    assert layers["model.layers.0.mlp.down_proj"] == {"quant_algo": "FP8"}
    awq = {"quant_algo": "W4A16_AWQ", "group_size": 32, "has_zero_point": False, "pre_quant_scale": False}
    assert layers["model.layers.1.mlp.up_proj"] == awq
    assert config["ignore"] == ["lm_head"] and config["quant_method"] == "modelopt"
    groups = config["config_groups"].values()
    assert sorted(len(group["targets"]) for group in groups) == [2, 2, 10]
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}


# By hand, from the layout in the format's docstring.
def test_golden_layers() -> None:
    codes = torch.tensor([[0, 1, 2, 7], [-1, -2, -8, 3], [4, 5, 6, 0], [-3, -4, -5, -6]]).to(torch.int8)
    scale = torch.tensor([[0.5], [1.0], [2.0], [3.0]])
    spec = spec_of({"bits": 4, "group_size": 4, "scale": "fp32"})
    packed = ModelOpt().pack("x.weight", QTensor(codes, scale, None, None, spec, Layout((4, 4)), torch.float32))
    assert packed["weight"].tolist() == [[0xF0, 0xE1, 0x82, 0x37], [0xD4, 0xC5, 0xB6, 0xA0]]
    assert packed["weight_scale"].tolist() == scale.tolist() and set(packed) == {"weight", "weight_scale"}
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 1.0]
    w = torch.tensor([numbers]) * 448.0
    four = make_quantizer(spec_of(GRIDS["W4A16_NVFP4"][0]), Layout((1, 16))).integers(w)
    packed = ModelOpt().pack("x.weight", four)
    assert packed["weight"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x2F]]
    assert packed["weight_scale_2"].shape == () and packed["weight_scale_2"].item() == pytest.approx(1.0)
    assert packed["weight_scale"].float().tolist() == [[448.0]]
    values = torch.tensor([[448.0, -1.0]]).to(torch.float8_e4m3fn)
    eight = QTensor(values, torch.tensor([[0.5]]), None, None, spec_of(GRIDS["FP8"][0]), Layout((1, 2)), torch.float32)
    packed = ModelOpt().pack("x.weight", eight)
    assert packed["weight_scale"].shape == () and packed["weight_scale"].item() == 0.5
    assert packed["weight"].view(torch.uint8).tolist() == [[0x7E, 0xB8]]


@pytest.mark.consumer
def test_its_own_code_packs_and_decodes_the_same() -> None:
    utils = pytest.importorskip("modelopt.torch.export.quant_utils", reason="nvidia-modelopt is not installed")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    for name, (words, _) in GRIDS.items():
        spec = spec_of(words)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            quantizer = make_quantizer(spec, Layout((6, 64)))
            quantizer.init_from(w.to(dtype))
            tensor = quantizer.integers(w.to(dtype))
            packed = ModelOpt().pack("x.weight", tensor)
            trained, exact = tensor.dequantize(), tensor.dequantize(torch.float32)
            if spec.kind == "fp4":
                wrapped = NVFP4QTensor(torch.Size((6, 64)), dtype, packed["weight"])
                scales = {"scale": packed["weight_scale"], "double_scale": packed["weight_scale_2"]}
                assert torch.equal(wrapped.dequantize(dtype, **scales, block_sizes={-1: 16}), trained), name
            elif spec.bits == 4:
                assert torch.equal(utils.pack_int4_in_uint8(exact, packed["weight_scale"], 32), packed["weight"]), name
            elif name == "FP8_PER_CHANNEL_PER_TOKEN":
                theirs = utils.to_quantized_weight(exact, packed["weight_scale"], "fp8_pc_pt")
                assert torch.equal(theirs.view(torch.uint8), packed["weight"].view(torch.uint8)), name
            else:
                algo = {"FP8": "fp8", "W8A16": "int8_wo"}[name]
                found = utils.from_quantized_weight(packed["weight"], packed["weight_scale"], algo, torch.float32)
                assert torch.equal(found.to(dtype), trained), name


def test_refusals(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    def reasons(words: dict[str, Any], given: dict[str, Any] | None = None, rows: int = 4) -> str:
        spec, x = spec_of(words), None if given is None else spec_of({"group_size": None, **given})
        row = PlanRow("x", "Linear", "r", spec, x, rows * 64, {"weight": "linear"}, 64)
        return "; ".join(ModelOpt().row_reasons(row))

    for words, given in GRIDS.values():
        assert not reasons(words, given)
    fp8, tokens = GRIDS["FP8"][0], GRIDS["FP8_PER_CHANNEL_PER_TOKEN"][0]
    assert "with float inputs: modelopt has e4m3 by tensor with static e4m3 inputs" in reasons(fp8)
    assert "modelopt has" in reasons(fp8, TOKEN) and "modelopt has" in reasons(tokens, STATIC)
    assert "modelopt has" in reasons({"grid": "fp4", "bits": 4, "scale": "nvfp4_over", "group_size": 16})
    assert "modelopt has" in reasons({"bits": 3}) and "modelopt has" in reasons({"bits": 4}, TOKEN)
    assert "modelopt has" in reasons({"bits": 4, "signed": False, "zero_point": "int", "quantizer": "minmax"})
    assert "their number is odd" in reasons({"bits": 4}, rows=3)
    moving = quantize(make_model(), fp8, input={**STATIC, "quantizer": "absmax"}, seen=IDS, head=KEEP_HEAD)
    with pytest.raises(ExportError, match="scaled anew each time; FP8 has static scales: quantizer: ema"):
        export(moving, tmp_path / "out", "modelopt")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files(make_model: Any, quantize: Any, attack: Any, tmp_path: Path) -> None:
    for name, (weight, given) in GRIDS.items():
        model = make_model(dtype=torch.bfloat16, num_hidden_layers=1, intermediate_size=64)
        bundle = quantize(model, weight, input=given, seen=IDS, head=KEEP_HEAD)
        export(bundle, tmp_path / name, "modelopt")
        outcomes = attack(ModelOpt(), tmp_path / name, 4)
        assert outcomes.total() == 32 and outcomes["refused"] > 8 and outcomes["noticed"] > 4, outcomes
