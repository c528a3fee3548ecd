"""A convolutional network on scikit-learn's digits: float, rounded (RTN) and trained (QAT), at 4, 3 and 2 bits.

    python examples/digits_cnn.py [--fast]

The recipe `cnn_w4a4` quantizes weights and activations, the first and the last layer at 8 bits. RTN is the float model
rounded to the same grid with searched scales; QAT goes on training on that grid, with the float model as teacher.
"""

import argparse
import copy
import logging

import lightning as L
import qat
import torch
from qat.callbacks import DistillationCallback, QATCallback
from qat.recipes import load_recipe
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class CNN(nn.Module):
    """[B, 1, 8, 8] -> [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        return self.fc(x.flatten(1))


class Digits(L.LightningModule):
    """The network and its loss; knows nothing of quantization."""

    def __init__(self, model: CNN, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def fit(model: CNN, data: TensorDataset, epochs: int, lr: float, callbacks: list[L.Callback]) -> None:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(model, lr), DataLoader(data, batch_size=64, shuffle=True))


@torch.no_grad()
def accuracy(model: CNN, data: TensorDataset) -> float:
    x, y = data[:]
    return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


def rounded(model: CNN, recipe: qat.recipes.Recipe, data: TensorDataset) -> CNN:
    """RTN: weight scales searched on the weights, activation ranges taken from one batch, nothing trained."""
    model = copy.deepcopy(model)
    qat.prepare(model, recipe)
    with torch.no_grad():
        model.train()(data[:256][0])
    qat.after_optimizer_step(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="a few epochs only")
    fast = parser.parse_args().fast
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    epochs = 8 if fast else 40

    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = (TensorDataset(x[part], y[part]) for part in (order[360:], order[:360]))

    torch.manual_seed(0)
    model = CNN()
    fit(model, train, epochs, 3e-3, [])
    table = Table("bits", "float", "RTN", "QAT", title="test accuracy in %", title_justify="left")
    for bits in (4, 2) if fast else (4, 3, 2):
        recipe = load_recipe("cnn_w4a4", [f"rules.layers.weight.bits={bits}", f"rules.layers.input.bits={bits}"])
        trained = copy.deepcopy(model)
        callbacks = [QATCallback(recipe), DistillationCallback(weight=recipe.distill.weight)]
        fit(trained, train, epochs // 2, 1e-3, callbacks)
        found = (accuracy(model, test), accuracy(rounded(model, recipe, train), test), accuracy(trained, test))
        table.add_row(f"W{bits}A{bits}", *(f"{value:.1f}" for value in found))
    Console().print(table)


if __name__ == "__main__":
    main()
