"""Tiny transformers folders, made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.tasks.stdlib import END, train_tokenizer

TEXT = "def add(a, b):\n    return a + b\n\nclass Point:\n    def __init__(self, x):\n        self.x = x\n" * 40


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer([TEXT, "<user><assistant>;# hello world yes no"], 320)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    end = tokenizer.convert_tokens_to_ids(END)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    turns = [("user", "hello"), ("assistant", "yes#no"), ("user", "add"), ("assistant", "return")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for _ in range(6)), encoding="utf-8")
    return path
