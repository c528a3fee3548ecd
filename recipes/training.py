"""Can a phase train what it says? (`phases.*.train`)"""

from __future__ import annotations

from qat.recipes.schema import Phase, Recipe
from qat.recipes.shape import nearest, show

TRAINS = ("all", "scales")
# quantizers whose scales do not learn
_LEARNS_NOTHING = ("absmax", "minmax", "mse", "ema", "quest", "absmean")


def reasons(phase: Phase, path: str, recipe: Recipe) -> list[str]:
    found: list[str] = []
    said = f'{path}.train: "scales" is not allowed'
    for key in ("freeze_oscillating", "dampen"):
        found += [
            f"{path}.{key}: {show(getattr(phase, key))} is not allowed with rules.{name}.weight.quantizer=dual_lsq, "
            "whose codes have a scale of their own; allowed: 0, or quantizer=lsq"
            for name, rule in recipe.rules.items()
            if getattr(phase, key) and rule.weight is not None and rule.weight.quantizer == "dual_lsq"
        ]
    if phase.train not in TRAINS:
        near = nearest(phase.train, TRAINS)
        return [*found, f"{path}.train: {show(phase.train)} is not allowed{near}; allowed: {', '.join(TRAINS)}"]
    if phase.train != "scales":
        return found
    if any(other.train != "scales" for other in recipe.phases.values()):
        found.append(f"{said} beside phases that train weights; allowed: all, or scales in every phase")
    for key, wrong in (
        ("quantize", not phase.quantize),
        ("bits", phase.bits),
        ("freeze_scales", phase.freeze_scales),
        ("freeze_oscillating", phase.freeze_oscillating),
        ("dampen", phase.dampen),
    ):
        if wrong:
            found.append(f"{said} with {key}={show(getattr(phase, key))}; allowed: all")
    for name, rule in recipe.rules.items():
        if rule.weight is not None and rule.weight.quantizer == "dual_lsq":
            where = f"rules.{name}.weight.quantizer"
            found.append(f"{said} with {where}=dual_lsq, whose codes have a scale of their own; allowed: all, or lsq")
        if rule.weight is not None and rule.weight.quantizer == "lsq_plus":
            where = f"rules.{name}.weight.quantizer"
            found.append(f"{said} with {where}=lsq_plus, whose zero points belong to the codes; allowed: all, or lsq")
    if all(rule.weight is None or rule.weight.quantizer in _LEARNS_NOTHING for rule in recipe.rules.values()):
        found.append(f"{said} where no weight has a learned scale; allowed: all, or quantizer=lsq")
    return found
