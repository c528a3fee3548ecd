"""QuantizationMonitor: its numbers by hand, and to which loggers they go."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lit_small import Lit, data, recipe, trainer
from pytorch_lightning.loggers import CSVLogger, WandbLogger

import qat
from qat.callbacks import QATCallback, QuantizationMonitor
from qat.health import look, summary

ALL = ("sqnr_db", "clipped_pct", "changed_pct", "changed_since_start_pct", "scale_drift_pct")


def test_numbers_by_hand() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    the_recipe = recipe({"bits": 4, "granularity": "channel", "group_size": None, "quantizer": "mse"})
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 7.0], [4.0, 2.0, 1.0, 0.0]]))
    qat.prepare(model, the_recipe)
    start = look(model)
    seen = start["0.weight"]
    with torch.no_grad():
        model[0].weight[0, 0] = 5.0
        model[0].weight[1, 0] = 400.0  # outside the frozen grid: clipped
    now = look(model)["0.weight"]
    fake = qat.convert(model)["0.weight"].dequantize()
    w = model[0].weight.detach()
    by_hand = 10 * torch.log10(w.square().sum() / (w - fake).square().sum())
    assert now.sqnr_db == pytest.approx(by_hand.item(), rel=1e-4)
    # mutation: count every code at the end of the grid as clipped -> red
    assert (seen.clipped_pct, now.clipped_pct) == (0.0, 12.5)
    assert 0.0 < now.changed_pct(seen) <= 25.0
    found = summary({"0.weight": now}, start, start)
    assert found["sqnr_db"] == found["sqnr_db_worst"] == found["sqnr_db/0.weight"] == now.sqnr_db
    assert found["scale_drift_pct"] == 0.0


@pytest.mark.parametrize(("kind", "bits"), [("seq", 2), ("nf4", 4), ("e4m3", 8), ("fp4", 4)])
def test_clipped_numbers_of_uneven_grids(kind: str, bits: int) -> None:
    """Between far levels a number is not clipped. Mutation: half a scale taken for half a step -> red."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    slot = {"grid": kind, "bits": bits, "granularity": "channel", "group_size": None, "quantizer": "mse"}
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, 0.0]]))
    qat.prepare(model, recipe(slot))
    before = look(model)["0.weight"]
    with torch.no_grad():
        # one number far beyond the largest level
        ends = model[0].weight_quantizer(model[0].weight).amax(1, keepdim=True)
        model[0].weight.copy_(torch.tensor([[0.0, 0.03, 0.1, 400.0], [0.5, 0.2, -0.4, 0.9]]) * ends)
    now = look(model)["0.weight"]
    assert now.clipped_pct == 12.5 and now.changed_pct(before) > 0.0


@pytest.mark.parametrize("kind", ["int", "fp4", "e4m3"])
def test_codes_that_turn_back(kind: str) -> None:
    """Mutations: codes of floats compared as they lie, the direction forgotten where nothing moved: red."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
    bits = {"int": 4, "fp4": 4, "e4m3": 8}[kind]
    qat.prepare(
        model, recipe({"grid": kind, "bits": bits, "granularity": "channel", "group_size": None, "quantizer": "mse"})
    )
    top = float(model[0].weight_quantizer.qparams(None).scale)

    def at(*values: float) -> Any:
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([values]) * top)
        return look(model)["0.weight"]

    start = at(1.0, 1.0, -2.0, 1.0)
    one = at(2.0, 2.0, 1.0, 1.0).after(start)
    two = at(2.0, 1.0, 2.0, 1.0).after(one)
    three = at(1.0, 1.0, 4.0, 1.0).after(two)
    # the second turns at once, the first after a look without a move, the third goes on, the last stays
    assert [seen.turned_pct for seen in (one, two, three)] == [0.0, 25.0, 25.0]
    assert summary({"w": three}, {"w": start}, {"w": two})["turned_pct"] == 25.0


def test_what_is_counted_for_freezing_is_shown() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 2, bias=False))
    qat.prepare(model, recipe(phases={"qat": {"freeze_oscillating": 0.1}}))
    counts = model[0].weight_quantizer.oscillation
    counts.frozen[0, :4] = True
    counts.frequency[:, 2:6] = 2**29
    seen = look(model)
    found = summary(seen, seen, seen)
    # those that are frozen oscillate no more
    assert found["frozen_pct"] == found["frozen_pct/0.weight"] == 25.0
    assert found["oscillating_pct"] == 100.0 * 6 / 16
    assert "frozen_pct" not in summary({}, {}, {})


def test_drift_and_changes_of_a_run(tmp_path: Path) -> None:
    module = Lit()
    logger = CSVLogger(tmp_path)
    t = trainer(tmp_path, QATCallback(recipe()), QuantizationMonitor(2), max_steps=5, logger=logger)
    t.fit(module, data())
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    ours = [{key: float(value) for key, value in row.items() if value} for row in rows if row["qat/sqnr_db"]]
    assert [row["step"] for row in ours] == [0, 2, 4, 5]
    assert ours[0]["qat/changed_since_start_pct"] == 0.0 < ours[-1]["qat/changed_since_start_pct"]
    assert ours[0]["qat/scale_drift_pct"] == 0.0 < ours[-1]["qat/scale_drift_pct"]
    for name in ALL:
        assert {f"qat/{name}", f"qat/{name}/net.a.weight", f"qat/{name}/net.b.weight"} <= ours[-1].keys()
    final = look(module)["net.a.weight"]
    assert ours[-1]["qat/sqnr_db/net.a.weight"] == final.sqnr_db


def test_looking_changes_nothing(tmp_path: Path) -> None:
    plain, watched = Lit(), Lit()
    trainer(tmp_path, QATCallback(recipe()), max_steps=4).fit(plain, data())
    callbacks = [QATCallback(recipe()), QuantizationMonitor(1)]
    trainer(tmp_path, *callbacks, max_steps=4, logger=CSVLogger(tmp_path)).fit(watched, data())
    assert watched.losses == plain.losses


def test_without_a_logger_it_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, QATCallback(recipe()), QuantizationMonitor(1), max_steps=3).fit(Lit(), data())
    assert sum("nothing to log to" in record.message for record in caplog.records) == 1


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(qat.QATError, match="every_n_steps=0"):
        QuantizationMonitor(0)
    t = trainer(tmp_path, QuantizationMonitor(), max_steps=1, logger=CSVLogger(tmp_path))
    with pytest.raises(qat.QATError, match="has to stand after a QATCallback"):
        t.fit(Lit(), data())


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger: Any = WandbLogger(save_dir=tmp_path, offline=True, project="x")
    trainer(tmp_path, QATCallback(recipe()), QuantizationMonitor(1), max_steps=2, logger=logger).fit(Lit(), data())
    summary_of_run = dict(logger.experiment.summary)
    wandb.finish()
    assert {f"qat/{name}/net.a.weight" for name in ALL} <= summary_of_run.keys()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
