"""A run as one HTML page that needs nothing else: no network, no files beside it.

A report is plain data, `{"title", "lead", "sections": [...]}`, kept as report.json beside the page; `qat report FOLDER`
renders it again. A section has a `kind`:

    text          "paragraphs": [str]
    table         "columns": [str], "rows": [[str]], "strong": [row numbers], "names": columns that are words
    tiles         "tiles": [[figure, caption]]
    lines         "x", "y": axis titles, "log": bool, "lines": [[name, [[x, y]]]]
    bars          "y": axis title, "log": bool, "bars": [[name, value, label]]
    layers        "y": axis title, "names": [str], "series": [[name, [value]]]
    completions   "models": [str], "rows": [[prompt, [text of each model]]]

all with an optional "title", "note" and, for plots, "half": true to share a row with the next.
"""

from __future__ import annotations

import io
import json
import os
from os import PathLike
from pathlib import Path
from typing import Any

from qat.errors import QATError

REPORT = "report.json"
PAGE = "report.html"
_KINDS = ("text", "table", "tiles", "lines", "bars", "layers", "completions")
_INK, _GREY, _GRID = "#1d2733", "#667085", "#e4e7ec"
# Same name, same colour on the whole page; other names take the spare ones in order.
_COLOURS = {"float": "#667085", "float trained on": "#a9b1bd", "RTN": "#e08a2c", "QAT": "#0d7d6c"}
_SPARE = ("#0d7d6c", "#7a5af0", "#e08a2c", "#c2415d", "#2f6fde", "#667085")


def write_report(report: dict[str, Any], folder: str | PathLike[str]) -> Path:
    """Write report.json and report.html into `folder`; returns the page's path."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    page = page_of(report)
    write_text(place / REPORT, json.dumps(report, indent=1) + "\n")
    write_text(place / PAGE, page)
    return place / PAGE


def write_text(path: Path, text: str) -> None:
    """All of `text` in UTF-8, or the file as it was: written beside it, flushed to the disk, renamed."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def render(folder: str | PathLike[str]) -> Path:
    """Render the report.json of a run again. Raises QATError if there is none or it cannot be read."""
    path = Path(folder) / REPORT
    if not path.is_file():
        raise QATError(f"{folder} holds no {REPORT}; `qat train` and the demo write one into their output folder")
    try:
        return write_report(json.loads(path.read_text(encoding="utf-8")), folder)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        what = f"{type(problem).__name__}: {problem}"
        raise QATError(f"{path} is not a report ({what}); run the training again") from None


def page_of(report: dict[str, Any]) -> str:
    """The page as text."""
    try:
        from jinja2 import Environment
    except ImportError:
        raise QATError('the report needs jinja2 and matplotlib; pip install "lightning-qat[report]"') from None
    sections = []
    for index, section in enumerate(report["sections"]):
        if section["kind"] not in _KINDS:
            raise QATError(f"a report has no section of kind {section['kind']!r}; kinds: {', '.join(_KINDS)}")
        sections.append({**section, "svg": _plot(section, index)})
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_PAGE)
    return template.render(report=report, sections=sections, style=_STYLE, paragraphs=_paragraphs)


def _paragraphs(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _plot(section: dict[str, Any], index: int) -> str | None:
    draw = {"lines": _lines, "bars": _bars, "layers": _layers}.get(section["kind"])
    if draw is None:
        return None
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise QATError('the report needs jinja2 and matplotlib; pip install "lightning-qat[report]"') from None
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"qat{index}",
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": _INK,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _GREY,
        "xtick.color": _GREY,
        "ytick.color": _GREY,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.3) if section.get("half") else (10.8, 3.6), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, section)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]


def _colour(name: str, index: int) -> str:
    return _COLOURS.get(name, _SPARE[index % len(_SPARE)])


def _lines(axes: Any, section: dict[str, Any]) -> None:
    for index, (name, points) in enumerate(section["lines"]):
        x, y = [p[0] for p in points], [p[1] for p in points]
        colour = _colour(name, index)
        if len(points) > 100:
            # Every step lightly, and on top what the eye should follow.
            axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
            y = _smooth(y)
        marker = "o" if len(points) < 20 else None
        axes.plot(x, y, color=colour, linewidth=1.8, label=name, marker=marker, markersize=3.5)
    axes.set(xlabel=section["x"], ylabel=section["y"])
    axes.margins(x=0.01)
    if section.get("log"):
        axes.set_yscale("log")
    if len(section["lines"]) > 1:
        axes.legend()


def _smooth(values: list[float], memory: float = 0.93) -> list[float]:
    """Exponential mean, corrected for having started from nothing."""
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total = memory * total + value
        weight = memory * weight + 1.0
        found.append(total / weight)
    return found


def _bars(axes: Any, section: dict[str, Any]) -> None:
    bars = section["bars"]
    colours = [next((c for n, c in _COLOURS.items() if n in name.split("\n")), "#0d7d6c") for name, *_ in bars]
    drawn = axes.bar(range(len(bars)), [value for _, value, _ in bars], width=0.62, color=colours)
    axes.bar_label(drawn, [label for *_, label in bars], padding=3, fontsize=9.5)
    axes.set_xticks(range(len(bars)), [name for name, *_ in bars], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel=section["y"])
    axes.margins(y=0.14)
    if section.get("log"):
        axes.set_yscale("log")


def _layers(axes: Any, section: dict[str, Any]) -> None:
    names, series = section["names"], section["series"]
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series):
        at = [i + (index - (len(series) - 1) / 2) * width for i in range(len(names))]
        axes.bar(at, values, width=width * 0.92, color=_colour(name, index), label=name)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel=section["y"])
    axes.margins(x=0.01)
    axes.legend(ncols=len(series))


_STYLE = """
:root { --ink: #1d2733; --grey: #667085; --line: #e4e7ec; --soft: #f6f7f9; --mark: #0d7d6c; --tint: #e9f5f2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 96px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 14px; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 0 0 10px; }
p { margin: 0 0 10px; max-width: 74ch; }
.lead p { font-size: 18px; }
.note { color: var(--grey); font-size: 14px; }
section { margin-top: 44px; }
.row { display: grid; grid-template-columns: 1fr 1fr; gap: 36px; margin-top: 44px; }
.row section { margin-top: 0; }
svg { width: 100%; height: auto; display: block; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; }
.tile { background: var(--tint); border-radius: 10px; padding: 16px 18px; }
.tile b { display: block; font-size: 28px; letter-spacing: -.02em; line-height: 1.2; color: var(--mark); }
.tile span { font-size: 14px; color: var(--grey); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--grey); font-weight: 500; border-bottom: 1.5px solid var(--ink);
  padding: 6px 10px; }
.names2 th:nth-child(2), .names2 td:nth-child(2) { text-align: left; }
td { text-align: right; border-bottom: 1px solid var(--line); padding: 6px 10px; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.strong td { font-weight: 650; background: var(--tint); }
tr.strong td:first-child { padding-left: 8px; }
details summary { cursor: pointer; color: var(--mark); margin-bottom: 8px; }
.mono, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.talk { display: grid; gap: 14px; margin-top: 18px; }
.talk pre { background: var(--soft); border-radius: 8px; margin: 0; padding: 12px 14px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.talk h3 { font-size: 13px; font-weight: 600; color: var(--grey); margin: 0 0 4px; }
.prompt { color: var(--grey); }
@media (max-width: 760px) { .row, .talk { grid-template-columns: 1fr !important; } }
@media print { details { display: block; } section { break-inside: avoid; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<main>
<header class="lead">
<h1>{{ report.title }}</h1>
{% for text in paragraphs(report.lead) %}<p>{{ text }}</p>{% endfor %}
</header>
{% macro table(s) %}
<div class="scroll"><table{% if s.names == 2 %} class="names2"{% endif %}>
<thead><tr>{% for c in s.columns %}<th>{{ c }}</th>{% endfor %}</tr></thead>
<tbody>
{% for r in s.rows %}
<tr{% if loop.index0 in (s.strong or []) %} class="strong"{% endif %}>{% for c in r %}<td>{{ c }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro body(s) %}
{% if s.title %}<h2>{{ s.title }}</h2>{% endif %}
{% if s.kind == "text" %}{% for text in s.paragraphs %}<p>{{ text }}</p>{% endfor %}
{% elif s.kind == "tiles" %}
<div class="tiles">
{% for figure, caption in s.tiles %}
<div class="tile"><b>{{ figure }}</b><span>{{ caption }}</span></div>
{% endfor %}
</div>
{% elif s.kind == "table" and s.fold %}
<details><summary>{{ s.fold }}</summary>{{ table(s) }}</details>
{% elif s.kind == "table" %}{{ table(s) }}
{% elif s.kind == "completions" %}
{% for prompt, texts in s.rows %}
<div class="talk" style="grid-template-columns: repeat({{ texts | length }}, 1fr)">
{% for text in texts %}
<div><h3>{{ s.models[loop.index0] }}</h3>
<pre><span class="prompt">{{ prompt }}</span>{{ text }}</pre></div>
{% endfor %}
</div>
{% endfor %}
{% else %}{{ s.svg | safe }}
{% endif %}
{% if s.note %}<p class="note">{{ s.note }}</p>{% endif %}
{% endmacro %}
{% set open = namespace(value=false) %}
{% for s in sections %}
{% if s.half and not open.value %}<div class="row">{% set open.value = true %}<section>{{ body(s) }}</section>
{% elif s.half %}<section>{{ body(s) }}</section></div>{% set open.value = false %}
{% else %}
{% if open.value %}</div>{% set open.value = false %}{% endif %}
<section>{{ body(s) }}</section>
{% endif %}
{% endfor %}
{% if open.value %}</div>{% endif %}
</main>
</body>
</html>
"""
