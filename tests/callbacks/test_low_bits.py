"""What convolutional networks at few bits ask of a Lightning run: statistics of batch norms, dampening, freezing."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lit_small import Lit, data, fit, recipe, trainer
from torch import Tensor, nn

import qat
from qat.batch_norm import HeldBatchNorm, reestimate_batch_norm
from qat.callbacks import DistillationCallback, QATCallback
from qat.oscillation import Oscillation, tracked


class Normed(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net.norm = nn.BatchNorm1d(16)


def seen(module: Any) -> tuple[Tensor, Tensor]:
    return module.net.norm.running_mean.clone(), module.net.norm.running_var.clone()


class Watch(pl.Callback):
    """Statistics before each training batch and after each validation; what the norm was."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.held: list[bool] = []
        self.validated: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.batches.append(seen(pl_module))
        self.held.append(isinstance(pl_module.net.norm, HeldBatchNorm))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(seen(pl_module))


def by_hand(module: Any, count: int) -> tuple[Tensor, Tensor]:
    kept = seen(module)
    batches = [batch[0] for batch in islice(data(), count)]
    reestimate_batch_norm(module, batches, lambda m, x: m.net(x))
    found = seen(module)
    module.net.norm.running_mean.copy_(kept[0])
    module.net.norm.running_var.copy_(kept[1])
    return found


def test_statistics_are_found_anew_for_validation_and_at_the_end(tmp_path: Path) -> None:
    """Mutations: on_train_end or on_validation_start left out: red."""
    module, watch = Normed(), Watch()
    before = len(module.losses)
    fit(tmp_path, module, recipe(batch_norm={"reestimate": 3}), watch, steps=5, val_check_interval=2)
    expected = by_hand(module, 3)
    assert all(torch.allclose(a, b) for a, b in zip(seen(module), expected, strict=True))
    assert len(watch.validated) >= 2
    # the batches that were only looked at are not steps
    assert qat.state.require_state(module).record.step == 5 and len(module.losses) > before + 5
    plain = Normed()
    fit(tmp_path, plain, recipe(), steps=5, val_check_interval=2)
    assert not torch.allclose(plain.net.norm.running_var, by_hand(plain, 3)[1])


def test_a_phase_that_freezes_them_begins_with_fresh_ones(tmp_path: Path) -> None:
    phases = {"learn": {"steps": 2}, "settle": {"steps": -1, "freeze_batch_norm": True}}
    module, watch = Normed(), Watch()
    made = recipe(phases=phases, batch_norm={"reestimate": 3})
    fit(tmp_path, module, made, watch, steps=5, limit_val_batches=0, num_sanity_val_steps=0)
    assert watch.held == [False, False, True, True, True]
    # found before the third batch (QATCallback comes first), and kept
    assert not torch.equal(watch.batches[1][0], watch.batches[2][0])
    for later in (watch.batches[3], watch.batches[4], seen(module)):
        assert all(torch.equal(a, b) for a, b in zip(later, watch.batches[2], strict=True))
    other = Normed()
    unsettled = Watch()
    fit(tmp_path, other, recipe(phases=phases), unsettled, steps=5, limit_val_batches=0, num_sanity_val_steps=0)
    assert not torch.allclose(unsettled.batches[2][1], watch.batches[2][1])


class Folded(Lit):
    """The norm is behind the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))  # type: ignore[assignment]


@pytest.mark.parametrize("late", [True, False])
def test_a_norm_that_is_folded_is_in_the_weights_at_the_end(tmp_path: Path, late: bool) -> None:
    """Mutation: scales that do not follow statistics found before the first step: red."""
    settle = {"settle": {"steps": -1, "freeze_batch_norm": True}}
    made = recipe(
        phases={**({"learn": {"steps": 2}} if late else {}), **settle}, batch_norm={"fold": True, "reestimate": 3}
    )
    module = Folded()
    fit(tmp_path, module, made, steps=1 if not late else 5, enable_checkpointing=True)
    bundle, x = qat.convert(module), next(iter(data()))[0]
    weights = [bundle[f"net.{i}.weight"].dequantize() for i in (0, 3)]
    hidden = torch.relu(nn.functional.linear(x, weights[0], bundle.floats["net.0.bias"]))
    with torch.no_grad():
        assert torch.equal(nn.functional.linear(hidden, weights[1], bundle.floats["net.3.bias"]), module.eval().net(x))
    if not late:
        quantizer = module.net[0].weight_quantizer  # type: ignore[index]
        fresh = qat.quantizers.make_quantizer(quantizer.spec, quantizer.layout)
        plain = Folded()
        reestimate_batch_norm(plain, [batch[0] for batch in islice(data(), 3)], lambda m, x: m.net(x))
        norm = plain.net[1]  # type: ignore[index]
        factor = norm.weight / torch.sqrt(module.net[0].folded_variance + norm.eps)  # type: ignore[index]
        fresh.init_from(plain.net[0].weight.detach() * factor.detach()[:, None])  # type: ignore[index]
        # rounded under the first variance and under this one, or the candidate of a search beside it
        assert torch.allclose(quantizer.start_scale, fresh.start_scale, rtol=0.03)
    (path,) = tmp_path.rglob("*.ckpt")
    again = qat.convert(qat.load_from_checkpoint(path, Folded()))
    assert torch.equal(again["net.0.weight"].codes, bundle["net.0.weight"].codes)
    assert torch.equal(again.floats["net.0.bias"], bundle.floats["net.0.bias"])


def test_statistics_that_could_not_be_found_are_refused_before_a_step(tmp_path: Path) -> None:
    class Manual(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(qat.QATError, match=r"batch_norm\.reestimate=2 runs training_step"):
        fit(tmp_path, Manual(), recipe(batch_norm={"reestimate": 2}))
    with pytest.raises(qat.QATError, match="StochasticWeightAveraging averages"):
        swa = pl.callbacks.StochasticWeightAveraging(1e-3)
        fit(tmp_path, Normed(), recipe(batch_norm={"reestimate": 2}), swa)


@pytest.mark.parametrize("distilled", [False, True])
def test_dampening_joins_the_loss(tmp_path: Path, distilled: bool) -> None:
    """Also where distillation replaces the step's own. Mutation: patched on fit start: red."""
    found: dict[float, float] = {}
    for strength in (0.0, 1000.0):
        module = Lit(1e-3)
        callbacks = [QATCallback(recipe({"quantizer": "mse"}, phases={"qat": {"dampen": strength}}))]
        callbacks += [DistillationCallback()] if distilled else []  # type: ignore[list-item]
        trainer(tmp_path, *callbacks, max_steps=60, limit_val_batches=0).fit(module, data())
        weight = module.net.a.weight.detach()
        found[strength] = float((weight - module.net.a.weight_quantizer(weight)).square().mean())
    assert found[1000.0] < 0.6 * found[0.0]


def test_counts_move_once_per_optimizer_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: counted in the forward: red."""
    calls, own = [], Oscillation.step
    monkeypatch.setattr(Oscillation, "step", lambda self, *args: (calls.append(self), own(self, *args)))
    module = Lit()
    made = recipe(phases={"qat": {"freeze_oscillating": 0.5}})
    fit(tmp_path, module, made, limit_val_batches=0, steps=4, accumulate_grad_batches=2)
    assert set(tracked(module)) == {"net.a.weight", "net.b.weight"} and len(calls) == 2 * 4
