"""Which batch norm is folded into which layer (`qat.norm_fold`)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.norm_fold import FIX

if TYPE_CHECKING:
    from qat.plan import PlanRow

TYPES = ("Linear", "Conv1d", "Conv2d", "Conv3d")


def find_pairs(
    model: nn.Module, rows: list[PlanRow], pairs: dict[str, str], prefix: str, adapted: set[str]
) -> tuple[dict[str, str], list[str]]:
    """(layer -> norm, why not); prefix: what names in `pairs` may leave out, adapted: layers that have an adapter.

    Without pairs: the layers after which their module lists a batch norm of as many channels.
    """
    able = {row.name: row for row in rows if row.weight is not None and "weight" in row.kinds}
    layers = list(able)
    found, problems = _named(model, layers, pairs, prefix) if pairs else (_listed(model, layers), [])
    # by identity: one norm may stand in two places
    norms = {layer: model.get_submodule(norm) for layer, norm in found.items()}
    for first, norm in found.items():
        owners = [layer for layer, other in norms.items() if other is norms[first]]
        if len(owners) > 1:
            norm = found[owners[0]]
            problems.append(
                f"batch_norm.pairs: {norm} is after {' and '.join(owners)}; it can be folded into one layer"
            )
    for layer, norm in found.items():
        reasons = [*_row_reasons(able[layer], layer in adapted), *_pair_reasons(model, layer, norm)]
        problems += [f"{layer}: {why}" for why in reasons]
    if not found and not problems:
        problems.append(
            "batch_norm.fold: true finds no quantized layer with a batch norm right after it; name them in "
            "batch_norm.pairs, {layer: norm}"
        )
    return found, list(dict.fromkeys(problems))


def _listed(model: nn.Module, layers: list[str]) -> dict[str, str]:
    found = {}
    for name in layers:
        parent, _, last = name.rpartition(".")
        if not name:
            continue
        children = list(model.get_submodule(parent)._modules.items())
        after = children[[key for key, _ in children].index(last) + 1 :]
        if after and isinstance(after[0][1], _BatchNorm):
            weight = model.get_submodule(name)._parameters["weight"]
            if weight is not None and after[0][1].num_features == weight.shape[0]:
                found[name] = f"{parent}.{after[0][0]}" if parent else after[0][0]
    return found


def _named(model: nn.Module, layers: list[str], pairs: dict[str, str], prefix: str) -> tuple[dict[str, str], list[str]]:
    known = dict(model.named_modules())
    found: dict[str, str] = {}
    problems = []
    for pattern, norm_pattern in pairs.items():
        wanted = re.compile(re.escape(pattern).replace(r"\*", r"([^.]+)"))
        hits = [(name, wanted.fullmatch(name) or wanted.fullmatch(name.removeprefix(prefix))) for name in layers]
        if not any(match for _, match in hits):
            problems.append(f"batch_norm.pairs: {pattern!r} names no layer whose weight is quantized")
        for name, match in hits:
            if match is None:
                continue
            norm = norm_pattern
            for part in match.groups():
                norm = norm.replace("*", part, 1)
            norm = norm if norm in known else f"{prefix}{norm}"
            if norm in known:
                found[name] = norm
            else:
                problems.append(f"batch_norm.pairs: {norm!r}, after {name}, names nothing in this model")
    return found, problems


def _row_reasons(row: PlanRow, adapted: bool) -> list[str]:
    said = "a batch norm cannot be folded into a layer with"
    found = (
        [] if row.kinds["weight"] in ("linear", "conv") else [f"{said} type {row.type}; allowed: {', '.join(TYPES)}"]
    )
    found += [] if row.backward == "float" else [f"{said} backward={row.backward}; allowed: float"]
    found += [] if row.output is None else [f"{said} an output slot, which would round before the norm; leave it out"]
    return found + ([f"{said} an adapter; leave it out of target_modules"] if adapted else [])


def _pair_reasons(model: nn.Module, layer: str, norm: str) -> list[str]:
    module: Any = model.get_submodule(norm)
    weight = model.get_submodule(layer)._parameters["weight"]
    if not isinstance(module, _BatchNorm):
        return [f"{norm} is a {type(module).__name__} and no batch norm; {FIX}"]
    found = []
    if not module.track_running_stats or module.running_var is None:
        found.append(f"{norm} keeps no statistics to fold (track_running_stats=False)")
    if not module.affine:
        found.append(f"{norm} has no weight and bias to fold (affine=False)")
    if weight is not None and module.num_features != weight.shape[0]:
        found.append(f"{norm} has {module.num_features} channels and {layer} gives {weight.shape[0]}; {FIX}")
    owners = [name for name, m in model.named_modules() if any(p is weight for p in m._parameters.values())]
    if len(owners) > 1:
        found.append(f"its weight is that of {' and '.join(set(owners) - {layer})} too, which {norm} does not follow")
    return found
