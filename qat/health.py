"""What quantization does to each layer, in numbers that can be plotted over a run.

sqnr_db         10 log10(sum w^2 / sum (w - w_hat)^2)                       higher is better; 6 dB are about one bit
clipped_pct     weights that lie outside the grid's range (farther from their code than half a step)
changed_pct     codes that differ from an earlier look
turned_pct      codes that moved since the last look, against the direction of their move before: with a look at every
                step the share of oscillating weights (Nagel et al. 2022, equation 4)
oscillating_pct, frozen_pct
                of weights that are counted step by step (`qat.oscillation`)
drift_pct       mean |s / s_earlier - 1| of the scales
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qat.convert import convert
from qat.grids import FloatGrid, Grid, ScaledGrid
from qat.oscillation import share
from qat.qtensor import QTensor

# Codes of a tensor that are compared over time; a sample is enough and costs one byte each.
_SAMPLED = 1 << 16
# Half a step, with room for fp32 rounding.
_INSIDE = 0.5 * (1 + 1e-4)


@dataclass(frozen=True)
class Look:
    """One parameter at one moment; `codes` are a sample, `signal` and `noise` sums of squares."""

    signal: float
    noise: float
    clipped: int
    numbers: int
    codes: Tensor
    scale: Tensor
    # of each code's last move, -1 or 1; 0: it has not moved yet. And the % that turned back in this look
    direction: Tensor | None = None
    turned_pct: float = 0.0
    oscillating_pct: float | None = None
    frozen_pct: float | None = None

    @property
    def sqnr_db(self) -> float:
        return decibels(self.signal, self.noise)

    @property
    def clipped_pct(self) -> float:
        return 100.0 * self.clipped / max(self.numbers, 1)

    def changed_pct(self, before: Look) -> float:
        return 100.0 * float((self.codes != before.codes).float().mean()) if self.codes.numel() else 0.0

    def after(self, before: Look) -> Look:
        """This look with what its moves since `before` say."""
        moved = torch.sign(self.codes - before.codes)
        last = torch.zeros_like(moved) if before.direction is None else before.direction
        turned = (moved != 0) & (moved == -last)
        back = 100.0 * float(turned.float().mean()) if turned.numel() else 0.0
        return replace(self, direction=torch.where(moved != 0, moved, last), turned_pct=back)

    def drift_pct(self, before: Look) -> float:
        return 100.0 * float((self.scale / before.scale - 1.0).abs().mean()) if self.scale.numel() else 0.0


def decibels(signal: float, noise: float) -> float:
    """inf where nothing is lost, -inf for an empty signal."""
    if noise <= 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


@torch.no_grad()
def look(model: nn.Module) -> dict[str, Look]:
    """Parameter name -> look, on the grid that will be deployed. Collective where weights are sharded."""
    bundle = convert(model, require_final=False)
    counted = share(bundle.module)
    found = {name: _look(bundle[name], bundle.latents(name)) for name in bundle}
    for name, (oscillating, frozen) in counted.items():
        if name in found:
            found[name] = replace(found[name], oscillating_pct=oscillating, frozen_pct=frozen)
    return found


def _look(q: QTensor, w: Tensor) -> Look:
    rows = q.layout.to_rows(w).float()
    error = rows - q.layout.to_rows(q.dequantize(torch.float32))
    groups = q.scale.shape[-1]

    def in_steps(t: Tensor) -> Tensor:
        return t.reshape(*q.scale.shape[:-1], groups, -1) / q.scale.float().unsqueeze(-1)

    if isinstance(q.spec.grid, ScaledGrid):
        low, high = q.spec.grid.ends
        v = in_steps(rows)
        clipped = (v < low) | (v > high)
    else:
        clipped = in_steps(error).abs() > _INSIDE
    flat = _in_order(q.codes.reshape(-1), q.spec.grid)
    return Look(
        signal=float(w.double().square().sum()),
        noise=float(error.double().square().sum()),
        clipped=int(clipped.sum()),
        numbers=w.numel(),
        codes=flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].cpu(),
        scale=q.scale.float().reshape(-1).cpu(),
    )


def _in_order(codes: Tensor, grid: Grid) -> Tensor:
    """Codes as int16 in the order of their numbers; those of small floats have their sign in the highest bit."""
    if not isinstance(grid, FloatGrid):
        return codes.to(torch.int16)
    sign, bits = 1 << (grid.bits - 1), codes.view(torch.uint8).to(torch.int16)
    return torch.where(bits >= sign, sign - 1 - bits, bits)


def summary(now: dict[str, Look], start: dict[str, Look], last: dict[str, Look]) -> dict[str, float]:
    """Metric name -> value: over all weights, and for every parameter under `<metric>/<parameter>`."""
    found: dict[str, float] = {}
    for name, seen in now.items():
        found[f"sqnr_db/{name}"] = seen.sqnr_db
        found[f"clipped_pct/{name}"] = seen.clipped_pct
        found[f"changed_pct/{name}"] = seen.changed_pct(last[name])
        found[f"changed_since_start_pct/{name}"] = seen.changed_pct(start[name])
        found[f"scale_drift_pct/{name}"] = seen.drift_pct(start[name])
        found[f"turned_pct/{name}"] = seen.turned_pct
        for key, value in (("oscillating_pct", seen.oscillating_pct), ("frozen_pct", seen.frozen_pct)):
            if value is not None:
                found[f"{key}/{name}"] = value
    total = max(sum(seen.numbers for seen in now.values()), 1)
    means = {
        key: sum(found[f"{key}/{name}"] * seen.numbers for name, seen in now.items()) / total
        for key in ("clipped_pct", "changed_pct", "changed_since_start_pct", "scale_drift_pct", "turned_pct")
    }
    for key in ("oscillating_pct", "frozen_pct"):
        counted = {name: found[f"{key}/{name}"] for name in now if f"{key}/{name}" in found}
        if counted:
            numbers = sum(now[name].numbers for name in counted)
            means[key] = sum(value * now[name].numbers for name, value in counted.items()) / max(numbers, 1)
    sqnr = decibels(sum(seen.signal for seen in now.values()), sum(seen.noise for seen in now.values()))
    worst = min((seen.sqnr_db for seen in now.values()), default=math.inf)
    return {"sqnr_db": sqnr, "sqnr_db_worst": worst, **means, **found}
