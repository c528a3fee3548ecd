from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import qat
from qat.errors import ExportError
from qat.export import export, gguf_tokenizer
from qat.export.gguf_tokenizer import SAMPLES, compare_tokens, pre_tokenizer_name, tokenizer_reasons
from qat.export.llama_cpp import LlamaCpp

pre = tokenizers.pre_tokenizers
REGEX = {name: pattern for pattern, name in gguf_tokenizer._REGEXES.items()}


def split_by(name: str) -> Any:
    plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre.Sequence([pre.Split(tokenizers.Regex(REGEX[name]), "isolated"), plain])


SPLITTINGS = {
    "gpt-2": pre.ByteLevel(add_prefix_space=False),
    "smollm": pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": split_by("llama-bpe"),
    "qwen2": split_by("qwen2"),
}


# Turned red by swapping two names in the table, or by leaving out add_bos_token.
@pytest.mark.consumer
@pytest.mark.parametrize("name", sorted(SPLITTINGS))
def test_llama_cpp_gives_the_same_ids(
    name: str, bundle: qat.Bundle, make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    begin = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # each the other way round than llama.cpp does for the name on its own
    tokenizer = make_tokenizer(SPLITTINGS[name], None if name == "llama-bpe" else begin)
    export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    with LlamaCpp(tmp_path / "out" / "model.gguf", context=32) as llama:
        for text in SAMPLES:
            assert llama.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert llama.tokenize(text, special=True) == tokenizer(text)["input_ids"]


@pytest.mark.consumer
def test_another_splitting_under_this_name_is_caught(
    bundle: qat.Bundle, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # this name splits numbers into digits; the tokenizer has learned to join them
    monkeypatch.setattr(gguf_tokenizer, "pre_tokenizer_name", lambda _: "smollm")
    with pytest.raises(ExportError, match=r"llama\.cpp splits text otherwise than this tokenizer"):
        export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_folder_serves_as_a_tokenizer(bundle: qat.Bundle, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    export(bundle, tmp_path / "out", "gguf", tokenizer=tmp_path / "tokenizer")
    compare_tokens(tmp_path / "out" / "model.gguf", tokenizer)


def test_reasons(make_tokenizer: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    assert tokenizer_reasons(tokenizer, 320) == []
    assert "needs the tokenizer inside the file" in tokenizer_reasons(None, 320)[0]
    assert "resize the embeddings" in tokenizer_reasons(tokenizer, 100)[0]
    assert "holds no tokenizer" in tokenizer_reasons(tmp_path, 320)[0]
    odd = make_tokenizer(pre.Sequence([pre.Whitespace(), pre.ByteLevel(use_regex=False)]))
    assert "no name for the way this tokenizer splits text (Whitespace" in tokenizer_reasons(odd, 320)[0]
    both = tokenizers.processors.TemplateProcessing(single="$A </s> </s>", special_tokens=[("</s>", 1)])
    assert "adds other tokens than bos" in tokenizer_reasons(make_tokenizer(post=both), 320)[0]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert "the tokenizer is WordLevel; GGUF export knows byte-level BPE" in tokenizer_reasons(raw, 320)[0]
    upper = make_tokenizer()
    upper.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    assert "normalizes text (Lowercase)" in tokenizer_reasons(upper, 320)[0]
    assert "has no tokenizer.json" in tokenizer_reasons(object(), 320)[0]


def test_a_prefix_space_has_no_name() -> None:
    assert pre_tokenizer_name({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}) is None
    assert pre_tokenizer_name({"pre_tokenizer": None}) is None
