"""Kernels and training steps on one GPU, within 8 minutes, with nothing but torch and triton.

    python -m benchmarks.gpu              everything -> benchmarks/results/gpu-<chip>.json
    python -m benchmarks.gpu --dry-run    all of the code in tiny sizes, on a CPU too; nothing is written without --out

Several processes compile the kernels first. Then, in this order, each part's rows being in the file once it is done:

    gate         every operation's Triton kernel against its reference on this device, then every scheme's layers
                 (benchmarks/schemes.py); red: exit status 1, nothing is timed
    bandwidth    bytes a second of each fused pass, over those of a device copy measured in the same run
    products     our low-precision linears beside torch.matmul, torch._int_mm and torch._scaled_mm
    llama        one block of Llama-3-8B's sizes: step time over bf16's, peak and saved bytes, for each scheme and peer,
                 2k / 8k / 32k tokens, compiled and eager, accumulation 1 and 8

Times are CUDA events around one turn, median of the rounds; in each round every variant takes one turn. A step is
`accumulation` micro-batches forward and backward, then SGD (the cheapest optimizer: ratios cannot hide behind it) and
`qat.after_optimizer_step`. peak_bytes: parameters, what is kept between steps, and the highest level above.
saved_bytes: what is alive after a forward beside parameters and gradients, code cache included.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import bare
from benchmarks.common import RESULTS, environment, save, verdict
from benchmarks.device import TINY, Bench, Sizes
from benchmarks.gpu_blocks import Blocks
from benchmarks.gpu_kernels import bandwidth, check_operations, products, warm, warmed

# processes that compile
WARMING = 12
# the more telling first: time may run out
MODES = ("compiled", "eager")


def run(bench: Bench, modes: Sequence[str], out: Path | None, where: dict[str, Any]) -> list[str]:
    """Everything in order; what the gate found."""

    def keep(part: str) -> None:
        left = bench.deadline - time.monotonic()
        print(f"{part} done, {left:.0f} s of the budget left", flush=True)
        if out is not None:
            save(out, where, bench.rows)

    if bench.device.type == "cuda":
        warmed(False, WARMING)
        keep("compilation")
    problems = check_operations(bench)
    if problems:
        return problems
    for part in (bandwidth, products):
        part(bench)
        keep(part.__name__)
    for mode in modes:
        blocks = Blocks(bench, mode)
        blocks.build()
        if blocks.problems:
            return blocks.problems
        keep(f"{mode} models")
        for tokens in bench.sizes.tokens:
            for accumulation in (1, 8):
                blocks.time(tokens, accumulation)
        keep(f"{mode} steps")
        del blocks
        torch._dynamo.reset()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kernels and training steps on one GPU.")
    parser.add_argument("--minutes", type=float, default=7.5, help="nothing is begun later; what is left out is listed")
    parser.add_argument("--only", choices=MODES, help="steps of this mode alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too: does all of the code run?")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--warm", metavar="I/N", help="only compile the I-th of N shares of the kernels")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    absent = bare.install()
    if not torch.cuda.is_available() and not options.dry_run:
        print("there is no CUDA device; --dry-run runs the code on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")
    out = options.out or (None if options.dry_run else RESULTS / f"gpu-{name}.json")
    where = environment(gpu=chip, optimizer="SGD", dtype="bf16", stand_ins=" ".join(absent) or "none")
    bench = Bench(device, TINY if options.dry_run else Sizes(), began + 60 * options.minutes)
    if options.warm:
        part, _, parts = options.warm.partition("/")
        warm(bench, int(part), int(parts))
        return 0
    problems = run(bench, [options.only] if options.only else MODES, out, where)
    if problems:
        print("the gate is red, nothing more is timed:", *problems, sep="\n  ", file=sys.stderr)
        return 1
    where["seconds"] = round(time.monotonic() - began)
    if out is not None:
        save(out, where, bench.rows)
    absent_rows = sorted({f"missing: {r['tool']}: {r['value']}" for r in bench.rows if r["metric"] == "missing"})
    print(*absent_rows, sep="\n")
    # tiny sizes say nothing about goals
    print(f"{len(bench.rows)} rows" if options.dry_run else verdict(bench.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
