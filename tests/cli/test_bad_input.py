"""Wrong models, data and training settings: exit code 2, one sentence, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tiny import Bomb, check_refusal, copied, edited, listing, make_llama, make_tokenizer

Refused = Callable[..., str]

# ---- model folders -------------------------------------------------------------------------------------------------


def test_model_that_does_not_exist(refused: Refused, tmp_path: Path, recipe_file: Path) -> None:
    refused("plan", recipe_file, "--model", "meta/llama", says=("meta/llama", "does not exist"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    refused("plan", recipe_file, "--model", file, says=(str(file), "is a file"))


def test_model_folder_without_config(refused: Refused, tmp_path: Path, recipe_file: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("plan", recipe_file, "--model", empty, says=(str(empty), "config.json"))


CONFIGS: list[tuple[str, str | dict[str, Any], tuple[str, ...]]] = [
    ("cut short", '{"model_type": "lla', ("config.json", "JSON")),
    ("binary", "\x00\x01\x02", ("config.json", "JSON")),
    ("a list", "[1, 2]", ("config.json", "model_type")),
    ("no model type", {"model_type": None}, ("config.json", "model_type")),
    ("unknown model type", {"model_type": "lama"}, ("config.json", "lama", "unknown")),
    (
        "code of its own",
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
        ("config.json", "mine", "is not run"),
    ),
    ("hidden size that is text", {"hidden_size": "many"}, ("config.json",)),
    ("heads that do not divide", {"num_attention_heads": 7, "head_dim": None}, ("config.json",)),
]


@pytest.mark.parametrize(("config", "says"), [case[1:] for case in CONFIGS], ids=[case[0] for case in CONFIGS])
def test_model_config(
    refused: Refused, tmp_path: Path, llama: Path, recipe_file: Path, config: Any, says: tuple[str, ...]
) -> None:
    folder = copied(llama, tmp_path / "model")
    if isinstance(config, str):
        (folder / "config.json").write_text(config)
    else:
        edited(folder, **config)
    refused("plan", recipe_file, "--model", folder, says=says)


def test_weights_cut_short(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    train(f"train.model={folder}", f"train.data=[{data}]", says=(str(file), "not a whole safetensors file"))


def test_weights_corrupted(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    train(f"train.model={folder}", f"train.data=[{data}]", says=(str(file), "not a whole safetensors file"))


def test_weights_missing(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    train(f"train.model={folder}", f"train.data=[{data}]", says=("model.safetensors", "do not exist"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}))
    train(f"train.model={folder}", f"train.data=[{data}]", says=("model-1-of-2.safetensors", "do not exist"))
    index.write_text("{}")
    train(f"train.model={folder}", f"train.data=[{data}]", says=(str(index), "weight_map"))


def test_weights_incomplete(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    train(f"train.model={folder}", f"train.data=[{data}]", says=("model.layers.1.mlp.up_proj.weight", "at random"))


def test_weights_of_another_shape(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    edited(folder, intermediate_size=160)
    train(f"train.model={folder}", f"train.data=[{data}]", says=(str(folder),))


def test_pickled_weights_are_not_read(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, folder / "pytorch_model.bin")
    train(f"train.model={folder}", f"train.data=[{data}]", says=("pytorch_model.bin", "pickle"))
    assert not (tmp_path / "unpickled").exists()


# ---- data ----------------------------------------------------------------------------------------------------------


def test_data_that_does_not_exist(train: Refused, tmp_path: Path) -> None:
    train("train.data=[no.txt]", says=("train.data", "no.txt", "does not exist"))
    train(says=("train.data", "empty"))
    (tmp_path / "nothing").mkdir()
    train("train.data=[nothing]", says=("train.data", "nothing"))
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    train("train.data=[x.xlsx]", says=("x.xlsx", ".jsonl"))


DATA: list[tuple[str, str, bytes, tuple[str, ...]]] = [
    ("empty text", "d.txt", b"", ("empty",)),
    ("short text", "d.txt", b"a", ("train.seq_len=16",)),
    ("text that is not UTF-8", "d.txt", b"\xff\xfe\x00" * 99, ("d.txt", "UTF-8")),
    ("empty jsonl", "d.jsonl", b"", ("d.jsonl",)),
    ("jsonl without the key", "d.jsonl", b'{"body": "text"}\n' * 9, ("train.text_key='text'", "'body'")),
    ("jsonl with another type", "d.jsonl", b'{"text": 3}\n' * 9, ("train.text_key='text'", "int")),
    (
        "malformed jsonl line",
        "d.jsonl",
        b'{"text": "a"}\n' * 2 + b'{"text": \n' + b'{"text": "b"}\n',
        ("d.jsonl", "line 3"),
    ),
    ("jsonl line that is no record", "d.jsonl", b'{"text": "a"}\n[1]\n', ("d.jsonl", "line 2")),
    ("broken parquet", "d.parquet", b"PAR1 or not", ("d.parquet",)),
    (
        "chat without a template",
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9,
        ("train.chat_key='messages'", "chat template"),
    ),
]


@pytest.mark.parametrize(("name", "content", "says"), [case[1:] for case in DATA], ids=[case[0] for case in DATA])
def test_data(train: Refused, tmp_path: Path, name: str, content: bytes, says: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    train(f"train.data=[{name}]", says=says)


CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user"}], ("messages", "'content'")),
        (["hello"], ("messages", "'role'")),
        ([{"role": "user", "content": "a"}], ("messages", "'assistant'")),
        ("hello", ("messages", "list")),
    ],
    ids=["no content", "no role", "no answer", "not a list"],
)
def test_chat(train: Refused, tmp_path: Path, llama: Path, messages: Any, says: tuple[str, ...]) -> None:
    words = tmp_path / "words"
    make_tokenizer(words)
    (words / "chat_template.jinja").write_text(CHAT)
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    train(f"train.tokenizer={words}", "train.data=[d.jsonl]", says=says)


def test_images(refused: Refused, tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    folder = tmp_path / "resnet"
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    ResNetForImageClassification(config).save_pretrained(folder)
    command = ("train", "cnn_w4a4", f"train.model={folder}")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    refused(*command, "train.data=[images]", says=("train.data", "images", "sub-folders"))
    (tmp_path / "images" / "cat" / "1.png").write_bytes(b"no image")
    refused(*command, "train.data=[images]", says=("train.data", "'cat'", "at least two"))
    (tmp_path / "images" / "dog").mkdir()
    (tmp_path / "images" / "dog" / "1.png").write_bytes(b"no image")
    refused(*command, "train.data=[images]", says=(str(folder), "preprocessor_config.json"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ConvNextImageProcessor"}))
    refused(*command, "train.data=[images]", says=("train.data", "1.png", "not an image"))


def test_sentences(train: Refused, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("\n \n")
    train(
        "train.task=sentence_embedding", "train.data=[d.txt]", "export.targets=[]", says=("train.data", "no sentence")
    )


# ---- training ------------------------------------------------------------------------------------------------------


def test_model_is_not_given(refused: Refused, recipe_file: Path, data: Path) -> None:
    refused("train", recipe_file, f"train.data=[{data}]", says=("train.model", "not set"))


def test_sequence_longer_than_the_model(train: Refused, data: Path) -> None:
    train(f"train.data=[{data}]", "train.seq_len=65", says=("train.seq_len=65", "64 positions"))


def test_tokenizer_of_another_model(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    small = tmp_path / "small"
    make_llama(small, 70)
    train(f"train.model={small}", f"train.tokenizer={llama}", f"train.data=[{data}]", says=("token", "has 70"))


def test_model_without_tokenizer(train: Refused, tmp_path: Path, data: Path) -> None:
    bare = tmp_path / "bare"
    make_llama(bare, 300)
    train(f"train.model={bare}", f"train.data=[{data}]", says=(str(bare), "no tokenizer"))


def test_resume(train: Refused, tmp_path: Path, data: Path, checkpoint: Path) -> None:
    given = f"train.data=[{data}]"
    train(given, "train.resume=no.ckpt", says=("no.ckpt",))
    (tmp_path / "noise.ckpt").write_bytes(b"noise" * 100)
    train(given, "train.resume=noise.ckpt", says=("train.resume", "noise.ckpt", "not a checkpoint"))
    train(given, f"train.resume={checkpoint}", says=("train.resume", str(checkpoint), "weights alone"))
    loaded = torch.load(checkpoint, weights_only=True)
    torch.save({**loaded, "optimizer_states": []}, tmp_path / "run.ckpt")
    other = "rules.linears.weight.bits=8"
    train(given, "train.resume=run.ckpt", other, says=("train.resume", "run.ckpt", "other rules or phases"))
    float_run = {"state_dict": {"model.lm_head.weight": torch.zeros(1)}, "optimizer_states": []}
    torch.save(float_run, tmp_path / "float.ckpt")
    train(given, "train.resume=float.ckpt", says="no quantization record")


def test_output_folder_is_in_the_way(train: Refused, tmp_path: Path, data: Path) -> None:
    (tmp_path / "out").write_text("a file")
    train(f"train.data=[{data}]", "train.out=out", says=("out",))


def test_output_folder_of_another_run(train: Refused, tmp_path: Path, data: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "last.ckpt").write_bytes(b"the first run")
    train(f"train.data=[{data}]", "train.out=out", says=("out/checkpoints", "train.out=", "train.resume="))


# ---- in a process of its own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "no.yaml", "--model", "."], "no.yaml"),
        (["plan", "w8a8"], "train.model=DIR"),
        (["plan", "w8a8", "--model", "."], "config.json"),
        (["verify", "."], "qat_receipt.json"),
        (["train", "w8a8"], "train.model"),
        (["nothing"], "nothing"),
    ],
    ids=["recipe", "no model", "folder", "verify", "train", "command"],
)
def test_process(tmp_path: Path, arguments: list[str], says: str) -> None:
    """Warnings of libraries, logging and exit handlers would show up here only."""
    before = listing(tmp_path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "qat.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    check_refusal(done.returncode, done.stderr, says)
    assert listing(tmp_path) == before
