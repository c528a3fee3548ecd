"""B1: a byte-level language model on the source text of Python's standard library, or on a synthetic source.

model   GPT of width 96, 3 blocks, 4 heads, context 64; RMSNorm, GELU MLP of 4 times the width, no bias, untied
        embeddings: 363 thousand parameters, of which the blocks' linears, 332 thousand, are quantized
data    files that `qat.tasks.stdlib` trains on; its held-out files in blocks of 8 KiB, in turn to tune and test
score   kl, mean over positions of KL(float || quantized), and nll_gap, the excess of the negative log-likelihood
        of the next byte, both in nats
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.lab import Lab, Scores
from qat.recipes import Train
from qat.tasks.measure import compare, evenly, log_probs
from qat.tasks.stdlib import read_corpus

CORPORA = ("stdlib", "synthetic")
VOCAB = 128
BLOCK = 8 * 1024
BATCH = 16
# positions of the test split: 512 blocks with 63 known next bytes each
TUNE_BLOCKS, TEST_BLOCKS = 128, 512
CALIBRATION_BLOCKS = 64
# the largest `Method.times`
LONGEST = 10
# what ByteGPT's residual stream is made of (`fold.network` of a recipe)
NETWORK: dict[str, Any] = {
    "writes": ["embedding", "position", "blocks.*.o", "blocks.*.down"],
    "reads": {
        "blocks.*.norm1": ["blocks.*.q", "blocks.*.k", "blocks.*.v"],
        "blocks.*.norm2": ["blocks.*.up"],
        "norm": ["lm_head"],
    },
    "values": {"blocks.*.v": "blocks.*.o"},
    "head_dim": 24,
}


class Output(NamedTuple):
    """logits [B, T, V]"""

    logits: Tensor


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class ByteGPT(nn.Module):
    """Bytes [B, T] -> logits [B, T, V]."""

    def __init__(self, width: int = 96, blocks: int = 3, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCAB, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.lm_head = nn.RMSNorm(width), nn.Linear(width, VOCAB, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.5 / math.sqrt(width))

    def forward(self, ids: Tensor) -> Output:
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        return Output(self.lm_head(self.norm(self.blocks(x))))


class Data(NamedTuple):
    """train uint8 [N]; tune and test: the bytes of their 8 KiB blocks, end to end."""

    train: Tensor
    tune: Tensor
    test: Tensor
    facts: dict[str, Any]


@functools.lru_cache(1)
def data(corpus: str, dry: bool) -> Data:
    if corpus == "synthetic":
        source = markov((1 << 16) if dry else (3 << 20))
        cut = len(source) * 3 // 4
        train, held_out = source[:cut], source[cut:]
        facts = {"corpus": corpus, "corpus sha256": hashlib.sha256(source).hexdigest(), "corpus bytes": len(source)}
    else:
        read = read_corpus(limit=1_500_000 if dry else None)
        train, held_out = "\n".join(read.train).encode(), "\n".join(read.held_out).encode()
        facts = {"corpus": "standard library", "corpus sha256": read.sha256, "corpus bytes": read.bytes}
    blocks = [held_out[start : start + BLOCK] for start in range(0, len(held_out), BLOCK)]
    tune, test = b"".join(blocks[::2]), b"".join(blocks[1::2])
    return Data(_tensor(train), _tensor(tune), _tensor(test), facts)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def markov(count: int) -> bytes:
    """A deterministic source of order 2: after each of 32 * 32 pairs of symbols eight others with probabilities 1/2,
    1/4, ... 1/128, 1/128. Integer arithmetic only, hence the same bytes everywhere.

    The generator is the 64-bit linear congruential one with Knuth's constants (MMIX).
    """
    symbols, branches, mask = 32, 8, (1 << 64) - 1
    state, a, b, out = 1, 0, 0, bytearray()
    for _ in range(count):
        state = (6364136223846793005 * state + 1442695040888963407) & mask
        top = state >> (64 - branches + 1)
        branch = branches - 1 - top.bit_length()
        a, b = b, ((a * symbols + b) * branches + branch) * 2654435761 % (1 << 32) >> 27
        out.append(b)
    return bytes(out)


class BytesLM(Lab):
    network = NETWORK

    def __init__(self, seed: int, dry: bool = False, corpus: str = "stdlib") -> None:
        super().__init__(seed, dry, corpus)
        self.corpus = data(corpus or CORPORA[0], dry)
        self.context = 32 if dry else 64
        self.steps = 8 if dry else 150
        self.float_schedule = Train(lr=3e-3, max_steps=120 if dry else 1500, weight_decay=0.05)
        counts = {"tune": 16, "test": 32} if dry else {"tune": TUNE_BLOCKS, "test": TEST_BLOCKS}
        self.blocks = {split: self._blocks(split, count) for split, count in counts.items()}
        self.starts: dict[int, Tensor] = {}
        self.references: dict[str, list[Tensor]] = {}
        if dry:
            self.network = {**NETWORK, "head_dim": 8}

    def _blocks(self, split: str, count: int) -> Tensor:
        """int64 [count, context], spread over the split."""
        stream = getattr(self.corpus, split)
        return evenly(stream[: len(stream) // self.context * self.context].view(-1, self.context), count).long()

    def fresh(self) -> nn.Module:
        return ByteGPT(32, 1, 4, self.context) if self.dry else ByteGPT(context=self.context)

    def batch(self, order: int, step: int) -> Tensor:
        """int64 [16, context]"""
        if order not in self.starts:
            generator = torch.Generator().manual_seed(1000 * self.seed + order)
            # longer trainings begin with the batches of the usual ones
            steps = LONGEST * self.steps if order else self.float_schedule.max_steps
            shape = steps, BATCH
            self.starts[order] = torch.randint(len(self.corpus.train) - self.context, shape, generator=generator)
        return self.corpus.train[self.starts[order][step][:, None] + torch.arange(self.context)].long()

    def task_loss(self, output: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(output[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def scores(self, model: nn.Module, split: str) -> Scores:
        blocks = self.blocks[split]
        if split not in self.references:
            self.references[split] = list(log_probs(self.float_model, blocks))
        reference = self.references[split]
        found = compare(reference, log_probs(model, blocks), blocks)
        float_perplexity = compare(reference, reference, blocks).perplexity
        return {"kl": found.kl, "nll_gap": math.log(found.perplexity) - math.log(float_perplexity)}

    def calibration(self) -> list[Tensor]:
        """Four batches of 16 sequences: those that training begins with."""
        return [self.batch(1, step) for step in range(CALIBRATION_BLOCKS // BATCH)]

    def facts(self) -> dict[str, Any]:
        blocks = self.blocks["test"]
        return {**self.corpus.facts, "test positions": blocks.numel() - len(blocks)}
