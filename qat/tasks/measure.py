"""How far a quantized language model is from its float model, on held-out tokens.

    KL            mean over positions of sum_v p_float(v) * (log p_float(v) - log p_quantized(v)), in nats
    perplexity    exp of the mean negative log-likelihood of the next token
    top-1         share of positions at which both models rank the same token first, in %

`blocks` are int64 [N, T]; a block has T - 1 positions with a known next token, and only those count.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

_BATCH = 32
_PACKAGES = ("lightning", "pytorch-lightning", "transformers", "compressed-tensors", "gguf", "xllamacpp")


def environment() -> dict[str, Any]:
    """Where figures are measured: machine, versions, date."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {},
    }
    for package in _PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = "not installed"
    return found


@dataclass(frozen=True)
class Scores:
    """`kl` and `top1` are against the reference; positions says over how many the means are."""

    kl: float
    perplexity: float
    top1: float
    positions: int


@torch.no_grad()
def log_probs(model: nn.Module, blocks: Tensor) -> Iterator[Tensor]:
    """fp32 log-probabilities [T, V] of every block, in eval mode; the model's mode is restored."""
    training = model.training
    model.eval()
    try:
        for batch in torch.split(blocks, _BATCH):
            yield from model(batch).logits.float().log_softmax(-1)
    finally:
        model.train(training)


@torch.no_grad()
def compare(reference: Iterable[Tensor], other: Iterable[Tensor], blocks: Tensor) -> Scores:
    """Scores of `other` against `reference`, both log-probabilities [T, V] per block."""
    divergence = likelihood = agree = 0.0
    positions = 0
    for ids, p, q in zip(blocks, reference, other, strict=True):
        p, q, nexts = p[:-1], q[:-1], ids[1:]
        divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        likelihood -= float(q.gather(1, nexts[:, None]).sum(dtype=torch.float64))
        agree += float((p.argmax(-1) == q.argmax(-1)).sum())
        positions += len(nexts)
    mean = torch.tensor(likelihood / positions)
    return Scores(divergence / positions, float(mean.exp()), 100.0 * agree / positions, positions)


def evenly(blocks: Tensor, count: int) -> Tensor:
    """`count` blocks spread over all of them."""
    return blocks[torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()]


@torch.no_grad()
def output_errors(reference: nn.Module, other: nn.Module, names: list[str], batch: Tensor) -> dict[str, float]:
    """Layer -> |y - y_reference| / |y_reference| of its outputs; both models see the same tokens."""
    outputs: list[dict[str, Tensor]] = []
    for model in (reference, other):
        seen: dict[str, Tensor] = {}
        hooks = [model.get_submodule(name).register_forward_hook(_keep(seen, name)) for name in names]
        for _ in log_probs(model, batch):
            continue
        for hook in hooks:
            hook.remove()
        outputs.append(seen)
    first, second = outputs
    return {name: float((second[name] - first[name]).norm() / first[name].norm()) for name in names}


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen[name] = output.detach()

    return hook


@torch.no_grad()
def greedy(model: nn.Module, ids: list[int], tokens: int, context: int, end: int | None = None) -> list[int]:
    """Up to `tokens` greedy tokens after `ids`, ending before the token `end`."""
    training = model.training
    model.eval()
    text = list(ids)
    for _ in range(min(tokens, context - len(text))):
        best = int(model(torch.tensor([text])).logits[0, -1].argmax())
        if best == end:
            break
        text.append(best)
    model.train(training)
    return text[len(ids) :]
