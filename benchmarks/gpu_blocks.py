"""Training steps of the GPU suite: one Llama block, every scheme and peer side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import AGAIN, FLOAT, Missing, Variant, against_peers, compiled, median, ratios, take_turns
from benchmarks.device import SUITE, Bench
from benchmarks.models import PlainLlama, linears
from benchmarks.peers import COMPILED, PEERS
from benchmarks.schemes import GPU as OURS
from benchmarks.schemes import gate, prepared


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
            if tool in OURS:
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
            if bench.late and taking_part:
                gone[tool] = "the time budget was spent"
                continue
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
            lambda variant: [[bench.seconds(lambda: variant.step(batch, accumulation))]],
            rounds,
            lambda: bench.late,
        )
        first = len(bench.rows)
        bench.add(case, FLOAT, "seconds", median(self.variants[FLOAT]))
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
