"""From the scores of every seed to rows.

    per seed   {suite, case, tool, metric, value, goal, better, seed}
    over seeds the same without `seed`: the mean; and in metrics of their own the standard deviation and, for ratios,
               the bound

A ratio is formed seed by seed (same float model, same data), then averaged. Its bound is the upper end of the one-sided
95 % confidence interval of the mean by Student's t: mean + t * standard deviation / sqrt(seeds).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.common import Row, missing, row
from benchmarks.quality.lab import Scores
from benchmarks.quality.methods import OURS, Case

SUITE = "quality"
SPREAD, BOUND = "standard deviation", "95 % bound"
# 0.95 quantiles of Student's t for 1, 2, ... degrees of freedom
T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)

# (width, tool) -> seed -> scores on the test split
Found = Mapping[tuple[str, str], Mapping[int, Scores]]


def bound(values: Sequence[float]) -> float:
    """Upper end of the one-sided 95 % interval of the mean; of one value there is none: infinity."""
    if len(values) < 2:
        return math.inf
    t = T95[min(len(values) - 1, len(T95)) - 1]
    return statistics.fmean(values) + t * statistics.stdev(values) / math.sqrt(len(values))


def over_seeds(
    case: str,
    tool: str,
    metric: str,
    values: Mapping[int, float],
    goal: float | None = None,
    bounded: bool = False,
    better: str = "lower",
) -> list[Row]:
    """Rows of one metric: every seed, the mean, the spread, the bound."""
    each = list(values.values())
    rows = [{**row(SUITE, case, tool, metric, value, None, better), "seed": seed} for seed, value in values.items()]
    rows.append(row(SUITE, case, tool, metric, statistics.fmean(each), goal, better))
    if len(each) > 1:
        rows.append(row(SUITE, case, tool, f"{metric}, {SPREAD}", statistics.stdev(each)))
        if bounded:
            rows.append(row(SUITE, case, tool, f"{metric}, {BOUND}", bound(each), goal))
    return rows


def ratios(found: Found, width: str, others: Sequence[str]) -> dict[int, float]:
    """Seed -> our KL over the least of the others' in that seed; empty where one side has no figures."""
    ours = found.get((width, OURS), {})
    theirs = [found[width, tool] for tool in others if (width, tool) in found]
    return {seed: scores["kl"] / min(other[seed]["kl"] for other in theirs) for seed, scores in ours.items() if theirs}


def lost(found: Found, width: str, metric: str, tool: str) -> dict[int, float]:
    """Seed -> how much less of `metric` ours has than `tool`; empty where one side has no figures."""
    ours, theirs = found.get((width, OURS), {}), found.get((width, tool), {})
    return {seed: theirs[seed][metric] - scores[metric] for seed, scores in ours.items() if seed in theirs}


def rows_of(
    name: str,
    case: Case,
    found: Found,
    absent: Mapping[tuple[str, str], str],
    rates: Mapping[tuple[str, str], float],
) -> list[Row]:
    """All rows of a case; its widths are cases of their own in the file, like "B1 W4"."""
    rows: list[Row] = []
    for width, grid in case.widths.items():
        if not any(key[0] == width for key in (*found, *absent)):
            continue
        where = f"{name} {width}"
        for tool in case.methods:
            key = width, tool
            if key in absent:
                rows.append(missing(SUITE, where, tool, absent[key]))
            for metric in next(iter(found[key].values())) if key in found else ():
                goal = grid.goals.get(metric) if tool == OURS else None
                better = "higher" if metric in case.lab.higher else "lower"
                values = {seed: found[key][seed][metric] for seed in found[key]}
                rows += over_seeds(where, tool, metric, values, goal, better=better)
            if key in found and key in rates:
                rows.append(row(SUITE, where, tool, "learning rate", rates[key], better=""))
        for metric, others in case.ratios.items():
            if ratio := ratios(found, width, others):
                rows += over_seeds(where, OURS, metric, ratio, grid.goals.get(metric), bounded=True)
        for metric, (of, tool) in case.lost.items():
            if less := lost(found, width, of, tool):
                rows += over_seeds(where, OURS, metric, less, grid.goals.get(metric))
    return rows
