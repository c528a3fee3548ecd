"""The demo's corpus and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qat.errors import QATError
from qat.tasks.stdlib import END, is_held_out, read_corpus, token_blocks


def test_the_split_depends_on_the_path_alone(tmp_path: Path) -> None:
    names = [f"module{i}.py" for i in range(40)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}\n" + "x = 1\n" * 100)
    first = read_corpus(tmp_path, limit=10_000)
    held_out = {text.split()[1] for text in first.held_out}
    assert held_out and held_out <= {name for name in names if is_held_out(name)}
    assert not held_out & {text.split()[1] for text in first.train}
    again = read_corpus(tmp_path, limit=10_000)
    assert again == first
    (tmp_path / names[0]).write_text("# changed\n" + "x = 2\n" * 100)
    assert read_corpus(tmp_path, limit=10_000).sha256 != first.sha256


def test_tests_and_non_ascii_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for index in range(60):
        (tmp_path / f"m{index}.py").write_text("value = 0\n" * 60)
        (tmp_path / "test" / f"t{index}.py").write_text("secret = 0\n" * 60)
    (tmp_path / "latin.py").write_text("# ü secret\n" * 60, encoding="utf-8")
    corpus = read_corpus(tmp_path, limit=30_000)
    assert "secret" not in "".join(corpus.train + corpus.held_out)


def test_too_little_text_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(QATError, match="too little to train on"):
        read_corpus(tmp_path)


def test_every_byte_comes_back(tokenizer: Any) -> None:
    text = (
        "def f(x):\n\treturn {'a': x, \"b\": 0x1F}  # tab, quotes\n\n\nclass A: pass" + bytes(range(32, 127)).decode()
    )
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_blocks_are_the_files_with_an_end_after_each(tokenizer: Any) -> None:
    blocks = token_blocks(tokenizer, ["def add(a, b):\n" * 8, "class Point:\n" * 8], 8)
    end = tokenizer.convert_tokens_to_ids(END)
    assert blocks.dtype == torch.int64 and blocks.shape[1] == 8 and int((blocks == end).sum()) >= 1
    assert tokenizer.decode(blocks.flatten().tolist()).startswith("def add(a, b):\n" * 8 + END + "class")
