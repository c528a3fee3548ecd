"""Insert quantizers into a model, drive them step by step, take them out again.

    plan = qat.prepare(model, "w4a16_g128")      # in place; the model's loss is now that of the quantized model
    ...                                          # optimizer.step(); qat.after_optimizer_step(model)
    bundle = qat.convert(model)                  # real integers

Everything that is not about *when* lives here; the Lightning callback and a hand-written loop call the same verbs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from qat.bypass import close_fast_paths, reopen_fast_paths
from qat.errors import QATError
from qat.layers import (
    Live,
    QATLayer,
    input_quantizer,
    layer_quantizers,
    layer_type,
    original_class,
    swapped_class,
    weight_quantizers,
)
from qat.layout import Layout
from qat.plan import Plan, PlanRow, make_plan
from qat.quantizers import Quantizer, make_quantizer
from qat.recipes import from_dict, load_recipe, to_dict
from qat.recipes.schema import Recipe
from qat.schedule import Schedule, State
from qat.state import CHILD, QATState, require_state, state_of, structure

log = logging.getLogger(__name__)


def plan(model: nn.Module, recipe: Recipe | str | PathLike[str]) -> Plan:
    """What `prepare` would do; changes nothing. Raises RecipeError or QATError as `prepare` does."""
    return make_plan(model, as_recipe(recipe))


def as_recipe(recipe: Recipe | str | PathLike[str]) -> Recipe:
    """A Recipe, a preset's name, or a path to a YAML file."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))


def prepare(model: nn.Module, recipe: Recipe | str | PathLike[str], *, search: bool = True) -> Plan:
    """Swap the planned layers' classes in place and give them quantizers; idempotent for the same recipe.

    Parameter names, hooks, attributes, tying, flags and state-dict keys stay; keys are only added. `search` looks for
    the scales on the current weights at once (skipped for meta or sharded ones). Raises RecipeError for a bad recipe
    and QATError where the recipe does not fit the model (see `qat.plan.make_plan`); the model is then as it was.
    """
    recipe = as_recipe(recipe)
    model = prepared_root(model)
    found = make_plan(model, recipe)
    _refuse_sharded(model, found)
    state = state_of(model)
    first = state is None
    if state is None:
        state = QATState(to_dict(recipe))
        model.add_module(CHILD, state)
    elif structure(state.record.recipe) != structure(to_dict(recipe)):
        raise QATError("this model is already prepared with another recipe; call qat.unprepare(model) first")
    else:
        state.record.recipe = to_dict(recipe)
    try:
        _insert(model, state, found, search)
    except Exception:
        if first:
            unprepare(model)
        raise
    log.info("%d layers prepared, %.2f %% of the parameters", len(found.rows), found.coverage)
    return found


def _insert(model: nn.Module, state: QATState, found: Plan, search: bool) -> None:
    shared: dict[int, Quantizer] = _existing(model)
    fresh: dict[str, QATLayer] = {}
    for row in found.rows:
        layer = model.get_submodule(row.name)
        if not isinstance(layer, QATLayer):
            _swap(layer, row, shared)
            fresh[row.name] = layer  # type: ignore[assignment]
    close_fast_paths(model)
    state.plan = found
    state.applied = None
    if search and fresh:
        _search_scales(fresh, force=False)
        state.record.initialized = True
    apply_schedule(model)
    for layer in qat_layers(model).values():
        layer._qat.root = state
    state.on_load = partial(_loaded, model)
    state.on_float = partial(_loaded_float, model)


def _loaded(model: nn.Module) -> None:
    """After a record was loaded: nothing that goes with it may be missing; layers then do what its step says."""
    for name, layer in qat_layers(model).items():
        for quantizer in layer_quantizers(layer):
            if quantizer.absent and quantizer.state_dict():
                raise QATError(f"the state dict has a quantization record but no scales of {name}; it is incomplete")
    apply_schedule(model)


def _loaded_float(model: nn.Module) -> None:
    """After weights without a record were loaded before the first step: scales follow the weights."""
    if require_state(model).record.step == 0:
        initialize(model)


def _refuse_sharded(model: nn.Module, found: Plan) -> None:
    """Scales have to exist before sharding, or they would be whole beside sharded weights."""
    for row in found.rows:
        layer = model.get_submodule(row.name)
        if not isinstance(layer, QATLayer) and any(hasattr(layer._parameters[key], "placements") for key in row.kinds):
            raise QATError(
                f"{row.name} is already sharded; call qat.prepare(model, recipe) in configure_model before fully_shard"
            )


def prepared_root(model: nn.Module) -> nn.Module:
    """The module at or below `model` that was prepared; `model` itself if none was."""
    return next((m for m in model.modules() if isinstance(m._modules.get(CHILD), QATState)), model)


def _existing(model: nn.Module) -> dict[int, Quantizer]:
    layers = [layer for layer in model.modules() if isinstance(layer, QATLayer)]
    return {id(layer._parameters[key]): q for layer in layers for key, q in weight_quantizers(layer).items()}


def _swap(layer: nn.Module, row: PlanRow, shared: dict[int, Quantizer]) -> None:
    entry = layer_type(layer)
    assert entry is not None
    weights = {key: layer._parameters[key] for key in row.kinds}
    for key, weight in weights.items():
        assert weight is not None
        if row.weight is None:
            continue
        tied = shared.get(id(weight))
        if tied is not None:
            # one quantizer per parameter: its first layer owns it, the others only refer to it (no second set of keys)
            layer.__dict__[f"{key}_quantizer"] = tied
            continue
        quantizer = _made(row.weight, Layout(tuple(weight.shape), row.kinds[key]), weight, layer)
        layer.add_module(f"{key}_quantizer", quantizer)
        shared[id(weight)] = quantizer
    if row.input is not None:
        first = next(w for w in weights.values() if w is not None)
        layer.add_module("input_quantizer", _made(row.input, Layout((1, 1), "tokens"), first, layer))
    layer.__dict__["_qat"] = Live(original=original_class(layer), op=entry[1])
    swapped: Any = swapped_class(original_class(layer))
    layer.__class__ = swapped


def _made(spec: Any, layout: Layout, weight: Tensor, layer: nn.Module) -> Quantizer:
    with torch.device(weight.device):
        quantizer = make_quantizer(spec, layout)
    for parameter in quantizer.learned():
        parameter.data = parameter.data.to(weight.dtype)
        parameter.requires_grad_(weight.requires_grad or layout.kind == "tokens")
    quantizer.train(layer.training)
    return quantizer


def unprepare(model: nn.Module) -> None:
    """Restore every module to what it was before `prepare`, bit for bit (the weights stay as they are now)."""
    reopen_fast_paths(model)
    for layer in list(model.modules()):
        if isinstance(layer, QATLayer):
            original: Any = layer._qat.original
            for name in [key for key, child in layer._modules.items() if isinstance(child, Quantizer)]:
                del layer._modules[name]
            for name in [key for key, value in layer.__dict__.items() if isinstance(value, Quantizer)]:
                del layer.__dict__[name]
            del layer.__dict__["_qat"]
            layer.__class__ = original
    for module in list(model.modules()):
        if isinstance(module._modules.get(CHILD), QATState):
            del module._modules[CHILD]


def is_prepared(model: nn.Module) -> bool:
    """Whether `model` or something below it carries quantizers."""
    return state_of(model) is not None


def qat_layers(model: nn.Module) -> dict[str, QATLayer]:
    """Layer name -> prepared layer, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLayer)}


# ---- scales --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialize(model: nn.Module, *, force: bool = False) -> None:
    """Search the scales on the current weights; layers whose weight did not change since are skipped.

    Every rank must call it when weights are sharded: they are gathered one by one. Raises QATError naming a weight that
    is not finite.
    """
    state = require_state(model)
    _search_scales(qat_layers(model), force)
    state.record.initialized = True


@torch.no_grad()
def _search_scales(layers: dict[str, QATLayer], force: bool) -> None:
    for name, layer in layers.items():
        for key, quantizer in weight_quantizers(layer).items():
            weight = layer._parameters[key]
            assert weight is not None
            if weight.device.type == "meta":
                continue
            whole = full(weight)
            # an edit through `.data` changes no version counter: the numbers themselves tell
            token = (float(whole.double().sum()), float(whole.double().abs().sum()), tuple(whole.shape))
            if not math.isfinite(token[1]):
                raise QATError(f"{name}.{key} has numbers that are not finite; quantization cannot start from it")
            if not force and quantizer.__dict__.get("searched") == token:
                continue
            with whole_quantizer(quantizer):
                quantizer.init_from(whole)
            for parameter in quantizer.learned():
                parameter.zero_()
            quantizer.__dict__["searched"] = token


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (collective), or the tensor itself; detached."""
    gather = getattr(tensor, "full_tensor", None)
    return (gather() if gather is not None else tensor).detach()


@contextmanager
def whole_quantizer(quantizer: Quantizer, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, the quantizer's parameters are whole (gathered if sharded), and in `dtype` as the forward had them."""
    kept = dict(quantizer._parameters)
    try:
        for name, parameter in kept.items():
            if parameter is not None:
                whole = full(parameter)
                quantizer._parameters[name] = nn.Parameter(whole if dtype is None else whole.to(dtype), False)
        yield
    finally:
        quantizer._parameters.update(kept)


# ---- time ----------------------------------------------------------------------------------------------------------


def schedule_of(model: nn.Module) -> Schedule:
    """The schedule of a prepared model."""
    return Schedule(from_dict(require_state(model).record.recipe))


def apply_schedule(model: nn.Module, step: int | None = None) -> State:
    """Set what every layer does during optimizer step `step` (default: the model's own count); cheap if unchanged."""
    state = require_state(model)
    if step is not None:
        state.record.step = step
    if state.schedule is None:
        state.schedule = schedule_of(model)
    now: State = state.schedule.at(state.record.step)
    if now == state.applied:
        return now
    rules = {row.name: row.weight_rule for row in state.known_plan().rows}
    prefix = _prefix(model, state)
    for name, layer in qat_layers(model).items():
        layer._qat.active, layer._qat.strength = now.active, now.strength
        bits = now.bits.get(rules.get(name.removeprefix(prefix)) or "")
        for quantizer in weight_quantizers(layer).values():
            quantizer.set_bits(bits)
    _freeze(model, state, now.freeze_scales)
    state.applied = now
    return now


def _prefix(model: nn.Module, state: QATState) -> str:
    name: str = next(name for name, module in model.named_modules() if module is state)
    return name[: -len(CHILD)]


def _freeze(model: nn.Module, state: QATState, freeze: bool) -> None:
    """Fold learned scales into their start values once (an optimizer's momentum must not move them afterwards)."""
    changed = freeze != state.record.scales_frozen
    for layer in qat_layers(model).values():
        for quantizer in layer_quantizers(layer):
            if changed:
                with whole_quantizer(quantizer, layer._qat.latent_dtype):
                    quantizer.freeze() if freeze else quantizer.thaw()
                if not freeze:
                    for parameter in quantizer.learned():
                        parameter.data.zero_()
            quantizer.frozen = freeze
    state.record.scales_frozen = freeze


@torch.no_grad()
def after_optimizer_step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> State:
    """Count one optimizer step: ranks agree on observed ranges, ranges move, the schedule goes on.

    Given the optimizers of a hand-written loop, the first call raises QATError if a learned scale is in none of them.
    """
    state = require_state(model)
    if optimizers and not state.checked:
        missing = missing_from(model, optimizers)
        if missing:
            raise QATError(
                f"{len(missing)} learned scales are in no optimizer, {missing[0]} for one; build the optimizer after "
                "qat.prepare(model, recipe), from model.parameters()"
            )
        state.checked = True
    watching = [q for layer in qat_layers(model).values() if (q := input_quantizer(layer)) is not None]
    scratch: list[Tensor] = [q.scratch for q in watching if isinstance(getattr(q, "scratch", None), Tensor)]  # type: ignore[misc]
    if scratch and torch.distributed.is_available() and torch.distributed.is_initialized():
        joint = torch.cat([t.float() for t in scratch])
        torch.distributed.all_reduce(joint, torch.distributed.ReduceOp.MAX)
        for t, agreed in zip(scratch, torch.split(joint, [t.numel() for t in scratch]), strict=True):
            t.copy_(agreed)
    for quantizer in watching:
        quantizer.commit()
    remember_dtypes(model)
    before = apply_schedule(model)
    now = apply_schedule(model, state.record.step + 1)
    if now.active and not before.active:
        # a delayed start: the scales are searched on the weights of this moment, not on those of step 0
        initialize(model, force=True)
        for quantizer in watching:
            quantizer.restart()
    return now


@torch.no_grad()
def follow(copy: nn.Module, before: State, now: State) -> None:
    """Do to an averaged copy of a model what a step from `before` to `now` did to the model's own scales.

    Without it the copy would average scales across the moment in which their meaning changed.
    """
    if now.active and not before.active:
        _search_scales(qat_layers(copy), force=True)
    if now.freeze_scales != before.freeze_scales:
        for layer in qat_layers(copy).values():
            for quantizer in layer_quantizers(layer):
                quantizer.freeze() if now.freeze_scales else quantizer.thaw()


def learned_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameter name -> learned scale."""
    learned = {id(p) for layer in qat_layers(model).values() for q in layer_quantizers(layer) for p in q.learned()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in learned}


def missing_from(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
    """Names of learned scales that none of the optimizers moves: one was built before `prepare`, or left them out."""
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in learned_scales(model).items() if p.requires_grad and id(p) not in owned]


def forget_observed(model: nn.Module) -> None:
    """Drop what inputs showed since the last optimizer step (a learning-rate finder's steps, say)."""
    for layer in qat_layers(model).values():
        quantizer = input_quantizer(layer)
        if quantizer is not None:
            quantizer.forget()


def remember_dtypes(model: nn.Module) -> None:
    """Write the dtypes of the last quantized forward into the record, for export from a checkpoint."""
    state = require_state(model)
    for name, layer in qat_layers(prepared_root(model)).items():
        live = layer._qat
        if live.out_dtype is not None and live.latent_dtype is not None:
            state.record.dtypes[name] = [str(live.latent_dtype)[6:], str(live.out_dtype)[6:]]
