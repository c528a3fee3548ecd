"""What GPTQ is made of: the solver against the textbook, latents against their codes, moments against outputs.

Mutations that were tried one at a time, and the test that turned red for each:

    obs: later blocks of columns not updated              test_blocks_of_columns_change_nothing
    obs: error not divided by U_jj                        test_solves_as_the_textbook_does
    obs: columns by rising diagonal                       test_solves_as_the_textbook_does
    obs: fields of the place in the order                 test_solves_as_the_textbook_does
    obs: no diagonal for columns without input            test_inputs_that_never_come_and_too_few_of_them
    within: the very ends / no clamp at all               test_latents_have_the_codes_of_gptq
    held: flipped codes stay                              test_latents_have_the_codes_of_gptq
    inputs: a grouped deconvolution not in blocks         test_moments_give_the_error_of_the_output
    mse.search: importance not passed on                  test_scales_weighted_by_the_inputs
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import QATError
from qat.grids import GRIDS
from qat.init.gptq import gptq, held, within
from qat.init.inputs import Moments
from qat.init.obs import errors_of, hat, solve
from qat.layers import weight_quantizers
from qat.layout import Layout
from qat.qtensor import Fields
from qat.quantizers import make_quantizer
from qat.quantizers.mse import search
from qat.recipes import Recipe
from qat.scales import SCALE_GRIDS
from qat.specs import QuantSpec
from qat.steps import qat_layers

Build = Callable[..., Recipe]
KINDS_AND_BITS = [(kind, grid.bits) for kind, grid in GRIDS.items()]
POWERS = [name for name in SCALE_GRIDS if name == "e8m0"]
SPECS = [
    QuantSpec(3, granularity="tensor", quantizer="mse"),
    QuantSpec(2, granularity="channel", quantizer="mse"),
    QuantSpec(4, granularity="group", group_size=16, quantizer="lsq"),
    QuantSpec(2, narrow=True, granularity="group", group_size=32, quantizer="mse"),
    QuantSpec(3, signed=False, granularity="channel", zero_point="int", quantizer="mse"),
    QuantSpec(3, granularity="group", group_size=16, zero_point="int", quantizer="lsq"),
    QuantSpec(2, signed=False, granularity="tensor", zero_point="float", quantizer="mse"),
    QuantSpec(4, signed=False, granularity="group", group_size=32, zero_point="float", quantizer="lsq"),
    QuantSpec(8, granularity="channel", quantizer="mse"),
    QuantSpec(3, signed_scale=True, granularity="group", group_size=16, quantizer="lsq"),
    *(QuantSpec(bits, kind=kind, quantizer="mse") for kind, bits in KINDS_AND_BITS),
    # torch 2.6 has no such dtype
    *(QuantSpec(4, kind="fp4", granularity="group", group_size=32, scale=s, quantizer="mse") for s in POWERS),
]
NAMES = [str(spec) for spec in SPECS]


def problem(rows: int, columns: int, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [R, K] and the Hessian of correlated inputs of different sizes."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    x = (mixed + 3 * torch.randn(samples, 1, generator=g)) * torch.rand(columns, generator=g)
    return torch.randn(rows, columns, generator=g) * 0.1 + 0.02, x.double().t() @ x.double()


def of_columns(fields: Fields, columns: int) -> Fields:
    """Fields of every number [R, K] (or [1, K])."""
    return Fields(*(None if f is None else f.repeat_interleave(columns // f.shape[1], 1) for f in fields))  # type: ignore[arg-type]


def textbook(w: Tensor, hessian: Tensor, fields: Fields, spec: QuantSpec, damp: float, act_order: bool) -> Tensor:
    """The optimal brain surgeon, literally: round one column, spread its error by the inverse of what is left."""
    w, hessian, every = w.double().clone(), hessian.clone(), of_columns(fields, w.shape[1])
    order = torch.argsort(hessian.diagonal(), descending=True).tolist() if act_order else list(range(w.shape[1]))
    hessian += damp * hessian.diagonal().mean() * torch.eye(len(order), dtype=torch.float64)
    rounded = torch.empty(w.shape)
    for at, j in enumerate(order):
        left = order[at:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        own = Fields(*(None if f is None else f[:, j : j + 1] for f in every))  # type: ignore[arg-type]
        rounded[:, j : j + 1] = hat(w[:, j : j + 1].float(), own, spec)
        error = (w[:, j] - rounded[:, j]) / inverse[0, 0]
        w[:, left] -= error.unsqueeze(1) * inverse[0]
    return rounded


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_solves_as_the_textbook_does(spec: QuantSpec, act_order: bool) -> None:
    w, hessian = problem(6, 64, 200)
    fields = search(w, spec)
    found = solve(w, hessian, fields, spec, act_order=act_order)
    assert torch.equal(found.weights, textbook(w, hessian, fields, spec, 0.01, act_order))
    assert found.damp == 0.01


@pytest.mark.parametrize("columns", [127, 128, 300])
def test_blocks_of_columns_change_nothing(columns: int) -> None:
    spec = QuantSpec(3, quantizer="mse")
    w, hessian = problem(3, columns, 400)
    fields = search(w, spec)
    assert torch.equal(solve(w, hessian, fields, spec).weights, textbook(w, hessian, fields, spec, 0.01, True))


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_error_is_below_that_of_rounding(spec: QuantSpec) -> None:
    for seed in range(3):
        w, hessian = problem(16, 64, 300, seed)
        fields = search(w, spec)
        found = errors_of(solve(w, hessian, fields, spec).weights - w, hessian)
        assert float(found.sum()) < float(errors_of(hat(w, fields, spec) - w, hessian).sum())


def test_inputs_that_never_come_and_too_few_of_them() -> None:
    spec = QuantSpec(3, quantizer="mse")
    w, hessian = problem(5, 32, 10)
    dead = torch.tensor([3, 17])
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    fields = search(w, spec)
    for damp in (0.01, 0.0):
        found = solve(w, hessian, fields, spec, damp=damp)
        assert torch.equal(found.latents[:, dead], w[:, dead])
        assert bool(torch.isfinite(found.weights).all()) and bool(torch.isfinite(found.latents).all())
        assert torch.equal(found.weights, hat(found.latents, fields, spec))
    nothing = solve(w, torch.zeros(32, 32), fields, spec)
    assert torch.equal(nothing.weights, hat(w, fields, spec))
    indefinite = hessian - 0.05 * float(hessian.diagonal().mean()) * torch.eye(32)
    assert solve(w, indefinite, fields, spec).damp > 0.01
    with pytest.raises(QATError, match="cannot be factorized"):
        solve(w, -hessian - torch.eye(32), fields, spec)
    with pytest.raises(QATError, match="not finite"):
        solve(w, hessian * torch.inf, fields, spec)


# ---- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_latents_have_the_codes_of_gptq(spec: QuantSpec, dtype: torch.dtype) -> None:
    w, hessian = problem(16, 64, 300)
    quantizer = make_quantizer(spec, Layout((16, 64)))
    quantizer.init_from(w)
    fields = quantizer.fields(w)
    found = solve(w, hessian, fields, spec)
    latents = held(within(found.latents, fields, spec), found.weights, fields, spec, dtype)
    codes = quantizer.integers(found.weights).codes
    assert latents.dtype == dtype and torch.equal(quantizer.integers(latents).codes, codes)
    if spec.bits < 8:
        assert not torch.equal(latents.float(), found.weights)
    for value in (latents, held(found.weights, found.weights, fields, spec, dtype)):
        assert torch.equal(quantizer.integers(value).codes, codes)
        assert torch.equal(quantizer(value), quantizer.integers(value).dequantize())
    if dtype == torch.float32:
        # far beyond the ends, too, every latent can still move
        driven = within(found.latents * 1e3, fields, spec)
        assert torch.equal(hat(driven, fields, spec), hat(found.latents * 1e3, fields, spec))
        for value in (latents, driven):
            quantizer(value.requires_grad_()).sum().backward()
            assert torch.equal(value.grad, torch.ones_like(value))


def test_latents_that_their_dtype_cannot_hold() -> None:
    spec = QuantSpec(8, signed=False, zero_point="float", scale="fp32", quantizer="mse")
    w = 100 + torch.randn(4, 32)
    fields = search(w, spec)
    rounded = hat(w, fields, spec)
    assert torch.equal(held(w, rounded, fields, spec, torch.float32), w)
    with pytest.raises(QATError, match=r"latent in bfloat16.*model\.float\(\)"):
        held(w, rounded, fields, spec, torch.bfloat16)
    spec = QuantSpec(8, quantizer="mse")
    fields = search(w, spec)
    rounded, cast = hat(w, fields, spec), w.bfloat16()
    assert not torch.equal(hat(cast.float(), fields, spec), rounded)
    assert torch.equal(hat(held(w, rounded, fields, spec, torch.bfloat16).float(), fields, spec), rounded)


# ---- inputs ----------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 7, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, stride=2, padding=1, dilation=2), (5, 6, 11)),
    "conv2d": (nn.Conv2d(6, 4, (3, 1), padding="same", groups=2), (5, 6, 7, 8)),
    "depthwise": (nn.Conv2d(6, 12, 3, padding=2, padding_mode="circular", groups=6), (5, 6, 7, 8)),
    "conv3d": (nn.Conv3d(6, 4, 2), (2, 6, 3, 4, 3)),
    "one picture": (nn.Conv2d(6, 4, 3), (6, 7, 8)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, dilation=2), (5, 6, 4, 5)),
    "transposed, grouped": (nn.ConvTranspose1d(6, 4, 4, stride=3, groups=2), (5, 6, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_moments_give_the_error_of_the_output(kind: str, recipe: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """sum |layer(x; d)|^2 = count * sum over rows of d H d^T, for any weight d."""
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(LAYERS[kind][0])).double()
    model[0].bias = None
    qat.prepare(model, recipe(bits=8))
    (layer,) = qat_layers(model).values()
    moments, total = Moments(), 0.0
    for at_once in (1 << 24, 400):
        monkeypatch.setattr("qat.init.inputs._AT_ONCE", at_once)
        x = torch.randn(LAYERS[kind][1]).double()
        moments.add(layer, (x,), {})
        layer._qat.active = False
        total += float(model(x).square().sum())
    hessians = moments.mean(layer)
    rows = weight_quantizers(layer)["weight"].layout.to_rows(layer.weight).chunk(len(hessians))  # type: ignore[arg-type]
    found = sum(float(errors_of(r, h).sum()) for r, h in zip(rows, hessians, strict=True)) * moments.count
    assert found == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_a_weighted_search_weighs(spec: QuantSpec) -> None:
    w, hessian = problem(8, 64, 100)
    h = (hessian.diagonal() / hessian.diagonal().mean()).float()
    errors = [((hat(w, search(w, spec, i), spec) - w).square() * h).sum() for i in (h, h.expand(8, 64), None)]
    assert errors[0] == errors[1] <= errors[2] * (1 + 1e-6)
    assert errors[0] < errors[2] or spec.scale == "e8m0" or spec.kind in ("e4m3", "e5m2")


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_scales_weighted_by_the_inputs(granularity: str, recipe: Build) -> None:
    spec = QuantSpec(3, granularity=granularity, group_size=16 if granularity == "group" else None, quantizer="mse")
    model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(50, 32) * (0.01 + 3.0 * (torch.arange(32) % 8 == 0))
    with torch.no_grad():
        model[0].weight[:, ::8] *= 0.2
    qat.prepare(model, recipe(types=["Linear"], bits=3, granularity=granularity, group_size=spec.group_size))
    start = model[0].weight.detach().clone()
    gptq(model, [x], weighted=True)
    scale = model[0].weight_quantizer.fields(start).scale
    assert torch.equal(scale, search(start, spec, x.square().mean(0) / x.square().mean()).scale)
    assert not torch.equal(scale, search(start, spec).scale)
    gptq(model, [x])
    assert bool((model[0].weight_quantizer.theta == 0).all())
