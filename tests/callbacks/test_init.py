"""`init` of a recipe in a Lightning run."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lit_small import Language, Lit, data, fit, recipe, tokens, trainer
from torch import Tensor, nn

import qat
from qat.callbacks import DistillationCallback, ExportCallback, QATCallback
from qat.init.gptq import gptq
from qat.init.imatrix import search_weighted

INIT = {"method": "gptq_latent", "batches": 3}


def started(seen: dict[str, Tensor]) -> Any:
    """A callback that writes down the state from which the training starts."""
    import pytorch_lightning as pl

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    return Look()


@pytest.mark.parametrize("method", ["gptq", "gptq_latent"])
def test_a_run_starts_where_gptq_ends(tmp_path: Path, method: str) -> None:
    """Mutations: `latent` turned round, all batches instead of the first three: red."""
    seen: dict[str, Tensor] = {}
    fit(tmp_path, Lit(), recipe(init={"method": method, "batches": 3}), started(seen), steps=1)
    other = Lit()
    qat.prepare(other, recipe())
    batches = [batch[0] for batch in islice(data(), 3)]
    gptq(other, batches, latent=method == "gptq_latent", forward=lambda model, x: model.net(x))
    for key, value in other.state_dict().items():
        assert "_extra_state" in key or torch.equal(value, seen[key]), key
    assert not torch.equal(seen["net.a.weight"], Lit().net.a.weight)


def test_a_run_starts_from_weighted_scales(tmp_path: Path) -> None:
    """Without a method the weights stay. Mutations: `looks` without `weighted`, the method asked alone: red."""
    seen: dict[str, Tensor] = {}
    fit(tmp_path, Lit(), recipe(init={"weighted": True, "batches": 3}), started(seen), steps=1)
    other = Lit()
    qat.prepare(other, recipe())
    batches = [batch[0] for batch in islice(data(), 3)]
    search_weighted(other, batches, forward=lambda model, x: model.net(x))
    for key, value in other.state_dict().items():
        assert "_extra_state" in key or torch.equal(value, seen[key]), key
    assert torch.equal(seen["net.a.weight"], Lit().net.a.weight)
    plain = Lit()
    qat.prepare(plain, recipe())
    assert any(not torch.equal(value, seen[key]) for key, value in plain.state_dict().items() if "start_scale" in key)


def test_a_run_starts_from_an_importance_matrix(tmp_path: Path) -> None:
    """No batch is looked at. Mutation: `init.imatrix` not read -> red."""
    import gguf

    squares = torch.linspace(0, 1, 64) ** 4
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.ffn_down.weight.in_sum2", 5 * squares.reshape(1, -1).numpy())
    writer.add_tensor("blk.0.ffn_down.weight.counts", torch.full((1, 1), 5.0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = {"init": {"weighted": True, "imatrix": str(tmp_path / "i.gguf")}, "phases": {"qat": {"steps": 0}}}
    module, other = Language(), Language()
    trainer(tmp_path, QATCallback(recipe({"quantizer": "mse", "group_size": 32}, **words)), max_steps=1).fit(
        module, tokens()
    )
    qat.prepare(other, recipe({"quantizer": "mse", "group_size": 32}))
    before = {key: value.clone() for key, value in other.state_dict().items() if "start_scale" in key}
    changed = [key for key, value in before.items() if not torch.equal(value, module.state_dict()[key])]
    assert changed == ["model.model.layers.0.mlp.down_proj.weight_quantizer.start_scale"]
    (key,) = (key.removesuffix(".weight_quantizer.start_scale") for key in changed)
    search_weighted(other, squares={f"{key}.weight": squares})
    assert torch.equal(other.state_dict()[changed[0]], module.state_dict()[changed[0]])


def test_a_run_starts_from_a_packed_folder(tmp_path: Path) -> None:
    """Mutation: `init.file` not read -> red."""
    words: dict[str, Any] = {"phases": {"qat": {"steps": 0}}}
    slot = {"quantizer": "mse", "group_size": 32}
    source, module = Language(), Language()
    qat.prepare(source, recipe(slot, **words))
    qat.export(source, tmp_path / "packed", format="compressed-tensors")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.3)
    words["init"] = {"file": str(tmp_path / "packed")}
    trainer(tmp_path, QATCallback(recipe(slot, **words)), max_steps=1).fit(module, tokens())
    wanted, found = qat.convert(source), qat.convert(module)
    assert len(wanted) > 3 and all(torch.equal(found[key].dequantize(), wanted[key].dequantize()) for key in wanted)


def test_random_numbers_and_figures_go_on_as_without(tmp_path: Path) -> None:
    class Noisy(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("noise", torch.rand(()), on_step=True)
            return super().training_step(batch, batch_idx)

    def noise(init: dict[str, Any]) -> list[float]:
        torch.manual_seed(3)
        module = Noisy()
        module.log = lambda name, value, **_: found.append(float(value))  # type: ignore[method-assign]
        found: list[float] = []
        torch.manual_seed(3)
        fit(tmp_path, module, recipe(init=init), limit_val_batches=0)
        return found

    assert noise(INIT) == noise({}) and len(noise({})) == 4


@pytest.mark.parametrize("method", ["none", "gptq", "blockwise"])
def test_no_training(tmp_path: Path, method: str) -> None:
    """phases.qat.steps=0: `init` and the export, no step."""
    module = Language()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    words = {"init": {"method": method}, "phases": {"qat": {"steps": 0}}, "export": {"targets": ["compressed-tensors"]}}
    slot = {"quantizer": "mse", "group_size": 32}
    export = ExportCallback(tmp_path / "out")
    t = trainer(tmp_path, QATCallback(recipe(slot, **words)), DistillationCallback(), export, max_steps=5)
    t.fit(module, tokens(), tokens())
    assert t.global_step == 0 and export.receipts
    same = [torch.equal(p, before[name]) for name, p in module.named_parameters() if name in before]
    assert all(same) == (method == "none")
    qat.verify(tmp_path / "out")


@pytest.mark.parametrize("train", ["all", "scales"])
def test_a_run_goes_on_from_blocks(tmp_path: Path, train: str) -> None:
    """EfficientQAT in one recipe: blocks first, then the whole model, or its scales alone."""
    module = Language()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    words = {"method": "blockwise", "batches": 2, "epochs": 4, "lr": 1e-4}
    phases = {"qat": {"steps": -1, "train": train}}
    seen: dict[str, Tensor] = {}
    start = started(seen)
    t = trainer(
        tmp_path,
        QATCallback(recipe({"bits": 2}, init=words, phases=phases)),
        start,
        max_steps=3,
        precision="bf16-mixed",
    )
    t.fit(module, tokens(16))
    weight = "model.model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(seen[weight], before[weight])
    assert torch.equal(module.get_parameter(weight), seen[weight]) == (train == "scales")
    assert float(module.get_submodule(weight.removesuffix(".weight")).weight_quantizer.theta.abs().sum()) > 0


def test_a_resumed_run_starts_from_its_checkpoint(tmp_path: Path) -> None:
    """Mutation: GPTQ also at a later step than the first -> red."""
    first, seen = Lit(), dict[str, Tensor]()
    t = fit(tmp_path, first, recipe(init=INIT), steps=3)
    t.save_checkpoint(tmp_path / "x.ckpt")
    t = trainer(tmp_path, QATCallback(recipe(init=INIT)), started(seen), max_steps=4, limit_val_batches=0)
    t.fit(Lit(), data(), ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(value, seen[key]) for key, value in first.state_dict().items())


def test_a_run_goes_on_from_what_init_alone_wrote(tmp_path: Path) -> None:
    """A checkpoint of no steps keeps its integers: neither searched anew nor GPTQ again. Mutation: `restored` not
    looked at -> red."""
    nothing = recipe(init=INIT, phases={"qat": {"steps": 0}})
    first = Lit()
    t = trainer(tmp_path, QATCallback(nothing), max_steps=4)
    t.fit(first, data())
    t.save_checkpoint(tmp_path / "start.ckpt")
    assert t.global_step == 0
    for init in ({}, INIT):
        seen: dict[str, Tensor] = {}
        t = trainer(tmp_path, QATCallback(recipe(init=init)), started(seen), max_steps=2)
        t.fit(Lit(), data(), ckpt_path=tmp_path / "start.ckpt")
        same = {key: torch.equal(value, seen[key]) for key, value in first.state_dict().items()}
        assert t.global_step == 2 and all(found for key, found in same.items() if "_extra_state" not in key)


def test_batches_come_as_in_the_fit_loop(tmp_path: Path) -> None:
    """The module's own transfer hook, the precision's cast, loaders in a dict; metrics forget what they saw."""
    import torchmetrics

    class Handled(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric()
            self.weights: list[float] = []

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["x"]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = (self.net(x) - y).square().mean()
            self.mean.update(loss.detach().float())
            self.weights.append(float(self.mean.weight))
            return loss

    module = Handled()
    t = trainer(tmp_path, QATCallback(recipe(init=INIT)), max_steps=2, precision="bf16-true", limit_val_batches=0)
    t.fit(module, {"x": data()})
    assert module.weights[-2:] == [1.0, 2.0]


def test_moments_are_summed_in_fp32_under_autocast(tmp_path: Path) -> None:
    """Mutation: no `no_autocast` in `Moments.add` -> products in bf16, another start."""
    starts = []
    for precision in ("bf16-mixed", "32-true"):
        seen: dict[str, Tensor] = {}
        t = trainer(
            tmp_path,
            QATCallback(recipe(init={**INIT, "method": "gptq"})),
            started(seen),
            max_steps=1,
            precision=precision,
            limit_val_batches=0,
        )
        t.fit(Lit(), data())
        starts.append(seen["net.a.weight"])
    # of the first layer, whose inputs are the data
    assert torch.equal(*starts)


def test_the_rehearsal_is_not_used_up(tmp_path: Path) -> None:
    class Peeks(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            extra = self.net.a.weight.sum() if self.training else 0.0
            return self.loss(batch) + 0.0 * extra

    for init in ({}, INIT):
        with pytest.raises(qat.QATError, match=r"net\.a"):
            fit(tmp_path, Peeks(), recipe(init=init))


def test_no_training_and_a_least_number_of_steps(tmp_path: Path) -> None:
    nothing = recipe(phases={"qat": {"steps": 0}})
    with pytest.raises(qat.QATError, match="min_steps=2"):
        trainer(tmp_path, QATCallback(nothing), max_steps=4, min_steps=2).fit(Lit(), data())


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(qat.QATError, match="manual optimization"):
        fit(tmp_path, Manual(), recipe(init=INIT))


def test_a_training_step_without_an_index(tmp_path: Path) -> None:
    class Short(Lit):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return self.loss(batch)

    module = Short()
    fit(tmp_path, module, recipe(init=INIT), steps=1)
    assert isinstance(module.net, nn.Module) and qat.is_prepared(module)
