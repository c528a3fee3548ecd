"""`ExportCallback(folder)`: the packed file at the end of training, rehearsed before the first step.

setup            the place in the list and the target folder are checked
on_train_start   rehearsal: packed into a temporary folder, read back by the consumer's own code, compared
on_train_end     the export; weights are still where the strategy put them, so all ranks take part and rank 0 writes
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import qat
from qat.callbacks.lightning import AnyCallback, is_a
from qat.callbacks.qat_callback import AVERAGING, QATCallback
from qat.errors import ExportError, QATError
from qat.export import Receipt, export, get_format, rehearse_export
from qat.export.atomic import refuse_target
from qat.recipes import Recipe
from qat.schedule import Schedule
from qat.state import require_state

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

log = logging.getLogger(__name__)

_WEIGHTS = ("last", "best")
_SHARDING = ("ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy")


class ExportCallback(AnyCallback):
    """Exports what was trained; list it after QATCallback, and after a WeightAveraging callback if there is one.

    folder      where to; with several formats a folder for each below it, called like the format
    format      name or names; None: the recipe's export.targets
    tokenizer   a transformers tokenizer, or a folder that holds one
    weights     last: those at the end of training (the averaged ones under WeightAveraging; the receipt says ema);
                best: those of the best checkpoint of a ModelCheckpoint with a monitor. The module keeps the last ones
    overwrite   replace an earlier export in `folder`
    example_inputs   for formats that hold a graph, as in `qat.export`; None: the deployed module's
                     `example_input_array`, or what a transformers config says

    `receipts` has one receipt for each format when training has ended. Raises QATError or ExportError, nearly always
    before the first step.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        format: str | Sequence[str] | None = None,
        *,
        tokenizer: Any = None,
        weights: str = "last",
        overwrite: bool = False,
        example_inputs: Any = None,
    ) -> None:
        if weights not in _WEIGHTS:
            raise QATError(
                f"ExportCallback: weights={weights!r} is unknown; use last or best (averaged ones are found)"
            )
        self.formats = [format] if isinstance(format, str) else list(format or [])
        for name in self.formats:
            get_format(name)
        self.folder, self.tokenizer, self.weights, self.overwrite = Path(folder), tokenizer, weights, overwrite
        self.example_inputs = example_inputs
        self.receipts: dict[str, Receipt] = {}

    @property
    def state_key(self) -> str:
        return f"ExportCallback[{self.folder}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        own = callbacks.index(self)
        if not any(isinstance(callback, QATCallback) for callback in callbacks[:own]):
            raise QATError("ExportCallback has to stand after a QATCallback in the trainer's list of callbacks")
        late = [
            type(callback).__name__ for callback in callbacks[own:] if any(is_a(callback, name) for name in AVERAGING)
        ]
        if late:
            raise QATError(
                f"{late[0]} is listed after ExportCallback, which would export weights that are not averaged yet; list "
                "ExportCallback last"
            )
        if self.weights == "best":
            _refuse_best(trainer)
        if trainer.max_steps > 0 and not getattr(trainer, "fast_dev_run", False):
            recipe = next(callback.recipe for callback in callbacks if isinstance(callback, QATCallback))
            # a module that was trained before goes on counting
            done = require_state(pl_module).record.step if qat.is_prepared(pl_module) else 0
            refuse_short(recipe, done + trainer.max_steps)
        for target in self._targets(callbacks).values():
            if trainer.is_global_zero:
                refuse_target(target.absolute(), self.overwrite)

    def _targets(self, callbacks: list[Any]) -> dict[str, Path]:
        """Format -> folder."""
        recipe = next(callback.recipe for callback in callbacks if isinstance(callback, QATCallback))
        names = self.formats or list(recipe.export.targets)
        if not names:
            raise QATError("ExportCallback: no format is given and the recipe has no export.targets; give format=")
        return {name: self.folder if len(names) == 1 else self.folder / name for name in names}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in self._targets(trainer.callbacks):  # type: ignore[attr-defined]
            rehearse_export(qat.convert(pl_module, require_final=False), name, self.tokenizer, self.example_inputs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if getattr(trainer, "fast_dev_run", False):
            log.info("fast_dev_run: the export was rehearsed and is not written")
            return
        averaged = any(is_a(callback, name) for callback in callbacks for name in AVERAGING)
        said = "best" if self.weights == "best" else "ema" if averaged else "last"
        with self._weights(trainer, pl_module):
            for name, target in self._targets(callbacks).items():
                self.receipts[name] = export(
                    pl_module,
                    target,
                    name,
                    tokenizer=self.tokenizer,
                    overwrite=self.overwrite,
                    weights=said,
                    example_inputs=self.example_inputs,
                )

    @contextmanager
    def _weights(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Inside, the module has the weights that are to be exported."""
        if self.weights == "last":
            yield
            return
        path = str(getattr(_monitored(trainer), "best_model_path", ""))
        if not Path(path).is_file():
            raise ExportError(
                "weights='best': no checkpoint was saved by the monitored ModelCheckpoint, so none is best"
            )
        kept = {key: value.clone() for key, value in pl_module.state_dict().items()}
        try:
            pl_module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
            log.info("exporting step %d, the best checkpoint: %s", require_state(pl_module).record.step, path)
            yield
        finally:
            pl_module.load_state_dict(kept)
            qat.apply_schedule(pl_module)


def refuse_short(recipe: Recipe, steps: int) -> None:
    """Raises QATError if after `steps` optimizer steps the phases have not brought the quantization fully on."""
    first = Schedule(recipe).first_final_step()
    if first is not None and steps >= first:
        return
    phases = ", ".join(f"{name} (steps {phase.steps}, ramp {phase.ramp})" for name, phase in recipe.phases.items())
    if first is None:
        raise QATError(f"phases: {phases}: none of them brings the quantization fully on, so nothing can be exported")
    raise QATError(
        f"max_steps={steps} ends before the phases {phases} bring the quantization fully on at step {first}, so "
        f"nothing could be exported; train for {first} steps or more, or shorten the phases"
    )


def _monitored(trainer: Trainer) -> Any:
    found: list[Any] = trainer.checkpoint_callbacks
    return next((c for c in found if is_a(c, "ModelCheckpoint") and getattr(c, "monitor", None) is not None), None)


def _refuse_best(trainer: Trainer) -> None:
    if _monitored(trainer) is None:
        raise QATError(
            "weights='best' needs a ModelCheckpoint(monitor=...) among the callbacks; nothing else says what is best"
        )
    for name in _SHARDING:
        if is_a(trainer.strategy, name):
            raise QATError(
                f"weights='best' does not work under {name}, whose checkpoints are sharded; export the last weights, "
                "or the best checkpoint later with qat.load_from_checkpoint"
            )
