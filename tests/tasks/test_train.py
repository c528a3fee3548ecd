"""`run`: every task from a recipe to files, and settings that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.errors import QATError
from qat.recipes import load_recipe
from qat.recipes.schema import Phase, Train
from qat.tasks import run
from qat.tasks.base import learning_rate_factor
from qat.tasks.train import make_trainer


def recipe_for(preset: str, folder: Path, data: Path, out: Path, *more: str) -> Any:
    return load_recipe(
        preset,
        [
            f"train.model={folder}",
            f"train.data=['{data}']",
            f"train.out={out}",
            "train.max_steps=3",
            "train.batch_size=2",
            "train.seq_len=16",
            "train.val_every=2",
            "train.accelerator=cpu",
            "train.lr=0.001",
            *more,
        ],
    )


def test_a_language_model_from_recipe_to_verified_file(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = run(recipe_for("w4_gguf_q4_0", llama_folder, text_file, out, "train.logger=csv"))
    assert results["metrics"]["val/loss"] > 0 and set(results["exports"]) == {"gguf"}
    rows = qat.verify(results["exports"]["gguf"])
    assert sum(row.spec != "float" for row in rows) == 9
    written = json.loads((out / "results.json").read_text())
    assert {"suite", "case", "tool", "metric", "value", "better"} == set(written["rows"][0])
    assert written["environment"]["torch"] == torch.__version__ and written["environment"]["seed"] == 0
    assert "<svg" in (out / "report.html").read_text() and (out / "checkpoints" / "last.ckpt").is_file()


def test_gptq_without_training(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """phases.qat.steps=0: the file holds GPTQ's integers, with scales of either sign; figures are of them."""
    found = {}
    for method in ("none", "gptq"):
        words = (f"init.method={method}", "phases.qat.steps=0", "rules.linears.weight.signed_scale=true")
        out = tmp_path / method
        results = run(recipe_for("w4_gguf_q4_0", llama_folder, text_file, out, *words))
        assert qat.Receipt.load(out / "export").step == 0
        assert sum(row.spec != "float" for row in qat.verify(results["exports"]["gguf"])) == 9
        found[method] = results["metrics"]["val/loss"]
    assert found["none"] != found["gptq"]


def test_a_dry_run_writes_nothing(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    results = run(recipe_for("w4_gguf_q4_0", llama_folder, text_file, tmp_path / "run"), dry_run=True)
    assert "lm_head" in results["plan"] and sorted(tmp_path.rglob("*")) == before


def test_resuming_goes_on_from_the_checkpoint(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(recipe_for("w4_gguf_q4_0", llama_folder, text_file, out))
    again = recipe_for("w4_gguf_q4_0", llama_folder, text_file, out, f"train.resume={out}/checkpoints/last.ckpt")
    again.train.max_steps = 5
    run(again)
    assert qat.Receipt.load(out / "export").step == 5
    # what was exported; mutation: no save_checkpoint after fit -> red, last.ckpt is of the last validation, step 4
    assert not list(out.rglob("*-v1.ckpt"))
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


def test_a_folder_with_another_runs_checkpoints_is_refused(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "run", tmp_path / "other" / "last.ckpt"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "last.ckpt").write_bytes(b"of the first run")
    other.parent.mkdir()
    other.write_bytes(b"of a third")
    before = sorted(tmp_path.rglob("*"))
    for more in ([], [f"train.resume={other}"]):
        with pytest.raises(QATError, match=r"holds the checkpoints of an earlier run.*train\.out=.*train\.resume="):
            run(recipe_for("w4_gguf_q4_0", llama_folder, text_file, out, *more))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_ends_before_its_grid_is_refused(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_for("w4_gguf_q4_0", llama_folder, tmp_path / "no data", tmp_path / "run")
    recipe.phases = {"float": Phase(steps=2, quantize=False), "grid": Phase(steps=-1, ramp=4)}
    with pytest.raises(QATError, match=r"max_steps=3 .* float \(steps 2, ramp 0\), grid \(.*\) .* at step 6"):
        run(recipe)
    recipe.export.targets = []
    with pytest.raises(QATError, match="no data"):
        run(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.resume=gone.ckpt", "there is no checkpoint gone.ckpt"),
        ("train.accelerator=abacus", "the trainer cannot be made"),
        ("train.strategy=telepathy", "the trainer cannot be made"),
    ],
)
def test_settings_that_cannot_be_used(
    llama_folder: Path, text_file: Path, tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(QATError, match=words):
        run(recipe_for("w4_gguf_q4_0", llama_folder, text_file, tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


def test_the_teacher_is_checked_before_the_data_is_read(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(
        "w4_gguf_q4_0", llama_folder, tmp_path / "no data", tmp_path / "run", "distill.teacher=nobody/x"
    )
    with pytest.raises(QATError, match=r"distill\.teacher: model folder nobody/x does not exist"):
        run(recipe)


def test_unknown_tasks_and_loggers_are_refused(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    for setting, value in (("task", "chess"), ("logger", "parchment")):
        recipe = recipe_for("w4_gguf_q4_0", llama_folder, text_file, tmp_path / "run")
        setattr(recipe.train, setting, value)
        with pytest.raises(QATError, match=f"train.{setting}='{value}' is unknown"):
            run(recipe)


def test_the_bar_counts_no_epochs_backwards(tmp_path: Path) -> None:
    trainer = make_trainer(Train(max_steps=7, accelerator="cpu"), tmp_path, [])
    bar = trainer.progress_bar_callback
    bar._trainer = trainer
    assert bar._get_train_description(0).strip() == "Epoch 0"


def test_the_learning_rate_rises_and_falls() -> None:
    train = Train(max_steps=100, warmup_fraction=0.1)
    factors = [learning_rate_factor(train, step) for step in range(101)]
    assert factors[:10] == sorted(factors[:10]) and factors[10] == 1.0 and factors[10:] == sorted(factors[10:])[::-1]
    assert 0 < factors[0] < 0.1 and factors[100] < 1e-9
    constant = Train(max_steps=100, warmup_fraction=0.0, scheduler="constant")
    assert {learning_rate_factor(constant, step) for step in range(100)} == {1.0}


def test_an_interrupted_run_equals_an_uninterrupted_one(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    def trained(out: Path, *more: str) -> dict[str, str]:
        recipe = recipe_for(
            "w4_gguf_q4_0", llama_folder, text_file, out, "train.scheduler=constant", "train.warmup_fraction=0", *more
        )
        run(recipe)
        return {tensor.name: tensor.sha256 for tensor in qat.Receipt.load(out / "export").tensors}

    whole = trained(tmp_path / "whole", "train.max_steps=7")
    trained(tmp_path / "cut", "train.max_steps=4")
    resumed = trained(tmp_path / "cut", "train.max_steps=7", f"train.resume={tmp_path}/cut/checkpoints/last.ckpt")
    assert resumed == whole


def test_the_other_lightning_is_used_where_it_was_imported_first(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    overrides = [f"train.model={llama_folder}", f"train.data=['{text_file}']", f"train.out={tmp_path / 'run'}"]
    overrides += ["train.max_steps=2", "train.seq_len=16", "train.val_every=2", "train.accelerator=cpu"]
    code = (
        "import sys, pytorch_lightning\n"
        "from qat.recipes import load_recipe\n"
        "from qat.tasks import run\n"
        f"results = run(load_recipe('w4_gguf_q4_0', {overrides!r}))\n"
        "assert set(results['exports']) == {'gguf'}\n"
        "assert 'lightning.pytorch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
