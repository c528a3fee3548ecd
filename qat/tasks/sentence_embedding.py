"""Sentence embeddings: an encoder learns the float encoder's embeddings on plain sentences; no labels are needed.

    embedding   mean over the tokens of the last hidden states, normalised: what sentence-transformers serves
    loss        mean of 1 - cos(embedding, float embedding), plus the mean squared difference of hidden states

The task's own loss is the distillation: `distill.enabled` adds no second one, `distill.teacher` names another teacher.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import QATError
from qat.hf import load_model, load_tokenizer, read_config
from qat.recipes.schema import Train
from qat.tasks.base import Batches, Task, need_model, read_records, split, value_of

log = logging.getLogger(__name__)


class SentenceEmbedding(Task):
    """Batch: input_ids and attention_mask [B, T]. The teacher is no child: in no state dict, in no optimizer."""

    def __init__(self, model: nn.Module, train: Train, teacher: nn.Module | None = None) -> None:
        super().__init__(model, train)
        frozen = (copy.deepcopy(model) if teacher is None else teacher).eval().requires_grad_(False)
        self.__dict__["teacher"] = frozen

    def on_fit_start(self) -> None:
        self.teacher.to(self.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings [B, D] of length 1, hidden states [B, T, D])."""
        return embed(self.model, input_ids, attention_mask)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch["attention_mask"]
        embedding, hidden = self(batch["input_ids"], mask)
        with torch.no_grad():
            wanted, wanted_hidden = embed(self.teacher, batch["input_ids"], mask)
        similarity = (embedding * wanted).sum(-1).mean()
        squared = (hidden.float() - wanted_hidden.float()).square().mean(-1)
        error = (squared * mask).sum() / mask.sum()
        return 1.0 - similarity + error, {"cosine": similarity}


def embed(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean pooling over the tokens that count, normalised, in fp32; and the hidden states."""
    hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    weight = attention_mask[..., None].float()
    mean = (hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1.0)
    return F.normalize(mean, dim=-1), hidden


def build(train: Train, teacher: str | None = None) -> tuple[SentenceEmbedding, Batches, Any]:
    """(module, data, tokenizer) from a recipe's `train`. Raises QATError for a model or data that cannot be used."""
    folder = need_model(train)
    read_config(folder)
    tokenizer = load_tokenizer(train.tokenizer or folder)
    sentences = read_sentences(train, train.data, "train.data")
    if train.val_data:
        held_out = read_sentences(train, train.val_data, "train.val_data")
    else:
        sentences, held_out = split(sentences, train.val_fraction, train.seed)
    model = load_model(folder, auto="AutoModel", dtype=torch.float32, may_lack=True)
    limit = min(train.seq_len, getattr(model.config, "max_position_embeddings", train.seq_len))

    def collate(batch: list[str]) -> dict[str, Tensor]:
        out = tokenizer(batch, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise QATError(f"the tokenizer of {folder} has no padding token, which batches of sentences need")
    loaded = None if teacher is None else load_model(teacher, auto="AutoModel", dtype=torch.float32, may_lack=True)
    # eval: dropout would only blur the target that the teacher gives.
    module = SentenceEmbedding(model.eval(), train, loaded)
    return module, Batches(sentences, held_out, train, collate), tokenizer


def read_sentences(train: Train, paths: list[str], key: str) -> list[str]:
    """One sentence for each line of text files and for each record of jsonl and parquet files; empty ones go."""
    texts: list[str] = []
    for record in read_records(paths, key):
        value = value_of(record, "text" if record.keys() == {"text"} else train.text_key, "train.text_key", str)
        texts += value.splitlines() if record.keys() == {"text"} else [value]
    found = [text.strip() for text in texts if text.strip()]
    if not found:
        raise QATError(f"{key}: there is no sentence in {', '.join(paths)}")
    return found
