"""Can this `batch_norm` be? Reasons why not, as in `qat.recipes.checks`."""

from __future__ import annotations

from qat.recipes.schema import Recipe
from qat.recipes.shape import join, show


def reasons(recipe: Recipe) -> list[str]:
    """Why the recipe's `batch_norm` cannot be; empty means it can."""
    norms = recipe.batch_norm
    found = []
    if norms.reestimate < 0:
        found.append(f"batch_norm.reestimate: {norms.reestimate} is not allowed; allowed: 0 or more")
    if not norms.fold:
        if norms.pairs:
            found.append("batch_norm.pairs: it does nothing with fold=false; leave it out, or fold: true")
        return found
    for layer, norm in norms.pairs.items():
        if not layer or not norm:
            found.append('batch_norm.pairs: "" names nothing; write the names of a layer and of the norm after it')
        elif norm.count("*") > layer.count("*"):
            found.append(f"batch_norm.pairs: {show(norm)} has more stars than {show(layer)}, which it belongs to")
    said = "batch_norm.fold: true is not allowed with"
    for name, phase in recipe.phases.items():
        path = join("phases", name)
        for key, usual in (("freeze_oscillating", 0), ("dampen", 0), ("train", "all")):
            if getattr(phase, key) != usual:
                found.append(f"{said} {path}.{key}={show(getattr(phase, key))}; allowed: false, or {show(usual)} there")
    last = list(recipe.phases)[-1] if recipe.phases else None
    if last is not None and not recipe.phases[last].freeze_batch_norm:
        found.append(
            f"{said} {join('phases', last)}.freeze_batch_norm=false: the weights that are deployed have to be those "
            "that were trained under statistics that stay; allowed: false, or freeze_batch_norm: true in the last phase"
        )
    if recipe.init.looks:
        word = "file" if recipe.init.file else "method" if recipe.init.method != "none" else "weighted"
        found.append(
            f"{said} init.{word}={show(getattr(recipe.init, word))}, which knows no norm behind a layer; allowed: "
            "false, or init.method: none, weighted: false"
        )
    return found
