"""`qat train` from beginning to end: a model folder, a text file and a recipe become a GGUF file and a report.

    python examples/recipe_run.py [--fast] [--out runs/examples/recipe_run]

The model is made here so that nothing has to be downloaded; any Hugging Face model folder takes its place.
"""

import argparse
import inspect
import shutil
import textwrap
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qat.cli import main as qat
from qat.tasks.stdlib import train_tokenizer

RECIPE = Path(__file__).parent / "recipes" / "tiny_llama.yaml"


def make_data(file: Path) -> str:
    """The source text of some modules of Python's standard library."""
    text = "\n".join(inspect.getsource(module) for module in (argparse, inspect, shutil, textwrap))
    file.write_text(text, encoding="utf-8")
    return text


def make_model(folder: Path, text: str) -> None:
    """A Llama with random weights and a tokenizer for `text`."""
    tokenizer = train_tokenizer([text], 512)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def run(*arguments: str) -> None:
    """One command, shown before it runs."""
    print("\n$ qat", " ".join(arguments), flush=True)
    if code := qat(arguments):
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="40 steps only")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/recipe_run"))
    options = parser.parse_args()
    model, data, out = options.out / "model", options.out / "text.txt", options.out / "run"
    # `qat train` refuses a folder with the checkpoints of another run
    shutil.rmtree(out, ignore_errors=True)
    model.mkdir(parents=True, exist_ok=True)
    make_model(model, make_data(data))

    run("plan", str(RECIPE), "--model", str(model))
    settings = [f"train.model={model}", f"train.data=[{data}]", f"train.out={out}"]
    if options.fast:
        settings.append("train.max_steps=40")
    run("train", str(RECIPE), *settings, "--dry-run")
    run("train", str(RECIPE), *settings)
    run("verify", str(out / "export"))


if __name__ == "__main__":
    main()
