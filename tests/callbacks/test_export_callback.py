"""ExportCallback: rehearsed before the first step, written at the end, and saying which weights it wrote."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lit_small import Language, delayed, recipe, tokens, trainer
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

import qat
from qat.callbacks import DistillationCallback, ExportCallback, QATCallback
from qat.export import get_format
from qat.export.format import Format, cache_scales
from qat.recipes.schema import Rule, Slot

WEIGHT = {"group_size": 32}
CT = "compressed-tensors"


def fit(path: Path, *callbacks: Any, the_recipe: Any = None, **kwargs: Any) -> Language:
    module = Language()
    settings = {"max_epochs": 2, "limit_val_batches": 1, **kwargs}
    t = trainer(path, QATCallback(the_recipe or recipe(WEIGHT)), *callbacks, **settings)
    t.fit(module, tokens(), tokens())
    return module


def same(folder: Path, model: Any) -> None:
    """What is in the files is what `model` would be packed to."""
    bundle = qat.convert(model)
    from qat.export import get_format

    read = dict(get_format(CT).read(folder))
    for name, q in bundle.items():
        assert torch.equal(read[name].to(q.out_dtype), q.dequantize()), name


def test_last(tmp_path: Path) -> None:
    export = ExportCallback(tmp_path / "out", CT)
    module = fit(tmp_path, DistillationCallback(), export)
    receipt = export.receipts[CT]
    assert (receipt.weights, receipt.step, receipt.max_abs_diff) == ("last", 4, 0)
    same(tmp_path / "out", module)
    assert all(row.max_abs_diff == 0 for row in qat.verify(tmp_path / "out"))


def test_formats_of_the_recipe(tmp_path: Path) -> None:
    export = ExportCallback(tmp_path / "out")
    fit(tmp_path, export, the_recipe=recipe(WEIGHT, export={"targets": [CT]}))
    assert (tmp_path / "out" / "qat_receipt.json").is_file() and list(export.receipts) == [CT]


def test_averaged(tmp_path: Path) -> None:
    # mutation: said = "last" always -> red; mutation: do not look for averaging behind -> red
    export = ExportCallback(tmp_path / "out", CT)
    module = fit(tmp_path, EMAWeightAveraging(decay=0.5), export)
    plain = fit(tmp_path)
    assert export.receipts[CT].weights == "ema"
    same(tmp_path / "out", module)
    assert not torch.equal(module.model.lm_head.weight, plain.model.lm_head.weight)
    with pytest.raises(qat.QATError, match="not averaged yet"):
        fit(tmp_path, ExportCallback(tmp_path / "other", CT), EMAWeightAveraging())


def test_best(tmp_path: Path) -> None:
    # mutation: no load_state_dict(kept) at the end -> red
    class Rising(Language):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("score", float(self.global_step))

    export = ExportCallback(tmp_path / "out", CT, weights="best")
    module, plain = Rising(), Rising()
    best = ModelCheckpoint(tmp_path / "best", monitor="score")
    t = trainer(tmp_path, QATCallback(recipe(WEIGHT)), export, best, max_epochs=2, enable_checkpointing=True)
    t.fit(module, tokens(), tokens())
    trainer(tmp_path, QATCallback(recipe(WEIGHT)), max_epochs=2).fit(plain, tokens(), tokens())
    assert (export.receipts[CT].weights, export.receipts[CT].step) == ("best", 2)
    same(tmp_path / "out", qat.load_from_checkpoint(best.best_model_path, Rising()))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert qat.state.require_state(module).record.step == 4
    with pytest.raises(qat.QATError, match="needs a ModelCheckpoint"):
        fit(tmp_path, ExportCallback(tmp_path / "x", CT, weights="best"))


def test_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    stepped: list[int] = []

    class Steps(Language):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            stepped.append(batch_idx)
            return super().training_step(batch, batch_idx)

    def run(*callbacks: Any, the_recipe: Any = None) -> None:
        trainer(tmp_path, *callbacks, max_steps=1).fit(Steps(), tokens())

    quantize = QATCallback(recipe(WEIGHT))
    for callbacks, said in [
        ([ExportCallback(tmp_path / "out", CT), quantize], "has to stand after a QATCallback"),
        ([quantize, ExportCallback(tmp_path / "full", CT)], "is not empty"),
        ([quantize, ExportCallback(tmp_path / "out")], "no format is given"),
        ([quantize, ExportCallback(tmp_path / "out", "gguf")], "gguf cannot hold this model"),
    ]:
        with pytest.raises(qat.QATError, match=said):
            run(*callbacks)
    with pytest.raises(qat.QATError, match=r"max_steps=1 ends before the phases float \(steps 9.* at step 9"):
        run(QATCallback(recipe(WEIGHT, phases=delayed(9))), ExportCallback(tmp_path / "out", CT))
    # the rehearsal reads back what it packed (mutation: no rehearse_export in on_train_start -> red)
    monkeypatch.setattr(sys.modules["qat.export"], "read_back", broken)
    with pytest.raises(qat.ExportError, match="planted"):
        run(quantize, ExportCallback(tmp_path / "out", CT))
    assert stepped == []
    assert not (tmp_path / "out").exists()
    with pytest.raises(qat.QATError, match="weights='first'"):
        ExportCallback(tmp_path / "out", CT, weights="first")
    with pytest.raises(qat.QATError, match="format"):
        ExportCallback(tmp_path / "out", "onnxx")


def broken(fmt: Format, *args: Any) -> None:
    raise qat.ExportError("planted")


def test_a_run_that_ends_before_its_start_exports_nothing(tmp_path: Path) -> None:
    with pytest.raises(qat.ExportError, match="not fully on"):
        fit(tmp_path, ExportCallback(tmp_path / "out", CT), the_recipe=recipe(WEIGHT, phases=delayed(9)))
    assert not (tmp_path / "out").exists()


def test_a_second_fit_goes_on_counting(tmp_path: Path) -> None:
    the_recipe = recipe(WEIGHT, phases=delayed(3))
    module, export = Language(), ExportCallback(tmp_path / "out", CT)
    trainer(tmp_path, QATCallback(the_recipe), max_steps=2).fit(module, tokens())
    # mutation: steps of the first fit not counted -> red
    trainer(tmp_path, QATCallback(the_recipe), export, max_steps=2).fit(module, tokens())
    assert export.receipts[CT].step == 4


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, ExportCallback(tmp_path / "out", CT), fast_dev_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights_only", [False, True])
def test_export_from_a_checkpoint_without_script_or_callback(tmp_path: Path, weights_only: bool) -> None:
    module = Language()
    t = trainer(tmp_path, QATCallback(recipe(WEIGHT)), max_steps=2)
    t.fit(module, tokens())
    t.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    loaded = qat.load_from_checkpoint(tmp_path / "x.ckpt", Language().model)
    qat.export(loaded, tmp_path / "out", CT)
    same(tmp_path / "out", module)


@pytest.mark.parametrize("quantizer", ["ema", "lsq"])
def test_a_cache_of_keys_and_values(quantizer: str, tmp_path: Path) -> None:
    """Rehearsed before its ranges were seen; written as they are after the last step; resumed with them."""
    # mutation: activation_quantizers without key and value in steps -> red
    slot = {"grid": "e4m3", "granularity": "tensor", "quantizer": quantizer, "scale": "e8m0"}
    the_recipe = recipe(WEIGHT)
    the_recipe.rules["cache"] = Rule(cache=Slot(**slot))
    export = ExportCallback(tmp_path / "out", CT)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    module = fit(tmp_path, DistillationCallback(), export, checkpoint, the_recipe=the_recipe, enable_checkpointing=True)
    scales = {
        name: value for name, value in get_format(CT).read(tmp_path / "out") if name.endswith(("k_scale", "v_scale"))
    }
    trained = cache_scales(qat.convert(module).caches)
    assert len(scales) == 4 and all(torch.equal(scales[name], value) for name, value in trained.items())
    loaded = qat.load_from_checkpoint(tmp_path / "last.ckpt", Language().model)
    again = cache_scales(qat.convert(loaded).caches)
    assert all(torch.equal(again[name], value) for name, value in trained.items())
