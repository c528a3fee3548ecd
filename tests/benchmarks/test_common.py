"""Rows, goals, turns and the comparison with peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import common
from benchmarks.common import FLOAT, Variant, against_peers, missing, row


def variant(tool: str, times: tuple[tuple[float, ...], ...] = ()) -> Variant:
    model = nn.Linear(4, 4)
    return Variant(tool, "weight", model, model, torch.optim.SGD(model.parameters()), times=list(times))


def test_rows_are_flat_and_read_back(tmp_path: Path) -> None:
    rows = [row("cpu", "a", "qat", "time_ratio", 1.25, 1.1), missing("cpu", "a", "other", "not\n installed")]
    common.save(tmp_path / "deep" / "cpu.json", common.environment(more=1), rows)
    found = json.loads((tmp_path / "deep" / "cpu.json").read_text(encoding="utf-8"))
    assert found["rows"] == rows and all(tuple(r) == common.FIELDS for r in found["rows"])
    assert rows[1]["value"] == "not installed" and rows[1]["metric"] == "missing"
    assert {"chip", "python", "torch", "threads", "date", "more", "revision"} <= set(found["environment"])


@pytest.mark.parametrize(
    ("value", "goal", "better", "expected"),
    [(1.1, 1.1, "lower", True), (1.2, 1.1, "lower", False), (0.95, 0.9, "higher", True), (0.8, 0.9, "higher", False),
     (0, 0, "lower", True), (1, 0, "lower", False), (5.0, None, "lower", None), ("text", 1.0, "lower", None)],
)  # fmt: skip
def test_goals(value: Any, goal: float | None, better: str, expected: bool | None) -> None:
    """Mutation: `goal` in place of `goal is None` (a goal of 0 would not count)."""
    entry = row("s", "c", "t", "m", value, goal, better)
    assert common.met(entry) is expected
    assert ("missed: c | t | m" in common.verdict([entry])) == (expected is False)


def test_turns_start_with_the_next_each_round() -> None:
    """Mutation: `start = 0`."""
    variants, order = [variant(name, ((9.0,),)) for name in "abc"], []

    def turn(v: Variant) -> list[list[float]]:
        order.append(v.tool)
        return [[float(len(order))]]

    common.take_turns(variants, turn, 3)
    assert "".join(order) == "abcbcacab"
    assert variants[0].times == [[1.0], [6.0], [8.0]]
    common.take_turns(variants, turn, 3, enough=lambda: True)
    assert [len(v.times) for v in variants] == [1, 1, 1]


def test_ratios_are_to_the_float_of_the_same_turns() -> None:
    """Mutation: the least of the sums."""
    found = common.ratios([variant("qat", ((1, 4), (3, 2), (3, 6))), variant(FLOAT, ((1, 1), (2, 2), (2, 2)))])
    assert found == {"qat": (1.5, 1.25), FLOAT: (1.0, 1.0)}


def test_micro_batches_after_the_first_count_alike() -> None:
    """Mutation: the first among them."""
    assert common.least(variant("qat", ((5, 4, 3, 9), (6, 2, 7, 8)))) == 5 + 2 * 2 + 8


def test_the_best_peer_of_the_same_family_is_the_measure() -> None:
    """Mutation: peers of every family."""
    values = {"qat W4": 3.0, "slow": 6.0, "fast": 4.0, "other kind": 1.0}
    rows = [row("cpu", "case", tool, "time_ratio", value) for tool, value in values.items()]
    rows.append(row("cpu", "another case", "fast", "time_ratio", 0.1))
    families = {"qat W4": "weight", "slow": "weight", "fast": "weight", "other kind": "activation"}
    (found,) = against_peers("cpu", "case", rows, families, ("time_ratio", "peak_bytes"))
    assert (found["tool"], found["metric"], found["value"]) == ("qat W4", "time_ratio / best peer", 0.75)
    assert common.met(found)


def test_compiled_models_of_one_class_do_not_share_a_list() -> None:
    """A recompilation limit of 2 is enough for four models. Mutation: `call` itself in place of `own`."""
    import torch._dynamo

    torch._dynamo.reset()
    x = torch.randn(2, 4)
    for width in (3, 5, 7, 9):
        model = nn.Sequential(nn.Linear(4, width))
        run = common.compiled(model, backend="eager")
        with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            assert torch.equal(run(x), model(x))
    torch._dynamo.reset()
