"""Can this recipe be? `check` returns every reason why not, each with the full key path, the value and what is allowed.

What depends on a model (does a rule match, does the group size divide the row) is the plan's to say.
"""

from __future__ import annotations

import dataclasses
import re
from importlib.metadata import entry_points
from importlib.resources import files

from qat.errors import IMPOSSIBLE_FORMATS
from qat.recipes import folding, norms, starting, training
from qat.recipes.schema import Distill, Phase, Recipe, Rule, Slot, Train
from qat.recipes.shape import class_errors, join, nearest, plain_errors, shape_errors, show

# Quantizer -> the zero points that it can find: what is known of these before a model is there. Others are found by
# their files and checked by their class when the model is planned.
WEIGHT_QUANTIZERS = {
    "absmax": ("none",),
    "minmax": ("int", "float"),
    "mse": ("none", "int", "float"),
    "lsq": ("none", "int", "float"),
    "lsq_plus": ("int", "float"),
    "ewgs": ("none", "int", "float"),
    "dual_lsq": ("none",),
    "quest": ("none",),
    "absmean": ("none",),
}
INPUT_QUANTIZERS = {
    "absmax": ("none",),
    "minmax": ("int", "float"),
    "lsq": ("none", "int", "float"),
    "lsq_plus": ("int", "float"),
    "pact": ("none",),
    "ema": ("none", "int", "float"),
    "local": ("none",),
}
# Recomputed in every forward, so they follow a change of bits by themselves; the others keep a scale per input tensor.
DYNAMIC_QUANTIZERS = ("absmax", "minmax", "quest", "absmean")
STATIC_INPUT_QUANTIZERS = ("lsq", "lsq_plus", "pact", "ema")
# What they keep is seen in training.
SEEING_INPUT_QUANTIZERS = (*STATIC_INPUT_QUANTIZERS, "local")
# Ranges that can be a share of the numbers.
PERCENTILE_QUANTIZERS = ("lsq", "ewgs", "ema")
WEIGHT_GRANULARITIES = ("tensor", "channel", "group")
INPUT_GRANULARITIES = ("tensor", "token", "group")
OUTPUT_QUANTIZERS = {name: INPUT_QUANTIZERS[name] for name in ("absmax", "minmax")}
CACHE_QUANTIZERS = {name: zeros for name, zeros in INPUT_QUANTIZERS.items() if name != "local"}
ZERO_POINTS = ("none", "int", "float")
TWO_LEVELS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "nvfp4", "nvfp4_over", "nvfp4_portable", "bnb_nested")
SCALES = ("portable", "fp32", "fp16", "bf16", "e8m0", *TWO_LEVELS, "exl2")
# grids with bits of their own; integers have those of the recipe
GRID_BITS = {"ternary": 2, "seq": 2, "binary": 1, "nf4": 4, "bnb_fp4": 4, "iq4_nl": 4, "fp4": 4, "e4m3": 8, "e5m2": 8}
GRIDS = ("int", *GRID_BITS)
BACKWARDS = ("float", "int8", "int8_dgrad")
LOSSES = ("kl", "kl_topk", "cakld", "mse", "cosine")
TASKS = ("causal_lm", "image_classification", "sentence_embedding")
SCHEDULERS = ("cosine", "constant")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true")
LOGGERS = ("none", "csv", "wandb")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def format_names() -> list[str]:
    """Export formats that are installed, found by their files and entry points; none of them is imported."""
    own = [name.replace("_", "-") for name in _files_of("export", "formats")]
    return sorted({*own, *(point.name for point in entry_points(group="qat.formats"))})


def quantizer_names() -> list[str]:
    """Quantizers that are installed, found in the same way: a quantizer's file is called like the quantizer."""
    own = [name for name in _files_of("quantizers") if name != "base"]
    return sorted({*own, *(point.name for point in entry_points(group="qat.quantizers"))})


def _files_of(*folders: str) -> list[str]:
    """Module names in a folder of the package, read from the disk."""
    folder = files("qat").joinpath(*folders)
    found = [entry.name for entry in (folder.iterdir() if folder.is_dir() else ())]
    return [name[: -len(".py")] for name in found if name.endswith(".py") and not name.startswith("_")]


def check(recipe: Recipe) -> list[str]:
    """Why this recipe cannot be; empty means it can."""
    data = dataclasses.asdict(recipe)
    found = plain_errors(data) or shape_errors(data)
    if not found:
        found = [f"{path}: {kind}" for path, kind in class_errors(recipe)]
    if found:
        return found
    if not _NAME.fullmatch(recipe.name):
        found.append(f'name: {show(recipe.name)} is not allowed; use letters, digits, ".", "_" and "-"')
    if not recipe.rules:
        found.append("rules: there is no rule, so nothing would be quantized; add one, e.g. linears: {types: [Linear]}")
    for name, rule in recipe.rules.items():
        found += _rule(rule, join("rules", name))
    if recipe.rules and all(not _slots(rule) for rule in recipe.rules.values()):
        found.append(
            "rules: no rule has a weight, an input or a cache, so nothing would be quantized; add one to a rule"
        )
    found += _phases(recipe)
    found += folding.reasons(recipe)
    found += starting.reasons(recipe, DYNAMIC_QUANTIZERS)
    found += norms.reasons(recipe)
    found += _distill(recipe.distill)
    if recipe.distill.hidden > 0 and not recipe.distill.enabled:
        found.append(f"distill.hidden: {show(recipe.distill.hidden)} does nothing with enabled=false; allowed: 0")
    elif recipe.distill.hidden > 0 and recipe.train.task == "sentence_embedding":
        found.append(
            f"distill.hidden: {show(recipe.distill.hidden)} is not allowed with train.task=sentence_embedding, which "
            "compares embeddings alone; allowed: 0"
        )
    found += _targets(recipe.export.targets)
    return found + _train(recipe.train)


def _one_of(path: str, value: str, allowed: tuple[str, ...] | list[str]) -> list[str]:
    if value in allowed:
        return []
    return [f"{path}: {show(value)} is not allowed{nearest(value, allowed)}; allowed: {', '.join(allowed) or 'none'}"]


def _at_least(path: str, value: float, least: int) -> list[str]:
    return [] if value >= least else [f"{path}: {show(value)} is not allowed; allowed: {least} or more"]


def _within(path: str, value: float, ends: str) -> list[str]:
    """`ends` as mathematicians write intervals between 0 and 1: `[0, 1]`, `[0, 1)`, `(0, 1]`."""
    inside = 0 < value < 1 or (value == 0 and ends[0] == "[") or (value == 1 and ends[-1] == "]")
    return [] if inside else [f"{path}: {show(value)} is not allowed; allowed: {ends}"]


def _bits(path: str, bits: int, slot: Slot) -> list[str]:
    found = [] if 1 <= bits <= 8 else [f"{path}: {show(bits)} is not allowed; allowed: 1..8"]
    if slot.narrow and bits == 1:
        found.append(f"{path}: 1 is not allowed with narrow=true, it would leave the single code 0; allowed: 2..8")
    return found


def _rule(rule: Rule, path: str) -> list[str]:
    found = []
    if not rule.match:
        found.append(f'{path}.match: [] matches nothing; write ["*"] for every layer')
    for index, pattern in enumerate(rule.match):
        where = f"{path}.match[{index}]"
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as problem:
                found.append(f"{where}: {show(pattern)} is not a regular expression: {problem}")
        elif not pattern:
            found.append(f'{where}: "" matches nothing; write a glob like "*mlp*"')
    for index, name in enumerate(rule.types):
        if not name.isidentifier():
            found.append(f"{path}.types[{index}]: {show(name)} is not the short name of a class, like Linear")
    if rule.keep_float:
        for key in ("weight", "input", "output", "cache", "backward"):
            if getattr(rule, key) is not None:
                found.append(f"{path}.keep_float: true is not allowed beside {path}.{key}; leave one of them out")
    elif not _slots(rule) and rule.backward is None:
        found.append(f"{path}: the rule does nothing; give it a weight, an input, a backward or keep_float: true")
    if rule.backward is not None:
        found += _one_of(f"{path}.backward", rule.backward, BACKWARDS)
    if rule.weight is not None:
        found += _slot(rule.weight, f"{path}.weight", WEIGHT_GRANULARITIES, WEIGHT_QUANTIZERS)
        if not rule.weight.is_signed and rule.weight.zero_point == "none":
            found.append(
                f"{path}.weight.signed: false is not allowed with zero_point=none, every negative weight would be 0; "
                "allowed: true, or zero_point=int or float"
            )
        if rule.weight.desc_act and (rule.weight.granularity != "group" or rule.weight.quantizer in DYNAMIC_QUANTIZERS):
            found.append(
                f"{path}.weight.desc_act: true is not allowed with granularity={rule.weight.granularity}, quantizer="
                f"{rule.weight.quantizer}; allowed: false, or granularity=group and quantizer=mse or lsq, which keep it"
            )
    for key in ("input", "output", "cache"):
        slot = getattr(rule, key)
        if slot is not None and slot.desc_act:
            found.append(f"{path}.{key}.desc_act: true is not allowed, it is about weights; allowed: false")
    if rule.cache is not None and rule.types == ["Attention"] and len(_slots(rule)) > 1:
        found.append(f"{path}.types: [Attention] has no weight, input or output; give {path}.cache a rule of its own")
    if rule.output is not None:
        found += _slot(rule.output, f"{path}.output", ("token", "group"), OUTPUT_QUANTIZERS)
    for key, slot, quantizers in (("input", rule.input, INPUT_QUANTIZERS), ("cache", rule.cache, CACHE_QUANTIZERS)):
        if slot is not None:
            found += _slot(slot, f"{path}.{key}", INPUT_GRANULARITIES, quantizers)
        if slot is not None and slot.granularity in ("token", "group") and slot.quantizer in STATIC_INPUT_QUANTIZERS:
            found.append(
                f"{path}.{key}.granularity: {show(slot.granularity)} is not allowed with quantizer={slot.quantizer}, "
                "whose range is fixed before a token is seen; allowed: tensor, or quantizer=absmax or minmax"
            )
    return found


def _slots(rule: Rule) -> list[Slot]:
    return [slot for slot in (rule.weight, rule.input, rule.output, rule.cache) if slot is not None]


def _slot(slot: Slot, path: str, granularities: tuple[str, ...], quantizers: dict[str, tuple[str, ...]]) -> list[str]:
    described = {*WEIGHT_QUANTIZERS, *INPUT_QUANTIZERS}
    known = [*quantizers, *(name for name in quantizer_names() if name not in described)]
    found = [
        *_bits(f"{path}.bits", slot.bits, slot),
        *_one_of(f"{path}.granularity", slot.granularity, granularities),
        *_one_of(f"{path}.zero_point", slot.zero_point, ZERO_POINTS),
        *_one_of(f"{path}.scale", slot.scale, SCALES),
        *_one_of(f"{path}.grid", slot.grid, GRIDS),
        *_one_of(f"{path}.quantizer", slot.quantizer, known),
        *_grid(slot, path),
    ]
    if slot.granularity == "group" and slot.group_size is None:
        found.append(f"{path}.group_size: null is not allowed with granularity=group; give one, e.g. 32 or 128")
    if slot.granularity != "group" and slot.group_size is not None:
        found.append(
            f"{path}.group_size: {show(slot.group_size)} is not allowed with granularity={slot.granularity}; "
            "allowed: null, or granularity=group"
        )
    if slot.group_size is not None:
        found += _at_least(f"{path}.group_size", slot.group_size, 1)
    if slot.zero_point == "float" and slot.signed:
        found.append(
            f"{path}.signed: true is not allowed with zero_point=float, whose codes count up from the minimum; "
            "allowed: null, false"
        )
    if slot.narrow and not slot.is_signed:
        found.append(
            f"{path}.narrow: true is not allowed for unsigned codes (zero_point={slot.zero_point}, "
            f"signed={show(slot.signed)}); allowed: false"
        )
    zero_points = quantizers.get(slot.quantizer, ZERO_POINTS)
    if slot.zero_point in ZERO_POINTS and slot.zero_point not in zero_points:
        found.append(
            f"{path}.zero_point: {show(slot.zero_point)} is not allowed with quantizer={slot.quantizer}; "
            f"allowed: {', '.join(zero_points)}"
        )
    return found


def _grid(slot: Slot, path: str) -> list[str]:
    found = []
    bits = GRID_BITS.get(slot.grid)
    if bits is not None:
        said = f"is not allowed with grid={slot.grid}"
        if slot.bits != bits:
            found.append(f"{path}.bits: {show(slot.bits)} {said}; allowed: {bits}")
        if slot.zero_point != "none":
            found.append(f"{path}.zero_point: {show(slot.zero_point)} {said}; allowed: none")
        if slot.signed is False:
            found.append(f"{path}.signed: false {said}; allowed: null, true")
        if slot.narrow and slot.grid != "ternary":
            found.append(f"{path}.narrow: true {said}; allowed: false")
    if slot.percentile is not None:
        said = f"{path}.percentile: {show(slot.percentile)} is not allowed"
        if not 50.0 < slot.percentile <= 100.0:
            found.append(f"{said}; allowed: (50, 100], e.g. 99.9")
        if slot.quantizer in {*WEIGHT_QUANTIZERS, *INPUT_QUANTIZERS} - {*PERCENTILE_QUANTIZERS}:
            found.append(f"{said} with quantizer={slot.quantizer}; allowed: null, or quantizer=lsq (ema for inputs)")
        if slot.signed_scale:
            found.append(f"{said} with signed_scale=true, of which it says no sign; allowed: null")
    if slot.signed_scale:
        said = f"{path}.signed_scale: true is not allowed with"
        if slot.grid not in ("int", "iq4_nl") or slot.zero_point != "none" or not slot.is_signed or slot.narrow:
            found.append(
                f"{said} these codes; allowed: false, or grid=int (iq4_nl), zero_point=none, signed codes, narrow=false"
            )
        if slot.quantizer in DYNAMIC_QUANTIZERS:
            found.append(f"{said} quantizer={slot.quantizer}; allowed: false, or quantizer=mse or lsq")
        if slot.scale == "e8m0":
            found.append(f"{said} scale=e8m0, which has no sign; allowed: false, or another scale")
    if slot.scale == "e8m0" and slot.zero_point != "none":
        said = f'{path}.scale: "e8m0" is not allowed with zero_point={slot.zero_point}'
        found.append(f"{said}; allowed: {', '.join(name for name in SCALES[:4])}, or zero_point=none")
    return found


def _phases(recipe: Recipe) -> list[str]:
    if not recipe.phases:
        return ["phases: there is none; write qat: {steps: -1}"]
    found = []
    last = list(recipe.phases)[-1]
    for name, phase in recipe.phases.items():
        path = join("phases", name)
        if name == last and phase.steps not in (-1, 0):
            found.append(
                f"{path}.steps: {phase.steps} is not allowed in the last phase; allowed: -1 (until the end), or 0 (no "
                "training)"
            )
        if name == last != next(iter(recipe.phases)) and phase.steps == 0:
            found.append(f"{path}.steps: 0, no training, is not allowed after other phases; allowed: -1")
        if name != last and phase.steps < 0:
            found.append(f"{path}.steps: {phase.steps} is not allowed before the last phase; allowed: 0 or more")
        found += _within(f"{path}.freeze_oscillating", phase.freeze_oscillating, "[0, 1)")
        found += _at_least(f"{path}.dampen", phase.dampen, 0)
        found += _at_least(f"{path}.ramp", phase.ramp, 0)
        if phase.ramp > phase.steps >= 0:
            found.append(f"{path}.ramp: {phase.ramp} is longer than the phase; allowed: 0..{phase.steps}")
        if phase.ramp > 0 and not phase.quantize:
            found.append(f"{path}.ramp: {phase.ramp} is not allowed with quantize=false; allowed: 0")
        if phase.bits and not phase.quantize:
            found.append(f"{path}.bits: {show(phase.bits)} is not allowed with quantize=false; allowed: {{}}")
        for key in ("freeze_oscillating", "dampen"):
            if getattr(phase, key) and not phase.quantize:
                found.append(
                    f"{path}.{key}: {show(getattr(phase, key))} is not allowed with quantize=false; allowed: 0"
                )
        for key, rule in recipe.rules.items() if phase.freeze_oscillating else ():
            if rule.weight is not None and rule.weight.quantizer in DYNAMIC_QUANTIZERS:
                found.append(
                    f"{path}.freeze_oscillating: {show(phase.freeze_oscillating)} is not allowed with "
                    f"{join('rules', key)}.weight.quantizer={rule.weight.quantizer}, whose scales would follow the "
                    "weights that are held; allowed: 0, or quantizer=mse or lsq"
                )
        found += _phase_bits(phase, path, recipe.rules)
        found += training.reasons(phase, path, recipe)
        kept = [(f"{join('rules', key)}.input", rule.input) for key, rule in recipe.rules.items()]
        kept += [(f"{join('rules', key)}.cache", rule.cache) for key, rule in recipe.rules.items()]
        static = [(key, slot.quantizer) for key, slot in kept if slot and slot.quantizer in SEEING_INPUT_QUANTIZERS]
        if phase.steps == 0 and name == last and static:
            found.append(
                f"{path}.steps: 0 is not allowed with {static[0][0]}.quantizer={static[0][1]}, whose range is seen in "
                "training; allowed: -1, or quantizer=absmax or minmax"
            )
    if not any(phase.quantize for phase in recipe.phases.values()):
        found.append("phases: none of them quantizes; set quantize: true in the last one")
    return found


def _phase_bits(phase: Phase, path: str, rules: dict[str, Rule]) -> list[str]:
    found = []
    allowed = [name for name, rule in rules.items() if rule.weight is not None]
    for name, bits in phase.bits.items():
        where = f"{path}.bits.{name}"
        rule = rules.get(name)
        if rule is None or rule.weight is None:
            what = "there is no such rule" if rule is None else "the rule has no weight"
            found.append(f"{where}: {what}{nearest(name, allowed)}; allowed: {', '.join(allowed) or 'none'}")
            continue
        if rule.weight.grid in GRID_BITS:
            found.append(f"{where}: {bits} is not allowed for grid={rule.weight.grid}, whose bits are fixed")
            continue
        found += _bits(where, bits, rule.weight)
        if rule.weight.zero_point != "none" and rule.weight.quantizer not in DYNAMIC_QUANTIZERS:
            found.append(
                f"{where}: {bits} is not allowed for a weight with zero_point={rule.weight.zero_point} and "
                f"quantizer={rule.weight.quantizer}, whose zero point is kept; allowed: zero_point=none, or "
                f"quantizer={' or '.join(DYNAMIC_QUANTIZERS[:2])}"
            )
    return found


def _distill(distill: Distill) -> list[str]:
    found = _one_of("distill.loss", distill.loss, LOSSES)
    found += _within("distill.weight", distill.weight, "[0, 1]")
    if distill.enabled and distill.weight == 0:
        found.append("distill.weight: 0 is not allowed with enabled=true; allowed: (0, 1], or enabled=false")
    if distill.hidden < 0:
        found.append(f"distill.hidden: {show(distill.hidden)} is not allowed; allowed: 0 or more")
    if distill.temperature <= 0:
        found.append(f"distill.temperature: {show(distill.temperature)} is not allowed; allowed: more than 0")
    return found


def _targets(targets: list[str]) -> list[str]:
    found = []
    for index, target in enumerate(targets):
        where = f"export.targets[{index}]"
        if target in IMPOSSIBLE_FORMATS:
            found.append(f"{where}: {show(target)} is not allowed: {IMPOSSIBLE_FORMATS[target]}")
        else:
            found += _one_of(where, target, format_names())
        if target in targets[:index]:
            found.append(f"{where}: {show(target)} is there twice; leave one out")
    return found


def _train(train: Train) -> list[str]:
    found = [
        *_one_of("train.task", train.task, TASKS),
        *_one_of("train.scheduler", train.scheduler, SCHEDULERS),
        *_one_of("train.precision", train.precision, PRECISIONS),
        *_one_of("train.logger", train.logger, LOGGERS),
        *_within("train.val_fraction", train.val_fraction, "[0, 1)"),
        *_within("train.warmup_fraction", train.warmup_fraction, "[0, 1]"),
    ]
    for key in ("seq_len", "batch_size", "accumulate", "max_steps", "val_every", "num_nodes"):
        found += _at_least(f"train.{key}", getattr(train, key), 1)
    for key in ("weight_decay", "gradient_clip", "num_workers", "seed"):
        found += _at_least(f"train.{key}", getattr(train, key), 0)
    if train.lr <= 0:
        found.append(f"train.lr: {show(train.lr)} is not allowed; allowed: more than 0")
    if len(train.betas) != 2:
        found.append(f"train.betas: {show(train.betas)} is not allowed; allowed: two numbers, e.g. [0.9, 0.95]")
    for index, beta in enumerate(train.betas):
        found += _within(f"train.betas[{index}]", beta, "[0, 1)")
    for key in ("text_key", "chat_key", "image_key", "label_key", "accelerator", "devices", "strategy"):
        if not getattr(train, key):
            found.append(f'train.{key}: "" is not allowed; leave it out for the default')
    return found
