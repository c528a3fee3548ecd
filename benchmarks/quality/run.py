"""The suite: `python -m benchmarks.quality` or `make bench-quality`.

    python -m benchmarks.quality                    three seeds, every method -> benchmarks/results/quality.json
    python -m benchmarks.quality --quick            one seed, two widths, fewer methods and learning rates; the same
                                                    file only with --out
    python -m benchmarks.quality --only 'B1 W4'     cases whose name contains this; with --out, in place of those that
                                                    the file holds
    python -m benchmarks.quality --tools 'qat' --out FILE
                                                    these methods alone are measured anew; the others keep the file's
                                                    figures, which another run of theirs would repeat: same data, same
                                                    order, same arithmetic
    python -m benchmarks.quality --corpus synthetic bytes that do not depend on the Python version
    python -m benchmarks.quality --try [SUBSTRING]  variants of our method on the tuning split of the first seed; all of
                                                    them: benchmarks/results/trials.json
    python -m benchmarks.quality --dry-run          tiny sizes, without other libraries: does it run?

Protocol. Every seed has a float model of its own. Every method of a seed trains the same number of steps on the same
batches in the same order. Its learning rate is the one of a grid, the same for all, with the least KL on the tuning
split of the first seed (for the float control: the least negative log-likelihood); the test split is only reported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.common import RESULTS, Missing, Row, environment, missing, revision, row, save, verdict
from benchmarks.quality.bytes_lm import CORPORA
from benchmarks.quality.cases import CASES
from benchmarks.quality.lab import Lab, Scores
from benchmarks.quality.methods import OURS, WIDTHLESS, Case, Method, measured
from benchmarks.quality.summary import SUITE, rows_of
from qat.errors import QATError

PROCESSES = 2
# the suite of `--try`
TRIED = "trials"
_PREFIX = "try: "


@dataclass(frozen=True)
class Place:
    """Which lab: enough to build it again in another process. `folder` holds the float models."""

    case: str
    corpus: str
    dry: bool
    folder: str


@dataclass(frozen=True)
class Job:
    """One model of one method."""

    place: Place
    seed: int
    width: str
    tool: str
    rate: float | None

    @property
    def method(self) -> Method:
        case = CASES[self.place.case]
        if self.tool.startswith(_PREFIX):
            return case.trials[self.tool.removeprefix(_PREFIX)]
        return case.methods[self.tool]


@dataclass
class Outcome:
    """scores: split -> metric -> value; reason: why there are none."""

    job: Job
    scores: dict[str, Scores] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0


# two: a process that goes from one seed to the next still has jobs of both
@lru_cache(2)
def lab_of(place: Place, seed: int) -> Lab:
    """With its float model, trained or read from where an earlier call wrote it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lab = CASES[place.case].lab(seed, place.dry, place.corpus)
    file = Path(place.folder) / f"{place.case}-{seed}.pt"
    if file.exists():
        lab.load(torch.load(file, weights_only=True))
    else:
        lab.pretrain()
        torch.save(lab.float_model.state_dict(), file)
    return lab


def prepare_lab(place: Place, seed: int) -> tuple[dict[str, Any], float]:
    """The data's facts, and the seconds that the float model took."""
    began = time.monotonic()
    return lab_of(place, seed).facts(), time.monotonic() - began


def work(job: Job) -> Outcome:
    lab, began = lab_of(job.place, job.seed), time.monotonic()
    try:
        grid = CASES[job.place.case].widths[job.width]
        found = Outcome(job, measured(job.tool, job.method, job.width, grid, lab, job.rate))
    except (Missing, QATError) as reason:
        found = Outcome(job, reason=str(reason))
    found.seconds = time.monotonic() - began
    return found


class InTurn(Executor):
    """Runs a call when it is submitted, in this process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass
class Suite:
    """One case: its widths, its tools, and what was found."""

    place: Place
    widths: Sequence[str]
    tools: Sequence[str]
    seeds: Sequence[int]
    rates: Sequence[float]
    pool: Executor
    outcomes: list[Outcome] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Float models; all rates on the first seed; the chosen ones on the others."""
        labs = [self.pool.submit(prepare_lab, self.place, seed) for seed in self.seeds]
        self.facts, seconds = labs[0].result()
        print(f"float model of seed {self.seeds[0]}: {seconds:.0f} s", flush=True)
        self.do(job for key in self.keys() for job in self.first(*key))
        for lab in labs:
            lab.result()
        chosen = self.chosen()
        self.do(
            Job(self.place, seed, width, tool, chosen.get((width, tool)))
            for seed in self.seeds[1:]
            for width, tool in self.keys()
            if (width, tool) not in self.absent()
        )

    def keys(self) -> list[tuple[str, str]]:
        """(width, tool); methods in float run once, at the first width."""
        found = [(w, t) for w in self.widths for t in self.tools if w == self.widths[0] or t not in WIDTHLESS]
        methods = CASES[self.place.case].methods
        return [(w, t) for w, t in found if t not in methods or not methods[t].only or w in methods[t].only]

    def first(self, width: str, tool: str) -> list[Job]:
        """A job for each learning rate on the first seed."""
        job = Job(self.place, self.seeds[0], width, tool, None)
        return [replace(job, rate=rate) for rate in self.rates] if job.method.loss else [job]

    def do(self, jobs: Iterable[Job]) -> None:
        for future in as_completed([self.pool.submit(work, job) for job in jobs]):
            found: Outcome = future.result()
            self.outcomes.append(found)
            job = found.job
            judge = job.method.judge
            shown = found.reason or f"{judge} {found.scores['tune'][judge]:.5f} on the tuning split"
            rate = f" at {job.rate:g}" if job.rate else ""
            print(f"{found.seconds:4.0f} s  seed {job.seed}  {job.width}  {job.tool}{rate}: {shown}", flush=True)

    def absent(self) -> dict[tuple[str, str], str]:
        """(width, tool) -> why it has no figures: it failed at the learning rate that was chosen, or at all."""
        chosen = self.chosen()
        reasons: dict[tuple[str, str], str] = {}
        for found in self.outcomes:
            key = found.job.width, found.job.tool
            if found.reason and found.job.rate == chosen.get(key, found.job.rate):
                reasons[key] = found.reason
        return reasons

    def chosen(self) -> dict[tuple[str, str], float]:
        """(width, tool) -> the learning rate that the tuning split of the first seed prefers; those that train."""
        best: dict[tuple[str, str], Outcome] = {}
        for found in self.outcomes:
            job = found.job
            if job.seed == self.seeds[0] and job.rate is not None and found.scores:
                key, judge = (job.width, job.tool), job.method.judge
                if key not in best or _value(found, judge) < _value(best[key], judge):
                    best[key] = found
        return {key: found.job.rate for key, found in best.items() if found.job.rate is not None}

    def scores(self, split: str) -> dict[tuple[str, str], dict[int, Scores]]:
        """(width, tool) -> seed -> scores at the chosen rate; float methods stand at every width."""
        chosen, absent = self.chosen(), self.absent()
        found: dict[tuple[str, str], dict[int, Scores]] = {}
        for outcome in self.outcomes:
            job = outcome.job
            if (job.width, job.tool) not in absent and job.rate == chosen.get((job.width, job.tool)):
                for width in self.widths if job.tool in WIDTHLESS else (job.width,):
                    found.setdefault((width, job.tool), {})[job.seed] = outcome.scores[split]
        return {key: dict(sorted(seeds.items())) for key, seeds in found.items()}

    def rows(self, before: Sequence[Row] = ()) -> list[Row]:
        """Rows of this run; of tools that took no part, those `before` has."""
        rates, found, absent = self.chosen(), self.scores("test"), self.absent()
        for (_, tool), rate in list(rates.items()):
            rates |= {(width, tool): rate for width in self.widths if tool in WIDTHLESS}
        case, metrics = CASES[self.place.case], {metric for of in found.values() for s in of.values() for metric in s}
        for entry in before:
            key = entry["case"].removeprefix(f"{self.place.case} "), entry["tool"]
            if key[0] not in self.widths or key[1] in self.tools:
                continue
            if "seed" in entry and entry["metric"] in metrics:
                found.setdefault(key, {}).setdefault(entry["seed"], {})[entry["metric"]] = entry["value"]
            elif entry["metric"] == "learning rate":
                rates[key] = entry["value"]
            elif entry["metric"] == "missing":
                absent[key] = entry["value"]
        return rows_of(self.place.case, case, found, absent, rates)

    def trial_rows(self) -> list[Row]:
        """Scores of variants on the tuning split, and the learning rates at which they were reached."""
        found, rates, absent = self.scores("tune"), self.chosen(), self.absent()
        rows: list[Row] = []
        for width, tool in self.keys():
            where, variant, key = f"{self.place.case} {width}", tool.removeprefix(_PREFIX), (width, tool)
            rows += [missing(TRIED, where, variant, absent[key])] if key in absent else []
            rows += [row(TRIED, where, variant, m, v) for s in found.get(key, {}).values() for m, v in s.items()]
            rows += [row(TRIED, where, variant, "learning rate", rates[key], better="")] if key in rates else []
        return rows


def _value(found: Outcome, judge: str) -> float:
    value = found.scores["tune"][judge]
    # a run that diverged is never the best
    return math.inf if math.isnan(value) else value


def results_table(rows: Sequence[Row]) -> str:
    """The means: a line for each case, tool and metric."""
    shown = [r for r in rows if "seed" not in r and not isinstance(r["value"], str)]
    return "\n".join(f"{r['case']:12} {r['tool']:26} {r['metric']:46} {r['value']:.6g}" for r in shown)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, fewer widths, methods and learning rates")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tools", nargs="+", default=[], help="methods; the others' figures are those of --out")
    parser.add_argument("--seeds", default="", help="separated by commas; the first one chooses learning rates")
    parser.add_argument("--corpus", choices=CORPORA, default=CORPORA[0])
    parser.add_argument("--try", dest="trial", nargs="?", const="", help="variants whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, without other libraries")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="side by side, one thread each; 0: this one")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    quick, dry = options.quick, options.dry_run
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else [0] if quick else [0, 1, 2]
    seeds = seeds[:1] if options.trial is not None else seeds
    if options.tools and not (options.out and options.out.exists() and options.trial is None):
        print("--tools wants the figures of the other methods in --out FILE", file=sys.stderr)
        return 2
    before = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.tools else []
    rows: list[Row] = []
    facts: dict[str, Any] = {"seeds": " ".join(map(str, seeds))}
    processes = 0 if dry else options.processes
    workers = ProcessPoolExecutor(processes, mp_context=get_context("spawn")) if processes else InTurn()
    with tempfile.TemporaryDirectory() as folder, workers as pool:
        for name in CASES:
            widths, tools = chosen(name, options)
            if not widths or not tools:
                continue
            began, rates = time.monotonic(), rates_of(CASES[name], quick, dry)
            suite = Suite(Place(name, options.corpus, dry, folder), widths, tools, seeds, rates, pool)
            try:
                suite.run()
            except Missing as reason:
                rows.append(missing(SUITE, name, OURS, str(reason)))
                continue
            rows += suite.rows(before) if options.trial is None else suite.trial_rows()
            if options.tools:
                facts[f"{name} revision of {', '.join(tools)}"] = revision()
                continue
            facts |= {f"{name} {key}": value for key, value in suite.facts.items()}
            facts[f"{name} revision"] = revision()
            facts[f"{name} rates"] = " ".join(f"{rate:g}" for rate in rates)
            facts[f"{name} seconds"] = round(time.monotonic() - began)
    if not rows:
        print(f"no case contains {options.only!r}, or no variant {options.trial!r}", file=sys.stderr)
        return 2
    print(results_table(rows))
    whole = not (dry or quick or options.only or options.trial or options.corpus != CORPORA[0])
    out = options.out or (RESULTS / f"{SUITE if options.trial is None else TRIED}.json" if whole else None)
    if out is not None:
        torch.set_num_threads(1)
        where = environment(**facts, processes=processes)
        part = (options.only or options.tools) and out.exists()
        save(out, *(added(out, where, rows) if part else (where, rows)))
    # tiny sizes say nothing about goals
    print(f"{len(rows)} rows" if dry else verdict(rows))
    return 0


def added(file: Path, where: dict[str, Any], rows: list[Row]) -> tuple[dict[str, Any], list[Row]]:
    """Environment and rows of a file in which these cases are replaced; the others keep their commit."""
    old = json.loads(file.read_text(encoding="utf-8"))
    now = {row["case"] for row in rows}
    kept = [row for row in old["rows"] if row["case"] not in now]
    before = {f"{case} revision": old["environment"]["revision"] for case in CASES if _has(kept, case)}
    return {**before, **old["environment"], **where}, sorted([*kept, *rows], key=lambda row: _order(row["case"]))


def _has(rows: Sequence[Row], name: str) -> bool:
    return any(_order(row["case"]) == list(CASES).index(name) for row in rows)


def _order(case: str) -> int:
    """Where the case of a width, "B1 W4", stands among all cases."""
    return next((i for i, (n, c) in enumerate(CASES.items()) if case.removeprefix(f"{n} ") in c.widths), len(CASES))


def rates_of(case: Case, quick: bool, dry: bool) -> Sequence[float]:
    """All of the case's learning rates, its two in the middle, or one."""
    middle = len(case.rates) // 2
    return case.rates[middle : middle + 1] if dry else case.rates[middle - 1 : middle + 1] if quick else case.rates


def chosen(name: str, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Widths and tools of a case that the options ask for."""
    case = CASES[name]
    quick_widths, quick_tools = case.quick
    widths = [w for w in case.widths if options.only in f"{name} {w}" and (not options.quick or w in quick_widths)]
    if options.trial is not None:
        return widths, [f"{_PREFIX}{variant}" for variant in case.trials if options.trial in variant]
    named = set(options.tools or case.methods)
    others = {tool for tool, method in case.methods.items() if method.peer} if options.dry_run else set()
    return widths, [t for t in case.methods if t in named - others and (not options.quick or t in quick_tools)]
