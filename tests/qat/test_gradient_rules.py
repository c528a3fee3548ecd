"""Quantizers whose gradients are not those of the grid, and scales with formulas of their own; by hand, and the same in
a layer's fused node as in the quantizer alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.layout import Layout
from qat.qtensor import Fields
from qat.quantizers import Quantizer, make_quantizer
from qat.quantizers.dual_lsq import DualLsq
from qat.quantizers.ewgs import DELTA
from qat.quantizers.lsq import RATE
from qat.quantizers.quest import clip_of
from qat.specs import QuantSpec

W = torch.tensor([[-3.0, -2.6, -2.4, -0.7, -0.2, 0.1, 0.6, 1.2, 1.45, 1.55, 2.9, 0.0]])
G = torch.tensor([[1.0, -1.0, 2.0, -2.0, 1.0, 1.0, -1.0, 3.0, 1.0, -1.0, 1.0, 0.5]])


def made(name: str, bits: int = 2, activation: bool = False, **words: object) -> Quantizer:
    layout = Layout((1, 1), "tokens") if activation else Layout(tuple(W.shape))
    spec = QuantSpec(bits, granularity="tensor" if activation else "channel", scale="fp32", quantizer=name, **words)  # type: ignore[arg-type]
    assert not Quantizer.reasons.__func__(type(make_quantizer(spec, layout)), spec, activation=activation)  # type: ignore[attr-defined]
    return make_quantizer(spec, layout)


def one(quantizer: Quantizer) -> Quantizer:
    """With a scale of 1 (start_scale's first value)."""
    if isinstance(getattr(quantizer, "seen", None), Tensor):
        quantizer.seen.fill_(1.0)
    return quantizer


def pulled(quantizer: Quantizer, x: Tensor = W, g: Tensor = G) -> Tensor:
    w = x.clone().requires_grad_()
    quantizer(w).backward(g)
    assert w.grad is not None
    return w.grad


def test_ewgs() -> None:
    """Mutations: sign of DELTA, sign(dw) left out, w_hat - w: red."""
    quantizer = one(made("ewgs"))
    v = W.clamp(-2, 1)
    inside = (v == W).float()
    expected = G * inside * (1 + DELTA * torch.sign(G) * (W - W.round().clamp(-2, 1)))
    assert torch.allclose(pulled(quantizer), expected)
    plain = one(made("lsq"))
    pulled(plain)
    assert torch.allclose(quantizer.theta.grad, plain.theta.grad) and float(quantizer.theta.grad) != 0.0  # type: ignore[arg-type, union-attr]


def test_quest_trusts_half_a_step_beyond_the_grid() -> None:
    """Mutations: the grid's own clip, half a scale for seq: red."""
    quantizer = made("quest", kind="seq")
    w = W.clone()
    w[0, 0], w[0, 10] = -4.78, 3.72
    rms = w.double().square().mean().sqrt()
    step = 2 * 1.49353 * rms / 3
    (scale, *_) = quantizer.qparams(w)
    assert math.isclose(float(scale) / 2, float(step), rel_tol=1e-6)
    expected = torch.where(w.abs() <= 2 * float(step), G, 0.0)
    assert torch.equal(pulled(quantizer, w), expected)
    assert int((expected == 0).sum()) == 1 and float(w.abs()[expected != 0].max()) > 1.5 * float(step)
    ternary = made("quest", kind="ternary")
    assert math.isclose(float(ternary.qparams(w)[0]), float(1.22401 * rms), rel_tol=1e-6)


def test_quest_clips_are_of_least_error_for_a_normal_distribution() -> None:
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    density = torch.exp(-x * x / 2)

    def error(levels: int, clip: float) -> float:
        step = 2 * clip / (levels - 1)
        codes = torch.round(x / step + (levels - 1) / 2).clamp(0, levels - 1)
        return float((density * (x - (codes - (levels - 1) / 2) * step) ** 2).sum())

    for levels in (2, 3, 4, 7, 8, 15, 16):
        assert all(error(levels, clip_of(levels)) < error(levels, clip_of(levels) * f) for f in (0.9, 1.1)), levels


def test_absmean() -> None:
    """BitNet b1.58: the gradient passes everywhere."""
    quantizer = make_quantizer(
        QuantSpec(2, granularity="tensor", scale="fp32", quantizer="absmean", kind="ternary"), Layout((2, 6))
    )
    w = W.reshape(2, 6)
    gamma = w.abs().mean()
    assert torch.allclose(quantizer(w), gamma * (w / gamma).round().clamp(-1, 1))
    assert torch.equal(pulled(quantizer, w, G.reshape(2, 6)), G.reshape(2, 6))


def test_pact_learns_from_what_is_clipped_alone() -> None:
    """Mutations: LSQ's gradient, that of the inside kept: red."""
    quantizer = one(made("pact", activation=True, signed=False))
    expected = G * ((W >= 0) & (W <= 3))
    x = W * 2
    inside = (x >= 0) & (x <= 3)
    assert torch.equal(pulled(quantizer, x), G * inside)
    above = float((G * (x > 3)).sum())
    # s = s0 exp(k theta), alpha = 3 s
    assert torch.allclose(quantizer.theta.grad, torch.tensor([[3.0 * above * RATE]]))  # type: ignore[arg-type]
    assert expected.shape == W.shape


@pytest.mark.parametrize("zero", ["int", "float"])
def test_lsq_plus_learns_its_offset(zero: str) -> None:
    """Mutations: no gradient for phi, the latent zero point exported: red."""
    quantizer = one(made("lsq_plus", 3, activation=True, signed=False, zero_point=zero))
    assert isinstance(quantizer.phi, nn.Parameter)
    with torch.no_grad():
        (quantizer.start_zero if zero == "int" else quantizer.start_minimum)[0] = 2.0 if zero == "int" else -2.0
        quantizer.phi.fill_((0.6 if zero == "int" else -0.25) / RATE)
    fields = quantizer.qparams(W)
    low = -3.0 if zero == "int" else -2.25
    offset = -fields.zero if zero == "int" else fields.minimum  # type: ignore[operator]
    assert float(offset.detach()) == low  # type: ignore[union-attr]
    x = W * 2
    fake = quantizer(x)
    assert torch.allclose(fake, (x - low).round().clamp(0, 7) + low)
    tensor = quantizer.integers(x)
    assert torch.equal(tensor.dequantize(), fake) and quantizer.learned() == (quantizer.theta, quantizer.phi)
    pulled(quantizer, x)
    outside = float((G * ((x < low) | (x > low + 7))).sum())
    assert torch.allclose(quantizer.phi.grad, torch.tensor([[(-1 if zero == "int" else 1) * outside * RATE]]))  # type: ignore[arg-type]


def test_dual_lsq_has_a_scale_of_its_own_for_the_codes() -> None:
    """Against autograd through Q(w / s_pre) * s_post. Mutations: LSQ's gradient for s_post, the ratio of the scales
    left out of dw, codes of integers() under s_post: red."""
    spec = QuantSpec(kind="fp4", granularity="group", group_size=16, scale="fp32", quantizer="dual_lsq")
    w = torch.randn(4, 32, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.2, 3, 32)
    g = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    quantizer = make_quantizer(spec, Layout((4, 32)))
    assert isinstance(quantizer, DualLsq)
    quantizer.init_from(w)
    started = quantizer(w).detach()
    same = make_quantizer(replace(spec, quantizer="lsq"), Layout((4, 32)))
    same.init_from(w)
    assert torch.equal(started, same(w).detach())
    with torch.no_grad():
        quantizer.theta += 0.01
        quantizer.phi -= 0.02
    post, pre = (s.detach().requires_grad_() for s in quantizer.qparams(w)[:2])  # type: ignore[union-attr]
    assert bool((pre < 0.8 * post).all())
    x = w.clone().requires_grad_()
    v = (x.reshape(4, 2, 16) / pre.unsqueeze(-1)).clamp(-6, 6)
    codes = spec.grid.encode(w, pre, None, None)
    numbers = spec.grid.decode(codes, torch.ones_like(pre), None, None).reshape(v.shape)
    plain = ((v + (numbers - v).detach()) * post.unsqueeze(-1)).reshape(4, 32)
    plain.backward(g)
    y = w.clone().requires_grad_()
    fake = quantizer(y)
    fake.backward(g)
    assert torch.equal(fake, quantizer.integers(w).dequantize()) and not torch.equal(fake, started)
    torch.testing.assert_close(fake, plain)
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(quantizer.theta.grad, RATE * post.grad * post.detach())
    torch.testing.assert_close(quantizer.phi.grad, RATE * pre.grad * pre.detach(), rtol=1e-4, atol=1e-4)


def test_a_zero_point_stays_within_the_codes() -> None:
    quantizer = one(made("lsq_plus", 3, activation=True, signed=False, zero_point="int"))
    with torch.no_grad():
        quantizer.phi.fill_(99.0)  # type: ignore[union-attr]
    assert float(quantizer.qparams(W).zero.detach()) == 7.0  # type: ignore[union-attr]


SLOTS = {
    "ewgs": {"bits": 3},
    "quest": {"bits": 2, "grid": "seq"},
    "absmean": {"bits": 2, "grid": "ternary", "granularity": "tensor"},
    "lsq_plus": {"bits": 3, "zero_point": "int"},
    "dual_lsq": {"bits": 4, "grid": "fp4"},
}


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("cached", [True, False])
def test_a_layer_pulls_as_its_quantizer_does(name: str, cached: bool) -> None:
    """With codes that are kept and without. Mutation: the grid's rule in the node: red."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    rules = {
        "all": {
            "weight": {**SLOTS[name], "quantizer": name},
            "input": {"bits": 3, "granularity": "tensor", "zero_point": "int", "quantizer": "lsq_plus"},
        }
    }
    qat.prepare(model, qat.recipes.from_dict({"name": "n", "rules": rules}), code_cache=cached)
    layer = model[0]
    x = torch.randn(5, 8)
    with torch.no_grad():
        model[0].weight *= torch.linspace(0.2, 3, 8)
        layer.input_quantizer.observe(x)
        layer.input_quantizer.commit()
    qat.weights_changed(model)
    x = (2 * x).requires_grad_()
    grad = torch.randn(5, 6)
    model(x).backward(grad)
    found = [p.grad.clone() for p in (x, layer.weight, layer.bias, *layer.weight_quantizer.learned())]
    found += [p.grad.clone() for p in layer.input_quantizer.learned()]
    model.zero_grad()
    x.grad = None
    y = nn.functional.linear(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias)
    y.backward(grad)
    wanted = [p.grad for p in (x, layer.weight, layer.bias, *layer.weight_quantizer.learned())]
    wanted += [p.grad for p in layer.input_quantizer.learned()]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    assert all(bool(g.any()) for g in wanted)


def test_learned_offsets_are_in_the_optimizer_and_in_the_bundle() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    slot = {"bits": 3, "granularity": "tensor", "zero_point": "int", "quantizer": "lsq_plus"}
    rules = {"all": {"weight": {"bits": 4, "quantizer": "lsq"}, "input": slot}}
    qat.prepare(model, qat.recipes.from_dict({"name": "n", "rules": rules}))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    torch.manual_seed(1)
    for _ in range(30):
        (model(torch.randn(16, 8) * 2 + 1) - 3.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)
    quantizer = model[0].input_quantizer
    assert float(quantizer.phi) != 0.0
    ((_, fields),) = qat.convert(model).inputs.values()
    assert isinstance(fields, Fields)
    assert fields.zero is not None and float(fields.zero) == round(float(fields.zero))
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert torch.equal(quantizer.quantize(x, quantizer.spec, fields)[0], quantizer.integers(x).codes)
