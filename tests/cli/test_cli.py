"""The command line: what each command prints, exit codes, and that help does not wait for torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_tiny import copied, edited, listing

from qat import __version__
from qat.cli import main
from qat.recipes import preset_names

COMMANDS = ("recipes", "plan", "allocate", "train", "export", "verify", "report")


def python(*arguments: str, here: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    whole = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "COLUMNS": "200", **env}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=here, env=whole, timeout=120
    )


def test_help_and_recipes_do_without_torch() -> None:
    heavy = "{'torch', 'lightning', 'pytorch_lightning', 'transformers'}"
    for command in ("['--help']", "['recipes']", "['train', '--help']", "['recipes', 'w8a8']", "['--version']"):
        code = f"import sys, qat.cli; code = qat.cli.main({command}); print(sorted({heavy} & set(sys.modules)), code)"
        done = python("-c", code)
        assert done.stdout.splitlines()[-1] == "[] 0", done.stdout + done.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert main([]) == 0
    assert capsys.readouterr().out == shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qat {__version__}\n"


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in preset_names())
    for name in preset_names():
        assert main(["recipes", name]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["name"] == name


def test_plan(llama: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe_file), "--model", str(llama)]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in shown
    assert "int4 g32" in shown
    assert "% of" in shown
    # Q4_0: 4 bits and an fp16 scale for 32 weights
    assert "gguf (target): holds every grid exactly, 4.5000 bits per weight" in shown


def test_plan_counts_what_a_loaded_model_counts(llama: Path, recipe_file: Path) -> None:
    import qat
    from qat.hf import empty_model, load_model

    meta, real = (
        qat.plan(empty_model(llama, meta=True), str(recipe_file)),
        qat.plan(load_model(llama), str(recipe_file)),
    )
    assert (meta.bytes, meta.coverage, meta.rows, meta.float_rows) == (
        real.bytes,
        real.coverage,
        real.rows,
        real.float_rows,
    )


def test_plan_of_a_large_model_needs_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert main(["plan", "w4a16_g128", "--model", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "560 layers quantized" in shown
    assert "compressed-tensors (target): holds every grid exactly" in shown


def test_plan_takes_overrides(llama: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe_file), "--model", str(llama), "rules.linears.weight.bits=8"]) == 0
    assert "int8 g32" in capsys.readouterr().out


def test_export_then_verify(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {file.name for file in exported.iterdir()} == {"model.gguf", "qat_receipt.json"}
    assert main(["verify", str(exported)]) == 0
    assert "all as trained, bit for bit" in capsys.readouterr().out


def test_export_for_several_programs(
    checkpoint: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutations: the formats written one by one without a check before; `--for` taken as names of formats."""
    command = ["export", str(checkpoint), "--model", str(llama), "--out"]
    assert main([*command, str(tmp_path / "all"), "--for", "llama.cpp, ollama,vllm"]) == 0
    assert {folder.name for folder in (tmp_path / "all").iterdir()} == {"gguf", "compressed-tensors"}
    for name in ("gguf", "compressed-tensors"):
        assert main(["verify", str(tmp_path / "all" / name)]) == 0
    assert main([*command, str(tmp_path / "one"), "--for", "llama.cpp"]) == 0
    assert (tmp_path / "one" / "model.gguf").exists()
    capsys.readouterr()
    for words, told in (
        (["--for", "llama.cp"], "'llama.cp' is no program that a format is written for"),
        (["--for", "vllm", "--format", "gguf"], "give one of them"),
    ):
        assert main([*command, str(tmp_path / "none"), *words]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_list_of_formats(capsys: pytest.CaptureFixture[str]) -> None:
    """Every format of the registry says what it holds and who reads it."""
    from qat.export import all_formats

    assert main(["export", "--list"]) == 0
    shown = capsys.readouterr().out
    for name, cls in all_formats().items():
        assert name in shown and cls.bits and cls.consumers, name
    programs = [program for cls in all_formats().values() for program in cls.consumers]
    assert len(programs) == len(set(programs)), "a program belongs to two formats"


def test_the_list_where_no_reader_is_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: a version asked for without looking."""
    from qat.export import all_formats

    for name in ("gguf", "openvino"):
        monkeypatch.setattr(sys.modules[all_formats()[name].__module__], "find_spec", lambda name: None)
    assert main(["export", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "gguf is not installed" in shown and "openvino is not installed" in shown


def test_export_overwrites_only_when_told(
    exported: Path, checkpoint: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    command = ["export", str(checkpoint), "--model", str(llama), "--out", str(out)]
    assert main(command) == 0
    first = (out / "model.gguf").read_bytes()
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0
    assert (out / "model.gguf").read_bytes() == first == (exported / "model.gguf").read_bytes()
    capsys.readouterr()


def test_the_trained_dtype_wins_over_that_of_the_model_folder(checkpoint: Path, llama: Path, tmp_path: Path) -> None:
    """A float32 run of a bfloat16 model: copying the checkpoint into bfloat16 would round what was trained."""
    import shutil

    import torch

    import qat
    from qat.hf import empty_model

    folder = tmp_path / "bf16"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    empty = empty_model(folder)
    assert next(empty.parameters()).dtype == torch.bfloat16
    bundle = qat.convert(qat.load_from_checkpoint(checkpoint, empty))
    trained = qat.convert(qat.load_from_checkpoint(checkpoint, empty_model(llama)))
    for name, weight in trained.items():
        assert torch.equal(bundle[name].dequantize(), weight.dequantize())
    for name, value in trained.floats.items():
        assert torch.equal(bundle.floats[name], value)


@pytest.fixture
def run(tmp_path: Path, llama: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A `qat train` command in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("the grid you deploy on is the grid you train on. " * 100)
    return ["train", str(recipe_file), f"train.model={llama}", "train.data=[data.txt]", "train.out=out"]


def test_train_dry_run_writes_nothing(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(tmp_path)
    assert main([*run, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert listing(tmp_path) == before
    assert "int4 g32" in shown.out and "export rehearsed and read back: gguf" in shown.out
    assert shown.err == ""


def test_train_then_resume_export_and_report(
    run: list[str], tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run) == 0
    out = tmp_path / "out"
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "val/loss" in shown.out and str(Path("out") / "export") in shown.out
    assert {row["metric"] for row in json.loads((out / "results.json").read_text())["rows"]} >= {"val/loss", "bytes"}
    assert main(["verify", str(out / "export")]) == 0

    last = out / "checkpoints" / "last.ckpt"
    assert main(["export", str(last), "--model", str(llama), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (out / "export" / "model.gguf").read_bytes()

    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page

    assert main([*run, "train.out=next", f"train.resume={last}", "train.max_steps=3"]) == 0
    assert main(["verify", "next/export"]) == 0
    receipt = json.loads((tmp_path / "next" / "export" / "qat_receipt.json").read_text())
    assert receipt["step"] == 3


def test_a_rotated_model_with_a_tied_head(
    run: list[str], tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planned, trained, and exported from the checkpoint and the float model's config alone. Mutation: `qat plan` does
    not untie -> red."""
    tied = copied(llama, tmp_path / "tied")
    edited(tied, tie_word_embeddings=True)
    settings = ["fold.method=rotate", f"train.model={tied}", "train.max_steps=1"]
    assert main(["plan", run[1], "--model", str(tied), "fold.method=rotate"]) == 0
    assert "lm_head" in capsys.readouterr().out
    assert main([*run, *settings, "--dry-run"]) == 0
    assert main([*run, *settings]) == 0
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    assert main(["export", str(last), "--model", str(tied), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (tmp_path / "out/export/model.gguf").read_bytes()
    assert main([*run, *settings, "train.out=next", f"train.resume={last}", "train.max_steps=2"]) == 0


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qat.recipes.preset_names", stop)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "qat: interrupted\n"

    def stop_as_the_trainer_does(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr("qat.recipes.preset_names", stop_as_the_trainer_does)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "qat: interrupted\n"


def test_a_mistake_of_ours_is_one_sentence_or_with_debug_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no scale")

    monkeypatch.setattr("qat.recipes.preset_names", broken)
    assert main(["recipes"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ZeroDivisionError: no scale" in error and "--debug" in error and "QAT_DEBUG=1" in error
    with pytest.raises(ZeroDivisionError):
        main(["--debug", "recipes"])
    assert "QAT_DEBUG" not in os.environ
    monkeypatch.setenv("QAT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["recipes"])


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr("qat.recipes.preset_names", missing)
    assert main(["recipes"]) == 2
    assert "pip install 'lightning-qat[gguf]'" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "import sys, qat.cli; sys.exit(qat.cli.main(['recipes', 'w8a8']))"
    shell = f'{sys.executable} -u -c "{code}" | head -n 1; exit ${{PIPESTATUS[0]}}'
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("command", [["--version"], ["recipes"]])
def test_as_a_module(command: list[str]) -> None:
    done = python("-m", "qat.cli", *command)
    assert (done.returncode, done.stderr) == (0, "")
