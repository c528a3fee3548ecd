"""Networks whose batch norms are folded, and what a consumer has of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qat
from qat.recipes import Recipe, from_dict

LATE = {"learn": {"steps": 2}, "settle": {"freeze_batch_norm": True}}
X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 + 1


def seasoned(model: nn.Module) -> nn.Module:
    """Norms as training leaves them."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (norm.weight, -2.0, 2.0),
                    (norm.bias, -1.0, 1.0),
                    (norm.running_mean, -1.0, 1.0),
                    (norm.running_var, 0.2, 3.0),
                ):
                    tensor.copy_(torch.rand(len(tensor), generator=generator) * (high - low) + low)  # type: ignore[union-attr, arg-type]
    return model


def net() -> nn.Module:
    torch.manual_seed(0)
    last = nn.Conv2d(4, 5, 1)
    return seasoned(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), last, nn.BatchNorm2d(5), nn.ReLU()
        )
    )


def recipe(pairs: Any = None, phases: Any = None, types: Any = ("Conv2d", "Linear"), **weight: Any) -> Recipe:
    slot = {"bits": 8, "granularity": "channel", "quantizer": "lsq", **weight}
    return from_dict(
        {
            "name": "n",
            "rules": {"layers": {"types": list(types), "weight": slot}},
            "phases": phases or {"qat": {"freeze_batch_norm": True}},
            "batch_norm": {"fold": True, "pairs": pairs or {}},
        }
    )


def train(model: nn.Module, steps: int = 3, x: Tensor = X) -> list[float]:
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, 0.05)
    losses = []
    for _ in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        # DDP would wait for the others
        assert all(p.grad is not None for p in learning)
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)
        losses.append(float(loss.detach()))
    return losses


def deployed(model: nn.Module) -> nn.Module:
    """What a consumer has: no norms, the weights and biases of the bundle."""
    bundle = qat.convert(model)
    plain, layers = bundle.plain()
    for name in bundle:
        layers[name.rpartition(".")[0]].weight = nn.Parameter(bundle[name].dequantize())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain.modules())
    return plain
