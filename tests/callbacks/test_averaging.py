"""Averaged weights: the averaged model is evaluated on the grid, and saved so that it can be exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lit_small import InConfigureModel, Lit, Net, data, delayed, recipe, trainer
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch.nn import functional as F

import qat
from qat.callbacks import QATCallback
from qat.steps import qat_layers

KINDS = [WeightAveraging, EMAWeightAveraging, lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1)]


@pytest.mark.parametrize("kind", KINDS, ids=["swa2", "ema", "swa"])
def test_listed_before_is_refused_in_words(tmp_path: Path, kind: Any) -> None:
    # mutation: look behind instead of before in _refuse_callbacks -> red
    t = trainer(tmp_path, kind(), QATCallback(recipe()), max_steps=2)
    with pytest.raises(qat.QATError, match=r"is listed before QATCallback .*list QATCallback first"):
        t.fit(Lit(), data())


@pytest.mark.parametrize("start", [0, 3])
def test_listed_after_the_averaged_model_is_evaluated_quantized(tmp_path: Path, start: int) -> None:
    module = Lit()
    average = EMAWeightAveraging(decay=0.5)
    t = trainer(tmp_path, QATCallback(recipe(phases=delayed(start))), average, max_epochs=1, enable_checkpointing=True)
    t.fit(module, data(), data(batch=32))
    # the checkpoint holds the averaged weights, and they are what was validated
    loaded = qat.load_from_checkpoint(t.checkpoint_callback.best_model_path, Lit())
    net = Net()
    weights = {name.removeprefix("net."): q.dequantize() for name, q in qat.convert(loaded).items()}
    net.load_state_dict({**loaded.net.state_dict(), **weights}, strict=False)
    x, y = next(iter(data(batch=32)))
    assert F.mse_loss(net(x), y).item() == t.callback_metrics["val_loss"].item()
    # and at the end the module has them
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))
    assert all(torch.equal(qat.convert(module)[name].codes, q.codes) for name, q in qat.convert(loaded).items())


def test_stochastic_averaging_after(tmp_path: Path) -> None:
    module = Lit()
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    trainer(tmp_path, QATCallback(recipe()), swa, max_epochs=3, limit_val_batches=0).fit(module, data())
    assert qat.state.require_state(module).record.step == 24
    assert len(qat.convert(module)) == 2


def test_averaging_with_configure_model(tmp_path: Path) -> None:
    late, plain = InConfigureModel(), Lit()
    for module in (late, plain):
        t = trainer(tmp_path, QATCallback(recipe()), EMAWeightAveraging(decay=0.5), max_steps=4, limit_val_batches=1)
        t.fit(module, data(), data())
    assert late.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(late.parameters(), plain.parameters(), strict=True))


def test_averaged_scales_are_frozen_with_the_live_ones(tmp_path: Path) -> None:
    # mutation: no follow(copy, before, now) in _stepped -> red: the average forgets what theta had learned
    phases = {"learn": {"steps": 20}, "frozen": {"steps": -1, "freeze_scales": True}}
    moved = {}
    for steps in (19, 21):
        module = Lit()
        the_recipe = recipe(weight={"scale": "fp32"}, phases=phases)
        t = trainer(tmp_path, QATCallback(the_recipe), EMAWeightAveraging(decay=0.98), max_steps=steps)
        t.fit(module, data(n=128))
        fresh = Lit()
        qat.prepare(fresh, the_recipe)
        before = qat.convert(fresh)
        ratios = [q.scale / before[name].scale - 1 for name, q in qat.convert(module).items()]
        moved[steps] = float(torch.cat([r.flatten() for r in ratios]).abs().mean())
    assert moved[21] >= 0.9 * moved[19] > 0


def test_averaged_scales_are_searched_at_a_delayed_start(tmp_path: Path) -> None:
    # mutation: follow does not search on activation -> red
    module = Lit(lr=0.1)
    the_recipe = recipe(weight={"quantizer": "mse"}, phases=delayed(20))
    t = trainer(tmp_path, QATCallback(the_recipe), EMAWeightAveraging(decay=0.98), max_steps=21)
    t.fit(module, data(n=128))
    bundle = qat.convert(module)
    for name, layer in qat_layers(module).items():
        error = (bundle[f"{name}.weight"].dequantize() - layer.weight).norm() / layer.weight.norm()
        assert float(error) < 0.15
