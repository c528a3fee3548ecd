"""A plain Lightning script: a small network learns scikit-learn's digits.

lightning_script_after.py is this script with two more lines: it trains the network that 8-bit arithmetic will compute.

    python examples/lightning_script_before.py [--fast]
"""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningModule):
    """64 pixels to 10 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, index):
        pixels, digit = batch
        return nn.functional.cross_entropy(self.net(pixels), digit)

    def test_step(self, batch, index):
        pixels, digit = batch
        self.log("accuracy", (self.net(pixels).argmax(1) == digit).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="a few epochs only")
    epochs = 8 if parser.parse_args().fast else 40
    L.seed_everything(0, verbose=False)
    pixels, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits))
    train, test = torch.utils.data.random_split(data, [0.8, 0.2])
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Digits()
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))
    trainer.test(model, DataLoader(test, batch_size=360))


if __name__ == "__main__":
    main()
