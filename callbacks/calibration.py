"""`init` of a recipe in a Lightning run: training batches go through `training_step`, and GPTQ through the layers."""

from __future__ import annotations

import inspect
import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat.bypass import planned_weights
from qat.callbacks.patches import Patch
from qat.errors import QATError
from qat.recipes.schema import Init

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

log = logging.getLogger(__name__)


def start_from_gptq(trainer: Trainer, pl_module: LightningModule, init: Init) -> None:
    """`qat.init.gptq` with the first `init.batches` batches of the training data.

    Every rank sees its own batches; all then take the weights and scales of rank 0. Random numbers go on as if nothing
    had been drawn. Raises QATError for sharded weights and for manual optimization, whose step cannot be called.
    """
    from qat.init.gptq import gptq

    _refuse(pl_module, init)
    devices = [torch.device(pl_module.device)] if torch.device(pl_module.device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        loader: Any = trainer.train_dataloader
        batches = [trainer.strategy.batch_to_device(b) for b in itertools.islice(iter(loader), init.batches)]

        # `def training_step(self, batch)` is allowed too
        indexed = len(inspect.signature(pl_module.training_step).parameters) > 1

        def forward(model: nn.Module, batch: Any) -> None:
            # not the strategy's own step: its wrapper would prepare for a backward
            with trainer.precision_plugin.train_step_context():
                pl_module.training_step(batch, 0) if indexed else pl_module.training_step(batch)

        silent = [Patch(pl_module, name, _nothing) for name in ("log", "log_dict")]
        try:
            rows = gptq(
                pl_module,
                batches,
                latent=init.method == "gptq_latent",
                damp=init.damp,
                act_order=init.act_order,
                weighted=init.weighted,
                forward=forward,
            )
        finally:
            for patch in silent:
                patch.undo()
    _agree(pl_module)
    gains = [row.error / row.rtn for row in rows if row.error is not None and row.rtn]
    mean = sum(gains) / len(gains) if gains else 1.0
    log.info("init %s: %d layers, their error %.2f of rounding to nearest", init.method, len(gains), mean)
    for row in rows:
        if row.note:
            log.info("init %s: %s: %s", init.method, row.name, row.note)


def _refuse(pl_module: LightningModule, init: Init) -> None:
    if not pl_module.automatic_optimization:
        raise QATError(
            f"init.method={init.method} runs training_step to see what layers get, and a training_step that steps its "
            "own optimizers (manual optimization) cannot be run for that; call qat.init.gptq(model, batches) before "
            "fit, and set init.method=none"
        )
    sharded = next((name for name, w in planned_weights(pl_module).items() if hasattr(w, "placements")), None)
    if sharded is not None:
        raise QATError(
            f"init.method={init.method} needs whole weights, and {sharded} is sharded; start from a checkpoint that a "
            "run on one device wrote with phases.qat.steps=0, and set init.method=none"
        )


def _nothing(original: Any, *args: Any, **kwargs: Any) -> None:
    """What is seen here is no figure of the training."""


def _agree(pl_module: LightningModule) -> None:
    """The weights and scales of rank 0 on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for tensor in itertools.chain(pl_module.parameters(), pl_module.buffers()):
        torch.distributed.broadcast(tensor.data, 0)
