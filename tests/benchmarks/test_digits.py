"""B2: what is held out, and what its figures are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from benchmarks.common import FLOAT
from benchmarks.quality import run
from benchmarks.quality.digits import B2, METHODS, QAT, WIDTHS, Digits, images
from benchmarks.quality.lab import exported, train
from benchmarks.quality.methods import CONTROL, OURS, _ours
from qat.recipes import Train

pytest.importorskip("sklearn")


def test_no_image_is_in_two_splits_and_seeds_test_on_others() -> None:
    labs = [Digits(seed, dry=True) for seed in range(3)]
    seen: set[bytes] = set()
    every = {x.numpy().tobytes() for x in images().x}
    for lab in labs:
        parts = [{x.numpy().tobytes() for x in part.x} for part in (lab.train, *lab.splits.values())]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        assert parts[0] | parts[1] | parts[2] == every
        assert not seen & parts[2] and 238 <= len(parts[2]) <= 240
        seen |= parts[2]


def test_images_are_moved_by_up_to_a_pixel_in_the_order_of_the_seed() -> None:
    lab, again, other = Digits(0, dry=True), Digits(0, dry=True), Digits(1, dry=True)
    first = lab.batch(1, 0)
    assert torch.equal(first.x, again.batch(1, 0).x) and not torch.equal(first.x, other.batch(1, 0).x)
    assert not torch.equal(first.y, lab.batch(0, 0).y)
    wide = torch.nn.functional.pad(lab.train.x, (1, 1, 1, 1))
    moved = {
        wide[i, 0, a : a + 8, b : b + 8].numpy().tobytes() for i in range(len(wide)) for a in range(3) for b in range(3)
    }
    assert all(x.contiguous().numpy().tobytes() in moved for x in first.x[:, 0])


@pytest.fixture(scope="module")
def lab() -> Digits:
    found = Digits(0, dry=True)
    found.pretrain()
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_weights_and_inputs_are_what_was_exported(lab: Digits, width: str) -> None:
    """Mutation: no hook on the inputs: red."""
    plain = _ours(lab, QAT, width, WIDTHS[width], 1e-3)
    counts: dict[str, int] = {}

    def look(name: str) -> Any:
        return lambda module, given: counts.__setitem__(name, int(given[0].unique().numel()))

    convolutions = {name: m for name, m in plain.named_modules() if isinstance(m, torch.nn.Conv2d)}
    for name, module in convolutions.items():
        module.register_forward_pre_hook(look(name))
    with torch.no_grad():
        plain(lab.splits["test"].x)
    levels = 2 ** WIDTHS[width].bits
    for name, module in convolutions.items():
        few = all(int(row.unique().numel()) <= levels for row in module.weight.flatten(1))
        assert (counts[name] <= levels) == name.startswith("blocks.") and (few or not name.startswith("blocks."))


def test_the_exported_network_computes_as_the_trained_one(lab: Digits) -> None:
    model = lab.copy()
    slot = {"bits": 3, "granularity": "tensor", "signed": False, "quantizer": "lsq"}
    rules = {"convs": {**lab.layers, "weight": {"bits": 3, "quantizer": "lsq"}, "input": slot}}
    qat.prepare(model, qat.recipes.from_dict({"name": "n", "rules": rules}))
    after = lambda optimizer: qat.after_optimizer_step(model, optimizer)  # noqa: E731
    train(model, Train(lr=1e-3, max_steps=4), lambda step: lab.loss(model, "kl", step, temperature=4.0), after)
    lab.settle(model)
    x = lab.splits["test"].x
    with torch.no_grad():
        assert torch.allclose(exported(model, lab.copy())(x), model(x), atol=1e-5)


def test_rows(tmp_path: Path) -> None:
    out = tmp_path / "b2.json"
    assert run.main(["--dry-run", "--only", "B2 W3A3", "--seeds", "0,1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["tool"] for row in rows} == set(METHODS) and not any(row["metric"] == "missing" for row in rows)
    mean = {(row["tool"], row["metric"]): row for row in rows if "seed" not in row}
    for metric, tool in zip(B2.lost, (FLOAT, CONTROL), strict=True):
        expected = mean[tool, "accuracy"]["value"] - mean[OURS, "accuracy"]["value"]
        assert mean[OURS, metric]["value"] == pytest.approx(expected)
    lost = mean[OURS, "accuracy lost to float"]
    assert lost["goal"] == 0.5 and lost["better"] == "lower" and mean[OURS, "accuracy"]["better"] == "higher"
