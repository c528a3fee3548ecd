"""What gradients multiplied as 8-bit integers cost in quality: the demo's model trained with each kind of backward.

    python -m benchmarks.backward              three seeds -> benchmarks/results/backward.json
    python -m benchmarks.backward --fast       tiny sizes: does it run? nothing is written without --out

For each seed a small Llama is trained on the source text of Python's standard library, then its quantized copies are
distilled from it in the same order of data, with `backward: float`, `int8_dgrad` and `int8`. Figures: KL(float model ||
quantized model) and perplexity on the same held-out tokens, and the float backward's own spread over seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Row, environment, row, save

SUITE = "backward"
BACKWARDS = ("float", "int8_dgrad", "int8")
TOKEN = {"bits": 8, "granularity": "token", "scale": "fp32", "quantizer": "absmax"}
RECIPES: dict[str, dict[str, Any]] = {
    "W8A8": {"weight": {"bits": 8, "granularity": "channel", "narrow": True, "quantizer": "mse"}, "input": TOKEN},
    "W4A8": {"weight": {"bits": 4, "granularity": "channel", "quantizer": "lsq"}, "input": TOKEN},
}
# of the demo's learning rate: 8 bits need a tenth, with more they drift from the float model
RATES = {"W8A8": 0.1, "W4A8": 1.0}
Found = dict[tuple[str, str, str], float]


def one_seed(seed: int, fast: bool) -> Found:
    """(recipe, tool, metric) -> value."""
    import qat
    from qat.callbacks import DistillationCallback, QATCallback
    from qat.recipes import from_dict
    from qat.tasks.demo import FAST, FULL, Demo, hush
    from qat.tasks.measure import compare, evenly, log_probs
    from qat.tasks.progress import stages

    torch.set_num_threads(1)
    hush()
    settings = FAST if fast else FULL
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder, stages(None) as progress:
        demo = Demo(settings, Path(folder), seed, progress)
        demo.corpus, demo.tokenizer, demo.train, held_out = demo.data()
        demo.held_out = evenly(held_out, settings.held_out_blocks)
        demo.float_model, _ = demo.pretrain()
        demo.reference = list(log_probs(demo.float_model, demo.held_out))
        found["float model", "", "perplexity"] = compare(demo.reference, demo.reference, demo.held_out).perplexity
        for name, rule in RECIPES.items():
            for backward in (None, *BACKWARDS):
                linears = {"types": ["Linear"], **rule, "backward": backward}
                rules = {"linears": linears, "head": {"match": ["*lm_head"], "keep_float": True}}
                recipe = from_dict({"name": "backward", "rules": rules, "distill": {"enabled": True}})
                model = copy.deepcopy(demo.float_model)
                tool = f"{backward} backward" if backward else "no training"
                began = time.monotonic()
                if backward:
                    callbacks = [QATCallback(recipe), DistillationCallback()]
                    demo.fit(model, f"{name} {tool}", settings.extra_steps, RATES[name] * settings.lr_4bit, callbacks)
                else:
                    qat.prepare(model, recipe)
                scores = demo.score(model)
                found[name, tool, "kl"], found[name, tool, "perplexity"] = scores.kl, scores.perplexity
                print(f"seed {seed} {name} {tool}: KL {scores.kl:.6f}, {time.monotonic() - began:.0f} s", flush=True)
    return found


def rows_of(runs: dict[int, Found]) -> list[Row]:
    """Means as suite "backward", standard deviations and single seeds as suites of their own; for each rounded backward
    also the mean over seeds of its KL over the float backward's."""
    rows = []
    for case, tool, metric in next(iter(runs.values())):
        each = [run[case, tool, metric] for run in runs.values()]
        rows.append(row(SUITE, case, tool, metric, statistics.fmean(each)))
        spread = statistics.stdev(each) if each[1:] else 0.0
        rows.append(row(f"{SUITE} standard deviation", case, tool, metric, spread))
        rows += [row(f"{SUITE} seed {seed}", case, tool, metric, run[case, tool, metric]) for seed, run in runs.items()]
        if metric == "kl" and tool.startswith("int8"):
            over = [run[case, tool, "kl"] / run[case, "float backward", "kl"] for run in runs.values()]
            rows.append(row(SUITE, case, tool, "kl / float backward's", statistics.fmean(over)))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fast", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(one_seed, options.seeds, [options.fast] * len(options.seeds)))
    rows = rows_of(dict(zip(options.seeds, found, strict=True)))
    out = options.out or (None if options.fast else RESULTS / "backward.json")
    if out is not None:
        more = {"seeds": " ".join(map(str, options.seeds)), "seconds": round(time.monotonic() - began)}
        save(out, environment(**more), rows)
    for entry in rows:
        if entry["suite"] == SUITE:
            print(f"{entry['case']:12} {entry['tool']:20} {entry['metric']:24} {entry['value']:.6g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
