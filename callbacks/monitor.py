"""`QuantizationMonitor`: error, clipping, changed codes and scale drift per layer, to the trainer's loggers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from qat.callbacks.lightning import AnyCallback
from qat.errors import QATError
from qat.health import Look, look, summary
from qat.state import state_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

log = logging.getLogger(__name__)


class QuantizationMonitor(AnyCallback):
    """Looks when fit begins, every `every_n_steps` steps of the schedule, and at the end; list it after QATCallback.

    Keys: `qat/sqnr_db`, `qat/sqnr_db_worst`, `qat/clipped_pct`, `qat/changed_pct` and `qat/turned_pct` (both since the
    last look), `qat/changed_since_start_pct`, `qat/scale_drift_pct`, and where `freeze_oscillating` counts
    `qat/oscillating_pct` and `qat/frozen_pct`: over all weights, and each for every parameter as
    `qat/<metric>/<parameter>`; see `qat.health`. "Start" is where this fit began. Without a logger it does nothing.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise QATError(f"QuantizationMonitor: every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self._start: dict[str, Look] = {}
        self._last: dict[str, Look] = {}
        self._step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._last, self._step = {}, {}, -1
        if not trainer.loggers:
            log.warning("QuantizationMonitor has nothing to log to: the trainer has no logger")
            return
        state = state_of(pl_module)
        if state is None:
            raise QATError("QuantizationMonitor has to stand after a QATCallback in the trainer's list of callbacks")
        self._start = self._last = look(pl_module)
        self._log(trainer, self._start, state.record.step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer, pl_module, every=self.every_n_steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module, every=1)

    def _look(self, trainer: Trainer, pl_module: LightningModule, every: int) -> None:
        state = state_of(pl_module)
        if not self._start or state is None or state.record.step == self._step or state.record.step % every:
            return
        self._log(trainer, look(pl_module), state.record.step)

    def _log(self, trainer: Trainer, now: dict[str, Look], step: int) -> None:
        if self._last is not now:
            now = {name: seen.after(self._last[name]) for name, seen in now.items()}
        metrics = {f"qat/{name}": value for name, value in summary(now, self._start, self._last).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._last, self._step = now, step
