"""The scales and the time of a prepared model: searches, the schedule, and what an optimizer step sets in motion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.batch_norm import hold_batch_norm
from qat.codes import bytes_of, stays
from qat.errors import QATError, refuse_if
from qat.layers import QATLayer, activation_quantizers, layer_quantizers, rounds_directly, weight_quantizers
from qat.norm_fold import BatchNormFold, agree_on_statistics, dead_reasons, folds_among
from qat.oscillation import count_step
from qat.quantizers import Quantizer
from qat.recipes import from_dict
from qat.reparam import Reparam
from qat.schedule import Schedule, State
from qat.state import CHILD, QATState, require_folded, require_state


def qat_layers(model: nn.Module) -> dict[str, QATLayer]:
    """Layer name -> prepared layer, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLayer)}


def prepared_root(model: nn.Module) -> nn.Module:
    """The module at or below `model` that was prepared; `model` itself if none was."""
    return next((m for m in model.modules() if isinstance(m._modules.get(CHILD), QATState)), model)


# ---- scales --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialize(model: nn.Module, *, force: bool = False) -> None:
    """Search the scales on the current weights; layers whose weight did not change since are skipped.

    Every rank must call it when weights are sharded: they are gathered one by one. Raises QATError naming a weight that
    is not finite.
    """
    state = require_state(model)
    search_scales(qat_layers(model), force)
    state.record.initialized = True
    refuse_if(dead_reasons(model), "batch_norm.fold", QATError)
    weights_changed(model)


@torch.no_grad()
def search_scales(layers: dict[str, QATLayer], force: bool) -> None:
    for name, layer in layers.items():
        for reparam in layer._qat.reparams.values():
            reparam.follow()
        for key, quantizer in weight_quantizers(layer).items():
            weight = layer._parameters[key]
            assert weight is not None
            if weight.device.type == "meta":
                continue
            whole = latents(layer, key)
            token = _numbers(whole)
            if not math.isfinite(token[1]):
                raise QATError(f"{name}.{key} has numbers that are not finite; quantization cannot start from it")
            if not force and quantizer.__dict__.get("searched") == token:
                continue
            with whole_quantizer(quantizer):
                quantizer.init_from(whole)
            for parameter in quantizer.learned():
                parameter.zero_()
            quantizer.__dict__["searched"] = token
        layer._qat.cache.forget()


def scales_fit(quantizer: Quantizer, weight: Tensor) -> None:
    """The scales were made for `weight` (whole) as it is now: `initialize` leaves them alone until it changes."""
    quantizer.__dict__["searched"] = _numbers(weight)


def _numbers(whole: Tensor) -> tuple[float, float, tuple[int, ...]]:
    """Tells whether a weight changed: an edit through `.data` changes no version counter."""
    return float(whole.double().sum()), float(whole.double().abs().sum()), tuple(whole.shape)


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (collective), or the tensor itself; detached."""
    gather = getattr(tensor, "full_tensor", None)
    return (gather() if gather is not None else tensor).detach()


def latents(layer: QATLayer, key: str, dtype: torch.dtype | None = None) -> Tensor:
    """What the quantizer of a weight reads, whole (collective for a sharded one) and detached; `dtype` as the forward
    had its parameters."""
    weight, reparam = layer._parameters[key], layer._qat.reparams.get(key)
    assert weight is not None
    if reparam is None:
        return full(weight) if dtype is None else full(weight).to(dtype)
    parts = [full(weight), *map(full, reparam.factors)]
    # a sharded run casts all of them alike; else the adapter's dtype is its own
    cast = dtype is not None and dtype != parts[1].dtype
    return reparam.weight(*(part.to(dtype) if cast else part for part in parts))


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
    return _applied(model, require_state(model), step)


def _applied(model: nn.Module, state: QATState, step: int | None = None) -> State:
    if step is not None:
        state.record.step = step
    if state.schedule is None:
        state.schedule = schedule_of(model)
    now: State = state.schedule.at(state.record.step)
    _find_norms(model, state)
    if now.freeze_batch_norm:
        # a norm whose class another library changed since is held again
        hold_batch_norm(model, True)
    if now == state.applied:
        return now
    rules = {row.name: row.weight_rule for row in state.known_plan().rows}
    _, prefix, layers = _parts(model)
    blends: dict[torch.device, Tensor] = {}
    for name, layer in layers.items():
        live = layer._qat
        live.active, live.blend = now.active, None
        live.cache.forget()
        if now.active and now.strength < 1.0:
            # a tensor: compiled code does not depend on its value
            device = next(p.device for p in layer.parameters())
            live.blend = blends.setdefault(device, torch.full((), now.strength, device=device))
        bits = now.bits.get(rules.get(name.removeprefix(prefix)) or "")
        for quantizer in weight_quantizers(layer).values():
            quantizer.set_bits(bits)
            quantizer.codes_fixed = now.fix_codes and bool(quantizer.learned())
    _freeze(model, state, now.freeze_scales)
    hold_batch_norm(model, now.freeze_batch_norm)
    state.applied = now
    return now


def _find_norms(model: nn.Module, state: QATState) -> None:
    """Norms that are folded are those of these names, whatever module stands there now."""
    pairs = [(row.name, row.norm) for row in state.known_plan().rows if row.norm]
    root = prepared_root(model) if pairs else model
    for name, _ in pairs:
        layer: Any = root.get_submodule(name)
        fold: BatchNormFold = layer._qat.reparams["weight"]
        fold.find(root)


def holds_from_now(state: QATState) -> bool:
    """Whether batch norms keep their statistics from this optimizer step on, and did not in the one before."""
    schedule, step = state.schedule, state.record.step
    if schedule is None or not schedule.at(step).freeze_batch_norm:
        return False
    return step == 0 or not schedule.at(step - 1).freeze_batch_norm


def weights_changed(model: nn.Module) -> None:
    """Say that weights were changed by something else than `torch.optim`, a load, or `qat` (an averaged copy swapped
    in, an edit through `.data`): their codes are computed anew, at once for compiled layers, else when next used.

    Until the next change compiled code, too, uses these codes.
    """
    refresh_codes(model)


def refresh_codes(model: nn.Module, at_once: bool = False) -> None:
    """`weights_changed`; at_once: compute them now for layers that are not compiled (yet) as well."""
    _refresh(require_state(model), qat_layers(model), at_once)


def _refresh(state: QATState, layers: dict[str, QATLayer], at_once: bool) -> None:
    budget = float("inf") if state.code_cache is True else float(state.code_cache)
    with torch.no_grad():
        for fold in folds_among(layers.values()):
            fold.follow()
    for layer in layers.values():
        live = layer._qat
        live.cache.forget()
        live.cache.enabled = True
        for key, quantizer in weight_quantizers(layer).items():
            weight = layer._parameters.get(key)
            live.cache.disown(key)
            if weight is None or not stays(weight):
                continue
            needed = bytes_of(quantizer.live_spec, quantizer.layout.rows_shape)
            if needed > budget:
                continue
            budget -= needed
            live.cache.own(key, weight, quantizer, live.reparams.get(key))
            spared = live.cache.spared(weight, live.traced)
            spared = spared and rounds_directly(layer, key, quantizer, weight, weight.dtype)
            if live.active and (live.traced or at_once) and not spared:
                live.cache.quantized(key, weight, quantizer, live.reparams.get(key))


def _parts(model: nn.Module) -> tuple[QATState, str, dict[str, QATLayer]]:
    """The record of a prepared model, the prefix of the prepared root's names, and `qat_layers`."""
    found: dict[str, nn.Module] = dict(model.named_modules())
    name = next((name for name, module in found.items() if isinstance(module, QATState)), None)
    if name is None:
        # says what to do
        require_state(model)
    assert name is not None
    layers = {name: module for name, module in found.items() if isinstance(module, QATLayer)}
    return found[name], name[: -len(CHILD)], layers  # type: ignore[return-value]


def _freeze(model: nn.Module, state: QATState, freeze: bool) -> None:
    """Fold learned scales into their start values once (an optimizer's momentum must not move them afterwards)."""
    changed = freeze != state.record.scales_frozen
    seen: set[int] = set()
    for layer in qat_layers(model).values():
        for quantizer in layer_quantizers(layer):
            # tied layers share one
            if id(quantizer) in seen:
                continue
            seen.add(id(quantizer))
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
    # walks over the modules are what takes time here: as few as can be
    state, prefix, layers = _parts(model)
    require_folded(state)
    if optimizers and not state.checked:
        missing = missing_from(model, optimizers)
        if missing:
            raise QATError(
                f"{len(missing)} learned scales are in no optimizer, {missing[0]} for one; build the optimizer after "
                "qat.prepare(model, recipe), from model.parameters()"
            )
        state.checked = True
    watching = [q for layer in layers.values() for q in activation_quantizers(layer).values()]
    scratch: list[Tensor] = [q.scratch for q in watching if isinstance(getattr(q, "scratch", None), Tensor)]  # type: ignore[misc]
    if scratch and torch.distributed.is_available() and torch.distributed.is_initialized():
        joint = torch.cat([t.float() for t in scratch])
        torch.distributed.all_reduce(joint, torch.distributed.ReduceOp.MAX)
        for t, agreed in zip(scratch, torch.split(joint, [t.numel() for t in scratch]), strict=True):
            t.copy_(agreed)
    for quantizer in watching:
        quantizer.commit()
    _remember(state, qat_layers(prepared_root(model)) if prefix else layers)
    before = _applied(model, state)
    if state.record.step == 0:
        refuse_if(dead_reasons(model), "batch_norm.fold", QATError)
    if not before.freeze_batch_norm:
        agree_on_statistics(folds_among(layers.values()))
    count_step(layers, before)
    now = _applied(model, state, state.record.step + 1)
    if now.active and not before.active:
        # a delayed start: the scales are searched on the weights of this moment, not on those of step 0
        initialize(model, force=True)
        for quantizer in watching:
            quantizer.restart()
    for layer in layers.values():
        layer._qat.cache.settle()
    _refresh(state, layers, at_once=False)
    return now


@torch.no_grad()
def follow(copy: nn.Module, before: State, now: State) -> None:
    """Do to an averaged copy of a model what a step from `before` to `now` did to the model's own scales.

    Without it the copy would average scales across the moment in which their meaning changed.
    """
    if now.active and not before.active:
        search_scales(qat_layers(copy), force=True)
    if now.freeze_scales != before.freeze_scales:
        shared = {id(q): q for layer in qat_layers(copy).values() for q in layer_quantizers(layer)}
        for quantizer in shared.values():
            quantizer.freeze() if now.freeze_scales else quantizer.thaw()


def learned_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameter name -> learned scale."""
    learned = {id(p) for layer in qat_layers(model).values() for q in layer_quantizers(layer) for p in q.learned()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in learned}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> what an optimizer moves of each quantized weight: the weight, or the factors of its adapter."""
    found: dict[str, Tensor] = {}
    for name, layer in qat_layers(model).items():
        for key in weight_quantizers(layer):
            reparam, parameter = layer._qat.reparams.get(key, Reparam()), f"{name}.{key}" if name else key
            trained = reparam.trained(layer._parameters[key])  # type: ignore[arg-type]
            found |= {f"{parameter}{what}": t for what, t in trained.items()}
    return found


def missing_from(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
    """Names of learned scales that none of the optimizers moves: one was built before `prepare`, or left them out."""
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in learned_scales(model).items() if p.requires_grad and id(p) not in owned]


def forget_observed(model: nn.Module) -> None:
    """Drop what inputs showed since the last optimizer step (a learning-rate finder's steps, say)."""
    for layer in qat_layers(model).values():
        for quantizer in activation_quantizers(layer).values():
            quantizer.forget()


def remember_dtypes(model: nn.Module) -> None:
    """Write the dtypes of the last quantized forward into the record, for export from a checkpoint."""
    _remember(require_state(model), qat_layers(prepared_root(model)))


def _remember(state: QATState, layers: dict[str, QATLayer]) -> None:
    for name, layer in layers.items():
        live = layer._qat
        if live.out_dtype is not None and live.latent_dtype is not None:
            state.record.dtypes[name] = [str(live.latent_dtype)[6:], str(live.out_dtype)[6:]]
