"""What is refused, in which words; and what is left when a run fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lit_small import InConfigureModel, InSetup, Lit, data, fit, recipe, step_of, trainer
from torch import Tensor
from torch.nn import functional as F

import qat
from qat.callbacks import QATCallback
from qat.state import state_of


def test_scales_in_no_optimizer(tmp_path: Path) -> None:
    class OnlyWeights(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for name, p in self.named_parameters() if "theta" not in name], 0.1)

    with pytest.raises(qat.QATError, match=r"2 learned scales are in no optimizer, net\.a\.weight_quantizer\.theta"):
        fit(tmp_path, OnlyWeights())


def test_nothing_matches(tmp_path: Path) -> None:
    the_recipe = qat.recipes.from_dict({"name": "x", "rules": {"convs": {"types": ["Conv2d"], "weight": {"bits": 4}}}})
    for module in (Lit(), InConfigureModel(), InSetup()):
        with pytest.raises(qat.QATError, match=r"rules\.convs matches no layer"):
            fit(tmp_path, module, the_recipe)
        assert not {"configure_model", "training_step"} & module.__dict__.keys()


def test_an_export_target_that_cannot_hold_the_grid(tmp_path: Path) -> None:
    with pytest.raises(qat.QATError, match=r"export\.targets: gguf: net\.a"):
        fit(tmp_path, Lit(), recipe(export={"targets": ["gguf"]}))


def test_two_callbacks(tmp_path: Path) -> None:
    with pytest.raises(qat.QATError, match="two QATCallbacks"):
        fit(tmp_path, Lit(), recipe(), QATCallback(recipe()))


def test_a_bypass_is_caught_in_each_stage(tmp_path: Path) -> None:
    class Bypass(Lit):
        stage = "training"

        def loss(self, batch: Any) -> Tensor:
            at = "training" if self.training else "validate"
            if at != self.stage:
                return super().loss(batch)
            return F.linear(batch[0], self.net.b.weight).square().mean()

    for stage in ("training", "validate"):
        module = Bypass()
        module.stage = stage
        with pytest.raises(qat.QATError, match=r"net\.b\.weight is planned for quantization but"):
            fit(tmp_path, module)
        # on_exception has undone the patches; the quantizers stay
        assert not {"training_step", "validation_step"} & module.__dict__.keys()
        assert qat.is_prepared(module)
    module = Bypass()
    t = trainer(tmp_path, QATCallback(recipe(), rehearse=False), max_steps=1, limit_val_batches=0)
    t.fit(module, data())


def test_an_exception_leaves_a_resumable_state(tmp_path: Path) -> None:
    class Fails(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if len(self.losses) == 3:
                raise RuntimeError("the user's own")
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(tmp_path, module)
    assert step_of(module) == 3
    optimizer = module.trainer.optimizers[0]
    assert not optimizer._optimizer_step_post_hooks
    assert state_of(module) is not None and "training_step" not in module.__dict__


def test_steps_keep_their_signature(tmp_path: Path) -> None:
    class OneArgument(Lit):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return self.loss(batch)

    fit(tmp_path, OneArgument())  # mutation: no __wrapped__ in Patch -> red (batch_idx is passed)
