"""Batch norms inside the rounding: codes(w * gamma / sqrt(variance + eps)).

Mutations tried, one at a time, each turns a test red: the bias without the mean; the factor without eps; dgamma without
the root; the rounded weight not undone before the freeze; the variance not followed after a step; check() left out; the
reader's op not noted; the norm handing on no copy then; factors no sources of the cache; the norm not found anew; the
variance registered as persistent.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from folded_nets import LATE, X, deployed, net, recipe, seasoned, train
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.batch_norm import is_held, reestimate_batch_norm
from qat.norm_fold import FoldedBatchNorm, folds_of
from qat.quantizers import quantizers
from qat.recipes import from_dict
from qat.steps import qat_layers

KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4, bias=False), lambda: nn.BatchNorm1d(4), (8, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), lambda: nn.BatchNorm1d(4), (8, 6, 5)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), lambda: nn.BatchNorm2d(4), (8, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), lambda: nn.BatchNorm2d(4), (8, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), lambda: nn.BatchNorm3d(4, eps=1.0), (8, 2, 4, 4, 4)),
}


# ---- the law -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, cls in quantizers().items() if cls.for_weights])
@pytest.mark.parametrize("phases", [None, LATE], ids=["from the start", "late"])
def test_what_is_trained_is_what_is_exported(name: str, phases: Any) -> None:
    zero = "none" if "none" in quantizers()[name].zero_points else "int"
    own: dict[str, Any] = {"absmean": {"grid": "ternary", "bits": 2}, "dual_lsq": {"grid": "nf4", "bits": 4}}
    grid = own.get(name, {"bits": 4})
    model = net().train()
    qat.prepare(model, recipe(phases=phases, quantizer=name, zero_point=zero, **grid))
    train(model)
    y = model.eval()(X)
    assert torch.equal(deployed(model)(X), y)
    # in training too: the statistics stay
    assert torch.equal(model.train()(X), y)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_computes_as_its_norm_did(kind: str) -> None:
    make, norm, shape = KINDS[kind]
    torch.manual_seed(0)
    model = seasoned(nn.Sequential(make(), norm())).eval()
    x = torch.randn(shape)
    expected = model(x)
    for phases in (None, LATE):
        other = copy.deepcopy(model)
        qat.prepare(other, recipe(phases=phases, types=(), scale="fp32"))
        assert torch.allclose(other(x), expected, atol=0.02 * float(expected.detach().abs().max()))
        qat.rehearse(other, x)
    qat.apply_schedule(other, 2)
    assert torch.equal(deployed(other)(x), other(x))


def reference(model: Any, x: Tensor, held: bool, quantizer: Any) -> Tensor:
    """One layer and its norm in plain operations, straight-through."""
    conv, norm = model
    gamma = norm.weight if held else norm.weight.detach()
    factor = (gamma / torch.sqrt(norm.running_var + norm.eps)).reshape(-1, 1, 1, 1)
    folded = conv.weight * factor
    hat = folded + (quantizer(folded.detach()) - folded).detach()
    if not held:
        return F.batch_norm(F.conv2d(x, hat / factor, conv.bias), None, None, norm.weight, norm.bias, True)
    bias = norm.bias + (conv.bias - norm.running_mean) * factor.flatten()
    return F.conv2d(x, hat, bias)


@pytest.mark.parametrize("held", [False, True])
def test_gradients_are_those_of_plain_operations(held: bool) -> None:
    torch.manual_seed(0)
    model = seasoned(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train()
    plain = copy.deepcopy(model)
    qat.prepare(model, recipe(phases=None if held else LATE, bits=4, quantizer="absmax"))
    a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
    y, wanted = model(a), reference(plain, b, held, model[0].weight_quantizer)
    assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-5)
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    for (name, p), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(p.grad, other.grad, rtol=1e-3, atol=1e-3), name  # type: ignore[arg-type]


# ---- time ----------------------------------------------------------------------------------------------------------


def test_statistics_move_until_they_are_frozen() -> None:
    model = net().train()
    qat.prepare(model, recipe(phases=LATE))
    norm, fold = model[1], folds_of(model)[0]
    variance = lambda: model[0].folded_variance  # noqa: E731
    seen = [norm.running_var.clone()]
    for step in range(4):
        assert is_held(norm) == (step >= 2)
        before = variance().clone()
        model(X)
        # not with each batch, but with each step
        assert torch.equal(variance(), before)
        train(model, 1)
        assert torch.equal(variance(), norm.running_var) and fold.held == (step >= 1)
        seen.append(norm.running_var.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3]) and torch.equal(seen[2], seen[4])


def test_statistics_found_anew_are_those_of_the_weights() -> None:
    model = net().train()
    qat.prepare(model, recipe(phases=LATE))
    model(X)
    reestimate_batch_norm(model, [X])
    assert torch.equal(model[0].folded_variance, model[1].running_var)  # type: ignore[union-attr]
    first = model.eval()(X)
    assert torch.equal(model(X), first)


def test_a_float_phase_is_the_unprepared_model() -> None:
    phases = {"wait": {"steps": 1}, "qat": {"freeze_batch_norm": True}}
    for word in (False, True):
        phases["wait"] = {"steps": 1, "quantize": False, "freeze_batch_norm": word}  # type: ignore[dict-item]
        model, plain = net().train(), net().train(not word)
        qat.prepare(model, recipe(phases=phases))
        assert torch.equal(model(X), plain(X))
    train(model)
    assert torch.equal(deployed(model)(X), model.eval()(X))


def test_gammas_that_are_all_zero_are_refused_where_they_could_not_learn() -> None:
    model = net().train()
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    late, loaded = copy.deepcopy(model), copy.deepcopy(model)
    why = r"every gamma of 1 is 0 \(zero_init_residual\?\), .* freeze_batch_norm"
    with pytest.raises(qat.QATError, match=why):
        qat.prepare(late, recipe(phases=LATE))
    assert not qat.is_prepared(late)
    # weights come later, or not at all
    qat.prepare(loaded, recipe(phases=LATE), search=False)
    with pytest.raises(qat.QATError, match=why):
        train(loaded, 1)
    with torch.device("meta"):
        nowhere = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    qat.prepare(nowhere, recipe(phases=LATE))
    qat.initialize(nowhere)
    qat.prepare(model, recipe())
    train(model)
    assert bool(model[1].weight.any())  # type: ignore[union-attr, operator]
    some = net().train()
    with torch.no_grad():
        some[1].weight[0] = 0.0  # type: ignore[index]
    qat.prepare(some, recipe(phases=LATE))
    assert all(map(torch.isfinite, map(torch.tensor, train(some))))


# ---- as before -----------------------------------------------------------------------------------------------------


def test_keys_stay_and_everything_is_taken_back() -> None:
    model = net()
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    qat.prepare(model, recipe())
    assert [key for key in model.state_dict() if "quantizer" not in key and "qat_state" not in key] == keys
    qat.unprepare(model)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == types
    assert not any("_qat_fold" in m.__dict__ or "folded_variance" in m._buffers for m in model.modules())


def test_copies_and_checkpoints_compute_the_same(tmp_path: Any) -> None:
    model = net().train()
    qat.prepare(model, recipe(phases=LATE))
    train(model, 4)
    expected = model.eval()(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), expected)
        fold = folds_of(other)[0]
        assert fold.norm is other[1] and fold.layer is other[0] and fold is not folds_of(model)[0]
        train(other.train(), 1)
    assert torch.equal(model(X), expected)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    found = qat.load_from_checkpoint(tmp_path / "x.pt", nn.Sequential(*net())).eval()
    assert torch.equal(found(X), expected) and torch.equal(deployed(found)(X), expected)
    resumed = net()
    qat.prepare(resumed, recipe(phases=LATE))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(resumed.eval()(X), expected)
    other = net()
    qat.prepare(other, from_dict({**qat.recipes.to_dict(recipe(phases=LATE)), "batch_norm": {}}))
    with pytest.raises(qat.QATError, match="other rules or phases"):
        other.load_state_dict(model.state_dict())


def test_a_norm_that_another_library_put_there_is_found() -> None:
    model = net().train()
    qat.prepare(model, recipe(phases=LATE))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synced[1]) is nn.SyncBatchNorm
    qat.apply_schedule(synced, 2)
    assert isinstance(synced[1], FoldedBatchNorm) and folds_of(synced)[0].norm is synced[1]
    assert torch.equal(deployed(synced)(X), synced.eval()(X))


def test_a_norm_that_was_replaced_normalizes_once() -> None:
    model = net().eval()
    qat.prepare(model, recipe())
    expected = model(X)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert torch.equal(synced(X), expected)
    again = nn.SyncBatchNorm.convert_sync_batchnorm(synced)
    qat.unprepare(again)
    assert not any("folded_variance" in m._buffers or "_qat_fold" in m.__dict__ for m in again.modules())
    assert type(again[1]) is nn.SyncBatchNorm
    qat.prepare(model, recipe())
    model[1] = nn.Identity()  # type: ignore[operator]
    with pytest.raises(qat.QATError, match="1 is folded into 0, but a Identity is in its place now"):
        model(X)


def test_compiled_layers_give_the_same_numbers() -> None:
    torch._dynamo.reset()
    model = net().train()
    qat.prepare(model, recipe(phases=LATE, bits=4))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        losses = []
        for one, call in ((model, model), (other, compiled)):
            optimizer = torch.optim.SGD(one.parameters(), 0.05)
            loss = call(X).square().mean()
            loss.backward()
            optimizer.step()
            qat.after_optimizer_step(one, optimizer)
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    a, b = qat.convert(model), qat.convert(other)
    assert all(torch.equal(a[name].dequantize(), b[name].dequantize()) for name in a)
    assert torch.equal(deployed(other)(X), compiled(X))
    fold, w = folds_of(model)[0], torch.randn(4, 3, 3, 3)
    made = torch.compile(lambda: (fold.weight(w, *fold.factors), fold.folded_bias()), fullgraph=True)
    with torch.no_grad():
        weight, bias = made()
        assert torch.equal(weight, fold.weight(w, *fold.factors)) and torch.equal(bias, fold.folded_bias())
    torch._dynamo.reset()


def test_layers_without_a_norm_are_as_they_were() -> None:
    model = nn.Sequential(*net(), nn.Conv2d(5, 2, 1)).train()
    qat.prepare(model, recipe())
    assert [bool(layer._qat.reparams) for layer in qat_layers(model).values()] == [True, True, False]
    # a ReLU reads what the norm hands on
    qat.rehearse(model, X)
    train(model)
    with torch.no_grad():
        model(X)
    assert all(layer._qat.cache.entries for layer in qat_layers(model).values())
    assert torch.equal(deployed(model)(X), model.eval()(X))
