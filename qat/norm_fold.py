"""Batch norms inside the rounding of the layers before them, so that what is deployed is one layer and no norm.

    w_hat = quantizer(w * f),  f = gamma / sqrt(variance + eps)       per output channel, running variance
    bias' = beta + (bias - mean) * f                                  running mean

The norm keeps its module, its parameters and its keys. Which statistics normalize:

    before batch norms are frozen    the batch's in training, the running ones in eval: the layer gives w_hat / f and
                                     its own bias, and the norm does the rest
    from then on                     the running ones: the layer gives w_hat and bias', and the norm hands it on; gamma
                                     and beta learn through them

So codes and scales mean the same in both. The variance of f moves once per optimizer step (`folded_variance`, a buffer
that is in no checkpoint), not with each batch; across processes it is that of rank 0. Kept scales follow it: what was
searched or loaded, times what f has grown by since, so that their share of f stays; one scale for all rows by what the
largest number has grown. A channel whose gamma is 0 gives zeros before the freeze.

The pairs come from a recipe or from the order in which a module lists its children, which proves nothing. So each eager
call checks that the norm gets what its layer gave, and `qat.bypass` and the export that nobody else reads it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.batch_norm import normalize_held
from qat.codes import forget_codes_of
from qat.errors import QATError
from qat.node import inside
from qat.reparam import Reparam

if TYPE_CHECKING:
    from qat.plan import PlanRow

TYPES = ("Linear", "Conv1d", "Conv2d", "Conv3d")
VARIANCE = "folded_variance"
_FIX = "name the right pairs in batch_norm.pairs, {layer: norm}, or set batch_norm.fold: false"


@dataclass
class _Growth:
    """Scales of one quantizer follow a variance, always from the same numbers so that no rounding adds up.

    starts      kept fields [R, G] or [1, 1] as they were searched or loaded
    variance    [R] that went with them
    last        the fields that were set last: a row where others are now was changed from outside (an average, a
                freeze of learned scales), and starts anew
    """

    starts: tuple[Tensor, ...]
    variance: Tensor
    last: tuple[Tensor, ...]

    def move(self, found: tuple[Tensor, ...], variance: Tensor) -> None:
        self.starts, self.last = (tuple(t.to(variance.device) for t in ts) for ts in (self.starts, self.last))
        changed = torch.stack([(a != b).any(1) for a, b in zip(found, self.last, strict=True)]).any(0)
        self.variance = torch.where(changed, variance, self.variance.to(variance))
        self.starts = tuple(torch.where(changed[:, None], a, b) for a, b in zip(found, self.starts, strict=True))

    def grown(self, ratio: Tensor) -> tuple[Tensor, ...]:
        return tuple((start.double() * ratio).float() for start in self.starts)


class BatchNormFold(Reparam):
    """The norm after one layer.

    names    of the layer and the norm, for messages
    held     batch norms are frozen
    watched  the norm hands on a copy, so that whoever else reads what the layer gave is seen
    """

    def __init__(self, layer: nn.Module, norm: nn.Module, names: tuple[str, str]) -> None:
        self.layer, self.names = layer, names
        self.held = self.watched = False
        # what the layer gave last, its version, and whether the norm got it
        self._given: tuple[weakref.ref[Tensor], int] | None = None
        self.arrived = True
        # the running variance that was followed last, and its version
        self._followed: tuple[Tensor, int] | None = None
        self._growth: _Growth | None = None
        variance: Tensor = norm.running_var  # type: ignore[assignment]
        layer.register_buffer(VARIANCE, variance.detach().clone(), persistent=False)
        self.take(norm)

    def take(self, norm: nn.Module) -> None:
        """Let a module stand for the norm; another library may have replaced it (SyncBatchNorm.convert_...)."""
        self.norm: Any = norm
        norm.__dict__["_qat_fold"] = self
        norm.__class__ = _folded_class(type(norm))

    def let_go(self) -> None:
        """Undo all of it."""
        del self.layer._buffers[VARIANCE], self.norm.__dict__["_qat_fold"]
        self.layer._non_persistent_buffers_set.discard(VARIANCE)
        self.norm.__class__ = type(self.norm).__mro__[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": None, "arrived": True, "_followed": None}

    # ---- the weight ------------------------------------------------------------------------------------------------

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(gamma, variance)"""
        gamma = self.norm.weight
        if hasattr(gamma, "placements") or hasattr(gamma, "ds_id"):
            layer, norm = self.names
            raise QATError(f"{norm} is folded into {layer} and sharded; train under DDP, or set batch_norm.fold: false")
        if not self.norm.training and not torch.compiler.is_compiling():
            self.refresh()
        return gamma, self.layer._buffers[VARIANCE]  # type: ignore[return-value]

    @property
    def undoes(self) -> bool:  # type: ignore[override]
        return not self.held

    @torch.no_grad()
    def follow(self) -> None:
        """The running variance as it is now is what weights are multiplied with from here on, and scales follow it."""
        mine: Any = self.layer._buffers[VARIANCE]
        now: Tensor = self.norm.running_var
        if mine.is_meta or now.is_meta:
            return
        self._followed = now, _version(now)
        quantizer: Any = self.layer._modules["weight_quantizer"]
        if quantizer.rewritten:
            # a search, or a checkpoint with both
            quantizer.rewritten, self._growth = False, None
            mine.copy_(now)
        starts = _copies(quantizer.starts())
        if starts:
            if self._growth is None:
                self._growth = _Growth(starts, mine.clone(), starts)
            self._growth.move(starts, now.to(mine))
            quantizer.start_from(self._growth.grown(self._grown_by(self._growth.variance, now, len(starts[0]))))
            self._growth.last = _copies(quantizer.starts())
        # in place, so that codes are seen to be old
        mine.copy_(now)

    def _grown_by(self, before: Tensor, now: Tensor, rows: int) -> Tensor:
        """f now over f before, fp64 [R, 1], gamma apart; of a scale for all rows [1, 1], of the largest number."""
        old, new = (torch.rsqrt(v.double() + self.norm.eps) for v in (before, now))
        if rows == len(old):
            return (new / old)[:, None]
        weight: Any = self.layer.weight
        largest = weight.detach().double().flatten(1).abs().amax(1) * self.norm.weight.double().abs()
        ratio: Tensor = (largest * new).amax() / (largest * old).amax()
        return ratio.nan_to_num(nan=1.0).reshape(1, 1)

    def refresh(self) -> None:
        """Frozen statistics that something else changed (an average, a load, an edit) are followed."""
        now = self.norm.running_var
        if self.held and (self._followed is None or self._followed[0] is not now or self._followed[1] != _version(now)):
            self.follow()

    def _factor(self, gamma: Tensor, variance: Tensor) -> Tensor:
        """f, fp32 [O]; in fp64 on the way, where a root and a quotient are the same on every machine."""
        return (gamma.double() / torch.sqrt(variance.double() + self.norm.eps)).float()

    def weight(self, w: Tensor, first: Tensor, second: Tensor) -> Tensor:
        # a product of two fp32 numbers, which no fused multiply-add can change
        return (w.double() * _by_row(self._factor(first, second).double(), w)).float()

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return self.folded_bias() if self.held else bias

    def folded_bias(self) -> Tensor:
        """bias', fp32 [O]."""
        bias: Any = self.layer.bias
        factor = self._factor(*self.factors)
        mean = self.norm.running_mean.float()
        shift = -mean if bias is None else bias.float() - mean
        # the product is exact, so the sum is rounded once, fused or not
        folded: Tensor = (shift.double() * factor.double() + self.norm.bias.double()).float()
        return folded

    def pull(self, dw: Tensor, latents: tuple[Tensor, ...], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        w, gamma, variance = latents
        factor = self._factor(gamma, variance)
        dgamma = None
        if needs[1]:
            dfactor = (dw.float() * w.float()).flatten(1).sum(1)
            dgamma = (dfactor / torch.sqrt(variance.float() + self.norm.eps)).to(gamma.dtype)
        return dw.float() * _by_row(factor, dw) if needs[0] else None, dgamma, None

    def undo(self, t: Tensor, latents: tuple[Tensor, ...]) -> Tensor:
        factor = self._factor(*latents[1:])
        inverse = torch.where(factor == 0, 0.0, 1.0 / factor)
        return t.float() * _by_row(inverse, t)

    # ---- from the layer to the norm ----------------------------------------------------------------------------------

    def gave(self, y: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._given, self.arrived = (weakref.ref(y), _version(y)), False

    def given(self) -> Tensor | None:
        """What the layer gave last, while it is alive."""
        return None if self._given is None else self._given[0]()

    def check(self, x: Tensor) -> None:
        """Raises QATError if x, which the norm is called with, is not what the layer gave."""
        if torch.compiler.is_compiling():
            return
        layer, norm = self.names
        if x is not self.given() or self._given is None or self._given[1] != _version(x):
            raise QATError(f"{norm} is folded into {layer}, but gets something else than {layer} gave; {_FIX}")
        if x.dim() != self.layer.weight.dim():  # type: ignore[operator]
            raise QATError(f"{norm} gets {x.dim()} dimensions, of which the second is no channel of {layer}; {_FIX}")
        self.arrived = True


def _copies(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone() for t in found)


def _version(t: Tensor) -> int:
    # tensors made in inference mode have no counter
    return -1 if t.is_inference() else t._version


def _by_row(factor: Tensor, like: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (like.dim() - 1))


# ---- the norm --------------------------------------------------------------------------------------------------------


class FoldedBatchNorm(nn.Module):
    """First base of the swapped class of a norm that is folded."""

    _qat_fold: BatchNormFold

    def forward(self, x: Tensor) -> Tensor:
        fold = self._qat_fold
        fold.check(x)
        with inside():
            if not fold.held:
                return super().forward(x)  # type: ignore[no-any-return]
            if not fold.layer._qat.active:  # type: ignore[union-attr]
                return normalize_held(self, x)
            return x.clone() if fold.watched else x

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self._qat_fold.held:
            self._qat_fold.follow()
            forget_codes_of(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self).__mro__[2],), self.__dict__


def _revive(original: type[nn.Module]) -> nn.Module:
    cls = _folded_class(original)
    return cls.__new__(cls)  # type: ignore[no-any-return]


_folded: dict[type[nn.Module], Any] = {}


def _folded_class(original: type[nn.Module]) -> Any:
    if original not in _folded:
        names = {"__module__": original.__module__}
        _folded[original] = type(f"Folded{original.__name__}", (FoldedBatchNorm, original), names)
    return _folded[original]


def folds_of(model: nn.Module) -> list[BatchNormFold]:
    """Every fold in a prepared model."""
    return [m._qat_fold for m in model.modules() if isinstance(m, FoldedBatchNorm)]


@torch.no_grad()
def agree_on_statistics(model: nn.Module) -> None:
    """After a step: weights are multiplied with the statistics as they are now, on every rank with those of rank 0,
    which DDP gives to all before the next forward."""
    folds = folds_of(model)
    if folds and torch.distributed.is_available() and torch.distributed.is_initialized():
        found = [t for fold in folds for t in (fold.norm.running_mean, fold.norm.running_var)]
        joint = torch.cat([t.float() for t in found])
        torch.distributed.broadcast(joint, 0)
        for t, agreed in zip(found, torch.split(joint, [t.numel() for t in found]), strict=True):
            t.copy_(agreed)
    for fold in folds:
        fold.follow()


def dead_reasons(model: nn.Module) -> list[str]:
    """Norms whose channels would all give zeros, and so would never learn."""
    return [
        f"every gamma of {fold.names[1]} is 0 (zero_init_residual?), so what is rounded in {fold.names[0]} is 0 and "
        "stays so; start with a phase with quantize: false, or with freeze_batch_norm: true"
        for fold in folds_of(model)
        if not fold.held and fold.layer._qat.active and not bool(fold.norm.weight.any())  # type: ignore[union-attr]
    ]


# ---- the pairs -------------------------------------------------------------------------------------------------------


def find_pairs(
    model: nn.Module, rows: list[PlanRow], pairs: dict[str, str], prefix: str, adapted: set[str]
) -> tuple[dict[str, str], list[str]]:
    """(layer -> norm, why not); prefix: what names in `pairs` may leave out, adapted: layers that have an adapter.

    Without pairs: the layers after which their module lists a batch norm of as many channels.
    """
    able = {row.name: row for row in rows if row.weight is not None and "weight" in row.kinds}
    layers = list(able)
    found, problems = _named(model, layers, pairs, prefix) if pairs else (_listed(model, layers), [])
    for norm in found.values():
        owners = [layer for layer, other in found.items() if other == norm]
        if len(owners) > 1 and owners[0] + norm not in problems:
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
        return [f"{norm} is a {type(module).__name__} and no batch norm; {_FIX}"]
    found = []
    if not module.track_running_stats or module.running_var is None:
        found.append(f"{norm} keeps no statistics to fold (track_running_stats=False)")
    if not module.affine:
        found.append(f"{norm} has no weight and bias to fold (affine=False)")
    if weight is not None and module.num_features != weight.shape[0]:
        found.append(f"{norm} has {module.num_features} channels and {layer} gives {weight.shape[0]}; {_FIX}")
    owners = [name for name, m in model.named_modules() if any(p is weight for p in m._parameters.values())]
    if len(owners) > 1:
        found.append(f"its weight is that of {' and '.join(set(owners) - {layer})} too, which {norm} does not follow")
    return found
