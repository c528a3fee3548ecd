"""Going through a model's layers in the order in which they run, each with the inputs that it has by then.

    for layers in walk(...):        # layers that read the same tensor; their moments are complete
        ...                         # change them: what comes later sees it

A survey runs the model on as many batches as it takes for every layer to run. It finds the order, which layers read the
same tensor (q, k and v), and the blocks: the outermost children of a ModuleList. Then

    a block that runs once per forward    its inputs are caught, and for each group of its layers the block runs alone,
                                          up to the last of them; its outputs are the next block's inputs where the
                                          survey saw that nothing else happens in between, else they are caught anew
    all else                              the model runs up to the last layer of the group

so at any time the inputs of one block are held, those of all batches.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat.init.inputs import Moments
from qat.layers import QATLayer

Forward = Callable[[nn.Module, Any], Any]
# arguments of a call by position and by name
Call = tuple[tuple[Any, ...], dict[str, Any]]
# where each argument of a call comes from: the call of the block before (its place there), or that block's output
# (its place in a tuple, -1: the output itself)
Source = tuple[bool, int | str]
Link = tuple[list[Source], dict[str, Source]]
# autocast on each of these devices: whether it is on, its dtype
Context = tuple[tuple[bool, torch.dtype], ...]
_DEVICES = ("cpu", "cuda")


_BLOCK = "block"


class _EnoughError(BaseException):
    """What was wanted of this forward is known. No Exception, so that no model catches it."""


@dataclass(eq=False)
class Shared:
    """A weight with the layers that share it, mostly one; named after the first that ran."""

    name: str
    layers: list[QATLayer]
    moments: Moments = field(default_factory=Moments)


def call_model(model: nn.Module, batch: Any) -> Any:
    """A mapping gives arguments by name, a tuple by position; anything else is the only argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def walk(model: nn.Module, batches: Sequence[Any], forward: Forward, weights: list[Shared]) -> Iterator[list[Shared]]:
    """Groups of `weights` in the order in which they run, with the moments of their inputs. Those that never run are
    left out."""
    runs = [partial(forward, model, batch) for batch in batches]
    survey = Survey(model, weights)
    survey.run(runs)
    stream = Stream(survey, runs)
    for block, groups in survey.stages():
        stream.enter(block)
        for group in groups:
            if block is None:
                _collect(group, runs, survey.times)
            else:
                _collect(group, map(partial(stream.alone, block), stream.calls), survey.times)
            yield group
            for shared in group:
                shared.moments = Moments()


def _collect(group: list[Shared], runs: Iterable[Callable[[], Any]], times: Counter[Any]) -> None:
    """Add to the moments of the group what its layers see, and stop each run after the last of their calls."""
    left: dict[QATLayer, int] = {}

    def seen(layer: QATLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments[layer].add(layer, args, kwargs)
        left[layer] -= 1
        if max(left.values()) <= 0:
            raise _EnoughError

    moments = {layer: shared.moments for shared in group for layer in shared.layers}
    with _hooked([layer.register_forward_pre_hook(seen, with_kwargs=True) for layer in moments]):
        for run in runs:
            left.update({layer: times[layer] for layer in moments})
            with contextlib.suppress(_EnoughError):
                run()


def _caught(block: nn.Module, run: Callable[[], Any]) -> list[Call]:
    """The arguments with which a run of the model calls the block: one call, or none."""
    found: list[Call] = []

    def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _EnoughError

    with _hooked([block.register_forward_pre_hook(seen, with_kwargs=True)]), contextlib.suppress(_EnoughError):
        run()
    return found


def alone(block: nn.Module, context: Context, call: Call) -> Callable[[], Any]:
    """The call of the block under the autocast in which it ran, with tensors of its own that it may change in place."""

    def own(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    def run() -> Any:
        with contextlib.ExitStack() as stack:
            for device, now, wanted in zip(_DEVICES, _context(), context, strict=True):
                if now != wanted:
                    stack.enter_context(torch.autocast(device, enabled=wanted[0], dtype=wanted[1]))
            return block(*map(own, call[0]), **{key: own(value) for key, value in call[1].items()})

    return run


def _context() -> Context:
    """Whether autocast is on, and its dtype, on each kind of device."""
    return tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES)


def _follow(link: Link, call: Call, output: Any) -> Call:
    def value(source: Source) -> Any:
        given, place = source
        if given:
            return call[0][place] if isinstance(place, int) else call[1][place]
        return output if place == -1 else output[place]

    return tuple(value(source) for source in link[0]), {key: value(source) for key, source in link[1].items()}


@contextlib.contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Stream:
    """With which arguments the batches call a block, for blocks in the order in which they run."""

    def __init__(self, survey: Survey, runs: Sequence[Callable[[], Any]]) -> None:
        self.survey, self.runs = survey, runs
        self.calls: list[Call] = []
        self._known: nn.Module | None = None

    def enter(self, block: nn.Module | None, outputs: Sequence[Any] | None = None) -> None:
        """Go on to the next block, or to no block, through the one before as it is now or by what it gave."""
        link = self.survey.links.get(block) if block is not None else None
        if block is not None and (link is None or link[0] is not self._known):
            self.calls = []
            for run in self.runs:
                self.calls += _caught(block, run)
        elif link is not None and self._known is not None:
            for i, call in enumerate(self.calls):
                output = self.alone(self._known, call)() if outputs is None else outputs[i]
                self.calls[i] = _follow(link[1], call, output)
        self._known = block

    def alone(self, block: nn.Module, call: Call) -> Callable[[], Any]:
        """`alone` under the autocast of the survey."""
        return alone(block, self.survey.contexts[block], call)


class Survey:
    """times      how often a layer or a block runs in one forward, at most
    contexts   block -> the autocast in which it runs
    links      block -> (the block before it, where its arguments come from), if that held in all forwards
    """

    def __init__(self, model: nn.Module, weights: list[Shared]) -> None:
        self.weights = weights
        self.owner = {layer: shared for shared in weights for layer in shared.layers}
        self.block_of = dict(_blocks(model))
        self.blocks = {block for layer, block in self.block_of.items() if layer in self.owner}
        self.times: Counter[Any] = Counter()
        self.contexts: dict[nn.Module, Context] = {}
        self.links: dict[nn.Module, tuple[nn.Module, Link]] = {}
        # each weight when it first runs, and whether it reads what the one before it read
        self.order: dict[Shared, bool] = {}
        self.whole: set[nn.Module] = set()
        self._unlinked: set[nn.Module] = set()

    def run(self, forwards: Sequence[Callable[[], Any]]) -> None:
        handles: list[Any] = []
        for layer in self.owner:
            handles.append(layer.register_forward_pre_hook(self._layer_runs, with_kwargs=True))
        for block in self.blocks:
            handles.append(block.register_forward_pre_hook(self._block_runs, with_kwargs=True))
            handles.append(block.register_forward_hook(self._block_ran, with_kwargs=True))
        with _hooked(handles):
            for forward in forwards:
                self._calls: Counter[Any] = Counter()
                self._read: tuple[Tensor, Any] | None = None
                self._reader: Shared | None = None
                self._before: tuple[nn.Module, Call, Any] | None = None
                self._versions: dict[int, int | None] = {}
                forward()
                # what a forward made may go
                self._read = self._before = None
                self.times |= self._calls
                if len(self.order) == len(self.weights):
                    break

    def stages(self) -> list[tuple[nn.Module | None, list[list[Shared]]]]:
        """(block or None, groups of weights that read the same tensor), in the order in which they run."""
        found: list[tuple[nn.Module | None, list[list[Shared]]]] = []
        for shared, joins in self.order.items():
            inside = {self.block_of.get(layer) for layer in shared.layers}
            block = inside.pop() if len(inside) == 1 else None
            if block is not None and (self.times[_BLOCK, block] != 1 or block in self.whole):
                block = None
            if not found or found[-1][0] is not block:
                found.append((block, [[shared]]))
            elif joins:
                found[-1][1][-1].append(shared)
            else:
                found[-1][1].append([shared])
        return found

    def _layer_runs(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[layer] += 1
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        now = (x, _version(x))
        same = self._read is not None and self._read[0] is x and self._read[1] == now[1] is not None
        shared = self.owner[layer]  # type: ignore[index]
        # it joins the newest group, so one of that has to have read the tensor; tied layers read more than this one
        newest = next(reversed(self.order), None)
        self.order.setdefault(shared, same and self._reader is newest and len(shared.layers) == 1)
        self._read, self._reader = now, shared

    def _block_runs(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # apart from its calls as a layer, which a block may be too
        self._calls[_BLOCK, block] += 1
        # a block is not run alone where it could change something (a cache of keys) or where its autocast varies
        same = self.contexts.setdefault(block, _context()) == _context()
        if not same or not all(map(_is_plain, (*args, *kwargs.values()))):
            self.whole.add(block)
        found = None if self._before is None else _link(*self._before[1:], (args, kwargs), self._versions)
        link = None if found is None or self._before is None else (self._before[0], found)
        if link is None or self.links.get(block, link) != link:
            self._unlinked.add(block)
        if link is not None:
            self.links[block] = link
        if block in self._unlinked:
            self.links.pop(block, None)
        self._versions = {id(t): _version(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}

    def _block_ran(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._before = block, (args, kwargs), output
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        self._versions |= {id(t): _version(t) for t in outputs if isinstance(t, Tensor)}


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(prepared layer, the outermost child of a ModuleList that holds it)."""
    for child in model.children():
        if isinstance(model, nn.ModuleList):
            yield from ((layer, child) for layer in child.modules() if isinstance(layer, QATLayer))
        else:
            yield from _blocks(child)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (Tensor, str, int, float, torch.dtype, torch.device, torch.Size))


def _version(t: Tensor) -> int | None:
    """Counts what was done to t in place; tensors of inference mode do not say."""
    return None if t.is_inference() else t._version


def _link(call: Call, output: Any, now: Call, versions: dict[int, int | None]) -> Link | None:
    """Where the arguments of the call `now` come from, given the call of the block before and its output; None if one
    comes from elsewhere, or is not as it was (`versions`, by id)."""
    outputs: list[tuple[Source, Any]] = [((False, -1), output)]
    if isinstance(output, (tuple, list)):
        outputs += [((False, i), value) for i, value in enumerate(output)]
    given: dict[Any, Any] = {**dict(enumerate(call[0])), **call[1]}

    def source(value: Any, place: int | str) -> Source | None:
        # the output first: a block that works in place returns what it was given
        if isinstance(value, Tensor):
            if _version(value) is None or versions.get(id(value)) != _version(value):
                return None
            for known, found in outputs:
                if found is value:
                    return known
        # not by another name: there are many None and True
        return (True, place) if place in given and given[place] is value else None

    args = [source(value, i) for i, value in enumerate(now[0])]
    kwargs = {key: source(value, key) for key, value in now[1].items()}
    if None in args or None in kwargs.values():
        return None
    return args, kwargs  # type: ignore[return-value]
