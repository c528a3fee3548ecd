"""A tiny Llama with a tokenizer, and a checkpoint of it, made once; and the check of a refusal."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RECIPE = """
name: tiny
rules:
  linears:
    match: ["*"]
    types: [Linear]
    weight: {bits: 4, granularity: group, group_size: 32, zero_point: none, scale: fp16, quantizer: absmax}
  embeddings: {match: ["*"], types: [Embedding], keep_float: true}
export: {targets: [gguf]}
train: {task: causal_lm, max_steps: 2, batch_size: 2, seq_len: 16, val_every: 2}
"""
LINES = ["the grid you deploy on is the grid you train on", "codes times a scale", "def add(a, b):\n    return a + b"]


def make_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer in `folder`; returns its vocabulary size."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(LINES * 3, vocab_size=300, min_frequency=2, special_tokens=["<|endoftext|>"])
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=end, bos_token=end, pad_token=end)
    fast.save_pretrained(folder)
    return len(fast)


def make_llama(folder: Path, vocab: int, **changes: object) -> None:
    """A Llama of 2 layers with random weights in `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder, make_tokenizer(folder))
    return folder


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit recipe that fits the model and GGUF Q4_0."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, llama: Path, recipe_file: Path) -> Path:
    """A plain state dict of the prepared model, as a run leaves it."""
    import qat
    from qat.hf import load_model

    model = load_model(llama)
    qat.prepare(model, str(recipe_file))
    file = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, file)
    return file


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, llama: Path, checkpoint: Path) -> Path:
    """A GGUF folder written by the command line."""
    from qat.cli import main

    folder = tmp_path_factory.mktemp("exported") / "packed"
    assert main(["export", str(checkpoint), "--model", str(llama), "--format", "gguf", "--out", str(folder)]) == 0
    return folder


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """Path -> (size, time of change) of everything below."""
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


@dataclass
class Refusals:
    """Runs a command that has to be refused: exit code 2, one line on stderr with `says`, nothing written."""

    here: Path
    watched: list[Path]
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *command: object, says: str | tuple[str, ...]) -> str:
        from qat.cli import main

        before = listing(self.here, *self.watched)
        self.capsys.readouterr()
        code = main([str(part) for part in command])
        error = self.capsys.readouterr().err
        check_refusal(code, error, says)
        assert listing(self.here, *self.watched) == before, "something was written"
        return error


def check_refusal(code: int, error: str, says: str | tuple[str, ...]) -> None:
    assert code == 2, error
    assert "Traceback" not in error
    assert error.startswith("qat: ") and error.count("\n") == 1 and error.endswith("\n"), error
    for part in (says,) if isinstance(says, str) else says:
        assert part in error, f"{part!r} is not in {error!r}"


@pytest.fixture
def refused(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The check, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return Refusals(tmp_path, [llama], capsys)
