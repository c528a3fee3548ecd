"""The figures of the demo, against numbers worked out by hand."""

from __future__ import annotations

import math

import torch
from torch import nn

from qat.tasks.measure import compare, evenly, greedy, output_errors


def test_kl_perplexity_and_agreement_by_hand() -> None:
    blocks = torch.tensor([[0, 1, 0]])
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]]).log()
    q = torch.tensor([[0.25, 0.75], [0.6, 0.4], [0.9, 0.1]]).log()
    scores = compare([p], [q], blocks)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    assert scores.positions == 2
    assert math.isclose(scores.kl, (first + second) / 2, rel_tol=1e-6)
    assert math.isclose(scores.perplexity, math.exp(-(math.log(0.75) + math.log(0.6)) / 2), rel_tol=1e-6)
    assert scores.top1 == 50.0


def test_a_model_is_at_no_distance_from_itself() -> None:
    p = torch.randn(4, 5, 7).log_softmax(-1)
    scores = compare(p, p, torch.randint(0, 7, (4, 5)))
    assert scores.kl == 0.0 and scores.top1 == 100.0 and scores.positions == 16


def test_evenly_takes_from_everywhere() -> None:
    blocks = torch.arange(100)[:, None]
    assert evenly(blocks, 5).flatten().tolist() == [0, 24, 49, 74, 99]
    assert len(evenly(blocks[:3], 5)) == 3


class Toy(nn.Module):
    """Logits are those of the token after the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight.data = torch.roll(torch.eye(6), 1, 0)

    def forward(self, ids: torch.Tensor) -> object:
        class Out:
            logits = self.head(nn.functional.one_hot(ids, 6).float())

        return Out()


def test_greedy_follows_the_largest_logit_and_stops() -> None:
    assert greedy(Toy(), [0], 3, 10) == [1, 2, 3]
    assert greedy(Toy(), [0], 9, 10, end=3) == [1, 2]
    assert greedy(Toy(), [0], 9, 3) == [1, 2]


def test_errors_of_layers() -> None:
    first, second = Toy(), Toy()
    second.head.weight.data *= 1.5
    found = output_errors(first, second, ["head"], torch.tensor([[0, 1, 2]]))
    assert math.isclose(found["head"], 0.5, rel_tol=1e-6)
