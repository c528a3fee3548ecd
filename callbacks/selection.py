"""Which checkpoint is best: scores from before the quantization was fully on must not win over later ones."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from qat.callbacks.lightning import is_a

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

log = logging.getLogger(__name__)


def forget_best_scores(trainer: Trainer) -> None:
    """Give every score so far the worst value there is, so that the next one is better.

    ModelCheckpoint then replaces its earlier files as it does with any that were beaten (same names, old ones deleted);
    EarlyStopping starts to wait anew.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_a(callback, "ModelCheckpoint") and callback.monitor is not None and callback.best_k_models:
            _forget_in_checkpoint(callback)
        if is_a(callback, "EarlyStopping"):
            callback.wait_count = 0
            callback.best_score = _worst(callback.mode)


def _forget_in_checkpoint(callback: Any) -> None:
    log.info("quantization is fully on: the %d best checkpoints so far compete no more", len(callback.best_k_models))
    worst = _worst(callback.mode)
    callback.best_k_models = {path: worst.clone() for path in callback.best_k_models}
    callback.best_model_score = worst.clone()
    if callback.kth_best_model_path:
        callback.kth_value = worst.clone()


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)
