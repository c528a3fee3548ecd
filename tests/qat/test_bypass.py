"""No planned weight is used in float: what is closed, what is refused, what the rehearsal finds."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.layers import swapped_class
from qat.quantizers import Quantizer


class Peeks(nn.Module):
    """A parent that reads its child's weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.child = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        w = self.child.weight
        y = self.other(x)
        if self.how == "linear":
            return F.linear(y, w)
        if self.how == "matmul":
            return y @ w.t()[:, :4]
        if self.how == "cast":
            return y @ w.detach().to(torch.float64).float()
        if self.how == "only in eval" and not self.training:
            return y + w.sum()
        if self.how == "only in training" and self.training:
            return y * torch.linalg.vector_norm(w)
        if self.how == "data":
            return y @ w.data
        # looks, but uses nothing
        assert w.shape[0] == 8 and w.dtype == torch.float32 and w.view(-1).shape[0] == 64
        return self.child(y)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["linear", "matmul", "cast", "only in eval", "only in training", "data"])
def test_a_parent_that_reads_a_weight_is_caught(how: str, recipe: Any) -> None:
    model = Peeks(how)
    qat.prepare(model, recipe())
    with pytest.raises(qat.QATError, match=r"child\.weight is planned for quantization but .* reads it in float"):
        qat.rehearse(model, X)
    qat.unprepare(model)
    rules = {"all": {"weight": {"bits": 4}}, "float": {"match": ["child"], "keep_float": True}}
    qat.prepare(model, recipe(rules=rules))
    qat.rehearse(model, X)


def test_looking_at_a_weight_is_no_use(recipe: Any) -> None:
    model = Peeks("not")
    qat.prepare(model, recipe())
    qat.rehearse(model, X)


def test_a_rehearsal_leaves_no_trace(recipe: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[2].eval()
    slot = {"bits": 8, "granularity": "tensor", "quantizer": "ema"}
    qat.prepare(model, recipe(input=slot, phases={"float": {"steps": 3, "quantize": False}, "qat": {}}))
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    scratch = [m.scratch.clone() for m in model.modules() if isinstance(m, Quantizer) and hasattr(m, "scratch")]
    random = torch.get_rng_state()
    qat.rehearse(model, X)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == flags
    left = [m.scratch for m in model.modules() if isinstance(m, Quantizer) and hasattr(m, "scratch")]
    assert all(torch.equal(a, b) for a, b in zip(scratch, left, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert not model[0]._qat.active and all(p.grad is None for p in model.parameters())


def test_multihead_attention_is_refused(recipe: Any) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    with pytest.raises(qat.QATError, match=r"attention\.out_proj \(rule all\): torch\.nn\.MultiheadAttention reads"):
        qat.plan(model, recipe())
    with pytest.raises(qat.QATError, match="'MultiheadAttention' cannot be quantized: it reads its weights itself"):
        qat.plan(model, recipe(types=["MultiheadAttention"]))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_are_refused_and_listed(kind: str, recipe: Any) -> None:
    model = nn.ModuleDict({"rnn": getattr(nn, kind)(8, 8), "mlp": nn.Linear(8, 8)})
    with pytest.raises(qat.QATError, match=f"'{kind}' cannot be quantized"):
        qat.plan(model, recipe(types=[kind]))
    assert [(row.name, row.type) for row in qat.plan(model, recipe()).float_rows] == [("rnn", kind)]
    with pytest.raises(qat.QATError, match="strict: 1 layers stay in float"):
        qat.plan(model, recipe(strict=True))
    rules = {"all": {"weight": {"bits": 4}}, "listed": {"types": [kind], "keep_float": True}}
    assert qat.plan(model, recipe(rules=rules, strict=True)).float_rows[0].listed


def encoder() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rules = {
        "all": {"types": ["Linear"], "weight": {"bits": 2, "granularity": "channel"}},
        "attention": {"match": ["*out_proj"], "keep_float": True},
    }
    return nn.TransformerEncoder(layer, 2).eval(), rules


def test_the_fast_path_of_an_encoder_is_closed(recipe: Any) -> None:
    """In eval the fused kernel would read `linear1.weight` itself; the numbers are those of the slow path on w_hat."""
    model, rules = encoder()
    x = torch.randn(2, 5, 8)
    expected = copy.deepcopy(model)
    classes = [type(m) for m in model.modules()]
    qat.prepare(model, recipe(rules=rules))
    for mine, theirs in zip(model.layers, expected.layers, strict=True):
        for name in ("linear1", "linear2"):
            layer = getattr(mine, name)
            getattr(theirs, name).weight.data = layer.weight_quantizer(layer.weight).detach()
    with torch.no_grad():
        y = model(x)
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = expected(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
    assert torch.equal(y, slow)
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    qat.rehearse(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(x), y)
    qat.unprepare(model)
    assert [type(m) for m in model.modules()] == classes


def test_an_open_fast_path_would_be_caught(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rules = encoder()
    # `qat.prepare` is the function; the module of that name is where it looks the other one up
    monkeypatch.setattr(sys.modules["qat.prepare"], "close_fast_paths", lambda model: None)
    qat.prepare(model, recipe(rules=rules))
    with pytest.raises(qat.QATError, match=r"linear1\.weight is planned for quantization but .*transformer_encoder"):
        qat.rehearse(model, torch.randn(2, 5, 8))


def test_a_forward_that_was_replaced_on_the_instance(recipe: Any) -> None:
    """Before prepare it is refused; afterwards the rehearsal finds it."""
    model = nn.Sequential(nn.Linear(8, 8))
    layer = model[0]
    layer.forward = lambda x: F.linear(x, layer.weight)
    with pytest.raises(qat.QATError, match="its forward was replaced on the instance"):
        qat.plan(model, recipe())
    del layer.forward
    qat.prepare(model, recipe())
    layer.forward = lambda x: F.linear(x, layer.weight)
    with pytest.raises(qat.QATError, match=r"0\.weight is planned"):
        qat.rehearse(model, X)


def test_classes_are_made_once() -> None:
    assert swapped_class(nn.Linear) is swapped_class(nn.Linear)
    assert issubclass(swapped_class(nn.Linear), nn.Linear)
