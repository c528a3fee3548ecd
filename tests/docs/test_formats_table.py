"""docs/formats.md is what the tests of formats proved."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("formats_table", ROOT / "docs" / "formats_table.py")
assert SPEC is not None and SPEC.loader is not None
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)


def test_the_page_is_what_the_results_file_says() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.RESULTS.is_file(), "run `make formats`"
    assert page == table.replaced(page, table.block(table.RESULTS), table.START, table.END), "run `make docs`"


def test_the_worst_of_all_tensors_is_shown(tmp_path: Path) -> None:
    """Mutations: the last difference in place of the largest; readers mixed up."""
    proofs = [
        {"format": "gguf", "grid": "int4 g32", "reader": "gguf 1", "dtype": "float32", "difference": 0.0},
        {"format": "gguf", "grid": "int4 g32", "reader": "gguf 1", "dtype": "float32", "difference": 0.25},
        {"format": "gguf", "grid": "int4 g32", "reader": "gguf 1", "dtype": "float32", "difference": 0.0},
        {"format": "gguf", "grid": "int4 g32", "reader": "qat", "dtype": "float32", "difference": 0.0},
        {"format": "gguf", "program": "llama.cpp", "what": "Llama", "metric": "kl", "value": 2e-3},
        {"format": "gguf", "program": "llama.cpp", "what": "Llama", "metric": "kl", "value": 1e-3},
    ]
    file = tmp_path / "formats.json"
    file.write_text(json.dumps({"environment": {"torch": "9"}, "rows": table.rows_of(proofs)}))
    shown = table.block(file)
    assert "| gguf | int4 g32 | gguf 1 | 3 | 0.25 |" in shown
    assert "| gguf | int4 g32 | qat | 1 | 0 |" in shown
    assert "| gguf | llama.cpp | Llama | kl 0.002 |" in shown
