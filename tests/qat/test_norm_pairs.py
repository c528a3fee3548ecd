"""Which norms are folded into which layers, and who else reads what comes between them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from folded_nets import LATE, X, net, recipe, seasoned
from torch import Tensor, nn

import qat
from qat.export import get_format


class Apart(nn.Module):
    """Lists a norm after a convolution; `mode` says what its forward does."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.conv, self.norm, self.mode = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), mode

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.mode == "other":
            return self.norm(y * 2)  # type: ignore[no-any-return]
        if self.mode == "in place":
            return self.norm(y.mul_(2))  # type: ignore[no-any-return]
        if self.mode == "skip":
            return self.norm(y) + y  # type: ignore[no-any-return]
        if self.mode == "early":
            return y.mean() + self.norm(y)  # type: ignore[no-any-return]
        if self.mode == "none":
            return y
        return self.norm(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("phases", [None, LATE], ids=["from the start", "late"])
@pytest.mark.parametrize("mode", ["fine", "other", "in place", "skip", "early", "none"])
def test_a_pair_that_is_none_is_refused(mode: str, phases: Any) -> None:
    model = seasoned(Apart(mode)).train()
    qat.prepare(model, recipe(phases=phases))
    if mode == "fine":
        qat.rehearse(model, X)
        return
    with pytest.raises(qat.QATError, match=r"norm is folded into conv, but .* batch_norm\.fold: false"):
        qat.rehearse(model, X)
    if mode in ("other", "in place"):
        # in every call
        with pytest.raises(qat.QATError, match="gets something else than conv gave"):
            model(X)


def test_features_on_the_last_dimension_are_no_channels() -> None:
    model = seasoned(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    qat.prepare(model, recipe())
    with pytest.raises(qat.QATError, match="1 gets 3 dimensions, of which the second is no channel of 0"):
        model(torch.randn(8, 4, 6))


class Read(nn.Module):
    """What comes before the norm is read by a layer that is quantized itself, or lost."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.conv, self.norm, self.mode = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), mode
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.mode == "layer":
            return self.norm(y) + self.other(y)  # type: ignore[no-any-return]
        return y, self.norm(self.conv(x))  # type: ignore[return-value]


@pytest.mark.parametrize("phases", [None, LATE], ids=["from the start", "late"])
@pytest.mark.parametrize("mode", ["layer", "twice"])
def test_another_quantized_layer_is_a_reader_too(mode: str, phases: Any) -> None:
    model = seasoned(Read(mode)).train()
    qat.prepare(model, recipe(phases=phases))
    with pytest.raises(qat.QATError, match=r"norm is folded into conv.* list the other pairs in batch_norm\.pairs"):
        qat.rehearse(model, X)


@pytest.mark.parametrize("phases", [None, LATE], ids=["from the start", "late"])
def test_hooks_and_layers_that_are_compiled_by_themselves_are_no_other_readers(phases: Any) -> None:
    torch._dynamo.reset()
    for how in ("hook", "compile"):
        model = net().train()
        qat.prepare(model, recipe(phases=phases))
        expected = copy.deepcopy(model)(X)
        if how == "hook":
            model[0].register_full_backward_hook(lambda *_: None)  # type: ignore[index]
            qat.rehearse(model, X)
        else:
            model[0].compile(backend="eager")  # type: ignore[index]
        for _ in range(2):
            assert torch.allclose(model(X), expected, atol=1e-5)
    torch._dynamo.reset()
    hooked = seasoned(Apart("other")).train()
    qat.prepare(hooked, recipe(phases=phases))
    hooked.conv.register_full_backward_hook(lambda *_: None)
    with pytest.raises(qat.QATError, match=r"list the right pairs, or all others, in batch_norm\.pairs"):
        hooked(X)


@pytest.mark.parametrize("gamma", [1e-18, 1e-37, 1e-39])
def test_a_gamma_that_is_almost_zero_gives_numbers(gamma: float) -> None:
    model = net().train()
    with torch.no_grad():
        model[1].weight[0] = gamma  # type: ignore[index]
    qat.prepare(model, recipe(phases=LATE, scale="fp32"))
    y = model(X)
    (y * 1e4).square().sum().backward()
    assert bool(torch.isfinite(y).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4, affine=False)})
        self.convs = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 4, 1)})
        self.up, self.after = nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)
        self.free = nn.BatchNorm2d(4, track_running_stats=False)
        self.layer = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs["b"](self.norms["a"](self.convs["a"](x)))  # type: ignore[no-any-return]


def test_pairs_have_names() -> None:
    model = Named()
    plan = qat.prepare(model, recipe({"convs.a": "norms.a"}))
    assert {row.name: row.norm for row in plan.rows} == {"convs.a": "norms.a", "convs.b": ""}
    assert "with norms.a" in plan.render()
    inside = nn.ModuleDict({"model": net()})
    found = qat.plan(inside, recipe())
    assert {row.norm for row in found.rows} == {"model.1", "model.4"}


@pytest.mark.parametrize(
    "pairs, types, why",
    [
        ({"convs.*": "norms.*"}, (), "norms.b has no weight and bias to fold"),
        ({"convs.a": "free"}, (), "free keeps no statistics to fold"),
        ({"convs.a": "layer"}, (), "layer is a LayerNorm and no batch norm"),
        ({"convs.a": "norms.c"}, (), "'norms.c', after convs.a, names nothing in this model"),
        ({"conv": "norms.a"}, (), "'conv' names no layer whose weight is quantized"),
        ({"convs.*": "norms.a"}, (), "norms.a is after convs.a and convs.b"),
        ({"up": "after"}, ("ConvTranspose2d",), "layer with type ConvTranspose2d; allowed: Linear, Conv1d"),
        ({}, ("Conv2d",), "finds no quantized layer with a batch norm right after it"),
    ],
)
def test_pairs_that_cannot_be_folded_are_refused(pairs: Any, types: Any, why: str) -> None:
    with pytest.raises(qat.QATError) as problem:
        qat.plan(Named(), recipe(pairs, types=types))
    assert why in str(problem.value)


def test_a_shared_weight_has_no_norm_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[2].weight = model[0].weight
    with pytest.raises(qat.QATError, match="its weight is that of 2 too, which 1 does not follow"):
        qat.plan(model, recipe())


def test_one_norm_in_two_places_is_refused() -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 4, 1), norm)
    with pytest.raises(qat.QATError, match="1 is after 0 and 2; it can be folded into one layer"):
        qat.plan(model, recipe())


def test_a_format_of_tensors_has_no_place_for_a_bias_that_was_a_norm() -> None:
    model = seasoned(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)))
    plan = qat.prepare(model, recipe(types=["Linear"]))
    assert "use onnx or openvino, or fold: false" in get_format("compressed-tensors").check(plan)[0]
    assert get_format("onnx").check(plan) == []
    found = "; ".join(get_format("executorch").check(plan))
    assert "nothing here proves that 1 alone reads what the layer gives; use onnx or openvino" in found
