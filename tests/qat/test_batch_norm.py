"""Statistics of batch norms: found anew, and held."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.batch_norm import HeldBatchNorm, batch_norms, hold_batch_norm, reestimate_batch_norm


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 6, 6, generator=generator) * (i + 1) + i for i in range(count)]


def recipe(**phases: object) -> qat.recipes.Recipe:
    rules = {"convs": {"types": ["Conv2d"], "weight": {"bits": 4}}}
    return qat.recipes.from_dict({"name": "n", "rules": rules, "phases": phases or {"qat": {}}})


def test_statistics_are_the_means_over_the_batches() -> None:
    model = net().train()
    qat.prepare(model, recipe())
    norm = model[1]
    norm.momentum, norm.num_batches_tracked = 0.3, torch.tensor(7)
    kept = norm.running_mean
    assert reestimate_batch_norm(model, batches()) == 1
    with torch.no_grad():
        inside = [model[0](x).transpose(0, 1).flatten(1) for x in batches()]
    means, variances = (torch.stack([getattr(y, what)(1) for y in inside]).mean(0) for what in ("mean", "var"))
    assert torch.allclose(norm.running_mean, means, atol=1e-6)
    assert torch.allclose(norm.running_var, variances, rtol=1e-5)
    # the same buffers, mode and momentum as before
    assert norm.running_mean is kept and norm.momentum == 0.3 and int(norm.num_batches_tracked) == 7
    assert all(module.training for module in model.modules())


def test_a_pair_is_two_arguments_and_a_forward_is_the_callers() -> None:
    model, seen = net().eval(), []
    reestimate_batch_norm(model, batches(2), lambda _, x: seen.append(model(x).shape))
    assert len(seen) == 2 and not any(module.training for module in model.modules())

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.norm(a + b)
            return out

    two = Two()
    reestimate_batch_norm(two, [(torch.ones(4, 2), torch.full((4, 2), 2.0))])
    assert torch.equal(two.norm.running_mean, torch.full((2,), 3.0))


def test_without_batches_or_after_a_failure_all_is_as_it_was() -> None:
    model = net().train()
    before, given = copy.deepcopy(model.state_dict()), batches()
    last = given[-1]
    with pytest.raises(qat.QATError, match="without a training batch"):
        reestimate_batch_norm(model, [])

    def fails(model: nn.Module, x: Tensor) -> None:
        if model(x).isfinite().all() and x is last:
            raise ValueError("no")

    with pytest.raises(ValueError):
        reestimate_batch_norm(model, given, fails)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and model[1].momentum == 0.1


def test_held_norms_compute_as_in_eval_mode_and_keep_their_statistics() -> None:
    model = net()
    reestimate_batch_norm(model, batches())
    keys, x = list(model.state_dict()), batches()[1]
    expected = model.eval()[1](model[0](x))
    hold_batch_norm(model.train(), True)
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(model[1](model[0](x)), expected)
    with pytest.raises(qat.QATError, match="the batch norms are frozen by a phase"):
        reestimate_batch_norm(model, batches())
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other[1], HeldBatchNorm) and isinstance(other[1], nn.BatchNorm2d)
        assert torch.equal(other[1](other[0](x)), expected)
    hold_batch_norm(model, False)
    assert type(model[1]) is nn.BatchNorm2d and not torch.equal(model[1](model[0](x)), expected)


def test_a_phase_holds_and_the_next_lets_go() -> None:
    model = net().train()
    phases = {"a": {"steps": 1}, "b": {"steps": 1, "freeze_batch_norm": True}, "c": {"steps": -1}}
    qat.prepare(model, recipe(**phases))
    held = []
    for _ in range(3):
        held.append(isinstance(model[1], HeldBatchNorm))
        model(batches()[0]).sum().backward()
        qat.after_optimizer_step(model)
    assert held == [False, True, False]
    qat.apply_schedule(model, 1)
    # conv swapped class and all: gone
    qat.unprepare(model)
    assert type(model[1]) is nn.BatchNorm2d


def test_norms_without_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    assert batch_norms(model) == [] and reestimate_batch_norm(model, []) == 0
    hold_batch_norm(model, True)
    assert type(model[0]) is nn.BatchNorm1d


def test_a_norm_that_does_not_run_keeps_its_statistics() -> None:
    """Mutation: all are copied back."""
    model = net()
    model.spare = nn.BatchNorm2d(4)  # type: ignore[assignment]
    model.spare.running_mean.fill_(3.0)  # type: ignore[union-attr]
    spare = model._modules.pop("spare")
    holder = nn.ModuleDict({"used": model, "spare": spare})
    reestimate_batch_norm(holder, batches(), lambda m, batch: m["used"](batch))  # type: ignore[index]
    assert spare is not None and bool((spare.running_mean == 3.0).all())
    assert not bool((model[1].running_mean == 0.0).any())  # type: ignore[union-attr]


def test_a_norm_whose_class_was_changed_is_held_again() -> None:
    """As by SyncBatchNorm.convert_sync_batchnorm."""
    model = net().train()
    qat.prepare(model, recipe(qat={"freeze_batch_norm": True}))
    model[1].__class__ = nn.BatchNorm2d
    qat.apply_schedule(model)
    assert isinstance(model[1], HeldBatchNorm)
