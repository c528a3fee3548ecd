"""The page: every kind of section, text that could be markup, and files that are no report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.errors import QATError
from qat.report import page_of, render, write_report, write_text

SECTIONS: list[dict[str, Any]] = [
    {"kind": "text", "title": "A", "paragraphs": ["one", "two"]},
    {"kind": "tiles", "tiles": [["9", "nine"]]},
    {"kind": "table", "columns": ["a", "b"], "rows": [["<b>", "2"]], "strong": [0]},
    {
        "kind": "lines",
        "x": "step",
        "y": "loss",
        "log": True,
        "lines": [["QAT", [[i, 1 / (i + 1)] for i in range(200)]]],
    },
    {"kind": "bars", "half": True, "y": "size", "bars": [["RTN", 2.0, "two"], ["QAT", 1.0, "one"]]},
    {"kind": "layers", "y": "error", "names": ["q", "k"], "series": [["RTN", [1, 2]], ["QAT", [2, 1]]]},
    {"kind": "completions", "models": ["m"], "rows": [["if a < b:", ["\n    return '</pre>'"]]]},
]
REPORT = {"title": "T & Co", "lead": ["l"], "sections": SECTIONS}


def test_every_kind_of_section() -> None:
    page = page_of(REPORT)
    assert page.count("<svg") == 3 and "T &amp; Co" in page and page.count("<section>") == len(SECTIONS)
    assert "<td>&lt;b&gt;</td>" in page and "&lt;/pre&gt;" in page and "</html>" in page


def test_the_same_report_is_the_same_page() -> None:
    assert page_of(REPORT) == page_of(REPORT)


def test_a_folder_is_rendered_again(tmp_path: Path) -> None:
    first = write_report(REPORT, tmp_path).read_text()
    (tmp_path / "report.html").unlink()
    assert render(tmp_path).read_text() == first


@pytest.mark.parametrize(
    "content", [None, "no json", json.dumps([1]), json.dumps({"title": "t", "lead": "l", "sections": [{}]})]
)
def test_one_sentence_for_what_is_no_report(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(QATError):
        render(tmp_path)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(QATError, match="kind 'song'; kinds: text"):
        page_of({"title": "", "lead": "", "sections": [{"kind": "song"}]})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_text(path, "old é")
    assert path.read_text(encoding="utf-8") == "old é"
    # mutation: path.write_text(text) -> red, what could not be encoded leaves an empty file
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 9999 + "\ud800")
    assert path.read_text(encoding="utf-8") == "old é" and list(tmp_path.iterdir()) == [path]
