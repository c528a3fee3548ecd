"""Kernels and training steps on one GPU, within 8 minutes, with nothing but torch and triton.

    python -m benchmarks.gpu              everything -> benchmarks/results/gpu-<chip>.json
    python -m benchmarks.gpu --dry-run    all of the code in tiny sizes, on a CPU too; nothing is written without --out

In this order, and each part's rows are in the file as soon as it is done:

    gate         every operation's Triton kernel against its reference on this device, then every scheme's layers
                 (benchmarks/schemes.py); red: exit status 1, nothing is timed
    bandwidth    bytes a second of each fused pass, over those of a device copy measured in the same run
    products     our low-precision linears beside torch.matmul, torch._int_mm and torch._scaled_mm
    llama        one block of Llama-3-8B's sizes: step time over bf16's, peak and saved bytes, for each scheme and peer,
                 2k / 8k / 32k tokens, eager and compiled, accumulation 1 and 8

Times are CUDA events around one turn, median of the rounds; in each round every variant takes one turn. A step is
`accumulation` micro-batches forward and backward, then SGD (the cheapest optimizer: ratios cannot hide behind it) and
`qat.after_optimizer_step`. peak_bytes: parameters, what is kept between steps, and the highest level above.
saved_bytes: what is alive after a forward beside parameters and gradients, code cache included.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import bare
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
    missing,
    ratios,
    row,
    save,
    take_turns,
    verdict,
)
from benchmarks.models import LlamaShape, PlainLlama, linears
from benchmarks.op_cases import PRODUCTS, Many, calls_at, differences, moved, operations
from benchmarks.peers import COMPILED, PEERS
from benchmarks.schemes import GPU as OURS
from benchmarks.schemes import gate, prepared

SUITE = "gpu"


@dataclass(frozen=True)
class Sizes:
    """Everything that a dry run makes small."""

    shape: LlamaShape = LlamaShape()
    sequence: int = 2048
    # width, hidden, layers and group of the weights that one launch takes
    many: tuple[int, int, int, int] = (1024, 2816, 8, 128)
    # tokens of a micro-batch, the most telling first: time may run out
    tokens: tuple[int, ...] = (8192, 2048, 32768)
    weight: tuple[int, int] = (28672, 4096)
    product: tuple[int, int, int] = (8192, 4096, 14336)
    gates: tuple[tuple[int, int, int], ...] = ((96, 384, 32), (130, 1008, 24), (512, 4096, 128))
    copy_bytes: int = 1 << 30
    repeats: int = 20
    rounds: tuple[int, int] = (7, 3)


TINY = Sizes(
    shape=LlamaShape(128, 256, 4, 2), sequence=32, many=(64, 128, 1, 32), tokens=(32,), weight=(64, 256),
    product=(64, 128, 96), gates=((24, 96, 24),), copy_bytes=1 << 12, repeats=2, rounds=(2, 1),
)  # fmt: skip


@dataclass
class Bench:
    device: torch.device
    sizes: Sizes
    deadline: float
    rows: list[Row] = field(default_factory=list)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def add(
        self, case: str, tool: str, metric: str, value: float, goal: float | None = None, better: str = "lower"
    ) -> None:
        self.rows.append(row(SUITE, case, tool, metric, value, goal, better))

    def absent(self, case: str, tool: str, reason: str) -> None:
        self.rows.append(missing(SUITE, case, tool, reason))

    def seconds(self, work: Callable[[], object]) -> float:
        """One run between two CUDA events (on a CPU: by the clock)."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def median(self, work: Callable[[], object]) -> float:
        for _ in range(3):
            work()
        return statistics.median(self.seconds(work) for _ in range(self.sizes.repeats))

    def level(self) -> int:
        """Bytes that tensors hold on the device."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(self.device)


def check_operations(bench: Bench) -> list[str]:
    """Triton against the reference, on this device; without one, the registered operator against it."""
    problems, count = [], 0
    for (rows, columns, group), dtype in ((s, d) for s in bench.sizes.gates for d in (torch.float32, torch.bfloat16)):
        for op, args in calls_at(rows, columns, group, bench.device, dtype):
            problems += differences((op, args), op.triton if bench.device.type == "cuda" else op.custom)
            count += 1
    problems += Many(*bench.sizes.many, bench.device).differences()
    print(f"gate: {count} calls of operations, {len(problems)} differ", flush=True)
    return problems


def bandwidth(bench: Bench) -> None:
    """Each fused pass over a large bf16 weight, as a share of a copy's bytes a second."""
    source = torch.empty(bench.sizes.copy_bytes // 2, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / bench.median(lambda: target.copy_(source))
    del source, target
    case = "bandwidth"
    bench.add(case, "copy", "bytes_per_second", copied, better="higher")
    reached = set()
    for op, args in calls_at(*bench.sizes.weight, 128, bench.device, torch.bfloat16):
        large = isinstance(args[0], Tensor) and 2 * args[0].numel() >= bench.sizes.weight[0] * bench.sizes.weight[1]
        if op.name in PRODUCTS or not large:
            continue
        reached.add(op.name)
        numbers = [str(a).removeprefix("torch.") for a in args[1:] if isinstance(a, int | str | torch.dtype)]
        shapes = ["x".join(map(str, a.shape)) for a in args if isinstance(a, Tensor)]
        tool = f"{op.name} ({' '.join([*shapes, *numbers])})"
        if bench.late:
            bench.absent(case, tool, "the time budget was spent")
            continue
        share = moved(args, op(*args)) / bench.median(lambda op=op, args=args: op(*args)) / copied
        # the search computes more than it reads
        bench.add(case, tool, "share of copy", share, None if op.name == "mse_search" else 0.9, "higher")
    many = Many(*bench.sizes.many, bench.device)
    share = many.moved / bench.median(many) / copied
    bench.add(case, f"multi_tensor ({len(many.weights)} weights)", "share of copy", share, 0.9, "higher")
    for name in sorted(set(operations()) - reached - set(PRODUCTS)):
        bench.absent(case, name, "benchmarks/op_cases.py has no arguments for it at this size")


def products(bench: Bench) -> None:
    """Operations a second of one large matmul in bf16, int8 and fp8, torch's own and ours (with scales and rounding)."""
    tokens, inputs, outputs = bench.sizes.product
    case, work = f"product {tokens}x{inputs}x{outputs}", 2.0 * tokens * inputs * outputs
    device, on_gpu = bench.device, bench.device.type == "cuda"
    x, w = (torch.randn(n, inputs, device=device, dtype=torch.bfloat16) for n in (tokens, outputs))
    x8, w8 = (torch.randint(-127, 128, (n, inputs), device=device, dtype=torch.int8) for n in (tokens, outputs))
    xs, ws = (torch.rand(n, 1, device=device) + 0.5 for n in (tokens, outputs))
    rates: dict[str, float] = {}

    def measure(tool: str, run: Callable[[], object]) -> None:
        try:
            rates[tool] = work / bench.median(run)
        except Exception as problem:
            bench.absent(case, tool, f"{type(problem).__name__}: {problem}")
        else:
            bench.add(case, tool, "operations_per_second", rates[tool], better="higher")

    measure("torch.matmul bf16", lambda: x @ w.t())
    measure("torch._int_mm", lambda: torch._int_mm(x8, w8.t()))
    found = operations()
    op = found["int8_linear"]
    measure("qat int8_linear", lambda: op(x8, xs, w8, ws, None, torch.bfloat16, None))
    if on_gpu:
        x_fp8, w_fp8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        row_wise = {"scale_a": xs, "scale_b": ws.t().contiguous(), "out_dtype": torch.bfloat16}
        measure("torch._scaled_mm", lambda: torch._scaled_mm(x_fp8, w_fp8.t(), **row_wise))
        fp8 = found["fp8_linear"]
        measure("qat fp8_linear", lambda: fp8(x_fp8, xs, w_fp8, ws, None, torch.bfloat16))
    else:
        bench.absent(case, "torch._scaled_mm", "takes minutes on a CPU")
    for ours, theirs in (("qat int8_linear", "torch._int_mm"), ("qat fp8_linear", "torch._scaled_mm")):
        if ours in rates and theirs in rates:
            bench.add(case, ours, f"rate / {theirs}", rates[ours] / rates[theirs], better="higher")
        elif ours not in rates:
            bench.absent(case, ours, "it failed, see above" if on_gpu else "takes minutes on a CPU")


@dataclass(frozen=True)
class Goal:
    """Of one scheme: step time over bf16's at (tokens, accumulation) when compiled, and peak bytes over bf16's."""

    time: dict[tuple[int, int], float]
    peak: float | None = None


WEIGHT_ONLY = Goal({(8192, 1): 1.02, (2048, 1): 1.08, (2048, 8): 1.01, (8192, 8): 1.01, (32768, 8): 1.01}, 1.01)
GOALS = {
    "qat W4A16 dynamic": WEIGHT_ONLY,
    "qat W4A16 LSQ": WEIGHT_ONLY,
    "qat W8A8 real": Goal({(8192, 1): 0.95}, 1.0),
    "qat FP8 real": Goal({(8192, 1): 0.95}, 1.01),
    "qat W8A8 real, int8 backward": Goal({(8192, 1): 0.75}, 1.0),
    "qat FP8 real, fp8 backward": Goal({(8192, 1): 0.75}, 1.01),
}


class Blocks:
    """The variants of one mode, built once and timed at every size."""

    def __init__(self, bench: Bench, mode: str) -> None:
        self.bench, self.mode = bench, mode
        self.variants: dict[str, Variant] = {}
        self.reasons: dict[str, str] = {}
        # bytes of parameters, and of what is kept between steps beside them
        self.parameters: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.problems: list[str] = []

    def batch(self, tokens: int) -> tuple[Tensor, Tensor]:
        sizes, g = self.bench.sizes, torch.Generator(self.bench.device).manual_seed(1)
        length = min(sizes.sequence, tokens)
        shape = (tokens // length, length, sizes.shape.width)
        x, y = (torch.randn(shape, generator=g, device=self.bench.device, dtype=torch.bfloat16) for _ in range(2))
        return x, y

    def build(self, only: Sequence[str] = ()) -> None:
        """One variant after the other: two steps, the gate for ours, the bytes that it holds."""
        torch.manual_seed(0)
        with self.bench.device:
            base = PlainLlama(self.bench.sizes.shape).to(torch.bfloat16).train()
        batch = self.batch(min(self.bench.sizes.tokens))
        for tool in only or (FLOAT, AGAIN, *OURS, *PEERS):
            if self.bench.late:
                self.reasons[tool] = "the time budget was spent"
                continue
            if self.mode == "compiled" and tool in PEERS and tool not in COMPILED:
                self.reasons[tool] = "not compiled: its modules break the graph at every layer"
                continue
            before = self.bench.level()
            try:
                variant = self._variant(tool, copy.deepcopy(base), batch)
                loss = variant.step(batch, 1)
                variant.step(batch, 1)
            except Missing as reason:
                self.reasons[tool] = str(reason)
                continue
            except Exception as problem:
                if tool not in PEERS and self.mode == "eager":
                    raise
                self.reasons[tool] = f"fails in training: {type(problem).__name__}: {problem}"
                continue
            own = sum(p.nbytes for p in variant.model.parameters())
            self.variants[tool], self.parameters[tool] = variant, own
            self.held[tool] = max(self.bench.level() - before - own, 0)
            if tool in OURS and self.mode == "eager":
                self.problems += [f"{tool}: {problem}" for problem in gate(variant.model, loss)]

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

    def time(self, tokens: int, accumulation: int) -> None:
        """Rows of one case."""
        bench, case = self.bench, f"llama {tokens} tokens {self.mode} accumulation {accumulation}"
        gone = {**self.reasons}
        if bench.late or FLOAT not in self.variants:
            for tool in (*self.variants, *gone):
                bench.absent(case, tool, gone.get(tool, "the time budget was spent"))
            return
        batch, taking_part, memory = self.batch(tokens), [], {}
        for tool, variant in self.variants.items():
            try:
                memory[tool] = self._memory(variant, batch, accumulation)
                taking_part.append(variant)
            except Exception as problem:
                if tool == FLOAT:
                    raise
                gone[tool] = f"fails at this size: {type(problem).__name__}: {problem}"
                variant.optimizer.zero_grad(set_to_none=True)
        rounds = bench.sizes.rounds[accumulation > 1]
        take_turns(
            taking_part,
            lambda variant: bench.seconds(lambda: variant.step(batch, accumulation)),
            rounds,
            lambda: bench.late,
        )
        first = len(bench.rows)
        bench.add(case, FLOAT, "seconds", statistics.median(self.variants[FLOAT].times))
        bench.add(case, FLOAT, "rounds", len(self.variants[FLOAT].times), better="")
        for tool, (_, ratio) in ratios(taking_part).items():
            goals = GOALS.get(tool, Goal({}))
            goal = goals.time.get((tokens, accumulation)) if self.mode == "compiled" else None
            bench.add(case, tool, "time_ratio", ratio, goal)
            peak, saved = memory[tool]
            allowed = None if goals.peak is None or bench.device.type != "cuda" else goals.peak * memory[FLOAT][0]
            bench.add(case, tool, "peak_bytes", peak, allowed)
            bench.add(case, tool, "saved_bytes", saved)
        families = {v.tool: v.family for v in taking_part}
        bench.rows += against_peers(
            SUITE, case, bench.rows[first:], families, ("time_ratio", "peak_bytes", "saved_bytes")
        )
        for tool, reason in gone.items():
            bench.absent(case, tool, reason)
        times = ", ".join(f"{tool} {ratio:.3f}" for tool, (_, ratio) in ratios(taking_part).items())
        print(f"{case}: {times}", flush=True)

    def _memory(self, variant: Variant, batch: Any, accumulation: int) -> tuple[int, int]:
        """(peak, saved) of a step with as many micro-batches as show something new; it warms up this size too."""
        bench, tool = self.bench, variant.tool
        variant.step(batch, 1)
        start = bench.level()
        if accumulation > 1:
            variant.micro_batch(batch, accumulation)
        loss = variant.run(batch) / accumulation
        grads = sum(p.grad.nbytes for p in variant.model.parameters() if p.grad is not None)
        saved = bench.level() - start - grads
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        variant.finish()
        if bench.device.type != "cuda":
            return self.parameters[tool], 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(bench.device)
        start = bench.level()
        variant.step(batch, min(accumulation, 2))
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(bench.device) - start
        return self.parameters[tool] + self.held[tool] + peak, self.held[tool] + saved


def run(bench: Bench, out: Path | None, where: dict[str, Any]) -> list[str]:
    """Everything in order; what the gate found."""

    def keep(part: str) -> None:
        left = bench.deadline - time.monotonic()
        print(f"{part} done, {left:.0f} s of the budget left", flush=True)
        if out is not None:
            save(out, where, bench.rows)

    problems = check_operations(bench)
    if problems:
        return problems
    for part in (bandwidth, products):
        part(bench)
        keep(part.__name__)
    for mode in ("eager", "compiled"):
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
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too: does all of the code run?")
    parser.add_argument("--out", type=Path, help="file to write")
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
    problems = run(bench, out, where)
    if problems:
        print("the gate is red, nothing more is timed:", *problems, sep="\n  ", file=sys.stderr)
        return 1
    where["seconds"] = round(time.monotonic() - began)
    if out is not None:
        save(out, where, bench.rows)
    absent_rows = sorted({f"missing: {r['tool']}: {r['value']}" for r in bench.rows if r["metric"] == "missing"})
    print(*absent_rows, sep="\n")
    print(verdict(bench.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
