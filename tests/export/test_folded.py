"""Folded models in files: the consumer's own code computes what the folded model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.export import export
from qat.export.llama_cpp import LlamaCpp
from qat.recipes import from_dict

IDS = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(1))


def folded(model: Any, method: str) -> qat.Bundle:
    """8-bit groups of 32 in every Linear; a head that is tied to the embedding stays in float."""
    slot = {"bits": 8, "granularity": "group", "group_size": 32, "quantizer": "mse"}
    rules: dict[str, Any] = {"linears": {"types": ["Linear"], "weight": slot}}
    if method != "rotate":
        rules["head"] = {"match": ["lm_head"], "keep_float": True}
    words = from_dict({"name": "folded", "rules": rules, "fold": {"method": method}})
    qat.fold.apply(model, words, [IDS])
    qat.prepare(model, words, real=False)
    return qat.convert(model)


# Turned red by a config that still says the head is tied.
@pytest.mark.consumer
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("method", ["rotate", "smooth", "awq"])
def test_llama_cpp_computes_the_folded_model(
    kind: str, method: str, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(kind, tie_word_embeddings=True)
    with torch.no_grad():
        wanted = model(IDS).logits.log_softmax(-1)
    bundle = folded(model, method)
    assert export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer).max_abs_diff == 0.0
    qat.verify(tmp_path / "out")
    with torch.no_grad():
        ours = model(IDS).logits.log_softmax(-1)
    with LlamaCpp(tmp_path / "out" / "model.gguf", context=64) as llama:
        theirs = torch.stack(list(llama.log_probs(IDS)))
    # llama.cpp rounds activations to int8 per 32 numbers
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 3e-3
    assert float((wanted.exp() * (wanted - theirs)).sum(-1).mean()) < 1e-2


@pytest.mark.consumer
@pytest.mark.parametrize("method", ["rotate", "smooth", "awq"])
def test_transformers_computes_the_folded_model(method: str, make_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(tie_word_embeddings=True)
    bundle = folded(model, method)
    assert export(bundle, tmp_path / "out", "compressed-tensors").max_abs_diff == 0.0
    qat.verify(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert loaded.config.tie_word_embeddings == (method != "rotate")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)
