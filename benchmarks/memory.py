"""Bytes and host reads of one step on a CPU, from the allocator's own events.

    peak    highest level within a step above its start
    alive   level after the forward above the step's start, without gradients: what autograd saved, caches, the loss
    syncs   reads of a tensor's value by the host (`.item()`, `bool(t)`, `nonzero`): each would stop a GPU's queue

To peak and alive is added what the tool held at the step's start beside its state dict, its gradients and its
optimizer's state: a cache that outlives a step counts, whether it is kept, refilled or made anew.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch._subclasses import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from benchmarks.common import Variant

SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2")


@dataclass(frozen=True)
class Memory:
    peak: int
    alive: int
    syncs: int


def storages() -> dict[int, int]:
    """Address -> bytes of every storage that some Python object holds a tensor of."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        # type(), not isinstance(): lazy modules answer the latter by importing
        kind = type(thing)
        if (
            issubclass(kind, Tensor)
            and not issubclass(kind, FakeTensor)
            and thing.device.type == "cpu"
            and thing.layout == torch.strided
        ):
            found |= _storage(thing)
    return found


def _storage(tensor: Tensor) -> dict[int, int]:
    try:
        storage = tensor.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()} if storage.nbytes() else {}
    except (RuntimeError, NotImplementedError):
        # functional tensors have none
        return {}


def _own(variant: Variant) -> Iterator[Tensor]:
    """What belongs to the model and its optimizer and not to a step."""
    yield from variant.model.state_dict().values()
    for parameter in variant.model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from (leaf for leaf in tree_leaves(dict(variant.optimizer.state)) if isinstance(leaf, Tensor))


def held(variant: Variant, before: dict[int, int]) -> int:
    """Bytes that came into being since `before` (`storages()` ahead of building the variant) and are no state; to be
    asked between two steps and before anything else is built."""
    gc.collect()
    own = {address for tensor in _own(variant) for address in _storage(tensor)}
    return sum(size for address, size in storages().items() if address not in own and address not in before)


def measure(variant: Variant, batch: Any, parts: int, kept: int) -> Memory:
    """Three more steps of a warm variant that holds `kept` bytes between steps, `parts` micro-batches each (after the
    first one gradients are there; more than two show nothing new)."""
    parts = min(parts, 2)
    with _recorded():
        # what is given back is only reported if it was taken under a recording
        variant.step(batch, parts)
    gc.collect()
    gc.disable()
    try:
        with _recorded() as recorded:
            for _ in range(parts - 1):
                variant.micro_batch(batch, parts)
            loss = variant.run(batch) / parts
        grads = sum(p.grad.untyped_storage().nbytes() for p in variant.model.parameters() if p.grad is not None)
        alive = sum(_changes(recorded)) - grads
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        variant.finish()
        with _recorded() as recorded:
            variant.step(batch, parts)
    finally:
        gc.enable()
    level = peak = 0
    for change in _changes(recorded):
        level += change
        peak = max(peak, level)
    syncs = sum(event.name() in SYNCS for event in _events(recorded))
    return Memory(peak + kept, alive + kept, syncs)


@contextlib.contextmanager
def _recorded() -> Iterator[profile]:
    """torch.profiler with memory events, without the lines that its library writes to stderr at start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            yield recorded
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _events(recorded: profile) -> list[Any]:
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    return list(recorded.profiler.kineto_results.events())


def _changes(recorded: profile) -> list[int]:
    """Bytes taken (positive) and given back, in order of time."""
    host = DeviceType.CPU
    found = [event for event in _events(recorded) if event.name() == "[memory]" and event.device_type() == host]
    return [event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())]
