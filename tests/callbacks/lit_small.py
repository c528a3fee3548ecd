"""Small Lightning modules for the tests of the callbacks; `make(pl)` takes either copy of Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import qat.recipes
from qat.callbacks import QATCallback
from qat.state import require_state

WEIGHTS = {"bits": 4, "granularity": "group", "group_size": 8, "quantizer": "lsq"}


def recipe(weight: dict[str, Any] | None = None, input: dict[str, Any] | None = None, **more: Any) -> Any:
    """All Linear layers at 4 bits with learned scales; `phases`, `export`... as in a recipe."""
    rules = {"linears": {"match": ["*"], "types": ["Linear"], "weight": {**WEIGHTS, **(weight or {})}, "input": input}}
    return qat.recipes.from_dict({"name": "small", "rules": rules, **more})


def delayed(steps: int) -> dict[str, Any]:
    return {"float": {"steps": steps, "quantize": False}, "qat": {"steps": -1}}


def data(n: int = 32, batch: int = 4, **kwargs: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 16, generator=generator)
    return DataLoader(TensorDataset(x, torch.randn(n, 8, generator=generator)), batch_size=batch, **kwargs)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.b = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


class Lit(pl.LightningModule):
    """`losses`: of every training step, in order."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.net = Net()
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x).float(), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def trainer(path: Any, *callbacks: Any, **kwargs: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": path,
    }
    quiet.update({"enable_checkpointing": False} if "enable_checkpointing" not in kwargs else {})
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **kwargs})


class Language(pl.LightningModule):
    """A transformers Llama of two layers on random tokens, with labels of which some are masked."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.model(**batch).loss, "extra": 1}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def tokens(n: int = 8, batch: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50, (n, 12), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    return DataLoader([{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)], batch_size=batch)


def fit(path: Path, module: Any, the_recipe: Any = None, *more: Any, steps: int = 4, **kwargs: Any) -> Any:
    t = trainer(path, QATCallback(the_recipe or recipe()), *more, max_steps=steps, **{"limit_val_batches": 1, **kwargs})
    t.fit(module, data(), data())
    return t


def step_of(module: nn.Module) -> int:
    return require_state(module).record.step


class InConfigureModel(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = Net()


class InSetup(Lit):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            torch.manual_seed(0)
            self.net = Net()
