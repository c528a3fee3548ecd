"""`Schedule`: what is active, what learns and at which strength; a pure function of (recipe, optimizer step)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class State:
    """What holds during one optimizer step.

    strength   0..1 between the float weight and its fake-quantized value (1 once the ramp is over)
    bits       rule name -> bits of its weights in this phase; rules that are missing have their own
    """

    phase: str
    active: bool
    strength: float = 1.0
    freeze_scales: bool = False
    bits: Mapping[str, int] = field(default_factory=dict)
    freeze_batch_norm: bool = False
    freeze_oscillating: float = 0.0
    dampen: float = 0.0
    # learned scales move, codes stay
    fix_codes: bool = False
    # norms are folded, and their statistics still move
    unsettled: bool = False

    @property
    def final(self) -> bool:
        """Whether a forward now computes what an export would pack."""
        return self.active and self.strength >= 1.0 and not self.bits and not self.unsettled


class Schedule:
    """The phases of a recipe laid end to end; the last one lasts until the end of the run."""

    def __init__(self, recipe: Any) -> None:
        self.phases: list[tuple[int, str, Any]] = []
        self.own = {name: rule.weight.bits for name, rule in recipe.rules.items() if rule.weight is not None}
        self.folds: bool = recipe.batch_norm.fold
        start = 0
        last = list(recipe.phases)[-1]
        for name, phase in recipe.phases.items():
            if phase.steps != 0 or name == last:
                self.phases.append((start, name, phase))
            start += max(phase.steps, 0)

    def at(self, step: int) -> State:
        """The state during optimizer step `step` (0 is the first)."""
        start, name, phase = next(
            entry for entry in reversed(self.phases) if entry[0] <= step or entry is self.phases[0]
        )
        if not phase.quantize:
            return State(name, False, 0.0, phase.freeze_scales, freeze_batch_norm=phase.freeze_batch_norm)
        strength = min(1.0, (step - start + 1) / (phase.ramp + 1)) if phase.ramp else 1.0
        bits = {rule: count for rule, count in phase.bits.items() if count != self.own.get(rule)}
        return State(
            name,
            True,
            strength,
            phase.freeze_scales,
            bits,
            phase.freeze_batch_norm,
            phase.freeze_oscillating,
            phase.dampen,
            phase.train == "scales",
            self.folds and not phase.freeze_batch_norm,
        )

    def first_final_step(self) -> int | None:
        """The first step from which on the quantization is fully on until the end; None if it never is."""
        candidates = [start + (phase.ramp if phase.quantize else 0) for start, _, phase in self.phases]
        for candidate in candidates:
            later = [start for start, _, _ in self.phases if start > candidate]
            if all(self.at(step).final for step in (candidate, *later)):
                return candidate
        return None
