"""`fold`, `init` and `batch_norm` of a recipe in a Lightning run: training batches go through `training_step`, and
SmoothQuant, AWQ, GPTQ, a weighted search or block-wise training through the layers."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import qat
from qat.batch_norm import batch_norms, hold_batch_norm, is_held, reestimate_batch_norm
from qat.bypass import planned_weights
from qat.callbacks.lightning import is_a
from qat.callbacks.patches import Patch
from qat.errors import QATError
from qat.recipes.schema import Init, Recipe

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from qat.init.gptq import LayerError

log = logging.getLogger(__name__)
_BY_HAND = {"fold": "qat.fold.apply(model, recipe, batches)", "init": "qat.init.gptq or blockwise"}


def start_folded(trainer: Trainer, pl_module: LightningModule, recipe: Recipe) -> None:
    """`qat.fold.apply` with the first `fold.batches` batches, as `start_from_init`."""
    with _calibration(trainer, pl_module, f"fold.method={recipe.fold.method}", recipe.fold.batches) as (seen, forward):
        qat.fold.apply(pl_module, recipe, seen, forward=forward)
    _agree(pl_module)
    log.info("fold %s: done", recipe.fold.method)


def start_from_init(trainer: Trainer, pl_module: LightningModule, init: Init) -> None:
    """`qat.init.gptq`, `qat.init.blockwise`, or `qat.init.imatrix` without a method, with the first `init.batches`
    batches of the training data; with `init.file` or `init.imatrix` none is looked at.

    Every rank sees its own batches; all then take the weights and scales of rank 0. Random numbers and metrics go on as
    if nothing had happened; a data set that can be read only once has lost these batches. Raises QATError for sharded
    weights and for manual optimization, whose step cannot be called.
    """
    if init.file is not None:
        from qat.init.file import start_from_file

        lines = [f"{len(start_from_file(pl_module, init.file))} weights of {init.file}"]
    elif init.imatrix is not None:
        from qat.init.imatrix import read_imatrix, search_weighted

        lines = _said(search_weighted(pl_module, squares=read_imatrix(init.imatrix, pl_module)))
    else:
        plain = init.method == "blockwise"
        said = "init.weighted=true" if init.method == "none" else f"init.method={init.method}"
        with _calibration(trainer, pl_module, said, init.batches, plain) as (batches, forward):
            lines = (_blockwise if plain else _layerwise)(pl_module, batches, init, forward)
        _agree(pl_module)
    what = "weighted" if init.weighted else init.method if init.file is None else "from file"
    for line in lines:
        log.info("init %s: %s", what, line)


def _layerwise(pl_module: LightningModule, batches: list[Any], init: Init, forward: Any) -> list[str]:
    """What was done, in words."""
    from qat.init.gptq import gptq
    from qat.init.imatrix import search_weighted

    if init.method == "none":
        return _said(search_weighted(pl_module, batches, forward=forward))
    words: dict[str, Any] = {"damp": init.damp, "act_order": init.act_order, "weighted": init.weighted}
    return _said(gptq(pl_module, batches, latent=init.method == "gptq_latent", forward=forward, **words))


def _said(rows: list[LayerError]) -> list[str]:
    gains = [row.error / row.rtn for row in rows if row.error is not None and row.rtn]
    mean = sum(gains) / len(gains) if gains else 1.0
    first = f"{len(gains)} layers, their error {mean:.2f} of rounding to nearest"
    return [first, *(f"{row.name}: {row.note}" for row in rows if row.note)]


def _blockwise(pl_module: LightningModule, batches: list[Any], init: Init, forward: Any) -> list[str]:
    from qat.init.blockwise import blockwise

    rows = blockwise(pl_module, batches, epochs=init.epochs, lr=init.lr, forward=forward)
    return [f"{row.name}: relative error {row.before:.3g} -> {row.after:.3g} in {row.steps} steps" for row in rows]


def settle_batch_norm(trainer: Trainer, pl_module: LightningModule, count: int, held: bool = False) -> None:
    """`qat.reestimate_batch_norm` with `count` batches of the training data, every rank with its own; held: of norms
    that were just told to keep their statistics, too."""
    if held:
        hold_batch_norm(pl_module, False)
    elif all(map(is_held, batch_norms(pl_module))):
        return
    with _calibration(trainer, pl_module, "", count) as (batches, forward):
        reestimate_batch_norm(pl_module, batches, forward)
    if held:
        hold_batch_norm(pl_module, True)


@contextlib.contextmanager
def _calibration(
    trainer: Trainer, pl_module: LightningModule, word: str, count: int, plain: bool = False
) -> Iterator[tuple[list[Any], Callable[[nn.Module, Any], Any]]]:
    """(the first batches, what runs `training_step` on one); `word` of the recipe asks for them and wants whole
    weights. plain: in fp32, whatever the precision of the run."""
    if word:
        _refuse(pl_module, word)
    devices = [torch.device(pl_module.device)] if torch.device(pl_module.device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        batches = list(_batches(trainer, pl_module, count))
        # `def training_step(self, batch)` is allowed too
        indexed = len(inspect.signature(pl_module.training_step).parameters) > 1

        def forward(model: nn.Module, batch: Any) -> Any:
            # not the strategy's own step: its wrapper would prepare for a backward
            with contextlib.nullcontext() if plain else trainer.precision_plugin.train_step_context():
                return pl_module.training_step(batch, 0) if indexed else pl_module.training_step(batch)

        silent = [Patch(pl_module, name, _nothing) for name in ("log", "log_dict")]
        metrics = [(m, copy.deepcopy(m.__dict__)) for m in pl_module.modules() if hasattr(m, "metric_state")]
        try:
            yield batches, forward
        finally:
            for patch in silent:
                patch.undo()
            for metric, state in metrics:
                metric.__dict__.update(state)


def _batches(trainer: Trainer, pl_module: LightningModule, count: int) -> Iterator[Any]:
    """The first batches of the training data, as the fit loop hands them to `training_step`."""
    combined: Any = trainer.fit_loop._combined_loader
    again = type(combined)(trainer.train_dataloader, combined._mode)
    for batch, _, number in itertools.islice(iter(again), count):
        ready = trainer.precision_plugin.convert_input(batch)
        ready = pl_module._on_before_batch_transfer(ready, dataloader_idx=number)
        yield trainer.strategy.batch_to_device(ready, dataloader_idx=number)


def _refuse(pl_module: LightningModule, word: str) -> None:
    key = word.partition("=")[0]
    if not pl_module.automatic_optimization:
        raise QATError(
            f"{word} runs training_step to see what layers get, and a training_step that steps its own optimizers "
            f"(manual optimization) cannot be run for that; call {_BY_HAND[word.partition('.')[0]]} before fit, and "
            f"set {key}=none"
        )
    sharded = next((name for name, w in planned_weights(pl_module).items() if hasattr(w, "placements")), None)
    if sharded is not None:
        raise QATError(f"{word} needs whole weights, and {sharded} is sharded; set {key}=none under this strategy")


def refuse_unseen(trainer: Trainer, pl_module: LightningModule, recipe: Recipe, averaging: Sequence[str]) -> None:
    """Raises QATError where statistics of batch norms could not be found anew; `averaging`: names of callbacks."""
    count = recipe.batch_norm.reestimate
    if count and not pl_module.automatic_optimization:
        raise QATError(
            f"batch_norm.reestimate={count} runs training_step to see what batch norms get, and one that steps its own "
            "optimizers (manual optimization) cannot be run for that; set it to 0 and call "
            "qat.reestimate_batch_norm(model, batches) where it is due"
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    averages = next((type(c).__name__ for c in callbacks for name in averaging if is_a(c, name)), None)
    if averages and any(phase.freeze_oscillating for phase in recipe.phases.values()):
        raise QATError(
            f"freeze_oscillating holds weights on their codes, and what {averages} averages lies between codes; set it "
            "to 0, or leave that callback out"
        )
    if count and averages:
        raise QATError(
            f"batch_norm.reestimate={count} finds statistics for the weights that are trained, not for those that "
            f"{averages} averages; set it to 0 and call qat.reestimate_batch_norm(model, batches) after fit"
        )


def _nothing(original: Any, *args: Any, **kwargs: Any) -> None:
    """What is seen here is no figure of the training."""


def _agree(pl_module: LightningModule) -> None:
    """The weights and scales of rank 0 on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for tensor in itertools.chain(pl_module.parameters(), pl_module.buffers()):
        torch.distributed.broadcast(tensor.data, 0)
