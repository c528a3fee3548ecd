"""QATCallback in ordinary runs: one test for each situation."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lit_small import InConfigureModel, InSetup, Lit, Net, data, delayed, fit, recipe, step_of, trainer
from pytorch_lightning.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.callbacks import QATCallback
from qat.steps import qat_layers

EMA_INPUT = {"bits": 8, "granularity": "tensor", "quantizer": "ema", "zero_point": "int"}


# ---- the whole way -------------------------------------------------------------------------------------------------


def test_fit_validate_test_predict(tmp_path: Path) -> None:
    module = Lit()
    t = fit(tmp_path, module, num_sanity_val_steps=1)
    module.eval()
    x, y = next(iter(data(batch=32)))
    bundle = qat.convert(module)
    net = Net()
    net.load_state_dict({**module.net.state_dict(), **bundle_weights(bundle)}, strict=False)
    wanted = F.mse_loss(net(x), y).item()
    assert t.validate(module, data(batch=32), verbose=False)[0]["val_loss"] == wanted
    assert t.test(module, data(batch=32), verbose=False)[0]["test_loss"] == wanted
    assert torch.equal(torch.cat(t.predict(module, data(batch=32))), net(x))
    assert step_of(module) == 4
    assert (
        not {"configure_model", "training_step", "validation_step", "test_step", "predict_step"}
        & module.__dict__.keys()
    )


def bundle_weights(bundle: Any) -> dict[str, Tensor]:
    return {name.removeprefix("net."): q.dequantize() for name, q in bundle.items()}


def test_evaluation_before_fit(tmp_path: Path) -> None:
    module = Lit()
    t = trainer(tmp_path, QATCallback(recipe()), max_steps=2)
    (before,) = t.validate(module, data(), verbose=False)
    assert qat.is_prepared(module)
    t.fit(module, data())  # no inference tensor is left from the validation
    assert t.validate(module, data(), verbose=False)[0] != before


def test_sanity_check_moves_nothing(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Look(pl.Callback):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append({key: value.clone() for key, value in pl_module.state_dict().items()})

    module = Lit()
    fit(tmp_path, module, recipe(input=EMA_INPUT), Look(), steps=1, num_sanity_val_steps=2)
    fresh = Lit()
    qat.prepare(fresh, recipe(input=EMA_INPUT))
    keys = [key for key in fresh.state_dict() if "_extra_state" not in key]
    assert all(torch.equal(fresh.state_dict()[key], seen[0][key]) for key in keys)


@pytest.mark.parametrize("input", [None, EMA_INPUT], ids=["weights", "inputs"])
def test_before_its_start_a_run_is_the_plain_run(tmp_path: Path, input: Any) -> None:
    # mutation: `if False:` for `if not phase.quantize:` in qat.schedule -> red
    plain, prepared = Lit(), Lit()
    trainer(tmp_path, max_steps=4).fit(plain, data())
    fit(tmp_path, prepared, recipe(input=input, phases=delayed(4)), steps=4)
    assert prepared.losses == plain.losses
    assert all(torch.equal(value, prepared.state_dict()[key]) for key, value in plain.state_dict().items())
    later = Lit()
    fit(tmp_path, later, recipe(input=input, phases=delayed(4)), steps=6)
    assert later.losses[:4] == plain.losses


def test_delayed_scales_are_those_of_the_start_step(tmp_path: Path) -> None:
    # mutation: no initialize in qat.steps.after_optimizer_step -> red
    module, twin = Lit(), Lit()
    fit(tmp_path, module, recipe(phases=delayed(4)), steps=4)
    twin.load_state_dict(module.state_dict(), strict=False)
    qat.prepare(twin, recipe(phases=delayed(4)))
    ours, theirs = dict(module.named_buffers()), dict(twin.named_buffers())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- counting steps ------------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    module = Lit()
    t = fit(tmp_path, module, steps=3, accumulate_grad_batches=2)
    assert len(module.losses) == 6 and t.global_step == 3 and step_of(module) == 3


class Gan(Lit):
    """Manual optimization: two optimizers, of which the second owns what is planned."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Linear(8, 1)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        for _ in range(2):
            critic.zero_grad()
            self.manual_backward(self.critic(self.net(batch[0]).detach()).square().mean())
            critic.step()
        generator.zero_grad()
        loss = self.loss(batch) - 0.01 * self.critic(self.net(batch[0])).mean()
        self.manual_backward(loss)
        generator.step()

    def configure_optimizers(self) -> Any:
        # not foreach: a step that reads the weights out of place must not look like a bypass
        return [
            torch.optim.Adam(self.critic.parameters(), 0.01),
            torch.optim.Adam(self.net.parameters(), 0.01, weight_decay=0.1, foreach=False),
        ]


def test_two_optimizers_by_hand(tmp_path: Path) -> None:
    # mutation: count trainer.global_step -> red (12); mutation: no pause in qat.bypass.watched -> red (refused)
    module = Gan()
    the_recipe = qat.recipes.from_dict(
        {
            "name": "gan",
            "rules": {"net": {"match": ["net.*"], "types": ["Linear"], "weight": {"bits": 4, "quantizer": "lsq"}}},
        }
    )
    t = fit(tmp_path, module, the_recipe, steps=12)
    assert t.global_step == 12 and step_of(module) == 4


def test_a_fit_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    # mutation: search all layers in qat.prepare.prepare, not the fresh ones -> red
    module = Lit()
    fit(tmp_path, module, steps=3)
    thetas = {name: p.clone() for name, p in module.named_parameters() if "theta" in name}
    assert any(bool(p.any()) for p in thetas.values())
    t = trainer(tmp_path, QATCallback(recipe()), max_steps=2)
    t.validate(module, data(), verbose=False)
    assert all(torch.equal(p, thetas[name]) for name, p in module.named_parameters() if name in thetas)
    t.fit(module, data())
    assert step_of(module) == 5


class Loaders(pl.LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return data(batch=self.batch_size)

    def val_dataloader(self) -> Any:
        return data()


class Reset(pl.Callback):
    """Forgets what a finder did to the module's own notes and to the learning rate."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.losses.clear()
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = pl_module.lr


FINDERS = {
    "lr": lambda: LearningRateFinder(num_training_steps=5, update_attr=False),
    "batch size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2),
}


@pytest.mark.parametrize("finder", FINDERS)
def test_finders_leave_no_trace(tmp_path: Path, finder: str) -> None:
    # mutation: no forget_observed in on_train_start -> red (the ranges of the finder's steps)
    plain, found, loaders = Lit(), Lit(), Loaders()
    for module, more in ((found, [FINDERS[finder](), Reset()]), (plain, [])):
        t = trainer(tmp_path, QATCallback(recipe(input=EMA_INPUT)), *more, max_steps=3, limit_val_batches=0)
        t.fit(module, datamodule=loaders)
        assert step_of(module) == 3
    assert found.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(found.net.parameters(), plain.net.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found.net.buffers(), plain.net.buffers(), strict=True))


# ---- precision, compilation ----------------------------------------------------------------------------------------


def test_bf16_mixed(tmp_path: Path) -> None:
    module = Lit()
    fit(tmp_path, module, precision="bf16-mixed")
    assert all(p.dtype == torch.float32 for p in module.parameters())
    q = qat.convert(module)["net.a.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        layer = module.net.a
        assert q.out_dtype == torch.bfloat16
        assert torch.equal(layer.weight_quantizer(layer.weight, torch.bfloat16), q.dequantize())


def test_bf16_true_warns_once_and_stays_exact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Lit()
    module.loss = lambda batch: F.mse_loss(module.net(batch[0].bfloat16()), batch[1].bfloat16())  # type: ignore[method-assign]
    fit(tmp_path, module, precision="bf16-true")
    assert sum("smaller than its resolution vanish" in record.message for record in caplog.records) == 1
    bundle = qat.convert(module)
    for name, layer in qat_layers(module).items():
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight_quantizer(layer.weight), bundle[f"{name}.weight"].dequantize())


@pytest.mark.slow
def test_compiled_module(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    plain, compiled = Lit(), Lit()
    fit(tmp_path, plain, recipe(phases=delayed(2)))
    fit(tmp_path, torch.compile(compiled, backend="eager"), recipe(phases=delayed(2)))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert step_of(compiled) == 4
    assert "the module is compiled" in caplog.text


# ---- where layers are made -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [InConfigureModel, InSetup])
def test_layers_made_late(tmp_path: Path, kind: type[Lit]) -> None:
    wanted, late = Lit(), kind()
    fit(tmp_path, wanted)
    t = fit(tmp_path, late)
    assert late.losses == wanted.losses
    assert "configure_model" not in late.__dict__
    owned = {id(p) for group in t.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in late.parameters()} == owned


def test_prepared_by_the_user(tmp_path: Path) -> None:
    class Own(Lit):
        def __init__(self) -> None:
            super().__init__()
            qat.prepare(self.net, recipe())

    module, wanted = Own(), Lit()
    t = fit(tmp_path, module, precision="bf16-mixed")
    fit(tmp_path, wanted, precision="bf16-mixed")
    assert module.losses == wanted.losses
    assert sum(name.endswith("_extra_state") for name in module.state_dict()) == 1
    t.save_checkpoint(tmp_path / "x.ckpt")
    # dtypes are recorded under the names of the prepared root (mutation: names of pl_module -> red)
    loaded = qat.convert(qat.load_from_checkpoint(tmp_path / "x.ckpt", Net()))
    assert all(q.out_dtype == torch.bfloat16 for q in loaded.values())
    with pytest.raises(qat.QATError, match="another recipe"):
        fit(tmp_path, Own(), recipe(weight={"bits": 2}))


# ---- selection of checkpoints --------------------------------------------------------------------------------------


class Rising(Lit):
    """Its metric only gets worse, so the first checkpoint would always be the best."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)
        self.log("score", 1.0 + self.global_step)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_checkpoint_is_a_quantized_one(tmp_path: Path, keep: int) -> None:
    # mutation: no forget_best_scores in QATCallback._stepped -> red (step 2 wins, and the run stops early)
    module = Rising()
    best = ModelCheckpoint(tmp_path / "best", "best", monitor="score", save_top_k=keep)
    stop = EarlyStopping("score", patience=3)
    fit(
        tmp_path,
        module,
        recipe(phases=delayed(5)),
        best,
        stop,
        steps=8,
        val_check_interval=2,
        enable_checkpointing=True,
    )
    assert module.global_step == 8
    loaded = qat.load_from_checkpoint(best.best_model_path, Lit())
    assert step_of(loaded) == 6
    qat.convert(loaded)
    assert best.best_model_score == 7.0
    if keep == 1:  # the beaten file is replaced under its own name
        assert [path.name for path in (tmp_path / "best").iterdir()] == ["best.ckpt"]
