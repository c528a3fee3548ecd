"""Insert quantizers into a model, drive them step by step, take them out again.

    plan = qat.prepare(model, "w4a16_g128")      # in place; the model's loss is now that of the quantized model
    ...                                          # optimizer.step(); qat.after_optimizer_step(model)
    bundle = qat.convert(model)                  # real integers

Everything that is not about *when* lives here; the Lightning callback and a hand-written loop call the same verbs.
"""

from __future__ import annotations

import logging
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from qat.adapters import Adapters, let_go, refuse_later, take_in
from qat.attention import attention_op, swap_attention
from qat.batch_norm import hold_batch_norm
from qat.bypass import close_fast_paths, reopen_fast_paths
from qat.errors import QATError, refuse_if
from qat.layers import (
    Live,
    QATLayer,
    layer_quantizers,
    layer_type,
    original_class,
    swapped_class,
    weight_quantizers,
)
from qat.layout import Layout
from qat.norm_fold import BatchNormFold, dead_reasons, folds_of
from qat.oscillation import add_counts
from qat.plan import Plan, PlanRow, make_plan
from qat.quantizers import Quantizer, make_quantizer
from qat.recipes import from_dict, load_recipe, to_dict
from qat.recipes.schema import Recipe
from qat.reparam import Reparam
from qat.specs import QuantSpec
from qat.state import CHILD, QATState, folded, require_folded, require_state, rotations, state_of, structure
from qat.steps import (
    apply_schedule,
    initialize,
    learned_scales,
    prepared_root,
    qat_layers,
    refresh_codes,
    search_scales,
    weights_changed,
)

log = logging.getLogger(__name__)


def plan(model: nn.Module, recipe: Recipe | str | PathLike[str]) -> Plan:
    """What `prepare` would do; changes nothing. Raises RecipeError or QATError as `prepare` does."""
    return make_plan(model, as_recipe(recipe))


def as_recipe(recipe: Recipe | str | PathLike[str]) -> Recipe:
    """A Recipe, a preset's name, or a path to a YAML file."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))


def prepare(
    model: nn.Module,
    recipe: Recipe | str | PathLike[str],
    *,
    search: bool = True,
    code_cache: bool | int | None = None,
    real: bool | None = None,
) -> Plan:
    """Swap the planned layers' classes in place and give them quantizers; idempotent for the same recipe.

    Parameter names, hooks, attributes, tying, flags and state-dict keys stay; keys are only added. `search` looks for
    the scales on the current weights at once (skipped for meta or sharded ones). Raises RecipeError for a bad recipe
    and QATError where the recipe does not fit the model (see `qat.plan.make_plan`); the model is then as it was.

    code_cache   codes are computed once per optimizer step and kept, at most a byte per weight and its scales (on a CPU
                 only where a step has more than one backward); an int is a budget in bytes, layers beyond it (False:
                 all) quantize again in backward instead. None: True, or what an earlier `prepare` of this model was
                 told. After a change of weights that neither `torch.optim` nor a load made, call
                 `qat.weights_changed(model)`.
    real         multiply 8-bit codes, integers or e4m3, as they are where the machine can, which differs from the
                 simulated product by float rounding only (`qat.fake_quant_kernels.int8_linear`, `fp8_linear`); False:
                 always simulate
    """
    recipe = as_recipe(recipe)
    model = prepared_root(model)
    refuse_later(model)
    found = make_plan(model, recipe)
    _refuse_sharded(model, found)
    state = state_of(model)
    first = state is None
    if state is None:
        done = folded(model)
        state = QATState(to_dict(recipe))
        state.record.folded = done
        model.add_module(CHILD, state)
    elif structure(state.record.recipe) != structure(to_dict(recipe)):
        raise QATError("this model is already prepared with another recipe; call qat.unprepare(model) first")
    else:
        state.record.recipe = to_dict(recipe)
    if recipe.fold.method == "rotate":
        # the others need batches, and are allowed to see a prepared model; training checks for them
        try:
            require_folded(state)
        except QATError:
            if first:
                unprepare(model)
            raise
    state.code_cache = state.code_cache if code_cache is None else code_cache
    state.real = state.real if real is None else real
    _keep_freed_memory()
    try:
        _insert(model, state, found, search)
    except Exception:
        if first:
            unprepare(model)
        raise
    log.info("%d layers prepared, %.2f %% of the parameters", len(found.rows), found.coverage)
    return found


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one.

    It returns freed blocks to the system while they are larger than any that it has seen freed (up to 32 MiB), and the
    next step pays for their pages again: 5,500 page faults, a tenth of a CPU step of a block with 3 million weights.
    One freed block of that size, whose pages were never touched, teaches it better.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def _insert(model: nn.Module, state: QATState, found: Plan, search: bool) -> None:
    shared: dict[int, Quantizer] = _existing(model)
    fresh: dict[str, QATLayer] = {}
    wrappers = Adapters(model).of
    phases = state.record.recipe["phases"].values()
    counts = any(phase.get("freeze_oscillating") for phase in phases)
    word = "freeze_oscillating" if counts else "dampen" if any(phase.get("dampen") for phase in phases) else None
    adapted = next((row.name for row in found.rows if row.name in wrappers), None)
    if word and adapted is not None:
        raise QATError(
            f"{word} looks at weights, and {adapted} has an adapter, whose sum with it is rounded; set it to 0"
        )
    for row in found.rows:
        layer = model.get_submodule(row.name)
        if not isinstance(layer, QATLayer):
            reparam: Reparam | None = take_in(wrappers[row.name]) if row.name in wrappers else None
            if row.norm:
                reparam = BatchNormFold(layer, model, (row.name, row.norm))
            if row.cache is not None:
                _swap_attention(layer, row.cache)
            else:
                _swap(layer, row, shared, reparam)
            if counts:
                for key, quantizer in layer._modules.items():
                    if isinstance(quantizer, Quantizer) and quantizer.layout.kind != "tokens":
                        add_counts(quantizer, layer._parameters[key.removesuffix("_quantizer")])  # type: ignore[arg-type]
            fresh[row.name] = layer  # type: ignore[assignment]
    close_fast_paths(model)
    if all(phase.train == "scales" for phase in from_dict(state.record.recipe).phases.values()):
        _train_scales_alone(model, state)
    state.plan = found
    state.applied = None
    if search and fresh:
        search_scales(fresh, force=False)
        state.record.initialized = True
    apply_schedule(model)
    if search and fresh:
        refuse_if(dead_reasons(model), "batch_norm.fold", QATError)
    for layer in qat_layers(model).values():
        layer._qat.root, layer._qat.real = state, state.real
    state.record.adapters = _scalings(model)
    # now: a model that is compiled next finds them
    refresh_codes(model, at_once=True)
    state.on_load = partial(_loaded, model)
    state.on_float = partial(_loaded_float, model)


def _train_scales_alone(model: nn.Module, state: QATState) -> None:
    """Before optimizers and DDP look at what has a gradient; `unprepare` takes it back."""
    scales = {id(p) for p in learned_scales(model).values()}
    for name, p in model.named_parameters():
        if id(p) in scales:
            p.requires_grad_(True)
        elif p.requires_grad:
            p.requires_grad_(False)
            state.stilled.add(name)


def _scalings(model: nn.Module) -> dict[str, float]:
    """Layer name -> what its adapter is multiplied with, which no state dict of peft tells."""
    live = {name: layer._qat for name, layer in qat_layers(model).items()}
    found = {name: reparam.scaling for name, one in live.items() for reparam in one.reparams.values()}
    return {name: scaling for name, scaling in found.items() if scaling is not None}


def _loaded(model: nn.Module) -> None:
    """After a record was loaded: nothing that goes with it may be missing; layers then do what its step says."""
    record = require_state(model).record
    if record.adapters != _scalings(model):
        raise QATError(
            f"the checkpoint was trained with {len(record.adapters)} adapters of scaling "
            f"{sorted(set(record.adapters.values()))}, this model has {len(_scalings(model))} of "
            f"{sorted(set(_scalings(model).values()))}; give get_peft_model the LoraConfig of that run"
        )
    for name, layer in qat_layers(model).items():
        for quantizer in layer_quantizers(layer):
            if quantizer.absent and quantizer.state_dict():
                raise QATError(f"the state dict has a quantization record but no scales of {name}; it is incomplete")
    apply_schedule(model)
    weights_changed(model)


def _loaded_float(model: nn.Module) -> None:
    """After weights without a record were loaded before the first step: scales follow the weights, and whether they
    are folded is not known."""
    if require_state(model).record.step == 0:
        record = require_state(model).record
        if rotations(record.folded):
            log.warning("weights without a record were loaded into a rotated model; are they rotated, too?")
        record.folded = rotations(record.folded)
        initialize(model)
    else:
        weights_changed(model)


def _refuse_sharded(model: nn.Module, found: Plan) -> None:
    """Scales have to exist before sharding, or they would be whole beside sharded weights."""
    for row in found.rows:
        layer = model.get_submodule(row.name)
        own = layer.parameters() if row.cache is not None else (layer._parameters[key] for key in row.kinds)
        if not isinstance(layer, QATLayer) and any(hasattr(parameter, "placements") for parameter in own):
            raise QATError(
                f"{row.name} is already sharded; call qat.prepare(model, recipe) in configure_model before fully_shard"
            )


def _existing(model: nn.Module) -> dict[int, Quantizer]:
    layers = [layer for layer in model.modules() if isinstance(layer, QATLayer)]
    return {id(layer._parameters[key]): q for layer in layers for key, q in weight_quantizers(layer).items()}


def _swap(layer: nn.Module, row: PlanRow, shared: dict[int, Quantizer], reparam: Reparam | None) -> None:
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
        # a base weight is frozen; its scale learns with the adapter
        learns: Any = weight if reparam is None else next(iter(reparam.trained(weight).values()))
        quantizer = _made(row.weight, Layout(tuple(weight.shape), row.kinds[key]), learns, layer)
        layer.add_module(f"{key}_quantizer", quantizer)
        shared[id(weight)] = quantizer
    if row.input is not None:
        first = next(w for w in weights.values() if w is not None)
        layer.add_module("input_quantizer", _made(row.input, Layout((1, 1), "tokens"), first, layer))
    if row.output is not None:
        first = next(w for w in weights.values() if w is not None)
        layer.add_module("output_quantizer", _made(row.output, Layout((1, 1), "tokens"), first, layer))
    reparams = {} if reparam is None else {"weight": reparam}
    layer.__dict__["_qat"] = Live(original_class(layer), entry[1], backward=row.backward, reparams=reparams)
    swapped: Any = swapped_class(original_class(layer))
    layer.__class__ = swapped


def _swap_attention(layer: nn.Module, spec: QuantSpec) -> None:
    op, first = attention_op(layer), next(layer.parameters())
    assert op is not None
    for name in ("key", "value"):
        layer.add_module(f"{name}_quantizer", _made(spec, Layout((1, 1), "tokens"), first, layer))
    swap_attention(layer, op)


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
    let_go(model)
    hold_batch_norm(model, False)
    for fold in folds_of(model):
        fold.let_go()
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
        found = module._modules.get(CHILD)
        if isinstance(found, QATState):
            for name, p in module.named_parameters():
                if name in found.stilled:
                    p.requires_grad_(True)
            del module._modules[CHILD]


def is_prepared(model: nn.Module) -> bool:
    """Whether `model` or something below it carries quantizers."""
    return state_of(model) is not None
