"""Wrong checkpoints, folders to export to, exports to verify and runs to report."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tiny import Bomb, copied, make_llama, make_tokenizer

Refused = Callable[..., str]

# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_checkpoint_that_is_none(export: Refused, tmp_path: Path, checkpoint: Path) -> None:
    export("no.ckpt", says=("no.ckpt", "no checkpoint"))
    export(tmp_path, says=(str(tmp_path), "no checkpoint"))
    file = tmp_path / "x.ckpt"
    for content in (b"", b"text", checkpoint.read_bytes()[:-2000], checkpoint.read_bytes()[:100]):
        file.write_bytes(content)
        export(file, says=(str(file), "is not a checkpoint"))


def test_checkpoint_that_runs_code(export: Refused, tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    torch.save({"state_dict": Bomb()}, file)
    export(file, says=(str(file), "without running code"))
    file.write_bytes(pickle.dumps(Bomb()))
    export(file, says=(str(file), "without running code"))
    assert not (tmp_path / "unpickled").exists()


def test_checkpoint_of_something_else(export: Refused, tmp_path: Path, llama: Path) -> None:
    from qat.hf import load_model

    file = tmp_path / "x.ckpt"
    torch.save([1, 2], file)
    export(file, says=(str(file), "no state dict but a list"))
    torch.save({"state_dict": 3}, file)
    export(file, says=(str(file), "no state dict but a int"))
    torch.save({"state_dict": {f"model.{k}": v for k, v in load_model(llama).state_dict().items()}}, file)
    export(file, says="no quantization record")


def test_checkpoint_of_another_model(export: Refused, tmp_path: Path, checkpoint: Path, llama: Path) -> None:
    deeper, wider, other = tmp_path / "deeper", tmp_path / "wider", tmp_path / "other"
    make_llama(deeper, make_tokenizer(deeper), num_hidden_layers=3)
    export(checkpoint, model=deeper, says=("last.ckpt", "model.layers.2"))
    make_llama(wider, make_tokenizer(wider), hidden_size=128)
    export(checkpoint, model=wider, says=("last.ckpt", "does not fit"))
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=99)).save_pretrained(other)
    export(checkpoint, model=other, says=("last.ckpt", "transformer.wte.weight"))
    smaller = tmp_path / "smaller"
    make_llama(smaller, make_tokenizer(smaller), num_hidden_layers=1)
    export(checkpoint, model=smaller, says=("last.ckpt", "model.layers.1"))


def test_checkpoint_with_a_damaged_record(export: Refused, tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "x.ckpt"
    entries = torch.load(checkpoint, weights_only=True)["state_dict"]
    key = next(key for key in entries if key.endswith("qat_state._extra_state"))
    entries[key] = entries[key][:50]
    torch.save({"state_dict": entries}, file)
    export(file, says=("record", "damaged"))


def test_checkpoint_that_diverged(export: Refused, tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "x.ckpt"
    entries = torch.load(checkpoint, weights_only=True)["state_dict"]
    entries["model.lm_head.weight"][0, 0] = float("nan")
    torch.save({"state_dict": entries}, file)
    export(file, says=("lm_head.weight", "not finite"))


def test_checkpoint_before_the_quantization_is_on(
    export: Refused, tmp_path: Path, llama: Path, recipe_file: Path
) -> None:
    import qat
    from qat.hf import load_model
    from qat.recipes import load_recipe

    model = load_model(llama)
    late = "phases={float: {steps: 10, quantize: false}, qat: {steps: -1}}"
    qat.prepare(model, load_recipe(recipe_file, [late]))
    file = tmp_path / "x.ckpt"
    torch.save(model.state_dict(), file)
    export(file, says=("step 0", "step 10"))


# ---- export folders ------------------------------------------------------------------------------------------------


def test_unknown_format(export: Refused, checkpoint: Path) -> None:
    export(checkpoint, "--format", "guff", says=("guff", "gguf", "compressed-tensors"))


def test_gguf_needs_a_tokenizer(export: Refused, tmp_path: Path, checkpoint: Path, llama: Path) -> None:
    bare = copied(llama, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    export(checkpoint, model=bare, says=("gguf cannot hold", "tokenizer"))
    export(checkpoint, "--tokenizer", bare, says=(str(bare), "no tokenizer"))
    (bare / "tokenizer.json").write_text("{")
    export(checkpoint, "--tokenizer", bare, says=("tokenizer", str(bare)))


def test_export_folder_is_in_the_way(export: Refused, tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    export(checkpoint, says=(str(out),))
    export(checkpoint, "--overwrite", says=(str(out),))
    assert (out / "thesis.tex").read_text() == "mine"
    shutil.rmtree(out)
    out.write_text("a file")
    export(checkpoint, says=(str(out),))


def test_export_folder_cannot_be_made(refused: Refused, tmp_path: Path, checkpoint: Path, llama: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    refused("export", checkpoint, "--model", llama, "--out", out, says=str(tmp_path / "file"))
    if sys.platform == "linux":
        refused("export", checkpoint, "--model", llama, "--out", "/proc/packed", says="/proc")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_export_folder_is_not_writable(refused: Refused, tmp_path: Path, checkpoint: Path, llama: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused("export", checkpoint, "--model", llama, "--out", locked / "out", says=str(locked))


def test_model_that_the_format_does_not_know(refused: Refused, tmp_path: Path) -> None:
    """GGUF names tensors by architecture: one that llama.cpp's converter does not have cannot be written."""
    from transformers import ResNetConfig, ResNetModel

    import qat
    from qat.recipes import load_recipe

    folder = tmp_path / "resnet"
    model = ResNetModel(ResNetConfig(embedding_size=32, hidden_sizes=[32], depths=[1]))
    model.save_pretrained(folder)
    qat.prepare(model, load_recipe("cnn_w4a4", ["rules.layers.input=null"]))
    torch.save(model.state_dict(), tmp_path / "x.ckpt")
    command = ("export", tmp_path / "x.ckpt", "--model", folder, "--out", tmp_path / "out")
    refused(*command, says=("0 export targets", "--format"))
    refused(*command, "--format", "gguf", says="gguf cannot hold this model")


# ---- verify --------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(exported: Path, tmp_path: Path) -> Path:
    return copied(exported, tmp_path / "packed")


def test_verify_what_is_no_export(refused: Refused, tmp_path: Path) -> None:
    refused("verify", "no", says="no folder no")
    refused("verify", tmp_path, says=("qat_receipt.json", str(tmp_path)))


def test_verify_tampered(refused: Refused, packed: Path) -> None:
    file = packed / "model.gguf"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    refused("verify", packed, says=("model.gguf",))


def test_verify_cut_short(refused: Refused, packed: Path) -> None:
    file = packed / "model.gguf"
    file.write_bytes(file.read_bytes()[:-100])
    refused("verify", packed, says=("model.gguf",))


def test_verify_missing(refused: Refused, packed: Path) -> None:
    (packed / "model.gguf").unlink()
    refused("verify", packed, says=("model.gguf",))


def forged(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "qat_receipt.json"
    receipt = json.loads(file.read_text())
    change(receipt)
    file.write_text(json.dumps(receipt))


RECEIPTS: list[tuple[str, Callable[[dict[str, Any]], Any], tuple[str, ...]]] = [
    ("hash of a tensor", lambda r: r["tensors"][0].update(sha256="0" * 64), ("not the trained weight",)),
    ("a tensor too many", lambda r: r["tensors"].append({**r["tensors"][0], "name": "x"}), ("x", "not in the files")),
    ("a tensor less", lambda r: r["tensors"].pop(), ("not in the receipt",)),
    ("shape", lambda r: r["tensors"][0].update(shape=[1]), ("shape",)),
    ("file outside", lambda r: r["files"][0].update(name="../../x"), ("outside",)),
    ("unknown format", lambda r: r.update(format="guff"), ("guff",)),
    ("other version", lambda r: r.update(version=99), ("version 99",)),
    ("missing entry", lambda r: r.pop("tensors"), ("qat_receipt.json",)),
    ("not a dtype", lambda r: r["tensors"][0].update(dtype="nn"), ("qat_receipt.json", "dtype")),
    ("impossible spec", lambda r: r["tensors"][0]["spec"].update(bits=40), ("bits",)),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in RECEIPTS], ids=[case[0] for case in RECEIPTS])
def test_verify_forged_receipt(
    refused: Refused, packed: Path, change: Callable[[dict[str, Any]], Any], says: tuple[str, ...]
) -> None:
    forged(packed, change)
    refused("verify", packed, says=says)


def test_verify_receipt_that_is_no_json(refused: Refused, packed: Path) -> None:
    for text in ("", "{", "[]", "null"):
        (packed / "qat_receipt.json").write_text(text)
        refused("verify", packed, says="qat_receipt.json")
    (packed / "qat_receipt.json").unlink()
    refused("verify", packed, says="qat_receipt.json")


# ---- report --------------------------------------------------------------------------------------------------------


def test_report_of_nothing(refused: Refused, tmp_path: Path) -> None:
    refused("report", "no", says="no")
    refused("report", tmp_path, says=str(tmp_path))


def test_report_of_damaged_results(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("results.json", "report.json"):
        (folder / name).write_text("{")
    refused("report", folder, says=str(folder))
