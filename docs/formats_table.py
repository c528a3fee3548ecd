"""Write the tables of docs/formats.md from what the tests of formats proved.

    python docs/formats_table.py PROOFS   lines that the tests noted (`make formats`) -> benchmarks/results/formats.json
                                          and docs/formats.md
    python docs/formats_table.py          docs/formats.md from the results file that is there

A line of PROOFS is {format, grid, reader, dtype, difference}, a tensor that was written, read back by `reader` and
compared, or {format, program, what, metric, value}, a folder that a program ran (tests/export/conftest.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from readme_results import number, read, replaced  # noqa: E402

PAGE = ROOT / "docs" / "formats.md"
RESULTS = ROOT / "benchmarks" / "results" / "formats.json"
START, END = "<!-- formats:start -->", "<!-- formats:end -->"
SUITE = "formats"
COMMAND = "make formats"
DIFFERENCE, TENSORS = "largest difference", "tensors"


def rows_of(proofs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a results file. case: "format | grid" or "format | what was run"; tool: who read or ran it."""
    found: dict[tuple[str, str, str], float] = {}
    for proof in proofs:
        if "grid" in proof:
            case, tool = f"{proof['format']} | {proof['grid']}", proof["reader"]
            found[case, tool, TENSORS] = found.get((case, tool, TENSORS), 0) + 1
            key, value = (case, tool, DIFFERENCE), proof["difference"]
        else:
            key = f"{proof['format']} | {proof['what']}", proof["program"], proof["metric"]
            value = proof["value"]
        found[key] = max(found.get(key, 0.0), value)
    return [
        {"suite": SUITE, "case": case, "tool": tool, "metric": metric, "value": value}
        | {"better": "" if metric == TENSORS else "lower"}
        for (case, tool, metric), value in sorted(found.items())
    ]


def block(results: Path) -> str:
    """What stands between the markers of docs/formats.md."""
    if not results.is_file():
        return f"Run `{COMMAND}`: it runs the tests of the formats and writes the tables."
    environment, rows = read(results, SUITE)
    values = {(row["case"], row["tool"], row["metric"]): row["value"] for row in rows}
    lines = ["| format | grid | read back by | tensors | largest difference |", "|---|---|---|---:|---:|"]
    ran = ["| format | run by | what | largest difference |", "|---|---|---|---:|"]
    for (case, tool, metric), value in values.items():
        name, _, rest = case.partition(" | ")
        if metric == DIFFERENCE:
            count = number(values[case, tool, TENSORS])
            lines.append(f"| {name} | {rest} | {tool} | {count} | {number(value)} |")
        elif metric != TENSORS:
            ran.append(f"| {name} | {tool} | {rest} | {metric} {number(value)} |")
    measured = ", ".join(f"{key} {value}" for key, value in environment.items())
    return "\n".join([*lines, "", *ran, "", f"From a run of the tests, `{COMMAND}`, with {measured}."])


def main(arguments: list[str]) -> int:
    if arguments:
        from benchmarks.common import environment, save

        text = Path(arguments[0]).read_text(encoding="utf-8")
        found = rows_of(json.loads(line) for line in text.splitlines())
        kept = {
            key: value for key, value in environment().items() if key in ("python", "torch", "transformers", "numpy")
        }
        save(RESULTS, {**kept, "date": datetime.now(timezone.utc).date().isoformat()}, found)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replaced(page, block(RESULTS), START, END), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
