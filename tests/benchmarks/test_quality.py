"""The quality suite runs from end to end in tiny sizes, and its numbers mean what its rows say."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from benchmarks.common import FLOAT, Missing, met
from benchmarks.models import linears
from benchmarks.quality import bytes_lm, methods, run, summary
from benchmarks.quality import lab as labs
from benchmarks.quality.bytes_lm import BytesLM, markov
from benchmarks.quality.methods import Method
from benchmarks.quality.weights import B1, METHODS, PEERS, WIDTHS
from benchmarks.schemes import recipe

LSQ = Method("kl", slot={"quantizer": "lsq"})


@pytest.fixture(scope="module")
def lab() -> BytesLM:
    found = BytesLM(0, dry=True, corpus="synthetic")
    found.pretrain()
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("quality") / "quality.json"
    assert run.main(["--dry-run", "--only", "B1", "--corpus", "synthetic", "--seeds", "0,1", "--out", str(out)]) == 0
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return found


def test_every_method_has_figures_or_a_reason(rows: list[dict[str, Any]]) -> None:
    """Mutation: rows of `absent` left out."""
    for width in WIDTHS:
        of_case = [entry for entry in rows if entry["case"] == f"B1 {width}"]
        assert {entry["tool"] for entry in of_case} == set(METHODS) - set(PEERS)
        seeds = {(e["tool"], e["seed"]) for e in of_case if e["metric"] == "kl" and "seed" in e}
        missing = {entry["tool"] for entry in of_case if entry["metric"] == "missing"}
        assert seeds == {(tool, seed) for tool in set(METHODS) - set(PEERS) - missing for seed in (0, 1)}
        # what needs nothing that is still to be built
        assert not missing & {FLOAT, methods.CONTROL, "RTN absmax", "RTN MSE"}


def test_figures_are_in_order(rows: list[dict[str, Any]]) -> None:
    """Mutations: the float model is rounded too; `quantizer` of a method's slot not used."""
    kl = {(e["case"], e["tool"]): e["value"] for e in rows if e["metric"] == "kl" and "seed" not in e}
    for width in WIDTHS:
        assert kl[f"B1 {width}", FLOAT] == 0.0
        assert kl[f"B1 {width}", methods.CONTROL] > 0.0
    assert kl["B1 W2", "RTN absmax"] > kl["B1 W2", "RTN MSE"] > kl["B1 W3", "RTN MSE"] > kl["B1 W4", "RTN MSE"] > 0.0


def test_training_brings_it_closer(lab: BytesLM) -> None:
    """Mutation: `_train` does nothing."""
    rounded = methods.measured("a", Method(slot={"quantizer": "mse"}), "W2", WIDTHS["W2"], lab, None)
    trained = methods.measured("b", LSQ, "W2", WIDTHS["W2"], lab, 1e-3)
    assert trained["test"]["kl"] < rounded["test"]["kl"]


def test_longer_trainings_begin_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: `times` not used; the order of batches depends on how many there are."""
    lab = BytesLM(0, dry=True, corpus="synthetic")
    lab.load(lab.fresh().state_dict())
    seen: list[int] = []
    monkeypatch.setattr(
        lab, "loss", lambda model, kind, step, *_: (seen.append(step), model(lab.batch(1, step)).logits.sum())[1]
    )
    methods.measured("x", replace(LSQ, times=3), "W3", WIDTHS["W3"], lab, 1e-4)
    assert seen == list(range(3 * lab.steps))
    monkeypatch.setattr(bytes_lm, "LONGEST", 1)
    usual = BytesLM(0, dry=True, corpus="synthetic")
    assert all(torch.equal(lab.batch(1, step), usual.batch(1, step)) for step in range(lab.steps))


def test_scale_rates(lab: BytesLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A width's word goes before the method's. Mutations: the word ignored; the method's forgotten."""
    seen = []
    monkeypatch.setattr(methods, "_train", lambda *_, rates, **more: seen.append([rate for _, rate in rates]))
    method = replace(LSQ, at={"W4": {"scale_rate": 0.5}}, scale_rate=0.1)
    for width, one in (("W4", method), ("W3", method), ("W3", method.varied(scale_rate=1.0))):
        methods.measured("x", one, width, WIDTHS[width], lab, 1e-4)
    assert seen == [[0.5], [0.1], []]


@pytest.mark.parametrize("fold", ["rotate", "smooth", "awq"])
def test_folded_methods(lab: BytesLM, fold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures differ from those without, and hidden states are compared in the basis of the student.
    Mutations: `fold` not passed on; the tap's teacher not folded (the loss of `rotate` begins at twice the weight)."""
    losses: list[float] = []
    loss = lab.loss

    def noted(*args: Any) -> torch.Tensor:
        found = loss(*args)
        losses.append(found.item())
        return found

    monkeypatch.setattr(lab, "loss", noted)
    first, figures = [], []
    for words in ({}, {"method": fold}):
        method = Method("kl", slot={"quantizer": "lsq"}, hidden=3.0, fold=words)
        figures.append(methods.measured("x", method, "W3", WIDTHS["W3"], lab, 1e-4)["test"]["kl"])
        first.append(losses[0])
        losses.clear()
    assert figures[0] != figures[1]
    assert first[1] < 1.5 * first[0]


def test_what_is_scored_are_the_exported_integers(lab: BytesLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain network with the numbers of the prepared one; red where they differ. Mutation: no comparison."""
    model = lab.copy()
    qat.prepare(model, recipe({"weight": {"bits": 3, "granularity": "channel", "quantizer": "mse"}}))
    plain = labs.exported(model, lab.copy())
    batch = lab.batch(1, 0)
    assert type(plain.get_submodule("blocks.0.q")) is torch.nn.Linear
    assert torch.equal(plain(batch).logits, model(batch).logits)

    from qat.qtensor import QTensor

    right = QTensor.dequantize
    monkeypatch.setattr(QTensor, "dequantize", lambda self: right(self) * 1.001)
    with pytest.raises(AssertionError, match="exported differs from trained"):
        labs.exported(model, lab.copy())


def test_a_quantization_that_is_off_is_noticed(lab: BytesLM) -> None:
    """So is one of a layer that others leave alone. Mutations: `levels` does not count; it skips embeddings."""
    count = len(linears(lab.float_model))
    with pytest.raises(AssertionError, match="0 of 6 weights"), labs.levels(lambda columns: 16, count):
        lab.float_model(lab.batch(1, 0))
    model = lab.copy()
    with torch.no_grad():
        for weight in (*(linear.weight for linear in linears(model).values()), model.embedding.weight):
            weight.copy_(weight.sign())
    with pytest.raises(AssertionError, match="7 of 6 weights"), labs.levels(lambda columns: 2, count):
        model(lab.batch(1, 0))


def test_batches_and_teacher(lab: BytesLM) -> None:
    """Every lab of a seed has the same order; the teacher's outputs are those of the step's own batch."""
    again = BytesLM(0, dry=True, corpus="synthetic")
    for step in (0, lab.steps - 1):
        assert torch.equal(lab.batch(1, step), again.batch(1, step))
        with torch.no_grad():
            assert torch.equal(lab.teacher[step], lab.float_model(lab.batch(1, step)).logits)
    assert not torch.equal(lab.batch(1, 0), lab.batch(0, 0))
    assert not torch.equal(lab.batch(1, 0), BytesLM(1, dry=True, corpus="synthetic").batch(1, 0))


def test_the_learning_rate_is_that_of_the_tuning_split() -> None:
    """The test split prefers another, and a run that diverged is never chosen. Mutation: `scores["test"]`."""
    place = run.Place("B1", "synthetic", True, "")
    suite = run.Suite(place, ["W4"], ["qat"], [0, 1], (1e-4, 1e-3, 1e-2), run.InTurn())
    for rate, tune, test in ((1e-2, math.nan, 0.0), (1e-4, 0.2, 0.1), (1e-3, 0.1, 0.3)):
        scores = {"tune": {"kl": tune}, "test": {"kl": test}}
        suite.outcomes.append(run.Outcome(run.Job(place, 0, "W4", "qat", rate), scores))
    assert suite.chosen() == {("W4", "qat"): 1e-3}
    assert suite.scores("test") == {("W4", "qat"): {0: {"kl": 0.3}}}


def test_ratios_are_paired_and_bounded() -> None:
    """Mutations: ratio of the means; the least of a library over all seeds; no t."""
    found = {
        ("W4", "qat"): {0: {"kl": 1.0}, 1: {"kl": 3.0}, 2: {"kl": 1.0}},
        ("W4", "GPTQ"): {0: {"kl": 2.0}, 1: {"kl": 4.0}, 2: {"kl": 2.0}},
        ("W4", "torchao QAT"): {0: {"kl": 4.0}, 1: {"kl": 3.0}, 2: {"kl": 5.0}},
        ("W4", "Brevitas QAT + KL"): {0: {"kl": 1.0}, 1: {"kl": 6.0}, 2: {"kl": 4.0}},
    }
    rows = summary.rows_of("B1", B1, found, {}, {})
    values = {(e["metric"], e.get("seed")): e for e in rows if e["tool"] == "qat"}
    assert [values["kl / GPTQ", seed]["value"] for seed in (0, 1, 2)] == [0.5, 0.75, 0.5]
    mean = values["kl / GPTQ", None]
    assert mean["value"] == pytest.approx(7 / 12) and mean["goal"] == 0.7 and met(mean)
    bound = values["kl / GPTQ, 95 % bound", None]
    assert bound["value"] == pytest.approx(7 / 12 + 2.920 * math.sqrt(1 / 48) / math.sqrt(3)) and met(bound) is False
    assert [values["kl / best other QAT", seed]["value"] for seed in (0, 1, 2)] == [1.0, 1.0, 0.25]
    assert [values["kl / best other QAT as it comes", seed]["value"] for seed in (0, 1, 2)] == [0.25, 1.0, 0.2]


def test_a_word_that_recipes_lack_is_a_reason(lab: BytesLM) -> None:
    with pytest.raises(Missing, match="no recipe can say it yet"):
        methods.measured("x", LSQ.varied(at={"W2": {"grid": "no such grid"}}), "W2", WIDTHS["W2"], lab, 1e-3)


def test_synthetic_source() -> None:
    """The same bytes everywhere; half of the time the likeliest of eight successors follows."""
    source = markov(1 << 16)
    assert hashlib.sha256(source).hexdigest() == "9c378185d664b422d0d8b238868947c0c8d226ba7333cbe2190e2d666761acc8"
    followers: dict[bytes, list[int]] = {}
    for place in range(2, len(source)):
        followers.setdefault(source[place - 2 : place], []).append(source[place])
    common = [max(map(found.count, set(found))) / len(found) for found in followers.values() if len(found) > 50]
    assert 0.45 < sum(common) / len(common) < 0.65
    assert max(len(set(found)) for found in followers.values()) <= 8


def test_trials(capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of variants by width."""
    assert run.main(["--dry-run", "--corpus", "synthetic", "--only", "B1 W2", "--try", "start: search"]) == 0
    assert re.search(r"B1 W2 +start: search +kl +0\.", capsys.readouterr().out)


def test_cases_are_added_to_a_file(tmp_path: Path) -> None:
    """Those that were measured replace their own; the others keep their commit. Mutation: all old rows kept."""
    file = tmp_path / "q.json"
    old = [{"case": "B1 W2", "value": 1}, {"case": "B1 W4", "value": 2}]
    file.write_text(json.dumps({"environment": {"revision": "old", "chip": "a"}, "rows": old}))
    new = [{"case": "B1 W2", "value": 3}, {"case": "B1 grid W4A4", "value": 4}]
    where, rows = run.added(file, {"revision": "new"}, new)
    assert where == {"revision": "new", "chip": "a", "B1 revision": "old"}
    assert [(row["case"], row["value"]) for row in rows] == [("B1 W4", 2), ("B1 W2", 3), ("B1 grid W4A4", 4)]


def test_one_method_is_measured_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutations: the others' figures left out of ratios; their learning rates lost; ours kept from the file."""
    file, words = tmp_path / "q.json", ["--dry-run", "--only", "B1 W2", "--corpus", "synthetic", "--seeds", "0,1"]
    assert run.main([*words, "--out", str(file)]) == 0
    first = json.loads(file.read_text())
    changed = [{**row, "value": 9.0} if row["tool"] == methods.OURS else row for row in first["rows"]]
    file.write_text(json.dumps({**first, "rows": changed}))
    assert run.main([*words, "--out", str(file), "--tools", methods.OURS]) == 0
    again = json.loads(file.read_text())
    assert again["rows"] == first["rows"] and any("kl / GPTQ" in row["metric"] for row in again["rows"])
    assert again["environment"]["B1 revision"] == first["environment"]["B1 revision"]
    assert f"B1 revision of {methods.OURS}" in again["environment"]
    assert run.main([*words, "--tools", methods.OURS]) == 2
    assert "wants the figures of the other methods" in capsys.readouterr().err


def test_no_case() -> None:
    assert run.main(["--dry-run", "--only", "nothing like it"]) == 2
