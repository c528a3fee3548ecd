"""QAT step over float step on one CPU thread, ours and other libraries' side by side.

    python -m benchmarks.cpu                       everything, about an hour -> benchmarks/results/cpu-avx512.json
                                                   (or named after what the processor has instead)
    python -m benchmarks.cpu --only 'block fp32'   the cases whose name contains this; nothing is written without --out
    python -m benchmarks.cpu --dry-run             all of the code in tiny sizes; nothing is written without --out

A case is (model, dtype, eager or compiled, accumulation). A step is `accumulation` micro-batches forward and backward,
then SGD; ours includes `qat.after_optimizer_step`. Time is the process' CPU time; in each round every variant takes one
turn of some steps: the first of them finds memory as another tool left it. Ratios to `float` are of the sum of the
least times of each part of a step (`common.least`), and, reported beside, of the median of the steps. `float again` is
a second float model: the spread. Bytes and host reads: benchmarks/memory.py.

First the gate (benchmarks/schemes.py): with a red one nothing is timed and the exit status is 1. A processor without
AVX-512 takes some 25 times as long for a product in bf16 as for one in fp32, next to which no quantization shows: the
cases of bf16 are left out there, and say so.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# before torch starts its threads; Inductor's own workers would not be on this process' clock
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn

from benchmarks import memory
from benchmarks.common import (
    AGAIN,
    FLOAT,
    RESULTS,
    Missing,
    Row,
    Variant,
    against_peers,
    compiled,
    environment,
    least,
    missing,
    ratios,
    row,
    save,
    take_turns,
    verdict,
)
from benchmarks.models import Block, HfLlama, linears
from benchmarks.peers import COMPILED, PEERS
from benchmarks.schemes import ACTIVATION, gate, prepared
from benchmarks.schemes import CPU as OURS

SUITE = "cpu"
_BEHIND = "not timed: behind another library of its kind, in time and in memory,"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_BF16 = "this processor has no fast products in bf16 (no AVX-512)"
MODES = ("eager", "compiled")
ACCUMULATIONS = (1, 8)
# issue of the kernels: (tool, dtype, mode, accumulation) -> step time over float's; None stands for any
GOALS: dict[tuple[str, str, str, int | None], float] = {
    ("qat W4 g32", "fp32", "eager", 1): 1.10,
    ("qat W4 g32", "fp32", "compiled", 1): 1.05,
    ("qat W4 g32", "fp32", "eager", 8): 1.03,
    ("qat W4 g32", "fp32", "compiled", 8): 1.03,
    ("qat W4 g32", "bf16", "eager", None): 1.25,
    ("qat W8A8", "fp32", "eager", None): 1.15,
}


@dataclass(frozen=True)
class Network:
    """What is trained, on how many tokens, and at each accumulation in how many rounds of turns of how many steps."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[torch.dtype], Any]
    turns: dict[int, tuple[int, int]]
    # of the peers only those that led in the first network take part: the others cost minutes
    best_peers_only: bool = False


def _pair(sequences: int, length: int, width: int, dtype: torch.dtype) -> Any:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(sequences, length, width, generator=g).to(dtype) for _ in range(2))


def _ids(sequences: int, length: int, vocab: int) -> Any:
    return torch.randint(0, vocab, (sequences, length), generator=torch.Generator().manual_seed(1))


NETWORKS = (
    Network("block", Block, lambda dtype: _pair(4, 128, 512, dtype), {1: (8, 4), 8: (6, 2)}),
    Network("llama", HfLlama, lambda dtype: _ids(4, 512, 2048), {1: (3, 3), 8: (2, 1)}, best_peers_only=True),
)
TINY = (
    Network("block", lambda: Block(128, 256, 4), lambda dtype: _pair(1, 32, 128, dtype), {1: (2, 2), 8: (1, 1)}),
    Network("llama", lambda: HfLlama(128, 256, 4, 1, 64), lambda dtype: _ids(1, 32, 64), {1: (2, 2), 8: (1, 1)}, True),
)


@dataclass
class Group:
    """The variants of one (network, dtype, mode), built once and timed at every accumulation."""

    network: Network
    dtype: str
    mode: str
    variants: dict[str, Variant] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    # bytes between two steps that are no state
    held: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def case(self, accumulation: int) -> str:
        return f"{self.network.name} {self.dtype} {self.mode} accumulation {accumulation}"

    def build(self, peers: set[str] | None, absent: dict[str, str]) -> None:
        """Every tool's model after two steps, of peers those named (None: all); tools that cannot go to `absent` (with
        the reason that is known already), what the gate finds to `problems`."""
        torch.manual_seed(0)
        base = self.network.make().to(DTYPES[self.dtype]).train()
        batch = self.network.batch(DTYPES[self.dtype])
        for tool in (FLOAT, AGAIN, *OURS, *PEERS):
            if self.mode == "compiled" and tool in PEERS and tool not in COMPILED:
                self.absent[tool] = "not compiled: its modules break the graph at every layer"
                continue
            if peers is not None and tool in PEERS and tool not in peers:
                self.absent[tool] = absent.get(tool, f"{_BEHIND} in the first network")
                continue
            before = memory.storages()
            try:
                variant = self._variant(tool, copy.deepcopy(base), batch)
                loss = variant.step(batch, 1)
                variant.step(batch, 1)
            except Missing as reason:
                self.absent[tool] = str(reason)
                continue
            except Exception as problem:
                if tool not in PEERS:
                    raise
                self.absent[tool] = f"fails in training: {type(problem).__name__}: {problem}"
                continue
            self.variants[tool], self.held[tool] = variant, memory.held(variant, before)
            if tool in OURS:
                where = f"{self.network.name} {self.dtype} {self.mode} {tool}"
                self.problems += [f"{where}: {problem}" for problem in gate(variant.model, loss)]

    def _variant(self, tool: str, model: nn.Module, batch: Any) -> Variant:
        family, count = "float", sum(linear.weight.numel() for linear in linears(model).values())
        if tool in OURS:
            family = OURS[tool].family
            prepared(model, OURS[tool].rule, **OURS[tool].options)
        elif tool in PEERS:
            family = PEERS[tool][0]
            model = PEERS[tool][1](model, batch).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        run = compiled(model) if self.mode == "compiled" else model
        variant = Variant(tool, family, model, run, optimizer, quantized_weights=count)
        if tool in OURS:
            import qat

            variant.after = lambda: qat.after_optimizer_step(model, optimizer)
        return variant

    def rows(self, accumulation: int, rounds: int | None, chosen: Sequence[str], deadline: float) -> list[Row]:
        """Time and memory of the chosen tools at one accumulation."""
        case, batch = self.case(accumulation), self.network.batch(DTYPES[self.dtype])
        taking_part = [self.variants[tool] for tool in chosen]

        def turn(variant: Variant) -> Iterator[list[float]]:
            for _ in range(steps):
                clock = [time.process_time()]
                for _ in range(accumulation):
                    variant.micro_batch(batch, accumulation)
                    clock.append(time.process_time())
                variant.finish()
                clock.append(time.process_time())
                yield [after - before for before, after in itertools.pairwise(clock)]

        count, steps = self.network.turns[accumulation]
        count = count if rounds is None else rounds
        take_turns(taking_part, turn, count, lambda: time.monotonic() > deadline)
        found = []
        for tool, (quickest, usual) in ratios(taking_part).items():
            goal = GOALS.get((tool, self.dtype, self.mode, accumulation))
            goal = goal or GOALS.get((tool, self.dtype, self.mode, None))
            found.append(row(SUITE, case, tool, "time_ratio", quickest, goal))
            found.append(row(SUITE, case, tool, "time_ratio_median", usual))
        found.append(row(SUITE, case, FLOAT, "seconds", least(self.variants[FLOAT])))
        found.append(row(SUITE, case, FLOAT, "steps", len(self.variants[FLOAT].times), better=""))
        measured = {v.tool: memory.measure(v, batch, accumulation, self.held[v.tool]) for v in taking_part}
        for variant in taking_part:
            ours, own = variant.tool in OURS, measured[variant.tool]
            allowance = variant.quantized_weights if variant.family != ACTIVATION else -1
            alive_goal = float(measured[FLOAT].alive + allowance) if ours else None
            found.append(row(SUITE, case, variant.tool, "peak_bytes", own.peak))
            found.append(row(SUITE, case, variant.tool, "alive_bytes", own.alive, alive_goal))
            # the network's own reads are not ours to spare
            goal = measured[FLOAT].syncs if ours else None
            found.append(row(SUITE, case, variant.tool, "host_syncs", own.syncs, goal))
        families = {v.tool: v.family for v in taking_part}
        found += against_peers(SUITE, case, found, families, ("time_ratio", "peak_bytes", "alive_bytes"))
        return found + [missing(SUITE, case, tool, reason) for tool, reason in self.absent.items()]


def best_peers(rows: Sequence[Row], variants: dict[str, Variant]) -> set[str]:
    """The peers that lead their family in time, in peak or in bytes alive: those that "ahead of every peer" needs."""
    found = set()
    for metric in ("time_ratio", "peak_bytes", "alive_bytes"):
        values = {r["tool"]: r["value"] for r in rows if r["metric"] == metric and r["tool"] in PEERS}
        for family in {variants[tool].family for tool in values}:
            found.add(min((tool for tool in values if variants[tool].family == family), key=values.__getitem__))
    return found


def groups(networks: Sequence[Network], only: str) -> Iterator[Group]:
    for network in networks:
        for dtype in DTYPES:
            for mode in MODES:
                group = Group(network, dtype, mode)
                if any(only in group.case(accumulation) for accumulation in ACCUMULATIONS):
                    yield group


def run(networks: Sequence[Network], only: str, rounds: int | None, deadline: float) -> tuple[list[Row], list[str]]:
    """Rows, and what the gate found (then the rows are those of the groups before it)."""
    found: list[Row] = []
    led: dict[tuple[str, str], tuple[set[str] | None, dict[str, str]]] = {}
    for group in groups(networks, only):
        if group.dtype == "bf16" and networks is not TINY and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            found += [missing(SUITE, group.case(a), FLOAT, NO_BF16) for a in ACCUMULATIONS]
            continue
        if time.monotonic() > deadline:
            found += [missing(SUITE, group.case(a), FLOAT, "the time budget was spent") for a in ACCUMULATIONS]
            continue
        began = time.monotonic()
        kind = group.dtype, group.mode
        leaders, absent = led.get(kind, (None, {}))
        group.build(leaders if group.network.best_peers_only else None, absent)
        if group.problems:
            return found, group.problems
        best: set[str] | None = None
        for accumulation in ACCUMULATIONS:
            case = group.case(accumulation)
            if only not in case:
                continue
            left_out = set() if best is None else {t for t in group.variants if t in PEERS and t not in best}
            chosen = [tool for tool in group.variants if tool not in left_out]
            rows = group.rows(accumulation, rounds, chosen, deadline)
            found += rows + [missing(SUITE, case, tool, f"{_BEHIND} at accumulation 1") for tool in sorted(left_out)]
            if best is None:
                best = best_peers(rows, group.variants)
                led.setdefault(kind, (best, group.absent))
            times = {r["tool"]: r["value"] for r in rows if r["metric"] == "time_ratio"}
            shown = ", ".join(f"{tool} {value:.3f}" for tool, value in times.items())
            print(f"{time.monotonic() - began:5.0f} s  {case}: {shown}", flush=True)
        torch._dynamo.reset()
    return found, []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="QAT step over float step on one CPU thread.")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, help="of every case, instead of its own number")
    parser.add_argument("--minutes", type=float, default=60.0, help="no case is begun later, rounds under way are cut")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: does all of the code run?")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.monotonic()
    networks = TINY if options.dry_run else NETWORKS
    rows, problems = run(networks, options.only, options.rounds, began + 60 * options.minutes)
    if problems:
        print("the gate is red, nothing more is timed:", *problems, sep="\n  ", file=sys.stderr)
        return 1
    if not rows:
        print(f"no case contains {options.only!r}", file=sys.stderr)
        return 2
    units = torch.backends.cpu.get_cpu_capability()
    out = options.out or (
        None if options.dry_run or options.only else RESULTS / f"cpu-{units.lower().replace(' ', '-')}.json"
    )
    if out is not None:
        more = {
            "vector units": units,
            "optimizer": "SGD",
            "clock": "CPU time of the process",
            "seconds": round(time.monotonic() - began),
        }
        save(out, environment(**more), rows)
    print(*(f"missing: {r['case']} | {r['tool']}: {r['value']}" for r in rows if r["metric"] == "missing"), sep="\n")
    # tiny sizes say nothing about goals
    print(f"{len(rows)} rows" if options.dry_run else verdict(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
