"""What quantization does to each layer, in numbers that can be plotted over a run.

sqnr_db         10 log10(sum w^2 / sum (w - w_hat)^2)                       higher is better; 6 dB are about one bit
clipped_pct     weights that lie outside the grid's range (farther from their code than half a step)
changed_pct     codes that differ from an earlier look
drift_pct       mean |s / s_earlier - 1| of the scales
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.convert import convert
from qat.grids import ScaledGrid
from qat.qtensor import QTensor
from qat.steps import full

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

    @property
    def sqnr_db(self) -> float:
        return decibels(self.signal, self.noise)

    @property
    def clipped_pct(self) -> float:
        return 100.0 * self.clipped / max(self.numbers, 1)

    def changed_pct(self, before: Look) -> float:
        return 100.0 * float((self.codes != before.codes).float().mean()) if self.codes.numel() else 0.0

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
    parameters = dict(bundle.module.named_parameters(remove_duplicate=False))
    return {name: _look(bundle[name], full(parameters[name])) for name in bundle}


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
    # bytes: small floats are compared as they lie
    flat = q.codes.reshape(-1).view(torch.uint8)
    return Look(
        signal=float(w.double().square().sum()),
        noise=float(error.double().square().sum()),
        clipped=int(clipped.sum()),
        numbers=w.numel(),
        codes=flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].cpu(),
        scale=q.scale.float().reshape(-1).cpu(),
    )


def summary(now: dict[str, Look], start: dict[str, Look], last: dict[str, Look]) -> dict[str, float]:
    """Metric name -> value: over all weights, and for every parameter under `<metric>/<parameter>`."""
    found: dict[str, float] = {}
    for name, seen in now.items():
        found[f"sqnr_db/{name}"] = seen.sqnr_db
        found[f"clipped_pct/{name}"] = seen.clipped_pct
        found[f"changed_pct/{name}"] = seen.changed_pct(last[name])
        found[f"changed_since_start_pct/{name}"] = seen.changed_pct(start[name])
        found[f"scale_drift_pct/{name}"] = seen.drift_pct(start[name])
    total = max(sum(seen.numbers for seen in now.values()), 1)
    means = {
        key: sum(found[f"{key}/{name}"] * seen.numbers for name, seen in now.items()) / total
        for key in ("clipped_pct", "changed_pct", "changed_since_start_pct", "scale_drift_pct")
    }
    sqnr = decibels(sum(seen.signal for seen in now.values()), sum(seen.noise for seen in now.values()))
    worst = min((seen.sqnr_db for seen in now.values()), default=math.inf)
    return {"sqnr_db": sqnr, "sqnr_db_worst": worst, **means, **found}
