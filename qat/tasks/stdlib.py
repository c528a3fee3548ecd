"""The demo's data: the source text of the running Python's standard library, on every machine and nothing to download.

Files that are not pure ASCII, tests and tables of data are left out. A file belongs to the held-out split if the hash
of its relative path says so, hence the same files are held out on every machine that has them.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import QATError

END = "<|endoftext|>"
_LEFT_OUT = {"__pycache__", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
_LEFT_OUT |= {"test", "tests", "turtledemo", "unittest"}
_SMALLEST = 1_000_000
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Corpus:
    """Source files as text. `sha256` covers the relative path and the bytes of every file, in order."""

    train: list[str]
    held_out: list[str]
    sha256: str
    bytes: int
    files: int


def read_corpus(root: str | Path | None = None, limit: int | None = None) -> Corpus:
    """Read the standard library (or the `*.py` below `root`), at most `limit` bytes of it.

    Raises QATError where there is less than a megabyte of source text, as in an installation without sources.
    """
    folder = Path(root or sysconfig.get_paths()["stdlib"])
    digest = hashlib.sha256()
    split: dict[bool, list[str]] = {True: [], False: []}
    total = files = 0
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if _LEFT_OUT.intersection(relative.parts):
            continue
        data = path.read_bytes()
        if not data.isascii() or not data.strip():
            continue
        name = relative.as_posix().encode()
        digest.update(name + b"\0" + data + b"\0")
        split[is_held_out(relative.as_posix())].append(data.decode().replace("\r\n", "\n"))
        total, files = total + len(data), files + 1
        if limit and total >= limit:
            break
    if total < min(_SMALLEST, limit or _SMALLEST) or not all(split.values()):
        found = f"{folder} holds {total:,} bytes of Python source text"
        raise QATError(f"{found}, too little to train on; use a Python with its sources")
    return Corpus(split[False], split[True], digest.hexdigest(), total, files)


def is_held_out(relative: str) -> bool:
    """Whether the file of this relative path is kept for evaluation: one in ten, by sha256."""
    return int.from_bytes(hashlib.sha256(relative.encode()).digest()[:4], "big") % _HELD_OUT_ONE_IN == 0


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE with GPT-2's way of splitting words, which llama.cpp knows as "gpt-2".

    Returns a transformers tokenizer whose only special token, END, separates files and begins a prompt.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def token_blocks(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """int64 [N, length]: every text followed by END, end to end, cut into blocks; the remainder is dropped."""
    end = tokenizer.convert_tokens_to_ids(END)
    stream: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        stream += encoding.ids
        stream.append(end)
    count = len(stream) // length
    return torch.tensor(stream[: count * length], dtype=torch.int64).reshape(count, length)
