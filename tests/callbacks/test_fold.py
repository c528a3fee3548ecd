"""`fold` of a recipe in a Lightning run."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lit_small import Language, recipe, tokens, trainer
from torch import Tensor

import qat
from qat.callbacks import DistillationCallback, ExportCallback, QATCallback
from qat.state import require_state

METHODS = ("rotate", "smooth", "awq")


class Tied(Language):
    """With a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.model.config.tie_word_embeddings = True
        self.model.tie_weights()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        self.losses.append(float(out["loss"]))
        return out


def words(method: str, **more: Any) -> Any:
    """Without the head, which is tied in some methods and not in others."""
    fold: dict[str, Any] = {"method": method, **({"batches": 2} if method in METHODS[1:] else {})}
    made = recipe({"group_size": 32}, {"bits": 8, "granularity": "token"}, fold=fold, **more)
    return qat.recipes.from_dict(
        {**qat.recipes.to_dict(made), "rules": {**rules(made), "head": {"match": ["*lm_head"], "keep_float": True}}}
    )


def rules(made: Any) -> dict[str, Any]:
    found: dict[str, Any] = qat.recipes.to_dict(made)["rules"]
    return found


def started(seen: dict[str, Tensor]) -> Any:
    import pytorch_lightning as pl

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    return Look()


def run(path: Path, module: Any, made: Any, *more: Any, steps: int = 4, ckpt: Any = None, **kwargs: Any) -> Any:
    t = trainer(path, QATCallback(made), *more, max_steps=steps, limit_val_batches=1, **kwargs)
    t.fit(module, tokens(), tokens(), ckpt_path=ckpt)
    return t


@pytest.mark.parametrize("method", METHODS)
def test_a_run_starts_from_folded_weights(tmp_path: Path, method: str) -> None:
    """Those of the verb on the same batches. Mutations: all batches instead of
    the first two; scales that are searched before the fold -> red."""
    seen: dict[str, Tensor] = {}
    module = Tied()
    run(tmp_path, module, words(method), started(seen), steps=1)
    other = Tied()
    batches = list(islice(tokens(), 2))
    qat.fold.apply(other, words(method), batches, forward=lambda m, b: m.model(**b))
    qat.prepare(other, words(method))
    for key, value in other.state_dict().items():
        assert "_extra_state" in key or torch.equal(value, seen[key]), key
    name = "model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(seen[name], Tied().state_dict()[name])
    assert [entry["method"] for entry in require_state(module).record.folded] == [method]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, method: str) -> None:
    """Mutation: folded again on resume -> red."""
    whole = Tied()
    run(tmp_path, whole, words(method), steps=4)
    first = run(tmp_path, Tied(), words(method), steps=2)
    first.save_checkpoint(tmp_path / "x.ckpt")
    resumed = Tied()
    run(tmp_path, resumed, words(method), steps=4, ckpt=tmp_path / "x.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    loaded = Tied().model
    qat.load_from_checkpoint(tmp_path / "x.ckpt", loaded)
    assert loaded.config.tie_word_embeddings == (method != "rotate")


@pytest.mark.parametrize("method", METHODS)
def test_no_training(tmp_path: Path, method: str) -> None:
    """The fold and the export alone."""
    export = ExportCallback(tmp_path / "out")
    made = words(method, phases={"qat": {"steps": 0}}, export={"targets": ["compressed-tensors"]})
    assert run(tmp_path, Tied(), made, export).global_step == 0
    qat.verify(tmp_path / "out")


@pytest.mark.parametrize("teacher", ["first", "folder", "after"])
def test_hidden_states_are_compared_in_one_basis(tmp_path: Path, teacher: str) -> None:
    """In float the student is the teacher, whatever it was copied from. Mutation: the teacher not rotated -> red."""
    module = Tied()
    module.model.save_pretrained(tmp_path / "float")
    late = {"float": {"steps": 2, "quantize": False}, "qat": {"steps": -1}}
    distil = DistillationCallback(hidden=1.0, teacher=tmp_path / "float" if teacher == "folder" else None)
    callbacks: list[Any] = [QATCallback(words("rotate", phases=late)), distil]
    if teacher == "first":
        callbacks.reverse()
    t = trainer(tmp_path, *callbacks, max_steps=1, limit_val_batches=0)
    t.fit(module, tokens(16))
    assert float(t.callback_metrics["train_distill_loss"]) < 1e-6


def test_float_checkpoints_are_refused(tmp_path: Path) -> None:
    """Their weights would come after the fold."""
    t = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    t.fit(Tied(), tokens())
    t.save_checkpoint(tmp_path / "float.ckpt")
    made = recipe({"group_size": 32, "quantizer": "absmax"}, fold={"method": "rotate"})
    with pytest.raises(qat.QATError, match="checkpoint of a float run"):
        run(tmp_path, Tied(), made, ckpt=tmp_path / "float.ckpt")


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = Tied()
    module.automatic_optimization = False
    with pytest.raises(qat.QATError, match=r"fold\.method=awq.*qat\.fold\.apply.*set fold\.method=none"):
        run(tmp_path, module, words("awq"))
