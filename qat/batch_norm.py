"""Batch norm and few bits: statistics that fit the weights that are deployed, and statistics that stay.

Running means and variances lag behind weights whose codes move to and fro, and at 4 bits or less what they lag behind
is most of the loss (Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", section 2.3).

    reestimate_batch_norm   before an evaluation or an export: statistics anew, from training batches
    hold_batch_norm         in the last phase: layers normalize by their statistics, as the deployed network does, also
                            in training, and the weights learn under these
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from qat.codes import forget_codes_of
from qat.errors import QATError


class HeldBatchNorm(nn.Module):
    """First base of a swapped class: a batch norm that computes as in eval mode whatever its mode is."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize_held(self, x)

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self).__mro__[2],), self.__dict__


def normalize_held(norm: Any, x: Tensor) -> Tensor:
    """What a batch norm gives in eval mode."""
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps)


def _revive(original: type[nn.Module]) -> nn.Module:
    cls = _held_class(original)
    return cls.__new__(cls)  # type: ignore[no-any-return]


_held: dict[type[nn.Module], Any] = {}


def _held_class(original: type[nn.Module]) -> Any:
    if original not in _held:
        names = {"__module__": original.__module__}
        _held[original] = type(f"Held{original.__name__}", (HeldBatchNorm, original), names)
    return _held[original]


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep statistics, held ones included."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def is_held(module: nn.Module) -> bool:
    fold = module.__dict__.get("_qat_fold")
    return isinstance(module, HeldBatchNorm) if fold is None else bool(fold.held)


def hold_batch_norm(model: nn.Module, hold: bool) -> None:
    """Swap the classes of all batch norms in place, or back; names, parameters and statistics stay. Folded ones
    (`qat.norm_fold`) are told."""
    for norm in batch_norms(model):
        if "_qat_fold" in norm.__dict__:
            norm.__dict__["_qat_fold"].held = hold
        elif hold != is_held(norm):
            if not hold and type(norm).__mro__[1] is not HeldBatchNorm:
                raise QATError(
                    "a batch norm that a phase holds was sharded by itself; shard it with its parent instead"
                )
            norm.__class__ = _held_class(type(norm)) if hold else type(norm).__mro__[2]


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> int:
    """Means over `batches` of each batch's mean and (unbiased) variance become the running statistics of the norms that
    run on them; returns how many norms there are. Held norms keep theirs: the weights were trained under them.

    The rest of the model computes as in eval mode, so dropout is off and observed ranges stay. Modes, momenta and the
    counts of batches are then as before. Across processes the statistics are averaged; every rank has to call it.

    forward   runs the model on one batch; None: model(batch), or model(*batch) for a tuple or a list

    Raises QATError if there is no batch, or if all norms are held.
    """
    norms = [norm for norm in batch_norms(model) if not is_held(norm)]
    if not norms and batch_norms(model):
        raise QATError(
            "the batch norms are frozen by a phase, and the weights learn under the statistics that they have; call "
            "qat.reestimate_batch_norm before the first step of that phase (where it is the first: before qat.prepare)"
        )
    if not norms:
        return 0
    run = forward or _call
    modes = {module: module.training for module in model.modules()}
    kept = [(norm.momentum, norm.num_batches_tracked, norm.running_mean, norm.running_var) for norm in norms]
    done = whole = False
    try:
        model.eval()
        for norm in norms:
            norm.train()
            # a momentum of None is a plain mean; the tensors are replaced so that a failure leaves them as they were
            norm.momentum = None
            norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)  # type: ignore[arg-type]
            norm.running_mean = torch.zeros_like(norm.running_mean)  # type: ignore[arg-type]
            norm.running_var = torch.ones_like(norm.running_var)  # type: ignore[arg-type]
        for batch in batches:
            run(model, batch)
            done = True
        if not done:
            raise QATError("batch norm cannot be estimated anew without a training batch")
        _average(norms)
        whole = True
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, (momentum, count, mean, var) in zip(norms, kept, strict=True):
            fresh, ran = (norm.running_mean, norm.running_var), bool(norm.num_batches_tracked)
            norm.momentum, norm.num_batches_tracked, norm.running_mean, norm.running_var = momentum, count, mean, var
            # one that did not run on these batches keeps what it has
            if whole and ran:
                mean.copy_(fresh[0])  # type: ignore[union-attr, arg-type]
                var.copy_(fresh[1])  # type: ignore[union-attr, arg-type]
            if "_qat_fold" in norm.__dict__:
                norm.__dict__["_qat_fold"].follow()
                forget_codes_of(norm)
    return len(norms)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _average(norms: list[_BatchNorm]) -> None:
    """Over the processes, each by how many batches its norm saw."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for norm in norms:
        mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
        assert mean is not None and var is not None and count is not None
        joint = torch.cat([mean.double() * count, var.double() * count, count.double().reshape(1)])
        torch.distributed.all_reduce(joint)
        if joint[-1] > 0:
            mean.copy_(joint[: len(mean)] / joint[-1])
            var.copy_(joint[len(mean) : -1] / joint[-1])
        count.copy_(joint[-1])
