"""Our side: recipes as plain data, and the gate that has to be green before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import Missing
from benchmarks.models import linears

Slot = dict[str, Any]
TOKEN: Slot = {"bits": 8, "granularity": "token", "scale": "fp32", "quantizer": "absmax"}
CHANNEL: Slot = {"bits": 8, "granularity": "channel", "narrow": True, "quantizer": "mse"}


def group(size: int, quantizer: str) -> Slot:
    return {"bits": 4, "granularity": "group", "group_size": size, "quantizer": quantizer}


# families: what is compared with what. Weights alone are quantized in the first three, with scales that are found anew
# after each step, found once, or trained.
FOLLOWING, FIXED, LEARNED = "weight, scales that follow", "weight, fixed scales", "weight, learned scales"
ACTIVATION = "activation"


@dataclass(frozen=True)
class Scheme:
    """family: one of those above; options: those of `qat.prepare`."""

    family: str
    rule: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


# the rule of the preset w8a8
W8A8: dict[str, Any] = {"weight": CHANNEL, "input": TOKEN}
FP8: dict[str, Any] = {
    "weight": {"grid": "e4m3", "bits": 8, "granularity": "channel", "quantizer": "absmax"},
    "input": {"grid": "e4m3", **TOKEN},
}
CPU = {
    "qat W4 g32": Scheme(FOLLOWING, {"weight": group(32, "absmax")}),
    "qat W4 g32 fixed": Scheme(FIXED, {"weight": group(32, "mse")}),
    "qat W4 g32 LSQ": Scheme(LEARNED, {"weight": group(32, "lsq")}),
    "qat W8A8": Scheme(ACTIVATION, W8A8),
}
GPU = {
    "qat W4A16 dynamic": Scheme(FOLLOWING, {"weight": group(128, "absmax")}),
    "qat W4A16 LSQ": Scheme(LEARNED, {"weight": group(128, "lsq")}),
    "qat W8A8 simulated": Scheme(ACTIVATION, W8A8, {"real": False}),
    "qat W8A8 real": Scheme(ACTIVATION, W8A8, {"real": True}),
    "qat W8A8 real, int8 backward": Scheme(ACTIVATION, {**W8A8, "backward": "int8"}, {"real": True}),
    # recipes have no fp8 backward yet; until then its rows say so
    "qat FP8 real": Scheme(ACTIVATION, FP8, {"real": True}),
    "qat FP8 real, fp8 backward": Scheme(ACTIVATION, {**FP8, "backward": "fp8"}, {"real": True}),
}


def recipe(rule: dict[str, Any], **more: Any) -> Any:
    """A recipe that gives every linear but the head this rule, and says `more` beside its rules; raises Missing where
    recipes have no such words."""
    from qat.errors import QATError, RecipeError
    from qat.recipes import from_dict

    rules = {
        "linears": {"types": ["Linear"], **rule},
        "head": {"match": ["*lm_head"], "keep_float": True, "optional": True},
    }
    try:
        return from_dict({"name": "benchmark", "rules": rules, **more})
    except (QATError, RecipeError) as problem:
        raise Missing(f"no recipe can say it yet: {problem}") from None


def prepared(model: nn.Module, rule: dict[str, Any], **options: Any) -> int:
    """Prepare in place; the number of quantized weights. Raises Missing if it cannot be."""
    import qat
    from qat.errors import QATError

    count = sum(linear.weight.numel() for linear in linears(model).values())
    try:
        plan = qat.prepare(model, recipe(rule), **options)
    except QATError as problem:
        raise Missing(f"the recipe cannot be prepared: {problem}") from None
    covered = sum(row.params for row in plan.rows)
    assert covered >= count, f"{covered} of {count} weights are planned"
    return count


def gate(model: nn.Module, loss: Tensor, tokens: int = 64) -> list[str]:
    """Why a prepared model must not be timed; empty means it may.

    loss      of a quantized step, which must be finite
    tokens    rows of the random inputs on which each layer's node is compared with plain autograd

    For every layer: the law (quantizer(w) == integers(w).dequantize(), bit for bit); output and gradients of x, the
    weight and each learned scale against F.linear(quantizer(x), quantizer(w)) under autograd (of a rounded backward to
    within its rounding).
    """
    from qat.steps import qat_layers

    if not bool(torch.isfinite(loss)):
        return [f"the loss of a quantized step is {float(loss)}"]
    problems = []
    for name, layer in qat_layers(model).items():
        for key, quantizer in _weight_quantizers(layer).items():
            weight = getattr(layer, key).detach()
            if not torch.equal(quantizer(weight).detach(), quantizer.integers(weight).dequantize()):
                problems.append(f"{name}.{key}: quantizer(w) differs from quantizer.integers(w).dequantize()")
        problems += [f"{name}: {problem}" for problem in _differences(layer, tokens)]
    return problems or ([] if qat_layers(model) else ["no layer is quantized"])


def _weight_quantizers(layer: Any) -> dict[str, Any]:
    from qat.layers import weight_quantizers

    return weight_quantizers(layer)


def _differences(layer: Any, tokens: int) -> list[str]:
    """Where the layer's own node and plain autograd differ by more than rounding of the sums."""
    from qat.layers import input_quantizer, layer_quantizers

    weight = layer.weight
    quantizer, on_input = _weight_quantizers(layer)["weight"], input_quantizer(layer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(weight.device, weight.dtype).requires_grad_()
    grad = torch.randn(tokens, weight.shape[0], generator=generator).to(weight.device, weight.dtype)
    learned = [p for q in layer_quantizers(layer) for p in q.learned() if p.requires_grad]
    leaves = [x, weight, *learned]
    y = layer(x)
    found = torch.autograd.grad(y, leaves, grad)
    plain = F.linear(x if on_input is None else on_input(x), quantizer(weight), layer.bias)
    wanted = torch.autograd.grad(plain, leaves, grad)
    # a sum of 8-bit numbers may be added in another order: a few units in the last place of the largest
    allowed = 2.0**-16 if weight.dtype == torch.float32 else 2.0**-6
    pairs = zip(["y", "dx", "dw", *("dscale" for _ in learned)], (y, *found), (plain, *wanted), strict=True)
    problems = []
    for name, ours, reference in pairs:
        difference, wanted_one = ours.detach().float() - reference.detach().float(), reference.detach().float()
        if layer._qat.backward != "float" and name != "y":
            # one stochastic rounding; `int8_gradients` bounds its variance
            if not float(difference.norm()) <= 0.05 * float(wanted_one.norm()):
                problems.append(f"{name} is further from plain autograd than 8-bit rounding explains")
            continue
        largest = float(difference.abs().max())
        if not largest <= allowed * float(wanted_one.abs().max()):
            problems.append(f"{name} differs from plain autograd by {largest:.3g}")
    return problems
