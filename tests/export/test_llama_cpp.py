from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.errors import ExportError
from qat.export import export
from qat.export.llama_cpp import LlamaCpp

pytestmark = pytest.mark.consumer


@pytest.fixture
def file(bundle: qat.Bundle, tokenizer: Any, tmp_path: Path) -> Path:
    export(bundle, tmp_path / "out", "gguf", tokenizer=tokenizer)
    return tmp_path / "out" / "model.gguf"


# Turned red by asking for the logits of the last position only, or by not clearing the memory between sequences.
def test_log_probs_of_every_position(file: Path, bundle: qat.Bundle) -> None:
    ids = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = bundle.module(ids).logits.log_softmax(-1)
    with LlamaCpp(file, context=64) as llama:
        theirs = torch.stack(list(llama.log_probs(ids)))
        again = llama.logits(ids[0]).log_softmax(-1)
    assert theirs.shape == ours.shape == (3, 40, 320)
    assert torch.equal(again, theirs[0])
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    # llama.cpp rounds activations to int8 per 32 numbers; a wrong row order or a shifted position gives more than 1
    assert divergence.mean() < 3e-3
    # a later token must not change an earlier position
    with LlamaCpp(file, context=64) as llama:
        torch.testing.assert_close(llama.logits(ids[0, :7]).log_softmax(-1), theirs[0, :7], rtol=0, atol=0.05)


def test_generates_as_transformers_does(file: Path, bundle: qat.Bundle) -> None:
    prompt = [5, 100, 7, 200]
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 1, "pad_token_id": 1}
    ours = bundle.module.generate(torch.tensor([prompt]), **settings)
    with LlamaCpp(file, context=64) as llama:
        theirs = llama.generate(prompt, 4)
    # the first token at least: later ones may part ways where two logits are close
    assert theirs[:1] == ours[0, len(prompt) : len(prompt) + 1].tolist()


def test_the_package_s_own_server_generates(file: Path) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
    server = xllamacpp.Server(parameters)
    answer = server.handle_completions({"prompt": [5, 6, 7], "n_predict": 4, "temperature": 0, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 4


def test_refusals(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no file"):
        LlamaCpp(tmp_path / "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ExportError, match=r"llama\.cpp does not load"):
        LlamaCpp(broken)
    with LlamaCpp(file, context=32) as llama:
        with pytest.raises(ExportError, match="33 tokens does not fit the context of 32"):
            llama.logits(list(range(33)))
        with pytest.raises(ExportError, match="the file has 320"):
            llama.logits([0, 320])
