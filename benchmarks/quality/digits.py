"""B2: a convolutional network on scikit-learn's digits, weights and activations at few bits.

model   convolution 3x3 to 16 channels; two depthwise-separable blocks (3x3 each channel for itself, then 1x1) to 24 and
        32 channels; batch norm and ReLU behind each of the five convolutions, no strides; mean over pixels; linear:
        2,210 parameters. The convolutions of the blocks are quantized, weights and inputs; the first convolution and
        the linear layer stay in float
data    1,797 images of 8x8 pixels. Of seed s every fifth image, from the (s mod 5)th on, is held out: a third of these
        (120) to tune, the others (240) to test; so three seeds test on 720 different images. Training images are moved
        by up to one pixel
score   accuracy in %; kl, mean over images of KL(float || quantized), and nll_gap, the excess of the negative
        log-likelihood of the label, both in nats. Learning rates are chosen by kl: one image of 120 is 0.8 %
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from benchmarks.common import FLOAT
from benchmarks.quality.lab import Lab, Scores
from benchmarks.quality.methods import CONTROL, GPTQ, OURS, Case, Method, Width
from qat.distill import kl
from qat.recipes import Train

BATCH = 64
FOLDS, TUNE_OF = 5, 3
FLOAT_EPOCHS, EPOCHS = 40, 15


class Separable(nn.Module):
    """[B, width, H, W] -> [B, out, H, W]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, out, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.depthwise(x)))
        return F.relu(self.norm2(self.pointwise(x)))


class CNN(nn.Module):
    """[B, 1, 8, 8] -> logits [B, 10]."""

    def __init__(self, widths: tuple[int, int, int] = (16, 24, 32)) -> None:
        super().__init__()
        first, second, third = widths
        self.stem, self.norm = nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first)
        self.blocks = nn.Sequential(Separable(first, second), Separable(second, third))
        self.fc = nn.Linear(third, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class Images(NamedTuple):
    """pixels [N, 1, 8, 8] in 0..1, labels [N]"""

    x: Tensor
    y: Tensor

    def at(self, index: Tensor) -> Images:
        return Images(self.x[index], self.y[index])


@functools.lru_cache(1)
def images() -> Images:
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    return Images(torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits))


class Digits(Lab):
    higher = frozenset({"accuracy"})
    counts_levels = False
    layers = MappingProxyType({"types": ["Conv2d"], "match": ["blocks.*"]})

    def __init__(self, seed: int, dry: bool = False, corpus: str = "") -> None:
        super().__init__(seed, dry, corpus)
        every = images()
        index = torch.arange(len(every.x))
        held = index[index % FOLDS == seed % FOLDS]
        third = torch.arange(len(held)) % TUNE_OF == 0
        self.train = every.at(index[index % FOLDS != seed % FOLDS])
        self.splits = {"tune": every.at(held[third]), "test": every.at(held[~third])}
        epoch = len(self.train.x) // BATCH
        self.steps = 8 if dry else EPOCHS * epoch
        self.float_schedule = Train(lr=5e-3, max_steps=20 if dry else FLOAT_EPOCHS * epoch, weight_decay=1e-4)
        self.orders: dict[int, Tensor] = {}

    def fresh(self) -> nn.Module:
        return CNN((4, 6, 8)) if self.dry else CNN()

    def batch(self, order: int, step: int) -> Images:
        """64 images, each moved by -1, 0 or 1 pixel up and left; epochs without the images that are left over."""
        if order not in self.orders:
            generator = torch.Generator().manual_seed(1000 * self.seed + order)
            count, epoch = len(self.train.x), len(self.train.x) // BATCH
            steps = self.steps if order else self.float_schedule.max_steps
            shuffled = [torch.randperm(count, generator=generator)[: epoch * BATCH] for _ in range(-(-steps // epoch))]
            places = torch.cat(shuffled).view(-1, BATCH, 1)
            moves = torch.randint(3, (*places.shape[:2], 2), generator=generator)
            self.orders[order] = torch.cat([places, moves], -1)
        place, down, right = self.orders[order][step].unbind(-1)
        wide = F.pad(self.train.x, (1, 1, 1, 1))[place, 0]
        rows, columns = down[:, None] + torch.arange(8), right[:, None] + torch.arange(8)
        one = torch.arange(len(place))[:, None, None]
        return Images(wide[one, rows[:, :, None], columns[:, None, :]].unsqueeze(1), self.train.y[place])

    def inputs(self, batch: Images) -> Tensor:
        return batch.x

    def task_loss(self, output: Tensor, batch: Images) -> Tensor:
        return F.cross_entropy(output, batch.y)

    @torch.no_grad()
    def scores(self, model: nn.Module, split: str) -> Scores:
        x, y = self.splits[split]
        found, reference = model(x), self.float_model(x)
        return {
            "kl": float(kl(found, reference)),
            "nll_gap": float(F.cross_entropy(found, y) - F.cross_entropy(reference, y)),
            "accuracy": 100.0 * float((found.argmax(1) == y).float().mean()),
        }

    def settle(self, model: nn.Module) -> None:
        """Statistics of batch norms anew, as an export would have them; for every method alike."""
        qat.reestimate_batch_norm(model, self.calibration())

    def calibration(self) -> list[Tensor]:
        """All training images of the first epoch of a method."""
        return [self.batch(1, step).x for step in range(min(self.steps, len(self.train.x) // BATCH))]

    def facts(self) -> dict[str, Any]:
        return {"images": len(images().x), "test images of a seed": len(self.splits["test"].x)}


def _width(bits: int, **goals: float) -> Width:
    """Unsigned codes for inputs: there is a ReLU in front of each."""
    return Width(bits, input={"bits": bits, "granularity": "tensor", "signed": False, "quantizer": "lsq"}, goals=goals)


_LOST, _LOST_TO_CONTROL = "accuracy lost to float", "accuracy lost to float trained on"
WIDTHS = {"W4A4": _width(4), "W3A3": _width(3, **{_LOST: 0.5}), "W2A2": _width(2, accuracy=90.0)}
QAT = Method(
    "kl",
    slot={"quantizer": "lsq"},
    at={"W4A4": {"signed_scale": True}, "W3A3": {"signed_scale": True}, "W2A2": {"grid": "seq"}},
    temperature=4.0,
    scale_rate=0.3,
)
METHODS: dict[str, Method] = {
    FLOAT: Method(),
    CONTROL: Method("ce", judge="nll_gap"),
    "RTN absmax": Method(slot={"quantizer": "absmax"}, input={"quantizer": "absmax"}),
    "RTN MSE": Method(slot={"quantizer": "mse"}),
    GPTQ: Method(slot={"quantizer": "mse", "init": "gptq"}),
    # scales that follow the weights and the inputs, and the labels alone: what most tools do
    "absmax QAT": Method("ce", slot={"quantizer": "absmax"}, input={"quantizer": "ema"}),
    OURS: QAT,
}
# at the widths and methods above; what did not help goes to docs/experiments.md
TRIALS: dict[str, Method] = {
    "default": QAT,
    "temperature 1": replace(QAT, temperature=1.0),
    "hidden states": replace(QAT, hidden=10.0),
    "scale rate 1": replace(QAT, scale_rate=1.0),
    "positive scales": QAT.varied({"W4A4": {}, "W3A3": {}}),
    "integers at 2 bits": QAT.varied({"W2A2": {}}),
    "start: GPTQ latents": QAT.varied(init="gptq latent"),
    "QuEST": QAT.varied({"W4A4": {}, "W3A3": {}}, quantizer="quest"),
    "EWGS": QAT.varied({"W2A2": {}}, quantizer="ewgs"),
    "PACT": replace(QAT, input={"quantizer": "pact"}),
    "cross entropy": replace(QAT, loss="ce"),
    "frozen above 0.02": replace(QAT, recipe={"phases": {"qat": {"freeze_oscillating": 0.02}}}),
    "dampened": replace(QAT, recipe={"phases": {"qat": {"dampen": 0.01}}}),
}
B2 = Case(
    Digits,
    WIDTHS,
    METHODS,
    (("W3A3", "W2A2"), (FLOAT, "RTN MSE", GPTQ, OURS)),
    {"kl / GPTQ": (GPTQ,)},
    TRIALS,
    # higher than for pretrained networks of ordinary size: the network is tiny and trained for 15 epochs
    (1e-3, 3e-3, 1e-2),
    {_LOST: ("accuracy", FLOAT), _LOST_TO_CONTROL: ("accuracy", CONTROL)},
)
