"""Bits for each layer, for a target of stored bits per weight: `allocate(model, recipe, batches, bits=4.25)`.

For each layer, and each number of bits that its rule's grid and the export targets can hold, the model runs with that
layer alone on its grid, and its outputs are compared with the float model's by the loss that distillation takes. Then

    minimize    sum over layers of loss[layer, bits]
    subject to  one number of bits for each layer,
                stored bits per weight, as each target counts them, at most the target

which is a multiple-choice knapsack, for scipy's solver of integer programs (HiGHS).

The error of a layer's own outputs, absolute or relative, is cheaper and says little of what the next layers make of it:
docs/allocation.md has figures.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from qat.adapters import Adapters
from qat.convert import Bundle, convert
from qat.distill import LOSSES, output_of, shifts, token_mask
from qat.errors import QATError, refuse_if
from qat.export import Format, get_format
from qat.init.gptq import calibrating
from qat.init.walk import Forward, Shared, call_model
from qat.plan import PlanRow, deployed, spec_of
from qat.prepare import as_recipe, is_prepared, prepare, unprepare
from qat.quantizers import quantizer_class
from qat.recipes.schema import Init, Recipe, Rule, Slot
from qat.scales import SCALE_GRIDS, TwoLevel
from qat.state import require_state
from qat.steps import qat_layers

log = logging.getLogger(__name__)

_ALL = range(2, 9)
_KQUANT = re.compile(r"q\d_k")


@dataclass
class Unit:
    """Layers that share their weights, mostly one.

    layers   names, as rules say them
    rule     the rule that gives them their grid
    slots    bits -> the weight of the rule with these bits, of those that every target holds
    stored   bits -> stored bits for each target, in their order; 0 where a target does not count the layer
    losses   bits -> the loss with these layers alone on that grid
    """

    layers: list[str]
    rule: str
    slots: dict[int, Slot]
    stored: dict[int, list[float]]
    losses: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """recipe    the one given, with a rule for each rule and number of bits, of layers by name
    bits      layer -> bits
    loss      sum of the measured losses
    reached   target -> stored bits per weight as that format counts them
    """

    recipe: Recipe
    bits: dict[str, int]
    loss: float
    reached: dict[str, float]


@torch.no_grad()
def allocate(
    model: nn.Module,
    recipe: Recipe | str | PathLike[str],
    batches: Iterable[Any],
    bits: float,
    *,
    choices: Sequence[int] = (),
    rules: Sequence[str] = (),
    loss: str = "kl",
    forward: Forward | None = None,
    tokenizer: Any = None,
) -> Allocation:
    """Choose bits for the layers of a float model that `recipe` puts on grids of integers; the model stays as it is.

    batches      a mapping -> model(**b), a tuple -> model(*b), else model(b); each is run once for every layer and
                 choice, and the float outputs of all are held
    bits         stored bits per weight that no target of `recipe.export` may exceed
    choices      bits of a layer's codes; empty: of 2 to 8 those that the layer's grid and all targets can hold
    rules        names of the rules whose layers get other bits; empty: all
    loss         how outputs are compared, see `qat.distill`
    forward      forward(model, batch) instead of the call above
    tokenizer    for targets that need one

    Integers alone or in groups, EXL2, and ggml's k-quants, whose grids come with their bits. Other layers, and those
    that no target counts (the head of exl2), keep what they have, and count with it.

    Raises QATError, before anything is measured, where there is nothing to choose, for bits that cannot be reached, and
    for a target that holds no such mixture.
    """
    # before time is spent
    from scipy.optimize import milp  # noqa: F401

    recipe, given = as_recipe(recipe), list(batches)
    formats = [get_format(name) for name in recipe.export.targets]
    refuse_if(_reasons(model, recipe, given, rules, loss), f"allocate with recipe {recipe.name!r}", QATError)
    with _prepared(model, recipe) as bundle:
        _check(formats, bundle, tokenizer, "this recipe")
        units, kept, counted = _units(bundle, recipe, formats, choices, set(rules or recipe.rules))
    _refuse_unreachable(bits, formats, units, kept, counted)
    # both ends at once: not every format holds layers of different bits
    ends = [max(unit.slots) if i % 2 else min(unit.slots) for i, unit in enumerate(units)]
    with _prepared(model, _assigned(recipe, units, ends)) as bundle:
        _check(formats, bundle, tokenizer, "layers of different bits")
    _measure(model, recipe, units, given, loss, forward or call_model)
    limits = [bits * count - own for count, own in zip(counted, kept, strict=True)]
    chosen = _solve(units, limits)
    found = _renamed(_assigned(recipe, units, chosen), bits)
    with _prepared(model, found) as bundle:
        reached = {fmt.name: fmt.bits_per_weight(bundle) for fmt in formats}
    pairs = list(zip(units, chosen, strict=True))
    total = sum(unit.losses[own] for unit, own in pairs)
    return Allocation(found, {layer: own for unit, own in pairs for layer in unit.layers}, total, reached)


def with_bits(slot: Slot, bits: int) -> Slot | None:
    """A weight's slot with another number of bits; None if there is no such grid. A k-quant becomes another one, with
    its groups and minima, or scales of either sign."""
    words: dict[str, Any] = {"bits": bits}
    if _KQUANT.fullmatch(slot.scale) and bits != slot.bits:
        stored = SCALE_GRIDS.get(f"q{bits}_k")
        if not isinstance(stored, TwoLevel):
            return None
        # signed follows from the zero point
        words = {key: value for key, value in stored.words if key not in ("kind", "signed")}
        words |= {"scale": stored.name, "signed_scale": words["zero_point"] == "none"}
    found = replace(slot, **words)
    return None if slot.grid != "int" or spec_of(found).reasons() else found


def _reasons(model: nn.Module, recipe: Recipe, batches: list[Any], rules: Sequence[str], loss: str) -> list[str]:
    found = [] if loss in LOSSES else [f"loss={loss!r} is unknown; use one of {', '.join(LOSSES)}"]
    if is_prepared(model):
        found.append("the model is prepared already, and float weights are looked at; call it before qat.prepare")
    if Adapters(model).of:
        found.append("the model has adapters of peft; give the model that they are put on, and put them on afterwards")
    if not recipe.export.targets:
        found.append(
            "export.targets is empty, and what is stored for a weight depends on the format; name one, like "
            "export.targets=[exl2]"
        )
    if not batches:
        found.append("there is no batch to measure losses on; give some inputs of the model")
    unknown = [name for name in rules if name not in recipe.rules]
    if unknown:
        found.append(f"the recipe has no rule {unknown[0]!r}; its rules are {', '.join(recipe.rules)}")
    said = [(phase, name) for phase, own in recipe.phases.items() for name in own.bits]
    if said:
        found.append(
            f"phases.{said[0][0]}.bits gives bits to layers by their rule ({said[0][1]}), which would be another one; "
            "take it out"
        )
    return found


@contextmanager
def _prepared(model: nn.Module, recipe: Recipe, search: bool = False) -> Iterator[Bundle]:
    """Inside, the model is prepared; nothing is kept beside its weights."""
    prepare(model, recipe, search=search, code_cache=False)
    try:
        yield convert(model, require_final=False)
    finally:
        unprepare(model)


def _check(formats: list[Format], bundle: Bundle, tokenizer: Any, what: str) -> None:
    for fmt in formats:
        refuse_if(fmt.check(bundle, tokenizer), f"{fmt.name} cannot hold {what}", QATError)


def _units(
    bundle: Bundle, recipe: Recipe, formats: list[Format], choices: Sequence[int], rules: set[str]
) -> tuple[list[Unit], list[float], list[int]]:
    """(what is to be chosen; for each target the stored bits of all else that it counts, and the weights that it
    counts)."""
    rows = {row.name.removeprefix(bundle.prefix): row for row in bundle.plan.rows}
    specs, layouts = bundle.specs(), bundle.layouts()
    counts = [set(fmt.counted(bundle)) for fmt in formats]
    weights: dict[str, list[str]] = {}
    for name in bundle:
        weights.setdefault(name.rpartition(".")[0], []).append(name)
    kept = [0.0] * len(formats)
    units: list[Unit] = []
    refused, held = dict[int, str](), set[int]()
    for layer, names in weights.items():

        def stored(slot: Slot | None, names: list[str] = names) -> list[float]:
            spec = spec_of(slot) if slot else None
            mine = [(name, (spec or specs[name], layouts[name], bundle.dtypes(name)[1])) for name in names]
            pairs = zip(formats, counts, strict=True)
            return [sum(fmt.stored_bits(*each) for name, each in mine if name in own) for fmt, own in pairs]

        row = rows[layer]
        assert row.weight_rule is not None
        slot = recipe.rules[row.weight_rule].weight
        assert slot is not None
        slots: dict[int, Slot] = {}
        if row.weight_rule in rules and any(stored(None)):
            for bits in choices or _ALL:
                changed = with_bits(slot, bits)
                why = "its grid has no such bits" if changed is None else _unfit(row, changed, formats)
                if changed is not None and not why:
                    slots[bits] = changed
                refused.setdefault(bits, f"{layer}: {why}")
        held |= set(slots)
        if slots:
            tied = (alias.rpartition(".")[0] for alias, owner in bundle.tied.items() if owner in names)
            sizes = {bits: stored(own) for bits, own in slots.items()}
            for bits in [b for b in slots if any(more > b and _at_most(sizes[more], sizes[b]) for more in sizes)]:
                # more bits take no more room
                del slots[bits], sizes[bits]
            units.append(Unit(list(dict.fromkeys((layer, *tied))), row.weight_rule, slots, sizes))
        else:
            kept = [before + own for before, own in zip(kept, stored(None), strict=True)]
    unheld = [bits for bits in choices if bits not in held]
    if unheld:
        why = refused.get(unheld[0], "no rule gives a layer a grid of integers")
        raise QATError(f"no layer can have {unheld[0]} bits ({why}); leave it out of the choices")
    if all(len(unit.slots) < 2 for unit in units):
        raise QATError(
            f"recipe {recipe.name!r} has no layer whose bits could vary: rules {', '.join(sorted(rules))} give "
            f"none a grid of integers that {', '.join(recipe.export.targets)} holds in two numbers of bits or more"
            f"{f' of the choices {list(choices)}' if choices else ''}"
        )
    return units, kept, [sum(math.prod(layouts[name].shape) for name in own) for own in counts]


def _at_most(some: list[float], others: list[float]) -> bool:
    return all(one <= other for one, other in zip(some, others, strict=True))


def _unfit(row: PlanRow, slot: Slot, formats: list[Format]) -> str:
    """Why the layer of a row cannot have this weight; the first reason, empty if there is none."""
    spec = spec_of(slot)
    own = [*quantizer_class(spec.quantizer).reasons(spec), *spec.shape_reasons(row.columns)]
    return next(iter([*own, *(why for fmt in formats for why in fmt.row_reasons(replace(row, weight=spec)))]), "")


def _refuse_unreachable(
    bits: float, formats: list[Format], units: list[Unit], kept: list[float], counted: list[int]
) -> None:
    def reached(i: int, end: Callable[[Iterable[float]], float]) -> float:
        return (kept[i] + sum(end(stored[i] for stored in unit.stored.values()) for unit in units)) / counted[i]

    least, most = ([reached(i, end) for i in range(len(formats))] for end in (min, max))
    names = [fmt.name for fmt in formats]
    (low, name), (high, widest) = (max(zip(ends, names, strict=True)) for ends in (least, most))
    # not `bits < low`: NaN is too few as well
    if not bits >= low:
        raise QATError(
            f"{bits:g} bits per weight are too few: {name} stores at least {math.ceil(low * 1000) / 1000:g} for this "
            "model, scales included; ask for more, or allow fewer bits or larger groups"
        )
    if bits > high:
        raise QATError(
            f"{bits:g} bits per weight are too many: {widest} stores at most {math.floor(high * 1000) / 1000:g} for "
            "this model; ask for less, or allow more bits"
        )


def _assigned(recipe: Recipe, units: list[Unit], bits: Sequence[int]) -> Recipe:
    """The recipe with a rule more for each rule and number of bits; units without bits keep their rule's."""
    rules = dict(recipe.rules)
    pairs = list(zip(units, bits, strict=True))
    for rule in recipe.rules:
        for own in sorted({own for unit, own in pairs if unit.rule == rule and own in unit.slots}):
            mine = [unit for unit, each in pairs if unit.rule == rule and each == own and own in unit.slots]
            name = f"{rule}_{own}bit"
            while name in recipe.rules:
                name += "_"
            match = [layer for unit in mine for layer in unit.layers]
            rules[name] = Rule(match=match, weight=mine[0].slots[own])
    return replace(recipe, rules=rules)


def _renamed(recipe: Recipe, bits: float) -> Recipe:
    name = f"{recipe.name}_{bits:g}bpw"
    what = f"{recipe.description or recipe.name}, mixed to {bits:g} bits per weight"
    out = f"runs/{name}" if recipe.train.out == f"runs/{recipe.name}" else recipe.train.out
    return replace(recipe, name=name, description=what, train=replace(recipe.train, out=out))


# ---- losses --------------------------------------------------------------------------------------------------------


def _measure(
    model: nn.Module, recipe: Recipe, units: list[Unit], batches: list[Any], loss: str, forward: Forward
) -> None:
    """Fill in the losses of all units."""
    prefix, network = deployed(model)
    references: list[Tensor] = []
    for bits in sorted({bits for unit in units for bits in unit.slots}):
        with _prepared(model, _assigned(_weights_alone(recipe), units, [bits] * len(units)), search=True):
            layers = qat_layers(model)
            every = [Shared(name, [layer]) for name, layer in layers.items()]
            with calibrating(model, require_state(model), layers, every):
                if not references:
                    references += [_compared(model, network, batch, forward)[0] for batch in batches]
                for unit in (unit for unit in units if bits in unit.slots):
                    live = [layers[f"{prefix}{layer}"]._qat for layer in unit.layers]
                    for one in live:
                        one.active = True
                    outputs = (_compared(model, network, batch, forward) for batch in batches)
                    pairs = zip(outputs, references, strict=True)
                    found = [float(LOSSES[loss](output, reference, mask)) for (output, mask), reference in pairs]
                    for one in live:
                        one.active = False
                    unit.losses[bits] = sum(found) / len(found)
                    log.info("%s with %d bits: %s %.3g", unit.layers[0], bits, loss, unit.losses[bits])
                    if not math.isfinite(unit.losses[bits]):
                        raise QATError(f"{unit.layers[0]}: {loss} is not finite; look for NaN in batches and weights")


def _weights_alone(recipe: Recipe) -> Recipe:
    """The same grids of weights and nothing else: inputs on a grid are as they are whatever bits the weights have."""
    rules = {
        name: replace(rule, input=None, output=None, cache=None, backward=None)
        for name, rule in recipe.rules.items()
        if rule.weight is not None or rule.keep_float
    }
    return replace(recipe, rules=rules, strict=False, init=Init())


def _compared(model: nn.Module, network: nn.Module, batch: Any, forward: Forward) -> tuple[Tensor, Tensor | None]:
    """(what the network gives for a batch, which of it counts)."""
    found: list[tuple[Tensor, Tensor | None]] = []

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        compared = output_of(output)
        found.append((compared, token_mask(compared.shape, kwargs, shifts(network))))

    handle = network.register_forward_hook(seen, with_kwargs=True)
    try:
        forward(model, batch)
    finally:
        handle.remove()
    if not found:
        raise QATError(f"the batches do not reach {type(network).__name__}, whose outputs are compared")
    return found[-1]


# ---- the choice ----------------------------------------------------------------------------------------------------


def _solve(units: list[Unit], limits: list[float]) -> list[int]:
    """Bits of each unit with the least sum of losses, to 0.01 %, and stored bits of at most `limits`, by target."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    pairs = [(i, bits) for i, unit in enumerate(units) for bits in unit.slots]
    losses = np.array([max(0.0, units[i].losses[bits]) for i, bits in pairs])
    once = np.zeros((len(units), len(pairs)))
    for column, (i, _) in enumerate(pairs):
        once[i, column] = 1.0
    stored = np.array([units[i].stored[bits] for i, bits in pairs]).T
    # the solver's tolerances are absolute
    losses /= np.median(losses[losses > 0]) if (losses > 0).any() else 1.0
    size = np.maximum(np.abs(limits), 1.0)
    # it takes what exceeds a limit by 1e-6 for equal, so that a second, narrower try may be needed
    for slack in (0.0, 1e-5):
        found = milp(
            losses,
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0.0, 1.0),
            constraints=[
                LinearConstraint(once, 1.0, 1.0),
                LinearConstraint(stored / size[:, None], -np.inf, np.array(limits) / size * (1.0 - slack)),
            ],
        )
        if found.x is None:
            break
        chosen = [bits for (_, bits), taken in zip(pairs, found.x, strict=True) if taken > 0.5]
        sums = np.array([unit.stored[bits] for unit, bits in zip(units, chosen, strict=True)]).sum(0)
        if _at_most(sums.tolist(), [limit * (1.0 + 1e-12) for limit in limits]):
            return chosen
    raise QATError(
        "no allocation keeps all targets' bits per weight at once; ask for more bits, or export to one format"
    )
