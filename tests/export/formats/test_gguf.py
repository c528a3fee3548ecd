from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import qat
from qat.errors import ExportError
from qat.export import export, rehearse_export
from qat.export.gguf_model import pair_rows, unpair_rows
from qat.export.llama_cpp import LlamaCpp
from qat.scales import SCALE_GRIDS, TwoLevel
from qat.verify import verify

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("Llama", {"head_dim": 32, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}
GRIDS: dict[str, dict[str, Any]] = {
    "q4_0": {"bits": 4},
    "q4_0 narrow": {"bits": 4, "narrow": True},
    "q4_0 of 2 bits": {"bits": 2},
    "q8_0": {"bits": 8},
    "q8_0 narrow": {"bits": 8, "narrow": True},
    "q8_0 of 5 bits by channel": {"bits": 5, "granularity": "channel", "group_size": None},
    "q4_0 fp16 scales of groups of 64": {"bits": 4, "scale": "fp16", "group_size": 64},
    "q4_0 by tensor": {"bits": 4, "granularity": "tensor", "group_size": None},
}


def divergence(bundle: qat.Bundle, file: Path) -> float:
    """KL(PyTorch || llama.cpp) per position, in nats."""
    ids = torch.randint(0, 300, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = bundle.module(ids).logits.log_softmax(-1)
    with LlamaCpp(file, context=128) as llama:
        theirs = torch.stack(list(llama.log_probs(ids)))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


# Turned red by: no re-ordering of q and k (or of their biases), re-ordering for qwen2, rope factors left out.
@pytest.mark.consumer
@pytest.mark.parametrize("name", sorted(MODELS))
def test_llama_cpp_computes_the_trained_model(
    name: str, make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path
) -> None:
    kind, changes = MODELS[name]
    bundle = quantize(make_model(kind, **changes), {"bits": 8}, ("Linear", "Embedding"))
    receipt = export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert receipt.reader == f"gguf {gguf_version()}" and receipt.max_abs_diff == 0.0
    assert divergence(bundle, tmp_path / "out" / "model.gguf") < 3e-3


# Turned red by an offset of 7 for 4 bits, or by the scale of the wrong group.
@pytest.mark.consumer
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_every_grid_reads_back_equal(name: str, make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(intermediate_size=64 if "64" in name else 96)
    bundle = quantize(model, GRIDS[name], ("Linear", "Embedding"))
    export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert divergence(bundle, tmp_path / "out" / "model.gguf") < 3e-3
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    (down,) = (t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    assert down.tensor_type.name == name[:4].upper()
    seen = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    assert torch.equal(seen, bundle["model.layers.1.mlp.down_proj.weight"].dequantize())


# Turned red by: a scale searched but not stored in two levels; blocks of the type below.
@pytest.mark.consumer
@pytest.mark.parametrize("scale", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_every_k_quant_is_trained_on_and_read_back_equal(
    scale: str, make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """With learned scales that have moved; llama.cpp runs it."""
    grid = SCALE_GRIDS[scale]
    assert isinstance(grid, TwoLevel)
    words = {name: value for name, value in grid.words if name != "kind"}
    words |= {"signed_scale": dict(grid.words)["signed"], "quantizer": "lsq"}
    # llama.cpp rounds inputs in runs of 256: what that costs grows with the weights, at any bit width
    model = make_model(hidden_size=256, intermediate_size=512, initializer_range=0.06)
    bundle = quantize(model, {**words, "scale": scale}, ("Linear", "Embedding"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("theta"):
                parameter.add_(torch.randn_like(parameter) * 0.01)
    qat.weights_changed(model)
    receipt = export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert receipt.max_abs_diff == 0.0
    assert divergence(bundle, tmp_path / "out" / "model.gguf") < 3e-3
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    (down,) = (t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    assert down.tensor_type.name == scale.upper()
    seen = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    assert torch.equal(seen, bundle["model.layers.1.mlp.down_proj.weight"].dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_floats_keep_their_dtype(
    dtype: torch.dtype, make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path
) -> None:
    bundle = quantize(make_model(dtype=dtype), {"bits": 4})
    export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert kinds["output_norm.weight"] == "F32" and kinds["output.weight"] == "Q4_0"
    rows = {row.name: row for row in verify(tmp_path / "out")}
    assert rows["model.norm.weight"].dtype == str(dtype).removeprefix("torch.")
    assert rows["model.norm.weight"].spec == "float"


# Turned red by listing a float parameter under each of its names.
@pytest.mark.parametrize("quantized", [False, True])
def test_the_tied_head_is_written_once(
    quantized: bool, make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(tie_word_embeddings=True)
    types = ("Linear", "Embedding") if quantized else ("Linear",)
    rules = {} if quantized else {"head": {"match": ["lm_head"], "keep_float": True}}
    bundle = quantize(model, {"bits": 4}, types, **rules)
    export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    names = [t.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors]
    assert "output.weight" not in names and len(names) == len(set(names)) == 20
    assert "model.embed_tokens.weight" in {row.name for row in verify(tmp_path / "out")}


# The trained weight is compared, not what was packed: turned red by `records` taken from the packed tensor.
def test_a_packer_that_changes_a_weight_is_caught(
    bundle: qat.Bundle, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qat.export import ggml_blocks

    real = ggml_blocks.encode_blocks

    def flips_a_code(kind: str, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        codes = codes.clone()
        codes[3, 5] ^= 1
        return real(kind, codes, scale)

    monkeypatch.setattr(ggml_blocks, "encode_blocks", flips_a_code)
    with pytest.raises(ExportError, match=r"is not the trained weight \(largest difference 0\.\d"):
        export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExportError, match="is not the trained weight"):
        rehearse_export(bundle, "gguf", tokenizer)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("Mistral", {"head_dim": 16, "sliding_window": 16}, "sliding_window=16"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("Llama", {"rope_parameters": {**LLAMA3, "rope_type": "dynamic"}}, "rope type 'dynamic'"),
        ("Gemma", {"head_dim": 16, "tie_word_embeddings": False}, "not for gemma; use compressed-tensors"),
    ],
)
def test_models_that_do_not_fit(
    kind: str, changes: dict[str, Any], words: str, make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path
) -> None:
    bundle = quantize(make_model(kind, **changes), {"bits": 4})
    with pytest.raises(ExportError, match=words):
        export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_all_reasons_at_once(quantize: Callable[..., qat.Bundle], tmp_path: Path) -> None:
    bundle = quantize(torch.nn.Sequential(torch.nn.Linear(48, 8)), {"bits": 4, "group_size": 16, "scale": "fp32"})
    with pytest.raises(ExportError) as caught:
        export(bundle, tmp_path / "out", "gguf")
    for words in ("group_size=16", "scale=fp32", "has no transformers config"):
        assert words in str(caught.value)


def test_pairing_rows_by_hand() -> None:
    rows = torch.arange(8).reshape(8, 1)  # two heads of four rows: halves (0, 1 | 2, 3) and (4, 5 | 6, 7)
    paired = pair_rows(rows, 2)
    assert paired.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(unpair_rows(paired, 2), rows)
    assert pair_rows(rows.flatten(), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")
