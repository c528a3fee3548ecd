"""`QATCallback(recipe)`: the moments at which `qat.prepare`, the schedule and the checks happen in a Lightning run.

    setup             the model is rotated if the recipe says so, and layers are swapped, if they exist; else around
                      configure_model, which comes before optimizers, wrapping, sharding and the loading of weights
    on_fit_start      checks only: sharded weights are not loaded yet
    on_train_start    the first moment with final weights under every strategy: `fold` methods that look at batches,
                      scales are searched, `init` is done
    optimizer step    one `qat.after_optimizer_step` per step of the optimizer that owns the planned weights
    on_validation_start, on_train_end
                      statistics of batch norms are found anew where the recipe says so
    on_*_start        the schedule is applied again (a loaded checkpoint brings its own step)

On an error Lightning calls `on_exception` but no `teardown`: both undo what was patched on the instance. The module
stays prepared either way.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import qat
from qat.bypass import planned_weights, watched
from qat.callbacks.calibration import refuse_unseen, settle_batch_norm, start_folded, start_from_init
from qat.callbacks.dampening import dampened
from qat.callbacks.lightning import AnyCallback, is_a, overrides
from qat.callbacks.patches import Patch
from qat.callbacks.selection import forget_best_scores
from qat.errors import QATError, RecipeError, refuse_if
from qat.plan import Plan
from qat.recipes import load_recipe
from qat.recipes.schema import Recipe
from qat.state import CHILD, require_state, state_of
from qat.steps import follow, forget_observed, holds_from_now, learned_scales, missing_from, trained_weights

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

log = logging.getLogger(__name__)

_RECORD = "qat_record"
# % of the parameters below which a plain script is told what its recipe covers
_LOW_COVERAGE = 50.0
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class QATCallback(AnyCallback):
    """Trains what will be packed.

    recipe      name of a preset, path of a YAML file, or a `Recipe`
    overrides   like `["rules.linears.weight.bits=3"]`, for a name or a path
    rehearse    prove on the first batch of each stage that no planned weight is used in float
    code_cache, real    how this machine computes, see `qat.prepare`

    `plan` holds the plan once the layers exist. Raises RecipeError for a bad recipe, QATError where it does not fit the
    model, the callbacks or the optimizers; all of them before the first step.
    """

    def __init__(
        self,
        recipe: str | PathLike[str] | Recipe,
        *,
        overrides: Sequence[str] = (),
        rehearse: bool = True,
        code_cache: bool | int | None = None,
        real: bool | None = None,
    ) -> None:
        if isinstance(recipe, Recipe):
            if overrides:
                raise RecipeError("overrides are for a recipe's name or path; change the Recipe object itself")
            self.recipe = recipe
        else:
            self.recipe = load_recipe(recipe, overrides)
        self.rehearse = rehearse
        self.code_cache, self.real = code_cache, real
        self.plan: Plan | None = None
        self._patches: list[Patch] = []
        self._counter: Any = None
        self._warned = self._told = self._swapped = self._calibrating = False
        self._settled = -1

    # ---- structure -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _refuse_callbacks(trainer, self)
        if stage == "fit":
            _warn_of_what_is_missing(trainer, self.recipe)
        self._undo()
        late = overrides(pl_module, "setup") or overrides(pl_module, "configure_model")
        try:
            self._prepare(pl_module)
        except RecipeError:
            raise
        except QATError:
            if not late:
                raise
            log.info("no layers to prepare yet: waiting for %s.configure_model", type(pl_module).__name__)
        if late:

            def configure(original: Any) -> None:
                original()
                self._prepare(pl_module)

            self._patches.append(Patch(pl_module, "configure_model", configure, transparent=False))
        if self.rehearse:
            self._patch_steps(pl_module)

    def _prepare(self, pl_module: LightningModule) -> None:
        if self.recipe.fold.method == "rotate" and state_of(pl_module) is None:
            # a checkpoint that is loaded next brings weights that are rotated in the same way
            qat.fold.apply(pl_module, self.recipe)
        self.plan = qat.prepare(pl_module, self.recipe, code_cache=self.code_cache, real=self.real)
        refuse_if(target_reasons(self.plan, self.recipe), f"recipe {self.recipe.name!r}: export.targets", QATError)
        if self.plan.coverage < _LOW_COVERAGE and not self._told:
            log.warning("recipe %r: only %s", self.recipe.name, self.plan.summary)
        self._told = True

    def _patch_steps(self, pl_module: LightningModule) -> None:
        if getattr(pl_module, "_compiler_ctx", None) is not None or _holds_compiled(pl_module):
            log.warning("the module is compiled: the rehearsal that looks for weights used in float is skipped")
            return
        for name in _STEPS:
            if overrides(pl_module, name):
                patch = Patch(pl_module, name, functools.partial(self._rehearsed, pl_module, name))
                self._patches.append(patch)

    def _rehearsed(self, pl_module: LightningModule, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        """The first call of one step; then the instance has its own method back."""
        if self._calibrating:
            return original(*args, **kwargs)
        for patch in [patch for patch in self._patches if patch.name == name]:
            patch.undo()
            self._patches.remove(patch)
        if any(hasattr(weight, "placements") for weight in planned_weights(pl_module).values()):
            log.warning("weights are sharded: the rehearsal that looks for weights used in float is skipped")
            return original(*args, **kwargs)
        with watched(pl_module):
            return original(*args, **kwargs)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # a second copy: some strategies restore parameters and buffers only
        checkpoint[_RECORD] = require_state(pl_module).get_extra_state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if _RECORD in checkpoint:
            require_state(pl_module).set_extra_state(checkpoint[_RECORD])
        weights = checkpoint.get("state_dict")
        if trainer.state.fn != "fit" or not weights or not checkpoint.get("optimizer_states"):
            return
        known = any(key.endswith(f"{CHILD}._extra_state") for key in weights)
        if not known and (learned_scales(pl_module) or self.recipe.fold.method != "none"):
            raise QATError(
                "this is the checkpoint of a float run, whose optimizer knows no scales; load its weights before fit "
                "(module.load_state_dict(torch.load(path)['state_dict'])) instead of giving ckpt_path"
            )

    # ---- start -----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.recipe.trains_nothing and (trainer.min_steps or trainer.min_epochs):
            raise QATError(
                f"recipe {self.recipe.name!r} trains nothing (its last phase has steps: 0), but the trainer has "
                f"min_steps={trainer.min_steps} and min_epochs={trainer.min_epochs}; leave both out"
            )
        _refuse_optimizers(trainer, pl_module)
        refuse_unseen(trainer, pl_module, self.recipe, AVERAGING)
        planned = trained_weights(pl_module)
        low = [name for name, w in planned.items() if w.requires_grad and w.dtype in (torch.bfloat16, torch.float16)]
        if low and not self._warned:
            self._warned = True
            log.warning(
                "%d planned weights are trained in %s (%s for one): steps smaller than its resolution vanish, and most "
                "steps of quantization-aware training are; use precision='bf16-mixed', which keeps them in float32",
                len(low),
                str(planned[low[0]].dtype).removeprefix("torch."),
                low[0],
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = require_state(pl_module)
        forget_observed(pl_module)
        if state.record.step == 0 and not (state.restored and state.record.initialized):
            # from these weights the run starts; a checkpoint brings its own scales
            self._calibrating = True
            try:
                if not qat.fold.is_folded(pl_module, self.recipe):
                    start_folded(trainer, pl_module, self.recipe)
                qat.initialize(pl_module)
                if self.recipe.init.looks:
                    start_from_init(trainer, pl_module, self.recipe.init)
            finally:
                self._calibrating = False
        qat.apply_schedule(pl_module)
        if self.recipe.trains_nothing:
            # nothing is to be trained: Lightning looks at this before the first batch
            trainer.should_stop = True
        _share_record(trainer, pl_module)
        if any(phase.dampen for phase in self.recipe.phases.values()):
            # now, outside of what distillation makes of the step's loss
            self._patches.append(Patch(pl_module, "training_step", functools.partial(dampened, pl_module)))
        self._stop_counting()
        owner = owner_of_planned(trainer, pl_module)

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if optimizer is owner:
                self._stepped(trainer, pl_module)

        # global hooks run after an optimizer's own, in the order of their registration: codes are forgotten first
        self._counter = register_optimizer_step_post_hook(stepped)
        qat.weights_changed(pl_module)

    def _stepped(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = qat.apply_schedule(pl_module)
        now = qat.after_optimizer_step(pl_module)
        for copy in _averaged(trainer, pl_module):
            follow(copy, before, now)
        if now.final and not before.final:
            forget_best_scores(trainer)

    # ---- time ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._swapped:
            self._swapped = False
            qat.weights_changed(pl_module)
        qat.apply_schedule(pl_module)
        state = require_state(pl_module)
        if self._settled != state.record.step and holds_from_now(state):
            # the weights learn under these statistics from now on
            self._settled = state.record.step
            self._settle_batch_norm(trainer, pl_module, held=True)

    def _settle_batch_norm(self, trainer: Trainer, pl_module: LightningModule, held: bool = False) -> None:
        if self.recipe.batch_norm.reestimate and qat.apply_schedule(pl_module).active:
            self._calibrating = True
            try:
                settle_batch_norm(trainer, pl_module, self.recipe.batch_norm.reestimate, held)
            finally:
                self._calibrating = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        qat.apply_schedule(pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._settle_batch_norm(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle_batch_norm(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0 and _averaged(trainer, pl_module):
            # averaged weights were swapped in, through `.data`, after on_validation_start; and will be swapped back
            self._swapped = True
            qat.weights_changed(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        qat.apply_schedule(pl_module)
        qat.weights_changed(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        qat.apply_schedule(pl_module)
        qat.weights_changed(pl_module)

    # ---- end -------------------------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    def _undo(self) -> None:
        self._stop_counting()
        while self._patches:
            self._patches.pop().undo()

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.remove()
            self._counter = None


# ---- checks --------------------------------------------------------------------------------------------------------


def _refuse_callbacks(trainer: Trainer, own: QATCallback) -> None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(callback, QATCallback) for callback in callbacks) > 1:
        raise QATError("two QATCallbacks are in the trainer's list; one recipe with several rules does what both would")
    for callback in callbacks[: callbacks.index(own)]:
        if any(is_a(callback, name) for name in AVERAGING):
            raise QATError(
                f"{type(callback).__name__} is listed before QATCallback and would average the module without its "
                f"scales; list QATCallback first: callbacks=[QATCallback(...), {type(callback).__name__}(...)]"
            )


def _warn_of_what_is_missing(trainer: Trainer, recipe: Recipe) -> None:
    """A recipe's wishes that other callbacks fulfil; `qat train` adds them by itself."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    listed = {cls.__name__ for callback in callbacks for cls in type(callback).__mro__}
    if recipe.distill.enabled and "DistillationCallback" not in listed:
        log.warning(
            "recipe %r asks for distillation from the float model, most of its quality, but the trainer "
            "has no DistillationCallback: only the loss of training_step is learned",
            recipe.name,
        )
    if recipe.export.targets and "ExportCallback" not in listed:
        log.info("recipe %r has export targets; ExportCallback(folder) writes them at the end", recipe.name)


def target_reasons(plan: Plan, recipe: Recipe) -> list[str]:
    """Why the recipe's export targets could not hold the planned grids; empty means they can."""
    if not recipe.export.targets:
        return []
    from qat.export import get_format

    return [f"{target}: {why}" for target in recipe.export.targets for why in get_format(target).check(plan)]


def _holds_compiled(pl_module: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in pl_module.modules()
    )


def _optimizers(trainer: Trainer) -> list[Any]:
    return list(trainer.strategy.optimizers)


def _owned(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _refuse_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Every scale that is to be learned has to be in some optimizer."""
    optimizers = _optimizers(trainer)
    if not optimizers:
        raise QATError(
            f"{type(pl_module).__name__}.configure_optimizers gives no optimizer; quantization-aware training needs one"
        )
    missing = missing_from(pl_module, optimizers)
    if missing:
        raise QATError(
            f"{len(missing)} learned scales are in no optimizer, {missing[0]} for one; give configure_optimizers "
            "self.parameters(), or every parameter of the layers it trains"
        )


def owner_of_planned(trainer: Trainer, pl_module: LightningModule) -> torch.optim.Optimizer:
    """The optimizer whose steps the schedule counts: the one with the most planned weights, or learned scales."""
    weights = {id(weight) for weight in trained_weights(pl_module).values()}
    scales = set(map(id, learned_scales(pl_module).values()))
    optimizers = _optimizers(trainer)
    for wanted in (weights, scales):
        counts = [len(_owned(optimizer) & wanted) for optimizer in optimizers]
        if any(counts):
            owner = optimizers[counts.index(max(counts))]
            break
    else:
        raise QATError(
            "no optimizer has a planned weight or a learned scale: nothing would be trained on the grid; give "
            "configure_optimizers the parameters of the planned layers"
        )
    if not hasattr(owner, "register_step_post_hook"):
        raise QATError(
            f"{type(owner).__name__} cannot be watched for its steps (it has no register_step_post_hook); use an "
            "optimizer that derives from torch.optim.Optimizer"
        )
    return owner  # type: ignore[no-any-return]


def _averaged(trainer: Trainer, pl_module: LightningModule) -> list[nn.Module]:
    """The prepared copies of the module that other callbacks average."""
    copies = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [
        copy for copy in copies if isinstance(copy, nn.Module) and copy is not pl_module and state_of(copy) is not None
    ]


def _share_record(trainer: Trainer, pl_module: LightningModule) -> None:
    """Averaged copies of the module save their own state; let them tell the step and dtypes of the live one."""
    for copy in _averaged(trainer, pl_module):
        require_state(copy).record = require_state(pl_module).record
