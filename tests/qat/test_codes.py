"""Codes are computed once per optimizer step, change nothing, and never outlive the weight that they came from.

Mutations tried: `_stepped` without its loop, `_load_from_state_dict` or `_apply` of QATLayer without `forget`,
`_token` without the address / the version / the spec, `owns` always true, `_Recent` without x's version,
`weights_changed` without `forget`: each turns a test red.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.fake_quant_kernels import int8_linear
from qat.layers import input_quantizer, weight_quantizers
from qat.quantizers import Quantizer
from qat.steps import qat_layers

GROUPS = {"bits": 4, "granularity": "group", "group_size": 8}
TOKENS = {"bits": 8, "granularity": "token", "scale": "fp32", "quantizer": "absmax"}
GRIDS: dict[str, dict[str, Any]] = {
    "absmax": {"weight": {**GROUPS, "quantizer": "absmax"}},
    "minmax": {"weight": {**GROUPS, "quantizer": "minmax", "zero_point": "int"}},
    "mse": {"weight": {**GROUPS, "quantizer": "mse"}},
    "lsq": {"weight": {**GROUPS, "quantizer": "lsq"}},
    "w8a8": {"weight": {"bits": 8, "narrow": True, "quantizer": "absmax"}, "input": TOKENS},
}


class Net(nn.Module):
    """Two layers on one input, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 24, bias=False), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(F.gelu(self.a(x)) * self.b(x))
        return self.c(torch.tanh(self.a(x)))


def net(recipe: Any, grid: str, **how: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    qat.prepare(model, recipe(rules={"all": GRIDS[grid]}), **how)
    return model


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Quantizer]]:
    """The quantizers that quantized something, in order."""
    seen: list[Quantizer] = []
    original = Quantizer.quantize

    def quantize(self: Quantizer, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Quantizer, "quantize", quantize)
        yield seen


ADAMS: dict[str, dict[str, bool]] = {
    "plain": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("adam", ADAMS)
@pytest.mark.parametrize("grid", GRIDS)
def test_accumulation_with_codes_equals_accumulation_without(grid: str, adam: str, recipe: Any) -> None:
    """20 optimizer steps of 8 micro-batches, bit for bit; fused AdamW does not touch the version counter."""
    found = []
    for code_cache in (True, False):
        model = net(recipe, grid, code_cache=code_cache)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, **ADAMS[adam])
        g = torch.Generator().manual_seed(1)
        for _ in range(20):
            for _ in range(8):
                model(torch.randn(5, 16, generator=g)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            qat.after_optimizer_step(model, optimizer)
        found.append(model.state_dict())
    cached, plain = found
    assert all(torch.equal(cached[name], plain[name]) for name in plain)
    start = net(recipe, grid).state_dict()
    assert not torch.equal(plain["a.weight"], start["a.weight"])


@pytest.mark.parametrize("grid", GRIDS)
def test_one_backward_in_a_step_makes_no_codes(grid: str, recipe: Any) -> None:
    """Where the last step had one backward a weight is rounded in forward and backward; the numbers are those of the
    codes, bit for bit, recomputed forwards and validation included. Mutations: `forget` never sets `once`;
    `_put_hat` without the scale; a mask of the rounded numbers in `_walk`; `again` passed on as the fields."""
    found, kept = [], []
    for once, checkpointed in ((True, True), (True, False), (False, False)):
        model = net(recipe, grid)
        for layer in qat_layers(model).values():
            layer._qat.cache.once = once
        optimizer = torch.optim.AdamW(model.parameters(), 0.02)
        g = torch.Generator().manual_seed(1)
        for _ in range(12):
            x = torch.randn(5, 16, generator=g)
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            y.square().mean().backward()
            kept.append((once, bool(model.a._qat.cache.entries)))
            with torch.no_grad():
                model(x)
            optimizer.step()
            optimizer.zero_grad()
            qat.after_optimizer_step(model, optimizer)
            for layer in qat_layers(model).values():
                layer._qat.cache.once &= once
        found.append(model.state_dict())
    assert all(torch.equal(other[name], found[0][name]) for other in found[1:] for name in other)
    # only where they are multiplied
    multiplied = grid == "w8a8" and not int8_linear.idle(torch.device("cpu"), torch.float32)
    assert [entries for once, entries in kept if once] == 24 * [multiplied]
    assert all(entries for once, entries in kept if not once)


@pytest.mark.parametrize("grid", GRIDS)
def test_once_per_optimizer_step(grid: str, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches, recomputed forwards and validation use the same codes."""
    model = net(recipe, grid)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    weights = [q for layer in qat_layers(model).values() for q in weight_quantizers(layer).values()]
    x = torch.randn(5, 16)
    qat.weights_changed(model)
    for _ in range(3):
        with counted(monkeypatch) as seen:
            for _ in range(4):
                torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().mean().backward()
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
            optimizer.step()
            qat.after_optimizer_step(model)
        assert [sum(q is w for q in seen) for w in weights] == [1, 1, 1]


def test_layers_that_read_one_tensor_share_its_codes(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(recipe, "w8a8")
    x = torch.randn(5, 16)
    with counted(monkeypatch) as seen:
        model.a(x), model.b(x)
        assert sum(q.layout.kind == "tokens" for q in seen) == 1
        with torch.no_grad():
            x.mul_(2)
        model.b(x)
        assert sum(q.layout.kind == "tokens" for q in seen) == 2
        model.b(torch.randn(5, 16))
        assert sum(q.layout.kind == "tokens" for q in seen) == 3


def fresh(model: nn.Module, x: Tensor) -> Tensor:
    """What the model computes when no codes are kept."""
    other = copy.deepcopy(model)
    assert all(not layer._qat.cache.entries for layer in qat_layers(other).values())
    return other(x)  # type: ignore[no-any-return]


def _sgd(model: nn.Module) -> None:
    model(torch.ones(2, 16)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.5).step()


def _fused(model: nn.Module) -> None:
    model(torch.ones(2, 16)).sum().backward()
    torch.optim.AdamW(model.parameters(), 0.5, fused=True).step()


def _load(model: nn.Module) -> None:
    state = copy.deepcopy(model).state_dict()
    model.load_state_dict({name: value * 3 if name.endswith("weight") else value for name, value in state.items()})


def _load_layer(model: nn.Module) -> None:
    layer: Any = model.c
    layer.load_state_dict({name: v * 3 if name == "weight" else v for name, v in layer.state_dict().items()})


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.c.weight.mul_(-3)  # type: ignore[operator, union-attr]


def _data(model: nn.Module) -> None:
    model.c.weight.data.mul_(-3)  # type: ignore[operator, union-attr]
    qat.weights_changed(model)


def _replaced(model: nn.Module) -> None:
    model.c.weight = nn.Parameter(model.c.weight.detach() * -3)  # type: ignore[operator, union-attr]


def _storage(model: nn.Module) -> None:
    model.c.weight.data = model.c.weight.data * -3  # type: ignore[operator, union-attr]


def _dtype(model: nn.Module) -> None:
    model.double().float()
    model.c.weight.data.mul_(-3)  # type: ignore[operator, union-attr]


CHANGES: list[Callable[[nn.Module], None]] = [
    _sgd,
    _fused,
    _load,
    _load_layer,
    _in_place,
    _data,
    _replaced,
    _storage,
    _dtype,
]


@pytest.mark.parametrize("grid", ["absmax", "lsq", "w8a8"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_changed_weight_has_new_codes(change: Callable[[nn.Module], None], grid: str, recipe: Any) -> None:
    model, x = net(recipe, grid), torch.randn(5, 16)
    before = model(x)
    change(model)
    after = model(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(model, x))


def test_a_scale_or_a_phase_that_changed_has_new_codes(recipe: Any) -> None:
    model, x = net(recipe, "lsq"), torch.randn(5, 16)
    before = model(x)
    with torch.no_grad():
        model.c.weight_quantizer.theta.add_(0.05)
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), fresh(model, x))
    model.c.weight_quantizer.set_bits(3)
    assert torch.equal(model(x), fresh(model, x))


def test_other_weights_for_one_call(recipe: Any) -> None:
    """functional_call: neither computed with the layer's codes, nor are its codes those of the call."""
    model, x = net(recipe, "absmax"), torch.randn(5, 16)
    before = model(x)
    other = {name: p.detach() * 1.5 + 0.1 for name, p in model.named_parameters()}
    called = torch.func.functional_call(model, other, (x,))
    assert torch.equal(model(x), before)
    model.load_state_dict({**model.state_dict(), **other})
    assert torch.equal(model(x), called)


def test_copies_and_pickles_bring_no_codes(recipe: Any) -> None:
    model = net(recipe, "absmax")
    x = torch.randn(5, 16)
    with torch.no_grad():
        expected = model(x)
    assert all(layer._qat.cache.nbytes for layer in qat_layers(model).values())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(not layer._qat.cache.nbytes for layer in qat_layers(other).values())
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.a.weight.zero_()
        assert torch.equal(model(x), expected)


BUDGETS = [(True, "abc"), (False, ""), (0, ""), (1, ""), (10**9, "abc"), (1200, "ab")]


@pytest.mark.parametrize(("budget", "kept"), BUDGETS)
def test_a_budget_of_bytes(budget: bool | int, kept: str, recipe: Any) -> None:
    """Layers get codes in order until the budget is used up. a and b: 384 / 2 bytes of codes, and 48 scales, with the
    codes and beside them."""
    model = net(recipe, "absmax", code_cache=budget)
    model(torch.randn(5, 16)).sum().backward()
    qat.after_optimizer_step(model)
    with torch.no_grad():
        model(torch.randn(5, 16))
    assert [name for name, layer in qat_layers(model).items() if layer._qat.cache.nbytes] == list(kept)
    assert model.a._qat.cache.nbytes in (0, 384 // 2 + 48 * 8)


def test_codes_of_a_frozen_layer_need_no_input(recipe: Any) -> None:
    """Mutation: `LinearOp.needs_x` always true."""
    for grid in ("absmax", "w8a8"):
        model = net(recipe, grid)
        model.a.weight.requires_grad_(False)
        x = torch.randn(5, 16, requires_grad=True)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = model.a(x)
        assert x.data_ptr() not in {t.data_ptr() for t in kept} and all(t.shape != x.shape for t in kept)
        y.sum().backward()
        assert x.grad is not None and model.a.bias.grad is not None


def test_a_run_that_diverged_shows(recipe: Any) -> None:
    """A NaN in a weight or an input is no code: it must not be trained on as a zero."""
    for grid in GRIDS:
        model = net(recipe, grid)
        with torch.no_grad():
            model.a.weight[1, 2] = torch.nan
        assert bool(torch.isnan(model(torch.randn(5, 16))).any()), grid
    model = net(recipe, "w8a8")
    x = torch.randn(5, 16)
    x[2, 3] = torch.nan
    assert torch.isnan(model(x)).any(-1).tolist() == [False, False, True, False, False]
    static = {"bits": 8, "granularity": "tensor", "quantizer": "ema"}
    torch.manual_seed(0)
    model = Net()
    qat.prepare(model, recipe(rules={"all": {"weight": {"bits": 8, "quantizer": "mse"}, "input": static}}))
    model(torch.randn(5, 16))
    qat.after_optimizer_step(model)
    assert input_quantizer(model.a) is not None
    assert bool(torch.isnan(model(x)).any())


def test_inputs_in_inference_mode(recipe: Any) -> None:
    """Its tensors have no version counter: an in-place change between two layers must be seen, and nothing that was
    made in that mode may be kept for training."""
    token = {"weight": {**GROUPS, "quantizer": "absmax"}, "input": TOKENS}
    torch.manual_seed(0)
    model = Net()
    qat.prepare(model, recipe(rules={"all": token}))

    def twice(x: Tensor) -> Tensor:
        model.a(x)
        x += 1.0
        return model.b(x)  # type: ignore[no-any-return]

    x = torch.randn(5, 16)
    with torch.no_grad():
        expected = twice(x.clone())
    with torch.inference_mode():
        assert torch.equal(twice(x.clone()), expected)
        model.a.weight.mul_(1.5)
        model(x)
    model(x).sum().backward()
    assert model.a.weight.grad is not None


def test_scales_of_a_frozen_weight_are_trained(recipe: Any) -> None:
    for code_cache in (True, False):
        model = net(recipe, "lsq", code_cache=code_cache)
        x = torch.randn(5, 16)
        model(x).square().sum().backward()
        expected = model.a.weight_quantizer.theta.grad.clone()
        model.zero_grad()
        model.a.weight.requires_grad_(False)
        model(x).square().sum().backward()
        assert model.a.weight.grad is None
        assert torch.equal(model.a.weight_quantizer.theta.grad, expected)


def test_the_cache_does_not_choose_the_product(recipe: Any) -> None:
    """4-bit weights and 8-bit inputs, whose codes could be multiplied as integers if they were not kept packed."""
    found = []
    for code_cache in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 64))
        qat.prepare(model, recipe(input=TOKENS, quantizer="absmax"), code_cache=code_cache)
        found.append(model(torch.randn(64, 512, generator=torch.Generator().manual_seed(0))))
    assert torch.equal(*found)


def test_weights_that_are_elsewhere(recipe: Any) -> None:
    """A parametrized weight is no Parameter of its layer; one of ZeRO-3 comes and goes under the same Parameter."""
    model = net(recipe, "mse")
    torch.nn.utils.parametrizations.weight_norm(model.a)
    qat.after_optimizer_step(model)
    model(torch.randn(5, 16)).sum().backward()
    model = net(recipe, "absmax")
    model.a.weight.ds_id = 1
    model(torch.randn(5, 16)).sum().backward()
    qat.weights_changed(model)
    with torch.no_grad():
        model(torch.randn(5, 16))
    assert model.a._qat.cache.nbytes == 0 and model.b._qat.cache.nbytes > 0


def test_what_a_second_prepare_does_not_say_stays(recipe: Any) -> None:
    model = net(recipe, "absmax", code_cache=False, real=False)
    qat.prepare(model, recipe(rules={"all": GRIDS["absmax"]}))
    model(torch.randn(5, 16))
    assert not any(layer._qat.cache.nbytes or layer._qat.real for layer in qat_layers(model).values())
