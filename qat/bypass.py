"""No bypass: nothing but our own node may use a planned weight.

Three ways in which a prepared model could silently run in float are handled here:

- torch.nn.TransformerEncoder(Layer) in eval reads `linear1.weight` itself and hands it to one fused kernel; modules of
  these classes get a class-swapped forward that switches that fast path off for the call.
- what a layer gives before the batch norm that is folded into it (`qat.norm_fold`) is read by nobody but that norm; the
  rehearsal finds who else does.
- anything else (a parent that calls `F.linear(x, child.weight)`) is found by the rehearsal: train and eval forwards run
  under a dispatch mode that reports every op outside our node that reads a planned weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qat.errors import QATError
from qat.layers import QATLayer
from qat.node import is_inside
from qat.norm_fold import BatchNormFold, folds_of

_FAST_PATHS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


class _SlowPath(nn.Module):
    """First base of a swapped encoder class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return super().forward(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self).__mro__[2],), self.__dict__


_slow: dict[type[nn.Module], Any] = {}


def _slow_class(original: type[nn.Module]) -> Any:
    if original not in _slow:
        _slow[original] = type(f"QAT{original.__name__}", (_SlowPath, original), {"__module__": original.__module__})
    return _slow[original]


def _revive(original: type[nn.Module]) -> nn.Module:
    cls = _slow_class(original)
    return cls.__new__(cls)  # type: ignore[no-any-return]


def close_fast_paths(model: nn.Module) -> None:
    """Give every encoder that holds a QAT layer a forward without the fused float kernel; idempotent."""
    for module in model.modules():
        encoder = isinstance(module, _FAST_PATHS) and not isinstance(module, _SlowPath)
        if encoder and any(isinstance(child, QATLayer) for child in module.modules()):
            module.__class__ = _slow_class(type(module))


def reopen_fast_paths(model: nn.Module) -> None:
    """Undo `close_fast_paths`."""
    for module in model.modules():
        if isinstance(module, _SlowPath):
            module.__class__ = type(module).__mro__[2]


def planned_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> weight of every layer that is prepared."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QATLayer):
            for key in module._qat.op.kinds(module):
                if hasattr(module, f"{key}_quantizer"):
                    found[f"{name}.{key}" if name else key] = module._parameters[key]
    return {name: w for name, w in found.items() if w is not None}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects (parameter name, op) of every op outside our node that reads a planned weight."""

    def __init__(self, weights: dict[str, Tensor], folds: list[BatchNormFold]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {w.untyped_storage().data_ptr(): name for name, w in weights.items() if w.numel()}
        self.found: dict[str, str] = {}
        # what layers gave that the norm after them has to get, and who else read it
        self.folds = folds
        self.early: dict[str, str] = {}
        # an optimizer reads the weights too (manual optimization steps inside training_step)
        self.paused = False

    def pause(self, *_: Any) -> None:
        self.paused = True

    def go_on(self, *_: Any) -> None:
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        # a layer of ours may read it as well
        self._note_early(func, (args, kwargs), out)
        if is_inside():
            return out
        touched = {self._owner(leaf) for leaf in tree_leaves((args, kwargs))} - {None}
        # a view or an in-place result hands the weight on; only an op with a fresh result has used it
        passed_on = {self._owner(leaf) for leaf in tree_leaves(out)}
        for name in sorted(str(name) for name in touched - passed_on):
            self.found.setdefault(name, str(func))
        return out

    def _note_early(self, func: Any, given: Any, out: Any) -> None:
        folds = [fold for fold in self.folds if not fold.reads]
        waiting = {y.untyped_storage().data_ptr(): fold for fold in folds if (y := fold.given()) is not None}
        # of a backward inside the step it is no use
        if not waiting or "backward" in str(func):
            return
        read, passed_on = (
            {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if _is_whole(leaf)}
            for tree in (given, out)
        )
        for place in (read - passed_on) & waiting.keys():
            self.early.setdefault(waiting[place].names[0], str(func))

    def _owner(self, leaf: Any) -> str | None:
        return self.names.get(leaf.untyped_storage().data_ptr()) if _is_whole(leaf) else None


def _is_whole(leaf: Any) -> bool:
    return type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided and leaf.device.type != "meta"


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """Run a forward inside; raises QATError at the end if a planned weight was used in float.

    Sharded weights (DTensor) are not watched: their storage is not the one that the forward reads.
    """
    weights = {name: w for name, w in planned_weights(model).items() if type(w) in (Tensor, nn.Parameter)}
    folds = folds_of(model)
    watch = _Watch(weights, folds)
    hooks = [register_optimizer_step_pre_hook(watch.pause), register_optimizer_step_post_hook(watch.go_on)]
    for fold in folds:
        fold.watched, fold.arrived, fold.lost = True, True, False
    try:
        with watch:
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for fold in folds:
            fold.watched = False
    for fold in folds:
        layer, norm = fold.names
        op = watch.early.get(layer) or (None if fold.arrived and not fold.lost else "nothing of it")
        if op is not None:
            raise QATError(
                f"{norm} is folded into {layer}, but {op} reads what {layer} gives without the norm; list the "
                "other pairs in batch_norm.pairs, or set batch_norm.fold: false"
            )
    if watch.found:
        name, op = next(iter(watch.found.items()))
        raise QATError(
            f"{name} is planned for quantization but {op} reads it in float ({len(watch.found)} such weights): the "
            "module around it bypasses the layer's own forward; list the layer with keep_float: true, or call it there "
            "(a penalty on the weights in training_step is meant? then QATCallback(..., rehearse=False))"
        )


def rehearse(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run `model(*args, **kwargs)` in train and in eval mode and prove that no planned weight is used in float.

    The model is left as it was: flags, buffers and random state are restored. Raises QATError on a bypass.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {name: copy.deepcopy(buffer) for name, buffer in model.named_buffers()}
    layers = [m for m in model.modules() if isinstance(m, QATLayer)]
    active = [layer._qat.active for layer in layers]
    try:
        gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(gpus)):
            for train in (True, False):
                model.train(train)
                for layer in layers:
                    layer._qat.active = True
                with watched(model), torch.set_grad_enabled(train):
                    model(*args, **kwargs)
    finally:
        for layer, state in zip(layers, active, strict=True):
            layer._qat.active = state
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
