"""A model that memory does not hold: its weights lie in files, and `init` and the export go through them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from qat.errors import QATError
from qat.hf import load_model, load_on_disk
from qat.recipes import from_dict
from qat.tasks.train import run

SCRIPT = Path(__file__).with_name("offload_run.py")
# bytes of the large model's parameters in fp32
WEIGHTS = 124_000_000


def llama(folder: Path, tokenizer: Any, layers: int = 2, width: int = 32, **more: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers}
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=len(tokenizer), **more)
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="8MB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_does_not_hold_the_weights(tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    """GPTQ and the export of 124 MB of weights: a run in memory takes more than these on top."""
    small, large = llama(tmp_path / "s", tokenizer), llama(tmp_path / "l", tokenizer, layers=30, width=384)
    environment, grown = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    for offload in ("true", "false"):
        out = tmp_path / offload
        words = [sys.executable, SCRIPT, small, large, text_file, out, offload]
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        grown.append(int(done.stdout.splitlines()[-1]))
    assert grown[1] - grown[0] > WEIGHTS, grown


def recipe(folder: Path, text: Path, out: Path, offload: bool) -> Any:
    slot = {"bits": 4, "granularity": "group", "group_size": 32, "quantizer": "mse"}
    train = {"model": str(folder), "data": [str(text)], "out": str(out), "seq_len": 16, "batch_size": 2}
    return from_dict(
        {
            "rules": {"linears": {"types": ["Linear"], "weight": slot}},
            "phases": {"qat": {"steps": 0}},
            "init": {"method": "gptq", "batches": 2},
            "export": {"targets": ["compressed-tensors"]},
            "train": {**train, "accelerator": "cpu", "offload": offload},
        }
    )


def test_the_export_is_that_of_a_run_in_memory(tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    """And nothing but the results is left in the folder."""
    folder = llama(tmp_path / "m", tokenizer)
    found = []
    for offload in (True, False):
        out = tmp_path / str(offload)
        results = run(recipe(folder, text_file, out, offload))
        found.append(load_file(Path(results["exports"]["compressed-tensors"]) / "model.safetensors"))
        assert (out / "checkpoints").exists() != offload and not list(out.glob("weights-*"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_on_disk_is_the_model(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m", tokenizer, tie_word_embeddings=tied)
    model, other = load_on_disk(folder, tmp_path, auto="AutoModelForCausalLM"), load_model(folder, dtype=torch.float32)
    mine, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (model, other))
    assert mine.keys() == theirs.keys() and not model.training
    assert all(value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in mine.items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = torch.arange(12).view(1, -1)
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_weights_that_do_not_fit(tokenizer: Any, tmp_path: Path) -> None:
    folder = llama(tmp_path / "m", tokenizer)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(QATError, match=f"lack 1 entries of LlamaForCausalLM by its own names, '{name}'"):
        load_on_disk(folder, tmp_path, auto="AutoModelForCausalLM")
    save_file({**weights, name: weights[name].reshape(16, 64).contiguous()}, folder / "model.safetensors")
    with pytest.raises(QATError, match=r"up_proj.weight is \[16, 64\], the model's \[32, 32\]"):
        load_on_disk(folder, tmp_path, auto="AutoModelForCausalLM")
