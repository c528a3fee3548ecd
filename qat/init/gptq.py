"""GPTQ on a prepared model, and its error-compensated weights as the latents that training starts from.

GPTQ (Frantar et al. 2023, arXiv 2210.17323) rounds a weight column by column and makes good for each error with the
columns that are left (`qat.init.obs`). What a column was just before it was rounded is a better place to start training
from than its rounded value: it has the same code, so the quantized model is GPTQ's at step 0, and it still says how far
the next code is.

Beyond the paper, on the way that errors are measured: a row for which plain rounding is better keeps it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.codes import stays
from qat.errors import QATError
from qat.grids import ScaledGrid
from qat.init.inputs import importance
from qat.init.obs import errors_of, hat, solve
from qat.init.walk import Forward, Shared, call_model, walk
from qat.layers import QATLayer, weight_quantizers
from qat.ops import ConvOp, LinearOp
from qat.qtensor import Fields
from qat.quantizers.mse import Stored
from qat.specs import QuantSpec
from qat.state import QATState, require_state
from qat.steps import apply_schedule, latents, qat_layers, scales_fit, search_scales, weights_changed

# Of the grid's range: how far inside its ends latents stay that GPTQ drove beyond them. At most 0.004 of a step, which
# changes no code; more than fp32 loses in w / s, so that the clamp leaves them as they are.
_INSET = 2.0**-16


@dataclass(frozen=True)
class LayerError:
    """One prepared layer.

    rtn, error   sum of squares of (w - q) x over that of w x on the calibration inputs, rounded to nearest and by
                 GPTQ; None where the layer was left as it was
    damp         the damping that was used
    note         why it was left, or that the damping had to be raised
    """

    name: str
    rtn: float | None = None
    error: float | None = None
    damp: float | None = None
    note: str = ""


@torch.no_grad()
def gptq(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    latent: bool = True,
    damp: float = 0.01,
    act_order: bool = True,
    weighted: bool = False,
    forward: Forward | None = None,
) -> list[LayerError]:
    """Round the weights of a prepared model by GPTQ, layer after layer in the order in which they run, each for the
    inputs that it gets once those before it are quantized. Returns a row for every prepared layer.

    The weights change in place and the quantized model is GPTQ's, bit for bit; scales are searched on the weights as
    they come, learned ones start anew, and `initialize` leaves both alone until the weights change. Call it once before
    training; with a start of the quantization that is delayed, when it starts (that start searches scales again).

    batches      a mapping -> model(**b), a tuple -> model(*b), else model(b); all are kept, on the model's device
    latent       write each weight's value before it was rounded, kept within the ends of the grid so that its gradient
                 flows (False: the rounded value)
    damp         see `qat.init.obs.solve`
    act_order    columns with the largest inputs first
    weighted     search the scales for the error weighted with the mean square of each input
    forward      forward(model, batch) instead of the call above

    Rules with desc_act: true form groups of the inputs in that order, too, the largest first.

    Linear layers, Conv1D and convolutions; embeddings, experts, and weights tied to them stay as they are, quantized
    from the start. Tied weights are done once, for the inputs of all their layers. The model is in eval mode meanwhile.

    Raises QATError naming a layer whose scales are dynamic, whose weight is sharded, whose inputs are not finite, or
    whose latents the weight's dtype cannot hold; layers before it have then changed.
    """
    state = require_state(model)
    layers = qat_layers(model)
    weights, notes = _sorted_out(layers)
    given = list(batches)
    if not given:
        raise QATError("gptq was given no batches; pass inputs of the model, 128 sequences for one")
    search_scales({name: layers[name] for name in notes}, force=False)
    search_scales({shared.name: shared.layers[0] for shared in weights}, force=True)
    rows: dict[QATLayer, LayerError] = {}
    with calibrating(model, state, layers, weights):
        for group in walk(model, given, forward or call_model, weights):
            for shared in group:
                row = _round(shared, latent, damp, act_order, weighted)
                for layer in shared.layers:
                    rows[layer] = row
                    layer._qat.cache.forget()
                    layer._qat.active = True
    state.record.initialized = True
    weights_changed(model)
    return [
        renamed(rows[layer], name)
        if layer in rows
        else LayerError(name, note=notes.get(name, "it did not run on these batches"))
        for name, layer in layers.items()
    ]


def renamed(row: LayerError, name: str) -> LayerError:
    """The row of a weight for one of its layers."""
    if row.name == name:
        return row
    return LayerError(name, row.rtn, row.error, row.damp, f"tied to {row.name}")


def _sorted_out(layers: dict[str, QATLayer]) -> tuple[list[Shared], dict[str, str]]:
    """(weights to round, layer -> why it is left). Raises QATError for dynamic scales and shards."""
    notes: dict[str, str] = {}
    left: dict[int, str] = {}
    for name, layer in layers.items():
        if not weight_quantizers(layer):
            notes[name] = "only its input is quantized"
        elif not isinstance(layer._qat.op, (LinearOp, ConvOp)):
            notes[name] = f"a layer of class {layer._qat.original.__name__} has no Hessian of inputs"
            left |= {id(layer._parameters[key]): name for key in weight_quantizers(layer)}
    found: dict[int, Shared] = {}
    for name, layer in layers.items():
        if name in notes:
            continue
        weight, quantizer = layer.weight, weight_quantizers(layer)["weight"]
        if id(weight) in left:
            notes[name] = f"tied to {left[id(weight)]}, which is left"
            continue
        if not quantizer.keeps_fields:
            raise QATError(
                f"the scales of {name} follow its weight (quantizer={quantizer.name!r}), which would change the codes "
                "that GPTQ chose; use quantizer mse or lsq in its rule"
            )
        if layer._qat.reparams and not torch.equal(latents(layer, "weight"), weight.detach().float()):  # type: ignore[operator]
            raise QATError(
                f"the adapter of {name} is not zero any more, and GPTQ writes the weight below it; call gptq before "
                "the adapter is trained (with init_lora_weights=True)"
            )
        if not stays(weight):  # type: ignore[arg-type]
            raise QATError(f"{name}.weight is sharded or has no storage; call gptq on the whole model, before sharding")
        found.setdefault(id(weight), Shared(name, [])).layers.append(layer)
    return list(found.values()), notes


@contextlib.contextmanager
def calibrating(
    model: nn.Module, state: QATState, layers: dict[str, QATLayer], weights: list[Shared]
) -> Iterator[None]:
    """Inside: eval mode, nothing compiled, no caches of keys; layers of `weights` in float, all others quantized on the
    deployed grid. After: as before, layers as the schedule says."""
    training = {module: module.training for module in model.modules()}
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in found if getattr(config, "use_cache", None) is True]
    rounded = {layer for shared in weights for layer in shared.layers}
    try:
        model.eval()
        for config in configs:
            config.use_cache = False
        for layer in layers.values():
            layer._qat.active, layer._qat.blend = layer not in rounded, None
            layer._qat.cache.forget()
            for quantizer in weight_quantizers(layer).values():
                quantizer.set_bits(None)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for config in configs:
            config.use_cache = True
        for module, was in training.items():
            module.training = was
        state.applied = None
        apply_schedule(model)


def _round(shared: Shared, latent: bool, damp: float, act_order: bool, weighted: bool) -> LayerError:
    """Solve one weight for the moments of its inputs and write it."""
    layer = shared.layers[0]
    quantizer, weight = weight_quantizers(layer)["weight"], layer.weight
    assert isinstance(weight, nn.Parameter)
    hessians = shared.moments.mean(layer).to(weight.device)
    if isinstance(quantizer, Stored) and quantizer.spec.desc_act:
        sizes = hessians.diagonal(dim1=1, dim2=2).mean(0)
        quantizer.regroup(torch.argsort(sizes, descending=True, stable=True))
        quantizer.init_from(weight.detach())
        hessians = quantizer.layout.ordered(quantizer.layout.ordered(hessians).mT)
    spec, layout = quantizer.live_spec, quantizer.layout
    w_RK = layout.to_rows(weight.detach()).float()
    run = w_RK.shape[0] // hessians.shape[0]
    if weighted:
        quantizer.init_from(weight.detach(), importance(hessians.diagonal(dim1=1, dim2=2), w_RK.shape[0]))
    fields = quantizer.fields(w_RK)
    nearest = hat(w_RK, fields, spec)
    latents, rounded = torch.empty_like(w_RK), torch.empty_like(w_RK)
    before, after, size, used = 0.0, 0.0, 0.0, damp
    try:
        for i, hessian in enumerate(hessians):
            own = slice(i * run, (i + 1) * run)
            found = solve(w_RK[own], hessian, _rows(fields, own), spec, damp=damp, act_order=act_order)
            rtn, error = (errors_of(q - w_RK[own], hessian) for q in (nearest[own], found.weights))
            better = (error <= rtn).unsqueeze(1)
            latents[own] = torch.where(better, found.latents, w_RK[own])
            rounded[own] = torch.where(better, found.weights, nearest[own])
            before, after = before + float(rtn.sum()), after + float(torch.minimum(error, rtn).sum())
            size, used = size + float(errors_of(w_RK[own], hessian).sum()), max(used, found.damp)
        start = within(latents, fields, spec) if latent else rounded
        kept = held(start, rounded, fields, spec, weight.dtype)
    except QATError as problem:
        raise QATError(f"{shared.name}: {problem}") from None
    weight.copy_(layout.from_rows(kept))
    scales_fit(quantizer, weight.detach())
    size = size or 1.0
    note = f"damping raised from {damp} to {used}" if used > damp else ""
    return LayerError(shared.name, before / size, after / size, used, note)


def _rows(fields: Fields, rows: slice) -> Fields:
    """Fields [r, G] of some rows; shared ones [1, 1] as they are."""
    return Fields(*(f if f is None or f.shape[0] == 1 else f[rows] for f in fields))  # type: ignore[arg-type]


@torch.no_grad()
def within(latents_RK: Tensor, fields: Fields, spec: QuantSpec) -> Tensor:
    """Latents fp32 [R, K], kept where their gradient flows: within the ends of the grid, or of the range of a table.

    Beyond, the gradient of a weight whose scale is kept is zero: what GPTQ left there would never move again, however
    near. (Kept up to 0.49 of a step beyond, as one might to lose less of the distance, it would be as stuck.)
    """
    if isinstance(spec.grid, ScaledGrid):
        ends = spec.grid.ends[0] * fields.scale, spec.grid.ends[1] * fields.scale
    else:
        infinite = torch.full_like(fields.scale, torch.inf)
        ends = hat(-infinite, fields, spec), hat(infinite, fields, spec)
    # a scale may be negative
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    inset = (high - low) * _INSET
    columns = latents_RK.shape[1] // fields.scale.shape[1] if fields.scale.numel() > 1 else 1
    low, high = (end.repeat_interleave(columns, 1) for end in (low + inset, high - inset))
    return torch.clamp(latents_RK, low, high)


@torch.no_grad()
def held(latents_RK: Tensor, rounded_RK: Tensor, fields: Fields, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Latents fp32 [R, K] in `dtype`, each on its number of the grid, `rounded_RK`.

    One whose code the cast changes becomes the number of the grid itself. Raises QATError where even that has another
    code, as bf16 weights far from 0 have.
    """
    kept = latents_RK.to(dtype)
    kept = torch.where(hat(kept.float(), fields, spec) == rounded_RK, kept, rounded_RK.to(dtype))
    lost = int((hat(kept.float(), fields, spec) != rounded_RK).sum())
    if lost:
        raise QATError(
            f"{lost} of {kept.numel()} weights have no latent in {str(dtype)[6:]} that keeps the code that GPTQ chose; "
            "keep the weights in float32 (model.float() before qat.prepare)"
        )
    return kept
