"""The demo from end to end with a few steps: its figures mean nothing here, that they are all there does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from qat.tasks.demo import FAST, main, run_demo
from qat.tasks.demo_report import DIFFERENCE, KL, READ_KL, pivot, print_table


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_demo(FAST, folder)
    return folder


def test_every_figure_is_there(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    table = pivot(results)
    for case in ("4 bits (Q4_0)", "2 bits (g64)"):
        assert table[case, "RTN (MSE)"][KL] > 0 and table[case, "qat"][KL] > 0
        assert table[case, "qat"][DIFFERENCE] == 0.0
    assert table["32 bits", "float trained on"][KL] > 0
    assert table["4 bits (Q4_0)", "qat"][READ_KL] < 1e-3 and table["8 bits (Q8_0)", "float Q8_0"][READ_KL] < 1e-3
    # compressed-tensors decodes to fp32 and transformers computes with it: the very same logits
    assert table["2 bits (g64)", "qat"][READ_KL] < 1e-9
    assert len(results["environment"]["corpus sha256"]) == 64


def test_the_page_needs_nothing_else(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 8 and "import os" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page and "src=" not in page


def test_the_table_fits_eighty_columns(out: Path) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(json.loads((out / "results.json").read_text()), console)
    text = console.export_text()
    assert "…" not in text and "2 bits  QAT" in text


def test_a_demo_without_sources_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert main(["--fast", "--out", str(tmp_path / "out")]) == 2
    assert "too little to train on" in " ".join(capsys.readouterr().err.split())
