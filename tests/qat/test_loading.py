"""State that is loaded, replaced or looked at in unusual ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.errors import QATError
from qat.state import require_state

INPUT = {"bits": 8, "granularity": "tensor", "quantizer": "ema"}


def test_a_network_trained_in_eval_mode_learns_its_input_range(recipe: Any) -> None:
    """As inside a training module around `from_pretrained`. Mutation: `trains` returns `layer.training`."""
    outer = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4))})
    qat.prepare(outer, recipe(rules={"all": {"weight": {"bits": 8}, "input": INPUT}}))
    outer["net"].eval()
    outer["net"](torch.randn(2, 4))
    qat.after_optimizer_step(outer)
    assert float(outer["net"][0].input_quantizer.seen) == 1


def test_scales_follow_weights_that_are_loaded_without_a_record(recipe: Any) -> None:
    """Mutation: `self.on_float()` removed, or the token made of data_ptr and version."""
    model, other = nn.Sequential(nn.Linear(16, 4)), nn.Sequential(nn.Linear(16, 4))
    other[0].weight.data.mul_(100)
    qat.prepare(model, recipe(quantizer="mse"))
    model.load_state_dict(other.state_dict())
    error = qat.convert(model)["0.weight"].dequantize() - other[0].weight
    assert float((error / other[0].weight.abs().max()).detach().abs().max()) < 0.2
    model[0].weight.data.copy_(other[0].weight.data * 100)
    qat.initialize(model)
    assert float(qat.convert(model)["0.weight"].dequantize().abs().max()) > float(other[0].weight.abs().max()) * 50


def test_a_record_without_its_scales_is_refused(recipe: Any) -> None:
    """Mutation: the check in `_loaded` removed."""
    model = nn.Sequential(nn.Linear(16, 4))
    qat.prepare(model, recipe())
    state = model.state_dict()
    with pytest.raises(QATError, match="no scales of 0"):
        model.load_state_dict({key: value for key, value in state.items() if "quantizer" not in key})
    with pytest.raises(RuntimeError, match="start_scale"):
        model.load_state_dict({key: value for key, value in state.items() if "start_scale" not in key})


def test_resuming_keeps_what_is_new_in_the_recipe(recipe: Any) -> None:
    """A longer run or another learning rate goes on from a checkpoint; the record then tells of this run."""
    first, second = nn.Sequential(nn.Linear(16, 4)), nn.Sequential(nn.Linear(16, 4))
    qat.prepare(first, recipe())
    longer = recipe()
    longer.train.max_steps = 77
    qat.prepare(second, longer)
    second.load_state_dict(first.state_dict())
    qat.prepare(second, longer)
    assert qat.convert(second).recipe["train"]["max_steps"] == 77


def test_a_refused_record_changes_nothing(recipe: Any) -> None:
    first, second = nn.Sequential(nn.Linear(16, 4)), nn.Sequential(nn.Linear(16, 4))
    qat.prepare(first, recipe(bits=2))
    qat.apply_schedule(first, 7)
    qat.prepare(second, recipe(bits=4))
    with pytest.raises(QATError, match="other rules"):
        second.load_state_dict(first.state_dict())
    record = require_state(second).record
    assert record.step == 0 and record.recipe["rules"]["all"]["weight"]["bits"] == 4


def test_a_copy_of_one_layer_does_not_copy_the_model(recipe: Any) -> None:
    """Mutation: `Live.__getstate__` removed."""
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4))
    qat.prepare(model, recipe())
    layer = copy.deepcopy(model[0])
    assert layer._qat.root is None and model[0]._qat.root is not None
