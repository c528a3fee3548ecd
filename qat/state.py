"""What a checkpoint must say about itself: recipe, step, and the dtypes of the forward.

`QATState` is a child of the prepared root called `qat_state`. It has no parameter and no buffer (nothing to average, to
cast or to shard); its extra state is a uint8 tensor of JSON, so a weights-only file carries it and no pickle is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.errors import QATError

if TYPE_CHECKING:
    from qat.plan import Plan
    from qat.schedule import Schedule, State

VERSION = 1
CHILD = "qat_state"
# Room for a layer's pair of dtypes beside its name, and for everything else but the recipe.
_LAYER_BYTES = 64
_RECORD_BYTES = 512
_BLOCK = 1024
# What was folded, in the __dict__ of the modules that it was done to: copies of any of them know it.
_FOLDED = "_qat_folded"


@dataclass
class Record:
    """Plain data of one prepared model.

    step             optimizer steps taken by the optimizer that owns the planned weights
    initialized      scales were searched on the weights that training started from
    scales_frozen    learned scales were folded into their start values
    adapters         layer -> scaling of the adapter in its weight
    dtypes           layer -> [latent dtype, out dtype] of its last quantized forward
    folded           what `qat.fold` did to the float model, in order: {"method": ..., and its settings}
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    initialized: bool = False
    scales_frozen: bool = False
    dtypes: dict[str, list[str]] = field(default_factory=dict)
    adapters: dict[str, float] = field(default_factory=dict)
    teacher: str = ""
    folded: list[dict[str, Any]] = field(default_factory=list)


class QATState(nn.Module):
    """Carries a `Record` in the state dict under `<root>.qat_state._extra_state`."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        super().__init__()
        self.record = Record(recipe=recipe)
        # set by prepare: the plan, and what the schedule applied last (never saved)
        self.plan: Plan | None = None
        self.schedule: Schedule | None = None
        self.applied: State | None = None
        # what `prepare` was told about this machine, not about the model: never saved
        self.code_cache: bool | int = True
        self.real = True
        # the optimizers of a hand-written loop were found to hold every learned scale
        self.checked = False
        # parameters that had a gradient before `prepare` took it from them
        self.stilled: set[str] = set()
        # True once a checkpoint with quantizer state was loaded into this model
        self.restored = False
        # set by prepare: brings the layers to the step of a record that was loaded
        self.on_load: Callable[[], Any] | None = None
        # set by prepare: searches scales anew after weights without a record were loaded
        self.on_float: Callable[[], Any] | None = None

    def forward(self, x: Any) -> Any:
        """x itself: a prepared `nn.Sequential` calls its children one after the other, this one last."""
        return x

    def known_plan(self) -> Plan:
        """The plan that `prepare` made."""
        assert self.plan is not None
        return self.plan

    def get_extra_state(self) -> Tensor:
        """The record, in a number of bytes that only the recipe and the plan decide: a sharded checkpoint is loaded
        into a tensor of the size that it was saved with."""
        layers = [] if self.plan is None else [row.name for row in self.plan.rows]
        recipe = len(json.dumps([self.record.recipe, rotations(self.record.folded)]).encode())
        room = recipe + sum(len(name.encode()) + _LAYER_BYTES for name in layers) + _RECORD_BYTES
        room += len(json.dumps(self.record.adapters).encode())
        return encode_record(self.record, -(-room // _BLOCK) * _BLOCK)

    def set_extra_state(self, state: Tensor) -> None:
        found, recipe = decode_record(state), self.record.recipe
        if recipe and structure(recipe) != structure(found.recipe):
            raise QATError(
                "the checkpoint was trained with other rules or phases than this recipe; resume with the recipe of the "
                "checkpoint (qat.load_from_checkpoint reads it from the file), or load only the weights"
            )
        if recipe and rotations(self.record.folded) != rotations(found.folded):
            raise QATError(
                f"the checkpoint's model was {_turned(found.folded)} and this one was {_turned(self.record.folded)}; "
                "do the same to the model before qat.prepare (qat.fold.rotate)"
            )
        # rules and phases are those of the file; how this run goes on (learning rate, steps) is its own recipe's
        self.record = replace(found, recipe=recipe or found.recipe)
        self.restored = True
        self.schedule = self.applied = None
        if self.on_load is not None:
            self.on_load()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A float checkpoint has no record: keep this one, and let scales follow the weights.
        missing: list[str] = []
        rest = (*args[:2], missing, *args[3:])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}_extra_state" not in state_dict and self.on_float is not None:
            self.on_float()


def structure(recipe: dict[str, Any]) -> Any:
    """What two recipes must agree on for one to go on with the other's training state. How long the last phase is
    (until the end, or no step at all) is not among it: a run may go on from what `init` alone wrote."""
    phases = dict(recipe.get("phases") or {})
    if phases:
        last = list(phases)[-1]
        phases[last] = {**phases[last], "steps": -1}
    norms = recipe.get("batch_norm") or {}
    folds = [norms.get("fold", False), norms.get("pairs", {})]
    return {"rules": recipe.get("rules"), "phases": list(phases.items()), "fold": recipe.get("fold"), "norms": folds}


def encode_record(record: Record, size: int = 0) -> Tensor:
    """uint8 [max(n, size)] of UTF-8 JSON and spaces; the order of rules and phases means something and is kept."""
    text = json.dumps({"version": VERSION, **record.__dict__}).encode().ljust(size)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()


def decode_record(state: Tensor) -> Record:
    """Raises QATError if the bytes are not a record of this version."""
    try:
        data = json.loads(bytes(state.cpu().to(torch.uint8).tolist()).decode())
        version = data.pop("version")
        record = Record(**data) if version == VERSION else None
        problem = "" if record is None else _record_problem(record)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        record, version, problem = None, VERSION, str(error)
    if problem:
        raise QATError(f"the quantization record in this checkpoint cannot be read ({problem}); it is damaged")
    if record is None:
        raise QATError(f"the quantization record has version {version}, this program reads {VERSION}; update qat")
    return record


def _record_problem(record: Record) -> str:
    """What is wrong with the values of a record; empty if nothing is."""
    if type(record.step) is not int or record.step < 0:
        return f"step={record.step!r}"
    if not isinstance(record.recipe, dict):
        return f"recipe={record.recipe!r}"
    if not all("method" in dict(entry) for entry in record.folded):
        return f"folded={record.folded!r}"
    for layer, pair in record.dtypes.items():
        if len(pair) != 2 or not all(isinstance(getattr(torch, name, None), torch.dtype) for name in pair):
            return f"dtypes of {layer}: {pair!r}"
    return ""


def folded(model: nn.Module) -> list[dict[str, Any]]:
    """What `qat.fold` did to the model, or to something below it: as its record says, if it is prepared."""
    state = state_of(model)
    if state is not None:
        return state.record.folded
    marks: list[dict[str, Any]] = next((m.__dict__[_FOLDED] for m in model.modules() if _FOLDED in m.__dict__), [])
    return marks


def mark_folded(model: nn.Module, module: nn.Module, entry: dict[str, Any]) -> None:
    """Note on `module` and all below it, and in the record if `model` is prepared, what was done."""
    done, state = [*folded(model), entry], state_of(model)
    for part in module.modules():
        part.__dict__[_FOLDED] = done
    if state is not None:
        state.record.folded = done


def same_fold(entry: dict[str, Any], fold: dict[str, Any]) -> bool:
    """Whether what was done is what a recipe's `fold` asks for."""
    return all(entry[word] == fold.get(word) for word in ("method", "seed", "alpha") if word in entry)


def require_folded(state: QATState) -> None:
    """Raises QATError if the recipe asks for a fold that the weights have not seen."""
    fold = state.record.recipe.get("fold") or {}
    method = fold.get("method", "none")
    if method != "none" and not any(same_fold(entry, fold) for entry in state.record.folded):
        raise QATError(
            f"the recipe has fold.method={method}, and the weights are not folded so; call qat.fold.apply(model, recipe"
            f"{'' if method == 'rotate' else ', batches'}) before qat.prepare, after the float weights are loaded"
        )


def rotations(folded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of it every model of a run has before its first step: rotations need no data."""
    return [entry for entry in folded if entry["method"] == "rotate"]


def _turned(folded: list[dict[str, Any]]) -> str:
    found = [f"rotated with seed={entry.get('seed')}" for entry in rotations(folded)]
    return " and ".join(found) or "not rotated"


def state_of(model: nn.Module) -> QATState | None:
    """The record of a prepared model, wherever the prepared root lies below `model`; None if it is not prepared."""
    return next((m for m in model.modules() if isinstance(m, QATState)), None)


def require_state(model: nn.Module) -> QATState:
    """Raises QATError if `model` is not prepared."""
    state = state_of(model)
    if state is None:
        raise QATError(f"{type(model).__name__} is not prepared; call qat.prepare(model, recipe) first")
    return state


def find_record(state_dict: dict[str, Any]) -> tuple[str, Record]:
    """(prefix, record) from a state dict; raises QATError if it has none."""
    ending = f"{CHILD}._extra_state"
    for key, value in state_dict.items():
        if key.endswith(ending):
            return key[: -len(ending)], decode_record(value)
    raise QATError("this checkpoint holds no quantization record; it was not written by a run with qat")
