"""QATCallback in ordinary runs: one test for each situation."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lit_small import Lit, Net, data, delayed, recipe, trainer
from pytorch_lightning.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.callbacks import QATCallback
from qat.prepare import qat_layers
from qat.state import require_state, state_of

EMA_INPUT = {"bits": 8, "granularity": "tensor", "quantizer": "ema", "zero_point": "int"}


def fit(path: Path, module: Any, the_recipe: Any = None, *more: Any, steps: int = 4, **kwargs: Any) -> Any:
    t = trainer(path, QATCallback(the_recipe or recipe()), *more, max_steps=steps, **{"limit_val_batches": 1, **kwargs})
    t.fit(module, data(), data())
    return t


def step_of(module: nn.Module) -> int:
    return require_state(module).record.step


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
    # mutation: `live.active = True` in qat.layers, or weight decay on anything but the user's own -> red
    plain, prepared = Lit(), Lit()
    trainer(tmp_path, max_steps=4).fit(plain, data())
    fit(tmp_path, prepared, recipe(input=input, phases=delayed(4)), steps=4)
    assert prepared.losses == plain.losses
    assert all(torch.equal(value, prepared.state_dict()[key]) for key, value in plain.state_dict().items())
    later = Lit()
    fit(tmp_path, later, recipe(input=input, phases=delayed(4)), steps=6)
    assert later.losses[:4] == plain.losses


def test_delayed_scales_are_those_of_the_start_step(tmp_path: Path) -> None:
    # mutation: no initialize in qat.prepare.after_optimizer_step -> red
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
    module = Lit()
    fit(tmp_path, module, steps=3)
    thetas = {name: p.clone() for name, p in module.named_parameters() if "theta" in name}
    assert any(bool(p.any()) for p in thetas.values())
    t = trainer(tmp_path, QATCallback(recipe()), max_steps=2)
    t.validate(module, data(), verbose=False)
    assert all(torch.equal(p, thetas[name]) for name, p in module.named_parameters() if name in thetas)
    t.fit(module, data())
    assert step_of(module) == 5


@pytest.mark.parametrize("finder", ["lr", "batch size"])
def test_finders_leave_no_trace(tmp_path: Path, finder: str) -> None:
    # mutation: no forget_observed in on_train_start -> red (the ranges of the finder's steps)
    plain, found = Lit(), Lit()
    fit(tmp_path, plain, recipe(input=EMA_INPUT), steps=3)

    def reset(trainer: Any, pl_module: Any) -> None:
        pl_module.losses.clear()
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plain.lr

    class Reset(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            reset(trainer, pl_module)

    if finder == "lr":
        fit(
            tmp_path,
            found,
            recipe(input=EMA_INPUT),
            LearningRateFinder(num_training_steps=5, update_attr=False),
            Reset(),
            steps=3,
        )
    else:
        from pytorch_lightning.callbacks import BatchSizeFinder

        class Loaders(pl.LightningDataModule):
            batch_size = 2

            def train_dataloader(self) -> Any:
                return data(batch=self.batch_size)

            def val_dataloader(self) -> Any:
                return data()

        t = trainer(
            tmp_path,
            QATCallback(recipe(input=EMA_INPUT)),
            BatchSizeFinder(max_trials=1, steps_per_trial=2),
            Reset(),
            max_steps=3,
        )
        t.fit(found, datamodule=Loaders())
    assert step_of(found) == 3
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


class InConfigureModel(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = Net()


class InSetup(Lit):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            torch.manual_seed(0)
            self.net = Net()


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


# ---- refusals and failures -----------------------------------------------------------------------------------------


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
