"""A recipe's `dampen` in a Lightning run: the loss of `training_step`, and what draws weights onto their codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

import qat

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule


def dampened(pl_module: LightningModule, original: Any, *args: Any, **kwargs: Any) -> Any:
    """`training_step` with `qat.dampening` added. With manual optimization the step adds `qat.dampening(self)` to its
    loss by itself."""
    out = original(*args, **kwargs)
    if out is None or not pl_module.automatic_optimization:
        return out
    pull = qat.dampening(pl_module)
    if not pull.requires_grad:
        return out
    pl_module.log("train_dampening", pull.detach())
    own: Tensor = out if isinstance(out, Tensor) else out["loss"]
    loss = own + pull
    return loss if isinstance(out, Tensor) else {**out, "loss": loss}
