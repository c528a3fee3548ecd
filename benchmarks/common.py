"""What both suites share: rows, the environment beside them, and turns taken by variants that live in one process.

A row is flat: {suite, case, tool, metric, value, goal, better}.

    value    a number; for the metric "missing" the reason why this tool has no figures in this case
    goal     the number to reach, or null where the row is only reported
    better   "lower", "higher" or "" (not to be compared)

Ratios are formed inside one case: every variant takes its turn in each round, so a noisy neighbour meets all alike, and
a second float model says how far apart two equal things were in that very run.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIELDS = ("suite", "case", "tool", "metric", "value", "goal", "better")
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "torchao",
    "brevitas",
    "nvidia-modelopt",
    "bitsandbytes",
    "xllamacpp",
    "numpy",
)
FLOAT, AGAIN = "float", "float again"

Row = dict[str, Any]


class Missing(Exception):
    """A tool cannot take part; the text is the reason that its row gives."""


def row(
    suite: str, case: str, tool: str, metric: str, value: float | str, goal: float | None = None, better: str = "lower"
) -> Row:
    return dict(zip(FIELDS, (suite, case, tool, metric, value, goal, better), strict=True))


def missing(suite: str, case: str, tool: str, reason: str) -> Row:
    """The row of a tool that has no figures in a case."""
    return row(suite, case, tool, "missing", " ".join(reason.split())[:300], better="")


def met(entry: Row) -> bool | None:
    """Whether a row reaches its goal; None if it has none."""
    if entry["goal"] is None or isinstance(entry["value"], str):
        return None
    return bool(entry["value"] <= entry["goal"] if entry["better"] == "lower" else entry["value"] >= entry["goal"])


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def chip() -> str:
    """The processor's own name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def revision() -> str:
    """The commit that was measured, with a plus sign if the tree differed from it; "unknown" outside git."""
    try:
        shown = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(**extra: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"chip": chip(), "python": platform.python_version()}
    found |= {name: version(name) for name in PACKAGES if version(name) is not None}
    found |= {"threads": torch.get_num_threads(), "revision": revision()}
    return found | extra | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def save(path: Path, where: dict[str, Any], rows: Sequence[Row]) -> None:
    """The results file: environment, then one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(entry) for entry in rows)
    head = json.dumps(where, indent=2)
    path.write_text(f'{{\n"environment": {head},\n"rows": [\n{lines}\n]\n}}\n', encoding="utf-8")


def verdict(rows: Iterable[Row]) -> str:
    """How many goals were met, and the rows that missed theirs."""
    judged = [(entry, met(entry)) for entry in rows if met(entry) is not None]
    lines = [f"{sum(bool(ok) for _, ok in judged)} of {len(judged)} goals met"]
    for entry, ok in judged:
        if not ok:
            where = f"{entry['case']} | {entry['tool']} | {entry['metric']}"
            lines.append(f"  missed: {where}: {entry['value']:.4g} (goal {entry['goal']:.4g})")
    return "\n".join(lines)


@dataclass
class Variant:
    """One model in training: `run` is its forward (perhaps compiled), `after` what its tool asks for after a step.

    family   "float", or one of `benchmarks.schemes`: it is compared with others of its own
    times    of its steps: seconds of each micro-batch and of the optimizer's step, or of all of it
    """

    tool: str
    family: str
    model: nn.Module
    run: Callable[[Any], Tensor]
    optimizer: torch.optim.Optimizer
    after: Callable[[], object] = lambda: None
    quantized_weights: int = 0
    times: list[Sequence[float]] = field(default_factory=list)

    def micro_batch(self, batch: Any, parts: int) -> Tensor:
        """Forward and backward; the loss."""
        loss = self.run(batch) / parts
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def finish(self) -> None:
        """Optimizer step, and gradients dropped."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after()

    def step(self, batch: Any, parts: int) -> Tensor:
        """One optimizer step of `parts` micro-batches; the loss of the last."""
        loss = torch.zeros(())
        for _ in range(parts):
            loss = self.micro_batch(batch, parts)
        self.finish()
        return loss


def compiled(model: nn.Module, backend: str = "inductor") -> Callable[[Any], Tensor]:
    """The model's forward under torch.compile, with a code object of its own: compiled code is kept, looked up and
    limited per code object, so that models of one class would otherwise share one short list."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    # past the limit it would run eagerly and say nothing
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    def call(batch: Any) -> Any:
        return model(batch)

    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    return torch.compile(own, dynamic=False, backend=backend)


def take_turns(
    variants: Sequence[Variant],
    turn: Callable[[Variant], Iterable[Sequence[float]]],
    rounds: int,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Fill `times`: each round starts with the next variant, so that none is always the first.

    `enough` is asked after each round but the first; True ends it early.
    """
    for variant in variants:
        variant.times.clear()
    for number in range(rounds):
        if number and enough():
            break
        gc.collect()
        gc.disable()
        try:
            start = number % len(variants)
            for variant in (*variants[start:], *variants[:start]):
                variant.times += turn(variant)
        finally:
            gc.enable()


def least(variant: Variant) -> float:
    """Seconds of a step of which each part goes as fast as it ever did, so that what disturbs some of each step counts
    for nothing; micro-batches after the first do the same work."""
    parts = [min(seconds) for seconds in zip(*variant.times, strict=True)]
    alike = parts[1:-1]
    return sum(parts) if not alike else parts[0] + len(alike) * min(alike) + parts[-1]


def median(variant: Variant) -> float:
    """Seconds of a step."""
    return statistics.median(map(sum, variant.times))


def ratios(variants: Sequence[Variant]) -> dict[str, tuple[float, float]]:
    """Tool -> (`least`, `median`) over those of `float`."""
    base = next(variant for variant in variants if variant.tool == FLOAT)
    return {v.tool: (least(v) / least(base), median(v) / median(base)) for v in variants}


def against_peers(
    suite: str, case: str, rows: Sequence[Row], families: dict[str, str], metrics: Sequence[str]
) -> list[Row]:
    """For each of our tools and each metric: our figure over the best peer's of the same family; below 1 is ahead.

    families   tool -> family; ours start with "qat"
    """
    values = {(r["tool"], r["metric"]): r["value"] for r in rows if r["case"] == case and r["metric"] in metrics}
    found = []
    for tool, family in families.items():
        if not tool.startswith("qat"):
            continue
        peers = [t for t, f in families.items() if f == family and not t.startswith("qat")]
        for metric in metrics:
            theirs = [values[peer, metric] for peer in peers if (peer, metric) in values]
            if theirs and (tool, metric) in values and min(theirs) > 0:
                ratio = values[tool, metric] / min(theirs)
                found.append(row(suite, case, tool, f"{metric} / best peer", ratio, 1.0))
    return found
