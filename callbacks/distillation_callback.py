"""`DistillationCallback`: the float model teaches; the user's `training_step` stays as it is.

setup            the teacher is copied from the float module (or given), before weights are restored
on_fit_start     the module to distil gets its tap, `training_step` its wrapper; precision and device of the teacher
on_train_start   the teacher's fingerprint is written into the record, or compared with the one of a checkpoint
training_step    returns the distillation loss, or the mix with its own
validation       the same loss on the validation batches is logged: the live gap between float and quantized model
"""

from __future__ import annotations

import logging
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import qat
from qat.callbacks.lightning import AnyCallback, overrides
from qat.callbacks.patches import Patch
from qat.callbacks.qat_callback import QATCallback
from qat.distill import LOSSES, Tap, attach, detach, fingerprint, freeze, frozen_copy, module_to_distil
from qat.errors import QATError
from qat.hf import load_model
from qat.state import require_state
from qat.steps import qat_layers

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

log = logging.getLogger(__name__)


class DistillationCallback(AnyCallback):
    """Trains on `weight` x distillation loss + (1 - `weight`) x the step's own loss; needs a QATCallback, in any order.

    loss         kl | kl_topk | cakld (logits) | mse | cosine (embeddings); see `qat.distill`
    temperature  of both softmaxes, kl only
    teacher      None: the float module itself, as it is when fit begins. A module, or the folder of a transformers
                 model of the class of the module to distil: safetensors, read from the disk alone
    module       name of the module to distil; None: the outermost child that holds all planned layers
    hidden       weight of the error of the hidden states between blocks, added to the loss (`qat.distill.hidden`); the
                 teacher is then rotated in place if the recipe rotates the model
    validate     log `val_distill_loss` over the validation batches

    With manual optimization `qat.distill_loss(self)` gives the loss inside `training_step`.
    Raises QATError for wrong arguments, for a module that has no single child to distil, for a step in which it is not
    called, and on resume if the teacher is not the one that the checkpoint was trained with.
    """

    def __init__(
        self,
        loss: str = "kl",
        weight: float = 1.0,
        temperature: float = 1.0,
        teacher: nn.Module | str | PathLike[str] | None = None,
        module: str | None = None,
        *,
        hidden: float = 0.0,
        validate: bool = True,
    ) -> None:
        if loss not in LOSSES:
            raise QATError(f"DistillationCallback: loss={loss!r} is unknown; use one of {', '.join(LOSSES)}")
        if not 0.0 < weight <= 1.0:
            raise QATError(
                f"DistillationCallback: weight={weight} is the share of the distillation loss, above 0 and up to 1"
            )
        if hidden < 0.0:
            raise QATError(f"DistillationCallback: hidden={hidden} must not be negative")
        if temperature <= 0.0:
            raise QATError(f"DistillationCallback: temperature={temperature} must be positive")
        self.loss, self.weight, self.temperature, self.validate = loss, float(weight), float(temperature), validate
        self.teacher, self.module, self.hidden = teacher, module, float(hidden)
        self._frozen: nn.Module | None = None
        self._fingerprint = ""
        self._tapped: nn.Module | None = None
        self._tap: Tap | None = None
        self._patches: list[Patch] = []

    # ---- teacher -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._undo()
        qat_callback = next((c for c in trainer.callbacks if isinstance(c, QATCallback)), None)  # type: ignore[attr-defined]
        if qat_callback is None:
            raise QATError(
                "DistillationCallback needs a QATCallback in the same list: it distils what that one prepares"
            )
        late = overrides(pl_module, "setup") or overrides(pl_module, "configure_model")
        try:
            self._take_teacher(pl_module, qat_callback)
        except QATError:
            if not late:
                raise
        if late and self._frozen is None:

            def configure(original: Any) -> None:
                original()
                self._take_teacher(pl_module, qat_callback)

            self._patches.append(Patch(pl_module, "configure_model", configure, transparent=False))

    def _take_teacher(self, pl_module: nn.Module, qat_callback: QATCallback) -> None:
        if self._frozen is not None:
            return
        found = qat.plan(pl_module, qat_callback.recipe)
        name = module_to_distil(pl_module, [row.name for row in found.rows], self.module)
        student = pl_module.get_submodule(name)
        if self.teacher is None:
            self._frozen = frozen_copy(student)
        elif isinstance(self.teacher, nn.Module):
            self._frozen = freeze(self.teacher)
        else:
            self._frozen = freeze(_from_folder(self.teacher, student))
        self._fingerprint = fingerprint(self._frozen)
        if self.hidden and qat_callback.recipe.fold.method == "rotate":
            # what blocks return is compared feature by feature, so both have to be in one basis
            qat.fold.apply(self._frozen, qat_callback.recipe)
        log.info("teacher of %s: %s", name or "the module", self._fingerprint[:12])

    # ---- start -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._frozen is None:
            raise QATError("no teacher could be copied when fit began; give DistillationCallback(teacher=...)")
        name = module_to_distil(pl_module, qat_layers(pl_module), self.module)
        self._tapped = pl_module.get_submodule(name)
        if self._tapped is pl_module:
            raise QATError("the LightningModule itself cannot be distilled; give module= the name of the network in it")
        teacher = trainer.strategy.precision_plugin.convert_module(self._frozen)
        self._frozen = freeze(teacher.to(pl_module.device))
        how: dict[str, Any] = {"loss": self.loss, "temperature": self.temperature, "hidden": self.hidden}
        self._tap = attach(self._tapped, self._frozen, **how)

        def step(original: Any, *args: Any, **kwargs: Any) -> Any:
            return self._step(pl_module, original, *args, **kwargs)

        self._patches.append(Patch(pl_module, "training_step", step))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        record = require_state(pl_module).record
        if record.teacher and record.teacher != self._fingerprint:
            raise QATError(
                f"the teacher is not the one this run began with (fingerprint {self._fingerprint[:12]}, "
                f"the checkpoint has {record.teacher[:12]}); construct the module with the same float "
                "weights, or give teacher="
            )
        record.teacher = self._fingerprint

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _step(self, pl_module: LightningModule, original: Any, *args: Any, **kwargs: Any) -> Any:
        tap = self._tap
        assert tap is not None
        with tap.open():
            out = original(*args, **kwargs)
        if not pl_module.automatic_optimization:
            if not tap.asked:
                raise QATError(
                    "manual optimization: training_step has to ask for the loss with qat.distill_loss(self) and use it"
                )
            return out
        if out is None:
            return None
        distilled = tap.take()
        pl_module.log("train_distill_loss", distilled.detach())
        own: Tensor = out if isinstance(out, Tensor) else out["loss"]
        # alone, the task's loss stays out of the graph: 0 x NaN would be NaN
        loss = distilled if self.weight == 1.0 else (1.0 - self.weight) * own + self.weight * distilled
        return loss if isinstance(out, Tensor) else {**out, "loss": loss}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._tap is not None and self.validate:
            self._tap.kept, self._tap.listening = [], True

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        tap = self._tap
        if tap is None or not tap.listening:
            return
        tap.listening = False
        if tap.kept:
            pl_module.log(
                "val_distill_loss", tap.take(), on_step=False, on_epoch=True, sync_dist=trainer.world_size > 1
            )

    # ---- end ---------------------------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    def _undo(self) -> None:
        while self._patches:
            self._patches.pop().undo()
        if self._tapped is not None:
            detach(self._tapped)
        self._tapped = self._tap = None


def _from_folder(folder: str | PathLike[str], student: nn.Module) -> nn.Module:
    """The model of the folder, of the student's class; raises QATError for a class that is not transformers' own."""
    name = type(student).__name__
    if type(student).__module__.partition(".")[0] != "transformers":
        raise QATError(
            f"teacher={str(folder)!r}: {name} is no class of transformers, which alone is loaded from a folder; load "
            "the teacher and give the module"
        )
    try:
        teacher = load_model(folder, auto=name)
    except QATError as problem:
        raise QATError(f"teacher={str(folder)!r}: {problem}") from None
    if getattr(student, "loss_type", None) is not None:
        teacher.loss_type = student.loss_type
    return teacher
