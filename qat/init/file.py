"""Start from a file that is packed already: its codes and scales become the state that training goes on from.

Step 0 then computes with the file's own weights, bit for bit. Whoever wrote the file, a recipe has to name the grid
that is in it: each weight is unpacked under its rule's spec and compared with what the consumer's code reads.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.codes import stays
from qat.convert import Bundle
from qat.errors import ExportError, QATError
from qat.export import all_formats, get_format
from qat.export.format import Format
from qat.layers import QATLayer, weight_quantizers
from qat.plan import deployed
from qat.qtensor import Fields, QTensor
from qat.quantizers.mse import Stored
from qat.state import require_state
from qat.steps import qat_layers, scales_fit, search_scales, weights_changed


@torch.no_grad()
def start_from_file(model: nn.Module, folder: str | PathLike[str], format: str | None = None) -> list[str]:
    """Give a prepared model the weights of an exported folder. Returns the names of the weights that took its codes.

    folder   of a format that has codes to start from (gguf as model.gguf, and those in a transformers folder), exported
             here or by another program, without fixed ranges of inputs
    format   its name; None: the one that knows the folder

    Quantized parameters become the file's weights in their own dtype, their quantizers (`mse`, `lsq` and what derives
    from them: scales that do not follow the weights) take its scales; other parameters are copied. Raises QATError if
    file and model do not belong together, if a weight's grid is not that of its rule, or if a quantizer cannot keep its
    scales; the model may then be changed in part.
    """
    path = Path(folder)
    fmt = get_format(format) if format is not None else _format_of(path)
    state = require_state(model)
    inner = deployed(model)[1]
    layers = qat_layers(inner)
    search_scales(layers, force=False)
    planned = {
        (f"{name}.{key}" if name else key): (layer, key)
        for name, layer in layers.items()
        for key in weight_quantizers(layer)
    }
    live = Bundle(model).parameters
    taken = []
    read = set()
    for name, weight, packed in fmt.entries(path):
        if name.endswith((".input_scale", ".input_zero_point", ".k_scale", ".v_scale")) and name not in live:
            raise QATError(
                f"{path} holds {name}: training cannot start from a file with fixed ranges of inputs or caches yet"
            )
        if name not in live:
            raise QATError(f"{path} holds {name}, which {type(inner).__name__} lacks; is it another model?")
        if tuple(weight.shape) != tuple(live[name].shape):
            raise QATError(f"{path}: {name} is {list(weight.shape)}, the model's is {list(live[name].shape)}")
        if name not in planned:
            if packed is not None:
                raise QATError(f"{path}: {name} is quantized, and no rule of the recipe gives it a grid; add one")
            live[name].copy_(weight)
        elif packed is None:
            raise QATError(f"{path}: {name} is in float, and a rule quantizes it; add keep_float: true for it")
        else:
            _take(*planned[name], f"{path}: {name}", fmt, packed, weight)
            taken.append(name)
        read.add(name)
    known = {id(live[name]) for name in read}
    absent = next((name for name, tensor in live.items() if id(tensor) not in known), None)
    if absent is not None:
        raise QATError(f"{path} lacks {absent}; is it another model?")
    state.record.initialized = True
    weights_changed(model)
    return taken


def _format_of(path: Path) -> Format:
    if not path.is_dir():
        raise QATError(
            f"there is no folder {path} to start from; a GGUF file is named by its folder, as model.gguf there"
        )
    found = [cls() for cls in all_formats().values() if cls.entries is not Format.entries]
    known = [fmt for fmt in found if fmt.knows(path)]
    if len(known) != 1:
        names = ", ".join(sorted(fmt.name for fmt in found))
        raise QATError(f"{path} is a folder of none of the formats that can be started from ({names})")
    return known[0]


def _take(layer: QATLayer, key: str, where: str, fmt: Format, packed: dict[str, Tensor], weight: Tensor) -> None:
    quantizer, parameter = weight_quantizers(layer)[key], layer._parameters[key]
    assert parameter is not None
    if not isinstance(quantizer, Stored):
        raise QATError(
            f"{where}: quantizer={quantizer.name!r} finds its own scales; use mse or lsq to start from a file"
        )
    if not stays(parameter) or key in layer._qat.reparams:
        raise QATError(f"{where}: the weight is sharded or has an adapter; start from the file before either")
    spec = quantizer.spec
    try:
        tensor = fmt.unpack(packed, spec, replace(quantizer.layout, order=None), torch.float32)
        found = tensor.dequantize()
    except (ExportError, KeyError, ValueError, TypeError, RuntimeError, IndexError) as problem:
        raise QATError(
            f"{where} is not on the grid of its rule, {spec} ({' '.join(str(problem).split())[:120]})"
        ) from None
    same = tensor.scale.shape == quantizer.start_scale.shape[1:] and found.shape == weight.shape
    if not (same and torch.equal(found.to(weight.dtype), weight)):
        raise QATError(f"{where} is not on the grid of its rule, {spec}; the recipe has to name the file's own grid")
    order = tensor.layout.order
    if order is not None and not spec.desc_act:
        raise QATError(f"{where} has groups of inputs in another order; add desc_act: true to the weight of its rule")
    quantizer.reset_parameters()
    if order is not None:
        quantizer.regroup(order)
    quantizer.store(_fields(tensor))
    parameter.data.copy_(found)
    scales_fit(quantizer, parameter.detach())
    again = quantizer(parameter)
    if not torch.equal(again, found.to(again.dtype)):
        worst = float((again.float() - found).abs().max())
        raise QATError(f"{where}: its scales are not numbers of scale={spec.scale} (largest difference {worst:.3g})")


def _fields(tensor: QTensor) -> Fields:
    zero = None if tensor.zero_point is None else tensor.zero_point.float()
    return Fields(tensor.scale.float(), zero, None if tensor.minimum is None else tensor.minimum.float())
