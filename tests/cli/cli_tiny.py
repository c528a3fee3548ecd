"""What the tests of the command line are made of: a tiny recipe, a tiny Llama, and what a refusal has to look like."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

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
        "intermediate_size": 128,
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


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """Path -> (size, time of change) of everything below."""
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


def check_refusal(code: int, error: str, says: str | tuple[str, ...]) -> None:
    assert code == 2, error
    assert "Traceback" not in error
    assert error.startswith("qat: ") and error.count("\n") == 1 and error.endswith("\n"), error
    for part in (says,) if isinstance(says, str) else says:
        assert part in error, f"{part!r} is not in {error!r}"


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edited(folder: Path, **changes: Any) -> None:
    """config.json of `folder` with changes; None removes a key."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)
