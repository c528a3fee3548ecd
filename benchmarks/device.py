"""What the parts of the GPU suite share: sizes, the rows so far, timing and memory of the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.common import Row, missing, row
from benchmarks.models import LlamaShape

SUITE = "gpu"
BLOCK = LlamaShape()


@dataclass(frozen=True)
class Sizes:
    """Everything that a dry run makes small."""

    shape: LlamaShape = BLOCK
    sequence: int = 2048
    # width, hidden, layers and group of the weights that one launch takes
    many: tuple[int, int, int, int] = (1024, 2816, 8, 128)
    # tokens of a micro-batch, the most telling first: time may run out
    tokens: tuple[int, ...] = (8192, 2048, 32768)
    weight: tuple[int, int] = (28672, 4096)
    product: tuple[int, int, int] = (8192, 4096, 14336)
    gates: tuple[tuple[int, int, int], ...] = ((96, 384, 32), (130, 1008, 24))
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
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
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
