"""Can this `init` be? Reasons why not, as in `qat.recipes.checks`."""

from __future__ import annotations

from qat.recipes.schema import Recipe
from qat.recipes.shape import join, nearest, show

METHODS = ("none", "gptq", "gptq_latent", "blockwise")


def reasons(recipe: Recipe, dynamic: tuple[str, ...]) -> list[str]:
    """Why the recipe's `init` cannot be; empty means it can. dynamic: quantizers whose scales follow the weights."""
    init = recipe.init
    found = []
    if init.method not in METHODS:
        near = nearest(init.method, METHODS)
        found.append(f"init.method: {show(init.method)} is not allowed{near}; allowed: {', '.join(METHODS)}")
    if init.batches < 1:
        found.append(f"init.batches: {show(init.batches)} is not allowed; allowed: 1 or more")
    if init.epochs < 1:
        found.append(f"init.epochs: {show(init.epochs)} is not allowed; allowed: 1 or more")
    if init.lr <= 0:
        found.append(f"init.lr: {show(init.lr)} is not allowed; allowed: more than 0")
    if init.damp < 0:
        found.append(f"init.damp: {show(init.damp)} is not allowed; allowed: 0 or more")
    if init.imatrix is not None and not (init.method == "none" and init.weighted):
        found.append(
            f"init.imatrix: {show(init.imatrix)} is not allowed with method={init.method}, weighted="
            f"{show(init.weighted)}; allowed: null, or method=none with weighted=true"
        )
    if init.file is not None and (init.method != "none" or init.weighted):
        found.append(
            f"init.file: {show(init.file)} is not allowed with method={init.method}, weighted={show(init.weighted)}, "
            "which choose other codes; allowed: null, or method=none with weighted=false"
        )
    if init.weighted and init.method == "blockwise":
        found.append(
            "init.weighted: true is not allowed with method=blockwise, which searches no scales; allowed: false"
        )
    if recipe.train.offload:
        found += _offload(recipe)
    if not init.looks:
        return found
    said, none = ("init.weighted: true", "false") if init.method == "none" else (f"init.method: {init.method}", "none")
    if init.file is not None:
        said, none = f"init.file: {show(init.file)}", "null"
    for name, rule in recipe.rules.items():
        slot = f"{join('rules', name)}.weight"
        # embeddings have no inputs to make good for
        if rule.weight is None or (rule.types and set(rule.types) <= {"Embedding"}):
            continue
        if rule.weight.quantizer in dynamic and init.method != "blockwise":
            found.append(
                f"{said} is not allowed with {slot}.quantizer={rule.weight.quantizer}, whose scales follow the weights"
                f"; allowed: {none}, or quantizer=mse or lsq"
            )
        if init.weighted and rule.weight.percentile is not None:
            found.append(
                f"init.weighted: true is not allowed with {slot}.percentile={show(rule.weight.percentile)}, which "
                "searches nothing; allowed: false"
            )
    first = next(((name, phase) for name, phase in recipe.phases.items() if phase.steps), None)
    if first is not None and not (first[1].quantize and not first[1].bits):
        found.append(
            f"{said} is not allowed with a first phase ({first[0]}) in float or in other bits, after which the weights "
            f"are others; allowed: {none}, or quantize=true and no bits there"
        )
    return found


def _offload(recipe: Recipe) -> list[str]:
    """What a run whose weights lie on disk cannot do."""
    last = join("phases", list(recipe.phases)[-1]) if recipe.phases else "phases"
    words = {
        "train.task": (recipe.train.task, ("causal_lm",)),
        "train.accelerator": (recipe.train.accelerator, ("cpu",)),
        "train.precision": (recipe.train.precision, ("32-true", "bf16-mixed")),
        "train.resume": (recipe.train.resume, (None,)),
        "distill.enabled": (recipe.distill.enabled, (False,)),
        f"{last}.steps": (0 if recipe.phases and recipe.trains_nothing else -1, (0,)),
    }
    return [
        f"train.offload: true is not allowed with {key}={show(value)}; allowed: false, or {key}="
        f"{' or '.join(show(one) for one in allowed)}"
        for key, (value, allowed) in words.items()
        if value not in allowed
    ]
