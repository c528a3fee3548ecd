"""`qat allocate`: a recipe in, a recipe out that reaches a number of bits per weight, trains and exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_tiny import make_llama, make_tokenizer
from safetensors.torch import load_file

import qat
from qat.cli import main
from qat.hf import empty_model
from qat.recipes import load_recipe

Refused = Callable[..., str]


def settings(llama: Path, data: Path, *more: str) -> list[str]:
    """Of a run of a few seconds."""
    quick = ["train.seq_len=16", "train.batch_size=4", "train.max_steps=2", "train.val_every=2", "train.lr=1e-4"]
    return [f"train.model={llama}", f"train.data=[{data}]", *quick, *more]


@pytest.mark.parametrize("bits", [3.0, 4.0, 4.25, 4.65])
def test_exl2_reaches_the_target(
    bits: float, llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Allocated, planned, trained, exported: `bits` of config.json, and every weight as the reader has it.

    Mutations: stored bits without q_invperm; limits of the choice 2 % higher, or 5 % lower.
    """
    file, out = tmp_path / "new" / "mixed.yaml", tmp_path / "run"
    command = ["allocate", "w4_exl2", *settings(llama, data, f"train.out={out}"), "--out", str(file)]
    assert main([*command, "--bits", str(bits), "--batches", "2"]) == 0
    shown = capsys.readouterr().out
    text = file.read_text()
    assert f"--bits {bits:g}" in text.splitlines()[0] and "# Measure: kl" in text
    recipe = load_recipe(file)
    reached = float(shown.split("exl2: ")[1].split()[0])
    assert bits - 0.05 <= reached <= bits and f"exl2 {reached:.4f}" in text
    assert recipe.name == f"w4_exl2_{bits:g}bpw" and recipe.train.out == str(out)
    plan = qat.plan(empty_model(llama, meta=True), recipe)
    assert len({row.weight.bits for row in plan.rows if row.weight}) > 1 and len(plan.rows) == 14
    assert all(row.weight_rule == f"linears_{row.weight.bits}bit" for row in plan.rows if row.weight)

    assert main(["plan", str(file)]) == 0
    assert f"exl2 (target): holds every grid exactly, {reached:.4f} bits per weight" in capsys.readouterr().out
    assert main(["train", str(file)]) == 0
    config = json.loads((out / "export" / "config.json").read_text())["quantization_config"]
    packed = load_file(out / "export" / "model.safetensors")
    stored = sum(8 * t.numel() * t.element_size() for name, t in packed.items() if ".q_" in name)
    assert config["bits"] == round(reached, 3) == round(stored / sum(row.params for row in plan.rows), 3) <= bits
    assert main(["verify", str(out / "export")]) == 0
    assert "all as trained, bit for bit" in capsys.readouterr().out


def test_other_families(llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Integers in groups for GGUF, which has no other bits than 4, 5 and 8; and ggml's k-quants, grid and all."""
    file = tmp_path / "mixed.yaml"
    command = ["allocate", "w4_gguf_q4_0", *settings(llama, data), "--out", str(file), "--batches", "1"]
    assert main([*command, "--bits", "6.5", "--rules", "linears"]) == 0
    used = {row.weight.bits for row in qat.plan(empty_model(llama), file).rows if row.weight_rule != "embeddings"}
    assert used <= {4, 5, 8} and len(used) > 1
    wide = tmp_path / "wide"
    make_llama(wide, make_tokenizer(wide), hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    assert (
        main(["allocate", "w4_gguf_q4_k", *settings(wide, data), "--bits", "4", "--out", str(file), "--overwrite"]) == 0
    )
    specs = [row.weight for row in qat.plan(empty_model(wide), file).rows if row.weight]
    assert {spec.scale for spec in specs} <= {f"q{bits}_k" for bits in (2, 3, 4, 5, 6)}
    assert all(spec.scale == f"q{spec.bits}_k" for spec in specs) and len({spec.bits for spec in specs}) > 1
    assert main(["plan", str(file)]) == 0
    assert "gguf (target): holds every grid exactly, " in capsys.readouterr().out


def test_bits_are_those_of_the_dtype_that_the_run_exports(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scales lie in the model's dtype: 16 or 32 bits for each group, by `train.precision` and not by the folder.

    Mutation: bits counted for fp32, 0.5 more than the file of bf16-true has.
    """
    file, out, half = tmp_path / "mixed.yaml", tmp_path / "run", tmp_path / "half"
    shutil.copytree(llama, half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    own = ["rules.linears.weight.group_size=32", "init.method=none", f"train.out={out}"]
    for precision, folder in (("bf16-true", llama), ("32-true", half)):
        given = [*settings(folder, data, *own), f"train.precision={precision}", "--bits", "4.8", "--batches", "1"]
        assert main(["allocate", "w4a16_g128", *given, "--out", str(file), "--overwrite"]) == 0
        reached = float(capsys.readouterr().out.split("compressed-tensors: ")[1].split()[0])
        assert 4.7 < reached <= 4.8
        assert main(["plan", str(file)]) == 0
        assert f"holds every grid exactly, {reached:.4f} bits per weight" in capsys.readouterr().out
        assert main(["train", str(file)]) == 0
        capsys.readouterr()
        packed = load_file(out / "export" / "model.safetensors")
        layers = [name.removesuffix("_packed") for name in packed if name.endswith(".weight_packed")]
        mine = [t for name, t in packed.items() if any(name.startswith(f"{layer}_") for layer in layers)]
        stored = sum(8 * t.numel() * t.element_size() for t in mine)
        assert reached == round(stored / sum(int(packed[f"{layer}_shape"].prod()) for layer in layers), 4)
        shutil.rmtree(out)


def test_refusals(refused: Refused, llama: Path, data: Path, tmp_path: Path) -> None:
    """One sentence, nothing written; of all but the last nothing was measured either."""
    given = settings(llama, data)
    there = tmp_path / "there.yaml"
    there.write_text("name: mine\n")

    def allocate(*words: object, says: str | tuple[str, ...], to: object = "new.yaml", bits: str = "4") -> None:
        refused("allocate", "w4_exl2", "--bits", bits, "--out", to, *words, says=says)

    allocate(*given, bits="2.2", says=("2.2 bits per weight are too few: exl2 stores at least 2.5", "ask for more"))
    allocate(*given, bits="9", says=("9 bits per weight are too many: exl2 stores at most 8.5", "ask for less"))
    allocate(*given, "--choices", "4,5", bits="3", says=("too few", "exl2 stores at least 4.5"))
    allocate(*given, "--choices", "4,7", says=("no layer can have 7 bits", "exl2 has 2, 3, 4, 5, 6, 8"))
    allocate(*given, "--choices", "4;5", says="--choices '4;5' is not of the form 2,3,4,6")
    allocate(*given, "--choices", "4", says=("has no layer whose bits could vary", "of the choices [4]"))
    allocate(*given, "--choices", "3,4", bits="5", says=("too many", "at most 4.5"))
    allocate(
        *given, "--rules", "linear", says="the recipe has no rule 'linear'; its rules are linears, embeddings, head"
    )
    allocate(*given, "--rules", "head", says="has no layer whose bits could vary")
    allocate(*given, "export.targets=[]", says=("export.targets is empty", "export.targets=[exl2]"))
    allocate(*given, "--batches", "0", says="0 batches measure nothing; allowed: 1 or more")
    allocate(*given, "phases={a: {steps: 1, bits: {linears: 8}}, b: {}}", says="phases.a.bits gives bits to layers")
    allocate(*given, to="new.txt", says="a recipe's file ends in .yaml")
    allocate(*given, to=there / "new.yaml", says="there.yaml is a file, not a folder; name another place")
    allocate(*given, to=there, says="there.yaml exists; name another file, or --overwrite")
    if not torch.cuda.is_available():
        allocate(*given, "train.accelerator=gpu", says="train.accelerator=gpu: torch finds no CUDA here; use auto")
    allocate(f"train.model={llama}", says="train.data is empty")
    allocate(f"train.data=[{data}]", says="train.model is not set")
    tables = ("allocate", "w4_nf4_bnb", *given, "--bits", "4", "--out", "new.yaml")
    refused(*tables, says="has no layer whose bits could vary")
    assert there.read_text() == "name: mine\n"
