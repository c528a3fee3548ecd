"""Kernels of the GPU suite: the gate, bytes a second of the fused passes, operations a second of the products."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT
from benchmarks.device import Bench
from benchmarks.op_cases import PRODUCTS, Call, Many, calls_at, differences, moved, operations


def gate_calls(bench: Bench) -> Iterator[Call]:
    for rows, columns, group in bench.sizes.gates:
        for dtype in (torch.float32, torch.bfloat16):
            yield from calls_at(rows, columns, group, bench.device, dtype)


def large_calls(bench: Bench) -> Iterator[Call]:
    return calls_at(*bench.sizes.weight, 128, bench.device, torch.bfloat16)


def implementation(op: Any, device: torch.device) -> Callable[..., Any]:
    """The kernel on a GPU, elsewhere the registered operator, so that a dry run runs something."""
    return op.triton if device.type == "cuda" else op.custom  # type: ignore[no-any-return]


def warm(bench: Bench, part: int, parts: int) -> None:
    """Run every kernel whose turn it is once, which leaves it in Triton's cache on disk."""
    for index, (op, args) in enumerate(chain(gate_calls(bench), large_calls(bench))):
        if index % parts == part:
            implementation(op, bench.device)(*args)


def warmed(dry_run: bool, processes: int) -> None:
    """`warm` in several processes: hundreds of kernels that one process would compile one after the other."""
    command = [sys.executable, "-m", "benchmarks.gpu", *(["--dry-run"] if dry_run else []), "--warm"]
    # the steps that find the arguments run without Triton: each process compiles its own share alone
    setting = {**os.environ, "QAT_KERNELS": "reference"}
    running = [subprocess.Popen([*command, f"{part}/{processes}"], cwd=ROOT, env=setting) for part in range(processes)]
    for process in running:
        process.wait()


def check_operations(bench: Bench) -> list[str]:
    """Triton against the reference, on this device."""
    problems, count = [], 0
    for op, args in gate_calls(bench):
        problems += differences((op, args), implementation(op, bench.device))
        count += 1
    problems += Many(*bench.sizes.many, bench.device).differences()
    print(f"gate: {count} calls of operations, {len(problems)} differ", flush=True)
    return problems


def bandwidth(bench: Bench) -> None:
    """Each fused pass over a large bf16 weight, as a share of a copy's bytes a second."""
    source = torch.empty(bench.sizes.copy_bytes // 2, device=bench.device, dtype=torch.bfloat16)
    target, case = torch.empty_like(source), "bandwidth"
    copied = 2 * source.nbytes / bench.median(lambda: target.copy_(source))
    bench.add(case, "copy", "bytes_per_second", copied, better="higher")
    reached = set()
    for op, args in large_calls(bench):
        large = 8 * args[0].numel() >= bench.sizes.weight[0] * bench.sizes.weight[1]
        if op.name in PRODUCTS or not large:
            continue
        reached.add(op.name)
        numbers = [str(a).removeprefix("torch.") for a in args[1:] if isinstance(a, int | str | torch.dtype)]
        shapes = ["x".join(map(str, a.shape)) for a in args if isinstance(a, Tensor)]
        tool = f"{op.name} ({' '.join([*shapes, *numbers])})"
        if bench.late:
            bench.absent(case, tool, "the time budget was spent")
            continue
        share = moved(args, op(*args)) / bench.median(partial(op, *args)) / copied
        # the search computes more than it reads
        bench.add(case, tool, "share of copy", share, None if op.name == "mse_search" else 0.9, "higher")
    many = Many(*bench.sizes.many, bench.device)
    share = many.moved / bench.median(many) / copied
    bench.add(case, f"multi_tensor ({len(many.weights)} weights)", "share of copy", share, 0.9, "higher")
    for name in sorted(set(operations()) - reached - set(PRODUCTS)):
        bench.absent(case, name, "benchmarks/op_cases.py has no arguments for it at this size")


def products(bench: Bench) -> None:
    """Operations a second of one matmul in bf16, int8 and fp8: torch's own, and ours with scales and rounding."""
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
        row_wise: dict[str, Any] = {"scale_a": xs, "scale_b": ws.t().contiguous(), "out_dtype": torch.bfloat16}
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
