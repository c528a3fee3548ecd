"""A tiny Llama with a tokenizer, and a checkpoint of it, made once; and the check of a refusal."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cli_tiny import RECIPE, check_refusal, listing, make_llama, make_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder, make_tokenizer(folder))
    return folder


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit recipe that fits the model and GGUF Q4_0."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, llama: Path, recipe_file: Path) -> Path:
    """A plain state dict of the prepared model, as a run leaves it."""
    import qat
    from qat.hf import load_model

    model = load_model(llama)
    qat.prepare(model, str(recipe_file))
    file = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, file)
    return file


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, llama: Path, checkpoint: Path) -> Path:
    """A GGUF folder written by the command line."""
    from qat.cli import main

    folder = tmp_path_factory.mktemp("exported") / "packed"
    assert main(["export", str(checkpoint), "--model", str(llama), "--format", "gguf", "--out", str(folder)]) == 0
    return folder


@dataclass
class Refusals:
    """Runs a command that has to be refused: exit code 2, one line on stderr with `says`, nothing written."""

    here: Path
    watched: list[Path]
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *command: object, says: str | tuple[str, ...]) -> str:
        from qat.cli import main

        before = listing(self.here, *self.watched)
        self.capsys.readouterr()
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            # hidden outside of tests
            for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", hidden)
            code = main([str(part) for part in command])
        assert not shown, [str(warning.message) for warning in shown]
        error = self.capsys.readouterr().err
        check_refusal(code, error, says)
        assert listing(self.here, *self.watched) == before, "something was written"
        return error


@pytest.fixture
def refused(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The check, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return Refusals(tmp_path, [llama], capsys)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Enough text for a run."""
    file = tmp_path / "data.txt"
    file.write_text("the grid you deploy on is the grid you train on. " * 200)
    return file


@pytest.fixture
def train(refused: Callable[..., str], recipe_file: Path, llama: Path) -> Callable[..., str]:
    """`qat train` with the tiny recipe and model; settings may be given again."""

    def run(*overrides: str, says: str | tuple[str, ...]) -> str:
        return refused("train", recipe_file, f"train.model={llama}", *overrides, says=says)

    return run


@pytest.fixture
def export(refused: Callable[..., str], llama: Path, tmp_path: Path) -> Callable[..., str]:
    """`qat export` of a checkpoint; settings may follow."""

    def run(checkpoint: Path | str, *options: object, model: Path = llama, says: str | tuple[str, ...]) -> str:
        return refused("export", checkpoint, "--model", model, "--out", tmp_path / "out", *options, says=says)

    return run
