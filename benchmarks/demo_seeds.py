"""The demo's comparison for several seeds: mean, spread, and whether each seed shows what it must.

    python benchmarks/demo_seeds.py            three seeds -> benchmarks/results/demo.json
    python benchmarks/demo_seeds.py --render   the file again, from the runs that are there

Two runs side by side, each with one thread. For every seed: KL(float || QAT) below that of rounding on the same grid,
at 4 and at 2 bits; KL(trained || llama.cpp on the file) at most 1.5 times that of the float model's Q8_0 file; every
packed tensor decoded with difference 0. Exits with 1 if one of them does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo.json"
QUANTIZED = ("4 bits (Q4_0)", "2 bits (g64)")
LARGEST_RATIO = 1.5
Key = tuple[str, str, str]


def run(seed: int, out: Path, fast: bool) -> None:
    """One demo in a process of its own; raises CalledProcessError with its output on the screen."""
    command = [sys.executable, "-m", "qat.tasks.demo", "--seed", str(seed), "--out", str(out)]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--fast"] if fast else command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()
    print(f"seed {seed}: {time.monotonic() - began:.0f} s")


def values_of(results: dict[str, Any]) -> dict[Key, float]:
    """(case, tool, metric) -> value."""
    return {(row["case"], row["tool"], row["metric"]): row["value"] for row in results["rows"]}


def checks(values: dict[Key, float]) -> dict[str, bool]:
    """What one seed must show."""
    found = {}
    for case in QUANTIZED:
        found[f"{case}: QAT below RTN"] = values[case, "qat", "kl"] < values[case, "RTN (MSE)", "kl"]
        found[f"{case}: packed tensors equal"] = values[case, "qat", "largest difference"] == 0
    reading = "kl of reading program"
    ratio = values[QUANTIZED[0], "qat", reading] / values["8 bits (Q8_0)", "float Q8_0", reading]
    found[f"llama.cpp within {LARGEST_RATIO} times Q8_0"] = ratio <= LARGEST_RATIO
    return found


def gathered(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means as suite "demo", standard deviations and single seeds as suites of their own; environment of the first."""
    first = next(iter(runs.values()))
    rows = []
    for row in first["rows"]:
        key = (row["case"], row["tool"], row["metric"])
        each = {seed: values_of(results)[key] for seed, results in runs.items()}
        values = list(each.values())
        rows.append({**row, "suite": "demo", "value": statistics.fmean(values)})
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append({**row, "suite": "demo standard deviation", "value": spread})
        rows += [{**row, "suite": f"demo seed {seed}", "value": value} for seed, value in each.items()]
    environment = {name: value for name, value in first["environment"].items() if name not in ("seed", "seconds")}
    environment["seeds"] = " ".join(map(str, runs))
    shown = {seed: checks(values_of(results)) for seed, results in runs.items()}
    return {"environment": {**environment, "checks": shown}, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo_seeds", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write")
    parser.add_argument("--render", action="store_true", help="use the runs that are in the folder")
    parser.add_argument("--fast", action="store_true", help="a few steps of a tiny model: does it run?")
    options = parser.parse_args(arguments)
    places = {seed: options.out.resolve() / f"seed{seed}" for seed in options.seeds}
    if not options.render:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda seed: run(seed, places[seed], options.fast), options.seeds))
    runs = {seed: json.loads((place / "results.json").read_text(encoding="utf-8")) for seed, place in places.items()}
    results = gathered(runs)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failed = [
        f"seed {seed}: {name}"
        for seed, found in results["environment"]["checks"].items()
        for name, ok in found.items()
        if not ok
    ]
    for row in results["rows"]:
        if row["suite"] == "demo":
            print(f"{row['case']:14} {row['tool']:16} {row['metric']:22} {row['value']:.6g}")
    print("\n".join(f"does not hold: {name}" for name in failed) or "every check holds for every seed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
