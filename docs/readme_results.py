"""Write README's tables and picture from results files, so that every number in README was measured.

    python docs/readme_results.py            benchmarks/results/{demo,cpu-*,backward,quality,trials,kquants}.json ->
                                             README.md, docs/results.svg, docs/{cost,quality,experiments}.md and
                                             docs/formats/gguf.md
    python docs/readme_results.py --check    change nothing; exit 1 if a page differs from what would be written

A results file holds {"environment": {name: value}, "rows": [{suite, case, tool, metric, value, better}, ...]}; rows may
have a goal too. The rows of the suite `demo` become a table with a line for each case and tool and a column for each
metric, in the order in which they come; the picture shows the metric that is drawn (`DRAWN`). Those of the suite `cpu`
become tables in docs/cost.md, one for each file: a line for each case, a column for each tool, in each cell the two
metrics of `CELL`; and the newest one in README, of our tools beside the best of the others. Those of the suite
`backward` become a table in docs/cost.md, those of `quality` one for each case in docs/quality.md: a line for each
tool, a column for each width. Those of `trials` become one in docs/experiments.md, those of `kquants` one in
docs/formats/gguf.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo.json"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "results.svg"
START, END = "<!-- results:start -->", "<!-- results:end -->"
SUITE = "demo"
# The first metric whose name starts so is drawn; without one, the first metric.
DRAWN = "kl"
FIELDS = {"suite", "case", "tool", "metric", "value", "better"}
OPTIONAL = {"goal", "seed"}
# a pattern: one file for each kind of vector units
SPEED = ROOT / "benchmarks" / "results" / "cpu-*.json"
SPEED_START, SPEED_END = "<!-- speed:start -->", "<!-- speed:end -->"
SPEED_SUITE = "cpu"
# what a cell of its tables shows: step time over the float step's, and bytes alive after a forward
CELL = ("time_ratio", "alive_bytes")
# metric -> its ratio to the best other tool of a kind
TO_BEST = {metric: f"{metric} / best peer" for metric in CELL}
NOT_MEASURED = "Run `make bench-cpu`: it measures on your machine, beside other libraries, and writes the table."
COST = ROOT / "docs" / "cost.md"
BACKWARD = ROOT / "benchmarks" / "results" / "backward.json"
BACKWARD_START, BACKWARD_END = "<!-- backward:start -->", "<!-- backward:end -->"
BACKWARD_COMMAND = "python -m benchmarks.backward"
QUALITY_PAGE = ROOT / "docs" / "quality.md"
QUALITY = ROOT / "benchmarks" / "results" / "quality.json"
QUALITY_START, QUALITY_END = "<!-- quality:start -->", "<!-- quality:end -->"
QUALITY_COMMAND = "make bench-quality"
# what stands for the spread of a metric's seeds, and what metrics are called
SPREAD = "standard deviation"
NAMES = {"kl": "KL to the float model"}
TRIALS_PAGE = ROOT / "docs" / "experiments.md"
TRIALS = ROOT / "benchmarks" / "results" / "trials.json"
TRIALS_START, TRIALS_END = "<!-- trials:start -->", "<!-- trials:end -->"
TRIALS_COMMAND = "python -m benchmarks.quality --try --quick"
DEFAULT = "default"
GGUF_PAGE = ROOT / "docs" / "formats" / "gguf.md"
KQUANTS = ROOT / "benchmarks" / "results" / "kquants.json"
KQUANTS_START, KQUANTS_END = "<!-- kquants:start -->", "<!-- kquants:end -->"
KQUANTS_COMMAND = "python -m benchmarks.kquants"
ARROWS = {"lower": "↓", "higher": "↑"}
NOTHING_YET = "Run `make demo`: it measures on your machine and writes the table, the plots and the figures."

Row = dict[str, Any]


def read(path: Path, suite: str = SUITE) -> tuple[dict[str, Any], list[Row]]:
    """Environment and the rows to show; raises ValueError naming what is wrong with the file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = data.get("rows")
    if not isinstance(rows, list) or not isinstance(data.get("environment"), dict):
        raise ValueError(f'{path}: needs the keys "environment" (a mapping) and "rows" (a list)')
    for index, row in enumerate(rows):
        if set(row) - OPTIONAL != FIELDS:
            raise ValueError(f"{path}: row {index} has the keys {sorted(row)}, not {sorted(FIELDS)}")
    shown = [row for row in rows if row["suite"] == suite and isinstance(row["value"], int | float)]
    if not shown:
        raise ValueError(f'{path}: no row of suite "{suite}" with a number')
    return data["environment"], shown


def number(value: float) -> str:
    """Four significant digits; whole numbers whole."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def table(environment: dict[str, Any], rows: list[Row], command: str = "python benchmarks/demo_seeds.py") -> str:
    """The markdown table and a line about where it was measured."""
    metrics = {row["metric"]: ARROWS.get(row["better"], "") for row in rows}
    values = {(row["case"], row["tool"], row["metric"]): row["value"] for row in rows}
    lines = [
        "| case | tool | " + " | ".join(f"{name} {arrow}".strip() for name, arrow in metrics.items()) + " |",
        "|---|---|" + "---:|" * len(metrics),
    ]
    for case, tool in dict.fromkeys((row["case"], row["tool"]) for row in rows):
        found = [values.get((case, tool, metric)) for metric in metrics]
        cells = ["" if value is None else number(value) for value in found]
        lines.append(f"| {case} | {tool} | " + " | ".join(cells) + " |")
    measured = ", ".join(f"{name} {value}" for name, value in environment.items() if not isinstance(value, dict | list))
    lines += ["", f"↓ lower is better, ↑ higher is better. {source(environment, command)} with {measured}."]
    return "\n".join(lines)


def source(environment: dict[str, Any], command: str) -> str:
    """What the figures are and which command measures them; `seeds` are those of a file with means."""
    seeds = str(environment.get("seeds", "")).split()
    if not seeds:
        return "Measured by `make demo`"
    return f"Mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}, measured by `{command}`"


def block(results: Path) -> str:
    """What stands between the markers of README."""
    if not results.is_file():
        return NOTHING_YET
    environment, rows = read(results)
    return f"{table(environment, rows)}\n\n![{drawn(rows)} of each tool](docs/results.svg)"


def cell(time: float | None, alive: float | None) -> str:
    return "" if time is None or alive is None else f"{time:.2f}, {alive / 2**20:.1f} MiB"


def speeds(pattern: Path) -> list[tuple[dict[str, Any], list[Row]]]:
    """Environments and rows of the files that the pattern names, the newest first."""
    found = []
    for path in sorted(pattern.parent.glob(pattern.name)):
        environment, rows = read(path, SPEED_SUITE)
        found.append(({"vector units": path.stem.partition("-")[2].upper()} | environment, rows))
    return sorted(found, key=lambda each: str(each[0].get("date", "")), reverse=True)


def speed_block(pattern: Path) -> str:
    """What stands between the second pair of markers: each of our tools beside the best figures that others reach in
    its kind, which can be those of two tools."""
    found = speeds(pattern)
    if not found:
        return NOT_MEASURED
    environment, rows = found[0]
    values = {(row["case"], row["tool"], row["metric"]): row["value"] for row in rows}
    ours = list(dict.fromkeys(row["tool"] for row in rows if row["metric"] in TO_BEST.values()))
    lines = [
        "| case | " + " | ".join(f"{tool} | best other" for tool in ours) + " |",
        "|---|" + "---:|" * 2 * len(ours),
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        shown = []
        for tool in ours:
            own = [values.get((case, tool, metric)) for metric in CELL]
            over = [values.get((case, tool, TO_BEST[metric])) for metric in CELL]
            best = [mine / ratio if mine and ratio else None for mine, ratio in zip(own, over, strict=True)]
            shown += [cell(*own), cell(*best)]
        lines.append(f"| {case} | " + " | ".join(shown) + " |")
    explained = (
        "Time of a training step over that of the float step of the same case, and bytes alive after a forward beside "
        "the parameters, caches included; lower is better. `best other`: the least of each that torchao, ModelOpt and "
        "Brevitas reach in the nearest scheme that they have; [docs/cost.md](docs/cost.md) has each of them."
    )
    return "\n".join([*lines, "", f"{explained} {measured_by(environment)}"])


def speed_details(pattern: Path) -> str:
    """What stands between the same markers of docs/cost.md: every file and tool."""
    tables = [f"With {each[0]['vector units']}:\n\n{speed_table(*each)}" for each in speeds(pattern)]
    return "\n\n".join(tables) or NOT_MEASURED


def speed_table(environment: dict[str, Any], rows: list[Row]) -> str:
    values = {(row["case"], row["tool"], row["metric"]): row["value"] for row in rows}
    tools = list(dict.fromkeys(row["tool"] for row in rows if row["metric"] == CELL[0]))
    lines = ["| case | " + " | ".join(tools) + " |", "|---|" + "---:|" * len(tools)]
    for case in dict.fromkeys(row["case"] for row in rows):
        shown = [cell(*(values.get((case, tool, metric)) for metric in CELL)) for tool in tools]
        lines.append(f"| {case} | " + " | ".join(shown) + " |")
    explained = (
        "Of other libraries, those that lead their kind in a case's first rows are timed in its long ones. `float "
        "again` is a second float model: the spread."
    )
    return "\n".join([*lines, "", f"{explained} {measured_by(environment)}"])


def measured_by(environment: dict[str, Any]) -> str:
    said = ", ".join(f"{name} {value}" for name, value in environment.items() if not isinstance(value, dict | list))
    return f"Measured by `make bench-cpu` with {said}."


def backward_block(results: Path) -> str:
    """What stands between the markers of docs/cost.md."""
    if not results.is_file():
        return f"Run `{BACKWARD_COMMAND}`: it measures on your machine and writes the figures."
    return table(*read(results, "backward"), BACKWARD_COMMAND)


def quality_block(results: Path) -> str:
    """What stands between the markers of docs/quality.md: for each case a table with a column for each width."""
    if not results.is_file():
        return f"Run `{QUALITY_COMMAND}`: it measures on your machine and writes the figures."
    environment, rows = read(results, "quality")
    means = [row for row in rows if "seed" not in row]
    families = list(dict.fromkeys(row["case"].rpartition(" ")[0] for row in means))
    shown = "\n\n".join(
        family_table(family, metric, of_case)
        for family in families
        for of_case in [[row for row in means if row["case"].rpartition(" ")[0] == family]]
        for metric in shown_metrics(of_case)
    )
    measured = ", ".join(f"{name} {value}" for name, value in environment.items() if not isinstance(value, dict | list))
    return f"{shown}\n\nMeasured by `{QUALITY_COMMAND}` with {measured}."


def shown_metrics(means: list[Row]) -> list[str]:
    """A case's first metric, and those of which more is better."""
    higher = [row["metric"] for row in means if row["better"] == "higher" and SPREAD not in row["metric"]]
    return list(dict.fromkeys([means[0]["metric"], *higher]))


def family_table(family: str, metric: str, means: list[Row]) -> str:
    """A metric by tool and width, mean and spread over seeds, and our ratios to others of the first one."""
    better = next(row["better"] for row in means if row["metric"] == metric)
    values = {(row["case"], row["tool"], row["metric"]): row["value"] for row in means}
    cases = list(dict.fromkeys(row["case"] for row in means))
    widths = [case.rpartition(" ")[2] for case in cases]
    name = NAMES.get(metric, metric)
    lines = [f"| {family}: {name} {ARROWS[better]} | " + " | ".join(widths) + " |", "|---|" + "---:|" * len(cases)]
    for tool in dict.fromkeys(row["tool"] for row in means):
        found = [[values.get((case, tool, which)) for which in (metric, f"{metric}, {SPREAD}")] for case in cases]
        if all(mean is None for mean, _ in found):
            continue
        cells = ["" if m is None else number(m) + ("" if s is None else f" ± {s:.1g}") for m, s in found]
        lines.append(f"| {tool} | " + " | ".join(cells) + " |")
    ratios = dict.fromkeys(row["metric"] for row in means if " / " in row["metric"] and SPREAD not in row["metric"])
    for ratio in ratios if metric == means[0]["metric"] else ():
        at = {case: value for (case, _, which), value in values.items() if which == ratio}
        cells = [f"{at[case]:.2f}" if case in at else "" for case in cases]
        lines.append(f"| *qat: {ratio}* | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trials_block(results: Path) -> str:
    """What stands between the markers of docs/experiments.md: KL of every variant over that of the default."""
    if not results.is_file():
        return f"Run `{TRIALS_COMMAND}`: it measures on your machine and writes the figures."
    environment, rows = read(results, "trials")
    values = {(row["case"], row["tool"]): row["value"] for row in rows if row["metric"] == "kl"}
    cases = list(dict.fromkeys(case for case, _ in values))
    lines = ["| variant | " + " | ".join(cases) + " |", "|---|" + "---:|" * len(cases)]
    for tool in dict.fromkeys(tool for _, tool in values):
        cells = []
        for case in cases:
            value, default = values.get((case, tool)), values.get((case, DEFAULT))
            over = f" ({value / default:.2f})" if value is not None and default and tool != DEFAULT else ""
            cells.append("" if value is None else f"{number(value)}{over}")
        lines.append(f"| {tool} | " + " | ".join(cells) + " |")
    measured = ", ".join(f"{name} {value}" for name, value in environment.items() if not isinstance(value, dict | list))
    return "\n".join([*lines, "", f"Measured by `{TRIALS_COMMAND}` with {measured}."])


def kquants_block(results: Path) -> str:
    """What stands between the markers of docs/formats/gguf.md."""
    if not results.is_file():
        return f"Run `{KQUANTS_COMMAND}`: it measures on your machine and writes the figures."
    return table(*read(results, "kquants"), KQUANTS_COMMAND)


def drawn(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["metric"] for row in rows))
    return next((name for name in names if name.lower().startswith(DRAWN)), names[0])


def draw(rows: list[Row], path: Path) -> None:
    """A bar for each case and tool that has the metric; the same bytes for the same rows."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "qat", "svg.fonttype": "none"})
    from matplotlib import pyplot

    metric = drawn(rows)
    bars = [row for row in rows if row["metric"] == metric]
    cases = list(dict.fromkeys(row["case"] for row in bars))
    figure, axes = pyplot.subplots(figsize=(7.2, 0.6 + 0.36 * len(bars)), layout="constrained")
    names = [f"{row['case']}  {row['tool']}" for row in bars]
    colors = [f"C{cases.index(row['case']) % 10}" for row in bars]
    drawing = axes.barh(range(len(bars)), [row["value"] for row in bars], color=colors)
    axes.bar_label(drawing, labels=[number(row["value"]) for row in bars], padding=3)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"{metric} ({bars[0]['better']} is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def replaced(readme: str, text: str, start: str = START, end: str = END) -> str:
    """A page with `text` between the markers; raises ValueError unless each marker is there once."""
    if readme.count(start) != 1 or readme.count(end) != 1 or readme.index(start) > readme.index(end):
        raise ValueError(
            f"README.md and the pages of docs need one {start} and, after it, one {end}, where these belong"
        )
    return f"{readme[: readme.index(start)]}{start}\n{text}\n{readme[readme.index(end) :]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write README's results from a results file.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    options = parser.parse_args(arguments)
    try:
        old = {page: page.read_text(encoding="utf-8") for page in (README, COST, QUALITY_PAGE, TRIALS_PAGE, GGUF_PAGE)}
        first = replaced(replaced(old[README], block(RESULTS)), speed_block(SPEED), SPEED_START, SPEED_END)
        quality = replaced(old[QUALITY_PAGE], quality_block(QUALITY), QUALITY_START, QUALITY_END)
        cost = replaced(old[COST], speed_details(SPEED), SPEED_START, SPEED_END)
        cost = replaced(cost, backward_block(BACKWARD), BACKWARD_START, BACKWARD_END)
        trials = replaced(old[TRIALS_PAGE], trials_block(TRIALS), TRIALS_START, TRIALS_END)
        kquants = replaced(old[GGUF_PAGE], kquants_block(KQUANTS), KQUANTS_START, KQUANTS_END)
        new = {README: first, COST: cost, QUALITY_PAGE: quality, TRIALS_PAGE: trials, GGUF_PAGE: kquants}
        if options.check:
            return int(old != new)
        if RESULTS.is_file():
            draw(read(RESULTS)[1], PICTURE)
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 2
    for page, text in new.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
