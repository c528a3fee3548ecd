"""Rotation of the residual stream and of the heads' values, folded into the weights (QuaRot, Ashkboos et al. 2024).

    stream      x' = x Q. What writes W x + b gets Q^T W and b Q, what reads gets W diag(g) Q with g the gain of its
                norm, which becomes 1: RMSNorm(x Q) = RMSNorm(x) Q, because Q changes no length ("R1")
    values      v' = v R for every head, R the same for all: attention mixes positions, not features, and what reads the
                heads' outputs gets W R on each head's columns ("R2")

Q and R are those of `qat.fold.hadamard`. Weights are computed in fp64 and rounded once, so the function changes by the
rounding of the weights' dtype. What the original does in the running network (queries, keys, inputs of the last linear
of an MLP) is left out: nothing is added to the network, and any consumer can load it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import QATError
from qat.fold.hadamard import Rotation
from qat.fold.network import Found, find, rotation_reasons
from qat.init.obs import wide
from qat.plan import has_config
from qat.recipes.schema import Network
from qat.state import folded, mark_folded, state_of

# numbers that are turned at a time in fp64, 128 MiB
_AT_ONCE = 1 << 24


@torch.no_grad()
def rotate(model: nn.Module, seed: int = 0, *, network: Network | None = None) -> None:
    """Rotate the float model in place; a head that is tied to the embedding becomes a matrix of its own.

    seed       of the random signs
    network    where the parts are; None: known by the architecture

    Raises QATError for an architecture that is not known, a norm other than RMSNorm, a part that is not described but
    has the width of the stream, a model that is prepared or rotated already, weights that are sharded or not there.
    """
    found = _checked(model, network)
    missing = [name for name, p in found.module.named_parameters() if p.is_meta or hasattr(p, "placements")]
    if missing:
        raise QATError(f"{found.prefix}{missing[0]} is sharded or not loaded; rotate the whole model, before sharding")
    width = _width(found)
    turn = Rotation(width, seed)
    norms = {f"{found.prefix}{name}": found.module.get_submodule(name) for name in found.reads}
    reasons = [why for name, norm in norms.items() for why in rotation_reasons(norm, name, turn)]
    if reasons:
        raise QATError(f"the model cannot be rotated: {'; '.join(reasons)}")
    _untie(found)
    for name in found.writes:
        part = _part(found, name)
        if isinstance(part, nn.Linear):
            _turn(part.weight, 0, turn)
            if part.bias is not None:
                _turn(part.bias, 0, turn)
        else:
            _turn(part.weight if isinstance(part, nn.Module) else part, -1, turn)  # type: ignore[arg-type]
    for name, readers in found.reads.items():
        gain = getattr(found.module.get_submodule(name), "weight", None)
        for reader in readers:
            _turn(found.linear(reader).weight, 1, turn, gain)
        if gain is not None:
            gain.fill_(1.0)
    heads = Rotation(found.head_dim, seed) if found.values and found.head_dim else None
    for first, second in found.values.items():
        assert heads is not None
        values = found.linear(first)
        _turn(values.weight, 0, heads)
        if values.bias is not None:
            _turn(values.bias, 0, heads)
        _turn(found.linear(second).weight, 1, heads)
    _mark(model, found, seed, network)


def restructure(model: nn.Module, seed: int = 0, network: Network | None = None) -> None:
    """What `rotate` changes besides numbers, on a model whose weights are not there or are about to be loaded. Raises
    QATError as `rotate` does."""
    found = _checked(model, network)
    _width(found)
    _untie(found)
    _mark(model, found, seed, network)


def _mark(model: nn.Module, found: Found, seed: int, network: Network | None) -> None:
    described = None if network is None else dict(network.__dict__)
    mark_folded(model, found.module, {"method": "rotate", "seed": seed, "network": described})


def _checked(model: nn.Module, network: Network | None) -> Found:
    if state_of(model) is not None:
        raise QATError("the model is prepared already; rotate it before qat.prepare")
    if any(entry["method"] == "rotate" for entry in folded(model)):
        raise QATError("the model is rotated already; rotating it again would not make it easier to quantize")
    return find(model, network)


def _part(found: Found, name: str) -> Any:
    """A module with a weight, or a parameter."""
    holder, _, last = name.rpartition(".")
    own = found.module.get_submodule(holder)._parameters.get(last)
    return own if own is not None else found.module.get_submodule(name)


def _width(found: Found) -> int:
    """Features of the stream. Raises QATError where parts disagree, and for parts of that width that nothing names."""
    sizes: list[tuple[str, int]] = []
    named: set[int] = set()
    for name in found.writes:
        part = _part(found, name)
        weight = part if isinstance(part, Tensor) else getattr(part, "weight", None)
        if not isinstance(part, nn.Linear | nn.Embedding | Tensor) or weight is None:
            raise QATError(
                f"{found.prefix}{name} is a {type(part).__name__}; rotation knows Linear, Embedding, parameters"
            )
        sizes.append((name, weight.shape[0] if isinstance(part, nn.Linear) else weight.shape[-1]))
    for name, readers in found.reads.items():
        gain = getattr(found.module.get_submodule(name), "weight", None)
        sizes += [(name, len(gain))] if gain is not None else []
        sizes += [(reader, found.linear(reader).in_features) for reader in readers]
    first, width = sizes[0]
    for name, size in sizes:
        if size != width:
            raise QATError(
                f"{found.prefix}{name} has {size} features and {found.prefix}{first} has {width}; they are not on one "
                "residual stream"
            )
    for first, second in found.values.items():
        rows, columns, head = found.linear(first).out_features, found.linear(second).in_features, found.head_dim
        if head is None or rows % head or columns % head:
            raise QATError(
                f"{found.prefix}{first} has {rows} rows and {second} has {columns} columns, which are no heads of "
                f"{head} features; give fold.network.head_dim"
            )
    for name in (*dict(sizes), *found.values, *found.values.values(), *found.products, *found.products.values()):
        part = _part(found, name)
        named |= {id(p) for p in (part.parameters() if isinstance(part, nn.Module) else [part])}
    for name, parameter in found.module.named_parameters():
        if width in parameter.shape and id(parameter) not in named:
            raise QATError(
                f"{found.prefix}{name} has the width {width} of the residual stream, and nothing says what it is; name "
                "it in fold.network"
            )
    return width


def _untie(found: Found) -> None:
    """Give every reader a weight of its own where it shares one with the embedding. Raises QATError for other ties."""
    writers = {
        id(getattr(part, "weight", part)): name for name in found.writes if (part := _part(found, name)) is not None
    }
    seen: dict[int, str] = {}
    for readers in found.reads.values():
        for name in readers:
            layer = found.linear(name)
            if id(layer.weight) in writers:
                layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
                if has_config(found.module) and getattr(found.module.config, "tie_word_embeddings", False):
                    found.module.config.tie_word_embeddings = False  # type: ignore[union-attr]
                    found.module.all_tied_weights_keys = {}  # type: ignore[assignment]
            if id(layer.weight) in seen:
                raise QATError(
                    f"{found.prefix}{name} shares its weight with {seen[id(layer.weight)]}; it would turn twice"
                )
            seen[id(layer.weight)] = name
    if len(writers) < len(found.writes) or set(writers) & set(seen):
        raise QATError(f"parts of {type(found.module).__name__} that write to the residual stream share their weights")


def _turn(weight: Tensor, dim: int, rotation: Rotation, gain: Tensor | None = None) -> None:
    """`weight` in place, along one dimension (in blocks of the rotation's size), after a multiplication with `gain`."""
    view = weight.detach().movedim(dim, -1)
    if view.dim() == 1:
        view = view.unsqueeze(0)
    step = max(1, _AT_ONCE // view[:1].numel())
    for rows in torch.split(view, step):
        x = rows.to(wide(weight.device))
        if gain is not None:
            x = x * gain.to(x)
        rows.copy_(rotation(x.reshape(*x.shape[:-1], -1, rotation.size)).reshape(x.shape))
