from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

import qat
from qat.errors import ExportError, QATError
from qat.export import export, get_format, rehearse_export
from qat.export.formats.gguf import Gguf
from qat.export.hf_folder import ShardWriter, write_config
from qat.verify import verify


def test_a_prepared_model_and_a_bundle_give_the_same_file(bundle: qat.Bundle, tokenizer: Any, tmp_path: Path) -> None:
    one = export(bundle, tmp_path / "one", "gguf", tokenizer=tokenizer, weights="best")
    two = export(bundle.module, tmp_path / "two", "gguf", tokenizer=tokenizer)
    assert one.files == two.files and one.tensors == two.tensors
    assert (one.weights, two.weights) == ("best", "last")
    assert sorted(os.listdir(tmp_path / "one")) == ["model.gguf", "qat_receipt.json"]


def test_the_receipt_hashes_the_weight_of_the_forward(bundle: qat.Bundle, tokenizer: Any, tmp_path: Path) -> None:
    receipt = export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    hashes = {record.name: record.sha256 for record in receipt.tensors}
    for name in bundle:
        layer = bundle.module.get_submodule(name.rpartition(".")[0])
        from qat.qtensor import tensor_sha256

        assert hashes[name] == tensor_sha256(layer.weight_quantizer(layer.weight)), name


# Turned red by writing into the target itself.
def test_an_exception_in_the_middle_leaves_nothing(
    bundle: qat.Bundle, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = Gguf._parts, []

    def fails_later(self: Gguf, *args: Any) -> Any:
        seen.append(1)
        if len(seen) == 7:
            raise RuntimeError("the disk caught fire")
        return real(self, *args)

    monkeypatch.setattr(Gguf, "_parts", fails_later)
    with pytest.raises(RuntimeError, match="caught fire"):
        export(bundle, tmp_path / "a" / "out", "gguf", tokenizer=tokenizer)
    assert len(seen) == 7 and list(tmp_path.iterdir()) == []


def test_one_pass_one_tensor_at_a_time(bundle: qat.Bundle, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[str] = []
    real = qat.Bundle.__getitem__
    monkeypatch.setattr(qat.Bundle, "__getitem__", lambda self, name: asked.append(name) or real(self, name))
    export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert asked == list(bundle)


def test_what_is_in_the_way(bundle: qat.Bundle, tokenizer: Any, tmp_path: Path) -> None:
    export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    with pytest.raises(ExportError, match="is not empty"):
        export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer, overwrite=True)
    assert len(verify(tmp_path / "out")) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("limit", [1, 10**9], ids=["shards", "one file"])
def test_weights_are_as_readable_as_their_neighbours(tmp_path: Path, limit: int) -> None:
    # mutation: no chmod after save_file -> red, 0600 beside 0644
    (tmp_path / "neighbour").write_text("")
    writer = ShardWriter(tmp_path, limit)
    for name in "ab":
        writer.add({name: torch.zeros(4)})
    writer.close()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LINEAR = {"rope_type": "linear", "factor": 8.0}


# Turned red by any key that is not written, and by `rope_scaling` for a Gemma 3 without its own branch.
@pytest.mark.parametrize(
    ("kind", "changes", "older"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ("Llama", {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        # an older file: a config keeps both names of the type, of which exllamav2 takes one
        (
            "Llama",
            {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 8.0}},
            {"rope_theta": 2e4, "rope_scaling": LINEAR},
        ),
        (
            "Phi3",
            {"rope_parameters": {"rope_theta": 1e4, **LONG}, "original_max_position_embeddings": 64},
            {
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "rope_scaling": {**LONG, "original_max_position_embeddings": 64},
            },
        ),
        (
            "Glm",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
        ),
        (
            "Gemma3Text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 2e6, **LINEAR},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
                }
            },
            {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},
        ),
        # kinds of layers that never had older names
        ("ModernBertDecoder", {}, {}),
    ],
)
def test_rotary_settings_have_their_older_names_too(
    kind: str, changes: dict[str, Any], older: dict[str, Any], make_model: Any, tmp_path: Path
) -> None:
    model = make_model(kind, **{"pad_token_id": 0, "head_dim": 16, **changes})
    write_config(tmp_path, model, {"quant_method": "none"})
    found = json.loads((tmp_path / "config.json").read_text())
    names = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
    assert {key: found[key] for key in names if key in found} == older
    assert kind != "Phi3" or found["original_max_position_embeddings"] == 64
    again = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    theirs, ours = (json.loads(json.dumps(rope)) for rope in (again, model.config.rope_parameters))
    ours.pop("type", None)
    assert theirs == ours


def test_wrong_arguments(bundle: qat.Bundle, tmp_path: Path) -> None:
    with pytest.raises(QATError, match="format='safetensors' is unknown"):
        export(bundle, tmp_path / "out", "safetensors")
    with pytest.raises(ExportError, match="weights='first' is unknown; use one of last, best, ema"):
        export(bundle, tmp_path / "out", "gguf", weights="first")
    with pytest.raises(QATError, match="not prepared"):
        export(torch.nn.Linear(2, 2), tmp_path / "out", "gguf")
    with pytest.raises(ExportError, match=r"gguf cannot hold this model: llama\.cpp needs the tokenizer"):
        export(bundle, tmp_path / "out", "gguf")


def test_a_rehearsal_leaves_nothing(
    bundle: qat.Bundle, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    receipt = rehearse_export(bundle, "gguf", tokenizer)
    assert len(receipt.tensors) == 20 and list(tmp_path.iterdir()) == []


def test_a_reader_that_differs_is_caught(
    bundle: qat.Bundle, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Gguf.read

    def off_by_little(self: Gguf, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in real(self, folder):
            weight.view(-1)[0] += 1e-3
            yield name, weight

    monkeypatch.setattr(Gguf, "read", off_by_little)
    with pytest.raises(ExportError, match=r"largest difference 0.001\)"):
        export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_alone_is_enough_for_the_grids(bundle: qat.Bundle) -> None:
    assert get_format("gguf").check(bundle.plan) == []
    assert any("not Embedding" in reason for reason in get_format("compressed-tensors").check(bundle.plan))


def _rank(rank: int, port: int, folder: str) -> None:
    """Both ranks export; then a failure on rank 0 must reach both."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    import transformers

    from qat.recipes import from_dict

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    rules = {"all": {"types": ["Linear"], "weight": {"bits": 4}}, "head": {"match": ["lm_head"], "keep_float": True}}
    qat.prepare(model, from_dict({"name": "small", "rules": rules, "phases": {"qat": {"steps": -1}}}))
    bundle = qat.convert(model)
    receipt = export(bundle, Path(folder) / "out", "compressed-tensors")
    assert len(verify(Path(folder) / "out")) == len(receipt.tensors) == 12
    try:
        export(bundle, Path(folder) / "out", "compressed-tensors")
    except ExportError as problem:
        assert "is not empty" in str(problem)
        (Path(folder) / f"refused{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


# Turned red by draining before the broadcast only on success, or by refusing on rank 0 before the ranks meet.
@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    port = 29500 + os.getpid() % 2000
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "refused0", "refused1"]
