"""Scales that are searched for the error that a layer's inputs see, without any change of the weights.

The search counts the squared error of each weight with the mean square of the input that it meets:

    sum over k of m_k (w_k - q_k)^2,    m_k = mean of x_k^2

which is |w x - q x|^2 for inputs that do not depend on each other. llama.cpp's importance matrix ("imatrix") holds
these m_k, and `read_imatrix` reads its GGUF form (llama.cpp's pull request 9400): for each tensor fp32 `NAME.in_sum2`,
sums of squares, and `NAME.counts`, over how many inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.codes import stays
from qat.errors import QATError
from qat.export.gguf_model import ARCHITECTURES, gguf_names, name_table
from qat.init.gptq import LayerError, calibrating, renamed
from qat.init.inputs import Squares, importance
from qat.init.obs import hat
from qat.init.walk import Forward, Shared, call_model
from qat.layers import QATLayer, weight_quantizers
from qat.ops import ConvOp, LinearOp
from qat.plan import deployed
from qat.state import require_state
from qat.steps import latents, qat_layers, search_scales, weights_changed

_UNKNOWN = "nothing is known of its inputs"


@torch.no_grad()
def search_weighted(
    model: nn.Module,
    batches: Iterable[Any] = (),
    *,
    squares: Mapping[str, Tensor] | None = None,
    forward: Forward | None = None,
) -> list[LayerError]:
    """Search the scales of a prepared model once more, weighted with the mean squares of the inputs. Returns a row for
    every prepared layer: its weighted error before and after, relative to the weighted size of the weight.

    The inputs are those of the float layers, all seen in one pass. `initialize` leaves these scales alone until the
    weights change.

    batches      as for `qat.init.gptq.gptq`, which need not be kept
    squares      name of a layer's weight -> its inputs' mean squares, float [K]; then no batch is looked at, and layers
                 that it lacks keep their scales (`read_imatrix`)
    forward      forward(model, batch) instead of the usual call

    Linear layers, Conv1D and convolutions whose scales are kept (quantizers mse and lsq); others are left.

    Raises QATError where there is nothing to go by, naming a layer whose inputs are not finite or of another number.
    """
    state = require_state(model)
    layers = qat_layers(model)
    weights, notes = _sorted_out(layers)
    search_scales(layers, force=False)
    if squares is None:
        found = _seen(model, batches, forward or call_model, weights)
    else:
        names = {name: f"{name}.weight" if name else "weight" for name in layers}
        found = {layers[name]: squares[key].reshape(1, -1) for name, key in names.items() if key in squares}
    rows: dict[QATLayer, LayerError] = {}
    for shared in weights:
        known = [found[layer] for layer in shared.layers if layer in found]
        row = _search(shared, torch.stack(known).mean(0)) if known else LayerError(shared.name, note=_UNKNOWN)
        rows |= dict.fromkeys(shared.layers, row)
    if all(row.error is None for row in rows.values()):
        what = "the squares name none of its weights" if squares is not None else "the batches reach none of its layers"
        raise QATError(f"there is nothing to weight the search of {type(model).__name__} with: {what}")
    state.record.initialized = True
    weights_changed(model)
    return [
        renamed(rows[layer], name) if layer in rows else LayerError(name, note=notes[name])
        for name, layer in layers.items()
    ]


def _sorted_out(layers: dict[str, QATLayer]) -> tuple[list[Shared], dict[str, str]]:
    """(weights whose scales are to be searched, layer -> why it is left). Raises QATError for shards."""
    found: dict[int, Shared] = {}
    notes: dict[str, str] = {}
    for name, layer in layers.items():
        quantizer = weight_quantizers(layer).get("weight")
        if quantizer is None or not isinstance(layer._qat.op, (LinearOp, ConvOp)):
            notes[name] = "it has no weight that multiplies inputs"
        elif not quantizer.keeps_fields:
            notes[name] = f"its scales follow the weight (quantizer={quantizer.name!r})"
        elif not stays(layer.weight):  # type: ignore[arg-type]
            raise QATError(f"{name}.weight is sharded or has no storage; search on the whole model, before sharding")
        else:
            found.setdefault(id(layer.weight), Shared(name, [])).layers.append(layer)
    return list(found.values()), notes


def _seen(model: nn.Module, batches: Iterable[Any], forward: Forward, weights: list[Shared]) -> dict[QATLayer, Tensor]:
    """Layer -> mean squares [C, K] of its inputs, of those that run."""
    squares = {layer: Squares() for shared in weights for layer in shared.layers}

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        squares[layer].add(layer, args, kwargs)  # type: ignore[index, arg-type]

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in squares]
    try:
        with calibrating(model, require_state(model), qat_layers(model), weights):
            for batch in batches:
                forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: found.mean(layer) for layer, found in squares.items() if found.total is not None}


def _search(shared: Shared, squares_CK: Tensor) -> LayerError:
    layer = shared.layers[0]
    quantizer, weight = weight_quantizers(layer)["weight"], layer.weight
    assert isinstance(weight, nn.Parameter)
    whole = latents(layer, "weight")
    w_RK = quantizer.layout.to_rows(whole).float()
    columns = w_RK.shape[1]
    if squares_CK.shape[1] != columns or w_RK.shape[0] % squares_CK.shape[0]:
        given = squares_CK.shape[1]
        raise QATError(f"{shared.name} has {columns} weights in a row, and mean squares of {given} inputs are given")
    if not bool(torch.isfinite(squares_CK).all()):
        raise QATError(f"{shared.name}: its inputs hold numbers that are not finite; look for NaN in the batches")
    counts = quantizer.layout.ordered(importance(squares_CK.to(w_RK.device), w_RK.shape[0]))

    def error() -> float:
        difference = hat(w_RK, quantizer.fields(w_RK), quantizer.spec) - w_RK
        return float((difference.square() * counts).double().sum())

    size = float((w_RK.square() * counts).double().sum()) or 1.0
    before = error()
    quantizer.init_from(whole, counts)
    return LayerError(shared.name, before / size, error() / size)


def read_imatrix(path: str | PathLike[str], model: nn.Module) -> dict[str, Tensor]:
    """Name of a weight of the model -> mean squares of its inputs, fp32 [K], from llama.cpp's importance matrix.

    Entries of experts and of tensors that the model lacks are left out. Raises QATError for a file that is no
    importance matrix in GGUF form, or a model whose architecture has no names in GGUF files.
    """
    import gguf

    prefix, inner = deployed(model)
    config = getattr(inner, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise QATError(f"{path} names tensors as GGUF files do, which is known of the models {known}, not of {kind}")
    try:
        reader = gguf.GGUFReader(Path(path))
    except (OSError, ValueError, IndexError) as problem:
        raise QATError(
            f"{path} is no GGUF file ({problem}); llama-imatrix writes one with --output-format gguf"
        ) from None
    entries = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
    table = name_table(ARCHITECTURES[kind], config.num_hidden_layers)  # type: ignore[union-attr]
    found: dict[str, Tensor] = {}
    for name in qat_layers(inner):
        own = next(iter(gguf_names(table, f"{name}.weight")), None)
        sums, counts = (entries.get(f"{own}.{part}") for part in ("in_sum2", "counts"))
        if sums is not None and counts is not None and counts.numel() == 1:
            found[f"{prefix}{name}.weight"] = sums.flatten() / counts.flatten().clamp_min(1.0)
    if not found:
        raise QATError(f"{path} holds no mean squares of this model's inputs (NAME.in_sum2 and NAME.counts)")
    return found
