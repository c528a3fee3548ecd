"""A run that is stopped and resumed is the run that was never stopped, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lit_small import Lit, data, delayed, recipe, trainer
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor, nn

import qat
from qat.callbacks import QATCallback
from qat.state import require_state

LSQ_INPUT = {"bits": 8, "granularity": "tensor", "quantizer": "lsq"}
EMA_INPUT = {"bits": 8, "granularity": "tensor", "quantizer": "ema", "zero_point": "int"}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


class Stepped(Lit):
    """Takes the batch of its step: a plain DataLoader begins anew when a run is resumed within an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(list(data())[self.global_step % 8], batch_idx)


def run(path: Path, steps: int, the_recipe: Any, *more: Any, ckpt: Any = None, seed: int = 0, **kwargs: Any) -> Any:
    module = Stepped()
    if seed:  # other weights than the checkpoint's: nothing of them may survive
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    t = trainer(path, QATCallback(the_recipe), *more, max_steps=steps, **{"limit_val_batches": 1, **kwargs})
    t.fit(module, data(), data(), ckpt_path=ckpt)
    return module, t


@pytest.mark.parametrize("input", [None, LSQ_INPUT, EMA_INPUT], ids=["weights", "lsq", "ema"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_equals_uninterrupted(tmp_path: Path, input: Any, stop: int) -> None:
    # mutation: step = 0 in decode_record -> red
    phases = {
        "float": {"steps": 2, "quantize": False},
        "ramp": {"steps": 4, "ramp": 2},
        "frozen": {"steps": -1, "freeze_scales": True},
    }
    the_recipe = recipe(input=input, phases=phases)
    whole, t_whole = run(tmp_path, 8, the_recipe)
    _, first = run(tmp_path, stop, the_recipe)
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, t_resumed = run(tmp_path, 8, the_recipe, ckpt=tmp_path / "stopped.ckpt", seed=1)
    assert resumed.losses == whole.losses[stop:]
    assert equal(resumed.state_dict(), whole.state_dict())
    assert require_state(resumed).record == require_state(whole).record
    assert equal(t_resumed.optimizers[0].state_dict(), t_whole.optimizers[0].state_dict())
    ours, theirs = qat.convert(resumed), qat.convert(whole)
    assert all(torch.equal(ours[name].codes, theirs[name].codes) for name in theirs)


def test_going_back_in_the_same_module(tmp_path: Path) -> None:
    # mutation: drop `self._settled = False` from Lsq._load_from_state_dict -> red
    the_recipe = recipe(input=LSQ_INPUT, phases=delayed(2))
    module, first = run(tmp_path, 2, the_recipe)
    first.save_checkpoint(tmp_path / "two.ckpt")
    runs = []
    for _ in range(2):
        module.losses.clear()
        t = trainer(tmp_path, QATCallback(the_recipe), max_steps=5, limit_val_batches=1)
        t.fit(module, data(), data(), ckpt_path=tmp_path / "two.ckpt")
        runs.append((list(module.losses), {key: value.clone() for key, value in module.state_dict().items()}))
    assert equal(runs[0], runs[1])


def test_resume_with_averaging(tmp_path: Path) -> None:
    def ema() -> Any:
        return EMAWeightAveraging(decay=0.5)

    the_recipe = recipe(phases=delayed(2))
    whole, _ = run(tmp_path, 8, the_recipe, ema())
    _, first = run(tmp_path, 4, the_recipe, ema(), enable_checkpointing=True)
    best = first.checkpoint_callback.best_model_path
    resumed, _ = run(tmp_path, 8, the_recipe, ema(), ckpt=best, seed=1)
    assert resumed.losses == whole.losses[4:]
    assert equal(resumed.state_dict(), whole.state_dict())
    # the averaged weights of the file say the live step and dtypes (mutation: drop _share_record -> red)
    loaded = qat.load_from_checkpoint(best, Lit())
    assert require_state(loaded).record.step == 4
    assert require_state(loaded).record.dtypes.keys() == {"net.a", "net.b"}
    qat.convert(loaded)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_file_needs_neither_script_nor_callback(tmp_path: Path, weights_only: bool) -> None:
    module, t = run(tmp_path, 5, recipe(), precision="bf16-mixed")
    path = tmp_path / "x.ckpt"
    t.save_checkpoint(path, weights_only=weights_only)
    trained = qat.convert(module)
    for model in (Lit(), Lit().net):  # the whole module, or the network that is deployed
        bundle = qat.convert(qat.load_from_checkpoint(path, model))
        assert list(bundle) == list(trained) if model is not model else len(bundle) == len(trained)
        for (name, ours), theirs in zip(bundle.items(), trained.values(), strict=True):
            assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale, theirs.scale), name
            assert ours.out_dtype == torch.bfloat16  # as the forward had it (mutation: empty record.dtypes -> red)


def test_lightnings_own_loader_fails_and_ours_does_not(tmp_path: Path) -> None:
    module, t = run(tmp_path, 2, recipe())
    t.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Lit.load_from_checkpoint(tmp_path / "x.ckpt")
    loaded = qat.load_from_checkpoint(tmp_path / "x.ckpt", Lit())
    assert isinstance(loaded, Lit)
    assert equal(loaded.state_dict(), module.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(loaded.eval().net(x), module.eval().net(x))


def float_checkpoint(path: Path) -> Path:
    plain = trainer(path, max_steps=3)
    plain.fit(Lit(), data())
    plain.save_checkpoint(path / "float.ckpt")
    return path / "float.ckpt"


def test_a_float_checkpoint_starts_the_run(tmp_path: Path) -> None:
    ckpt, without = float_checkpoint(tmp_path), recipe(weight={"quantizer": "mse"})
    module = Lit()
    for parameter in module.parameters():
        nn.init.normal_(parameter)

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}

    look = Look()
    trainer(tmp_path, QATCallback(without), look, max_steps=5).fit(module, data(), ckpt_path=ckpt)
    fresh = Lit()
    fresh.load_state_dict(torch.load(ckpt, weights_only=True)["state_dict"])
    qat.prepare(fresh, without)
    # scales are those of the loaded weights (mutation: no qat.initialize in on_train_start -> red)
    keys = [key for key in look.state if "_extra_state" not in key]
    assert all(torch.equal(look.state[key], fresh.state_dict()[key]) for key in keys)
    assert require_state(module).record.step == 2


def test_a_float_checkpoint_lacks_learned_scales(tmp_path: Path) -> None:
    with pytest.raises(qat.QATError, match="load its weights before fit"):
        run(tmp_path, 5, recipe(), ckpt=float_checkpoint(tmp_path))


def test_validate_with_a_checkpoint_brings_its_step(tmp_path: Path) -> None:
    module, t = run(tmp_path, 4, recipe(phases=delayed(2)), limit_val_batches=4)
    t.save_checkpoint(tmp_path / "x.ckpt")
    (wanted,) = t.validate(module, data(), verbose=False)
    fresh = Lit()
    other = trainer(tmp_path, QATCallback(recipe(phases=delayed(2))), limit_val_batches=4)
    (got,) = other.validate(fresh, data(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert got == wanted
    assert qat.apply_schedule(fresh).active


def test_other_rules_on_resume_are_refused(tmp_path: Path) -> None:
    _, t = run(tmp_path, 2, recipe())
    t.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(qat.QATError, match="other rules or phases"):
        run(tmp_path, 4, recipe(weight={"bits": 2}), ckpt=tmp_path / "x.ckpt")
