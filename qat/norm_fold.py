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

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.batch_norm import normalize_held
from qat.codes import forget_codes_of
from qat.errors import QATError
from qat.node import inside
from qat.reparam import Reparam

VARIANCE = "folded_variance"
FIX = "list the right pairs, or all others, in batch_norm.pairs, {layer: norm}, or set batch_norm.fold: false"
# below, a factor is as good as 0: its inverse, times a gradient, would leave fp32
_TINY = 2.0**-60


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

    def __init__(self, layer: nn.Module, root: nn.Module, names: tuple[str, str]) -> None:
        self.layer, self.names = layer, names
        self.held = self.watched = False
        # what the layer gave last and its version; whether the norm got it, reads it now, or never got an earlier one
        self._given: tuple[Callable[[], Tensor | None], int] | None = None
        self.arrived, self.reads, self.lost = True, False, False
        self.norm: Any = None
        # the running variance that was followed last, and its version
        self._followed: tuple[Tensor, int] | None = None
        self._growth: _Growth | None = None
        self.find(root)
        norm: Any = root.get_submodule(names[1])
        layer.register_buffer(VARIANCE, norm.running_var.detach().clone(), persistent=False)

    def find(self, root: nn.Module) -> None:
        """The norm is what has its name below `root`."""
        parent, _, last = self.names[1].rpartition(".")
        # its parent, and its name there
        self._place: tuple[nn.Module, str] | None = root.get_submodule(parent), last
        self._take()

    def _take(self) -> None:
        """Another library may have replaced the norm (SyncBatchNorm.convert_...)."""
        if self._place is None or self._place[0]._modules.get(self._place[1]) is self.norm:
            return
        norm: Any = self._place[0]._modules.get(self._place[1])
        if not isinstance(norm, _BatchNorm):
            layer, name = self.names
            raise QATError(
                f"{name} is folded into {layer}, but a {type(norm).__name__} is in its place now; put the batch norm "
                "back, or call qat.unprepare(model) first"
            )
        if self.norm is not None:
            self._free()
        self.norm = norm
        norm.__dict__["_qat_fold"] = self
        norm.__class__ = _folded_class(type(norm))

    def _free(self) -> None:
        del self.norm.__dict__["_qat_fold"]
        self.norm.__class__ = type(self.norm).__mro__[2]

    def let_go(self) -> None:
        """Undo all of it."""
        self._free()
        del self.layer._buffers[VARIANCE]
        self.layer._non_persistent_buffers_set.discard(VARIANCE)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of one layer must not bring the norm's parent with it; the schedule finds it
        return {**self.__dict__, "_given": None, "arrived": True, "_followed": None, "_place": None}

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
        inverse = torch.where(factor.abs() < _TINY, 0.0, 1.0 / factor)
        return t.float() * _by_row(inverse, t)

    # ---- from the layer to the norm ----------------------------------------------------------------------------------

    def gave(self, y: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        self._take()
        self.lost |= not self.arrived
        # a full backward hook hands on a view, and y itself is gone
        hooked = self.hooked
        self._given, self.arrived = ((lambda: y) if hooked else weakref.ref(y), _version(y)), False

    @property
    def hooked(self) -> bool:
        layer = self.layer
        return bool(layer._backward_hooks or layer._backward_pre_hooks)

    def given(self) -> Tensor | None:
        """What the layer gave last, while it is alive."""
        return None if self._given is None else self._given[0]()

    def check(self, x: Tensor) -> None:
        """Raises QATError if x, which the norm is called with, is not what the layer gave."""
        if torch.compiler.is_compiling():
            return
        layer, norm = self.names
        # of a layer that is compiled by itself nothing is known here
        if not self.layer._qat.traced and not self._is_given(x):  # type: ignore[union-attr]
            raise QATError(f"{norm} is folded into {layer}, but gets something else than {layer} gave; {FIX}")
        if x.dim() != self.layer.weight.dim():  # type: ignore[operator]
            raise QATError(f"{norm} gets {x.dim()} dimensions, of which the second is no channel of {layer}; {FIX}")
        self.arrived = True
        if self.hooked and not self.watched:
            self._given = None

    def _is_given(self, x: Tensor) -> bool:
        y = self.given()
        if y is None or self._given is None or self._given[1] != _version(x):
            return False
        return x is y or (self.hooked and x.data_ptr() == y.data_ptr() and x.shape == y.shape)


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
        if not fold.watched:
            return self._normalized(x)
        fold.reads = True
        try:
            y = self._normalized(x)
            return y.clone() if y is x else y
        finally:
            fold.reads = False

    def _normalized(self, x: Tensor) -> Tensor:
        fold = self._qat_fold
        with inside():
            if not fold.held:
                return super().forward(x)  # type: ignore[no-any-return]
            # in a float phase the layer gives what it gave before
            if not fold.layer._qat.active:  # type: ignore[union-attr]
                return normalize_held(self, x)
            # a view that a hook made must not be changed in place, which an activation may do
            return x.clone() if fold.hooked else x

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
    """Every fold in a prepared model, by its layer: another library may have replaced the norm."""
    return folds_among(model.modules())


def folds_among(modules: Iterable[nn.Module]) -> list[BatchNormFold]:
    """Every fold of these layers."""
    lives = [m.__dict__["_qat"] for m in modules if "_qat" in m.__dict__]
    return [reparam for live in lives for reparam in live.reparams.values() if isinstance(reparam, BatchNormFold)]


@torch.no_grad()
def agree_on_statistics(folds: list[BatchNormFold]) -> None:
    """After a step: weights are multiplied with the statistics as they are now, on every rank with those of rank 0,
    which DDP gives to all before the next forward."""
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
        if not fold.held and fold.layer._qat.active  # type: ignore[union-attr]
        if not fold.norm.weight.is_meta and not bool(fold.norm.weight.any())
    ]
