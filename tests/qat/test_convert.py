"""What leaves training: the bundle, and checkpoints that speak for themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.layers import QATLayer
from qat.state import CHILD, Record, decode_record, encode_record, require_state


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.norm = nn.BatchNorm1d(8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.mid(self.norm(self.embed(ids).mean(1)))))
        return y


IDS = torch.arange(10).reshape(2, 5)
INPUT = {"bits": 8, "granularity": "tensor", "quantizer": "ema"}
RULES = {
    "weights": {"weight": {"bits": 4, "granularity": "channel", "quantizer": "lsq"}},
    "inputs": {"match": ["*mid"], "input": INPUT},
}
PHASES = {"float": {"steps": 2, "quantize": False}, "ramp": {"steps": 3, "ramp": 2}, "full": {}}


def trained(recipe: Any, root: nn.Module, model: nn.Module) -> None:
    qat.prepare(root, recipe)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(IDS).square().mean().backward()
    optimizer.step()
    qat.after_optimizer_step(root)


def test_a_bundle_holds_everything_once(recipe: Any) -> None:
    model = Tied()
    trained(recipe(rules=RULES), model, model)
    before = copy.deepcopy(model.state_dict())
    bundle = qat.convert(model)
    assert list(bundle) == ["embed.weight", "mid.weight"] and len(bundle) == 2
    assert bundle.tied == {"head.weight": "embed.weight"} and bundle.config is None and bundle.step == 1
    own = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "mid.bias"]
    assert list(bundle.floats) == own
    assert {**bundle.shapes()} == {"embed.weight": (12, 8), "mid.weight": (8, 8)}
    assert {name: spec.bits for name, spec in bundle.specs().items()} == {"embed.weight": 4, "mid.weight": 4}
    assert list(bundle.inputs) == ["mid"] and bundle.inputs["mid"][0].quantizer == "ema"
    for name in bundle:
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(bundle[name].dequantize(), layer.weight_quantizer(layer.weight))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(KeyError):
        bundle["head.weight"]


def test_a_bundle_speaks_of_the_model_inside_a_wrapper(recipe: Any) -> None:
    """Names are those of the outermost module with a Hugging Face config, dtypes those of its last forward."""
    model = Tied()
    model.config = SimpleNamespace(model_type="small")
    root = nn.ModuleDict({"model": model})
    with torch.autocast("cpu", torch.bfloat16):
        trained(recipe(rules=RULES), root, model)
    bundle = qat.convert(root)
    assert list(bundle) == ["embed.weight", "mid.weight"] and bundle.prefix == "model." and bundle.module is model
    assert bundle.dtypes("mid.weight") == (torch.float32, torch.bfloat16)
    assert bundle.dtypes("embed.weight") == (torch.float32, torch.float32)
    assert bundle["mid.weight"].out_dtype == torch.bfloat16


def test_an_export_waits_for_full_quantization(recipe: Any) -> None:
    model = Tied()
    qat.prepare(model, recipe(rules=RULES, phases=PHASES))
    with pytest.raises(qat.ExportError, match="it is from step 4 on"):
        qat.convert(model)
    early = qat.convert(model, require_final=False)
    assert early["mid.weight"].spec.bits == 4
    assert isinstance(model.mid, QATLayer)


# ---- the record ------------------------------------------------------------------------------------------------------


def test_a_record_survives_with_the_order_of_its_rules() -> None:
    record = Record({"rules": {"z": {}, "a": {}, "m": {}}}, 7, True, True, {"l": ["float32", "bfloat16"]}, "teacher")
    back = decode_record(encode_record(record))
    assert back == record and list(back.recipe["rules"]) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: torch.zeros(3, dtype=torch.uint8), "damaged"),
        (lambda r: r[:-4], "damaged"),
        (lambda r: torch.tensor(list(b'{"version": 1, "step": "x"}'), dtype=torch.uint8), "damaged"),
        (lambda r: torch.tensor(list(b'{"version": 1, "step": -1}'), dtype=torch.uint8), "damaged"),
        (lambda r: torch.tensor(list(b'{"version": 1, "dtypes": {"l": ["nope", 3]}}'), dtype=torch.uint8), "damaged"),
        (lambda r: torch.tensor(list(b'{"version": 1, "unknown": 3}'), dtype=torch.uint8), "damaged"),
        (lambda r: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8), "damaged"),
        (lambda r: torch.tensor(list(b'{"version": 9, "new": 3}'), dtype=torch.uint8), "version 9"),
    ],
)
def test_a_damaged_record_is_refused(damage: Any, words: str) -> None:
    with pytest.raises(qat.QATError, match=words):
        decode_record(damage(encode_record(Record())))


def test_load_from_checkpoint(recipe: Any, tmp_path: Path) -> None:
    """Plain, below `model.` as Lightning writes it, and in the dtype that was trained."""
    model = Tied()
    wrapped = nn.ModuleDict({"model": model})
    qat.prepare(wrapped, recipe())
    model(IDS).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    qat.after_optimizer_step(wrapped)
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": wrapped.state_dict(), "epoch": 1}, path)
    loaded = qat.load_from_checkpoint(path, Tied())
    bundle, expected = qat.convert(loaded), qat.convert(wrapped)
    assert [name.removeprefix("model.") for name in bundle] == ["embed.weight", "mid.weight"]
    for name in expected:
        assert torch.equal(bundle[name].dequantize(), expected[name].dequantize())
    assert require_state(loaded).record.step == 1


def test_checkpoints_that_cannot_be_used(recipe: Any, tmp_path: Path) -> None:
    model = Tied()
    plain = copy.deepcopy(model.state_dict())
    qat.prepare(model, recipe())
    good = model.state_dict()
    record = f"{CHILD}._extra_state"

    def refused(words: str, content: Any, target: nn.Module) -> None:
        path = tmp_path / "x.ckpt"
        torch.save(content, path)
        with pytest.raises(qat.QATError, match=words):
            qat.load_from_checkpoint(path, target)

    with pytest.raises(qat.QATError, match="no checkpoint file"):
        qat.load_from_checkpoint(tmp_path / "none.ckpt", Tied())
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(qat.QATError, match="not a checkpoint"):
        qat.load_from_checkpoint(tmp_path / "text.ckpt", Tied())
    refused("without running code", {"state_dict": Tied()}, Tied())
    refused("no state dict", {"state_dict": 5}, Tied())
    refused("no state dict", [1, 2], Tied())
    refused("no quantization record", plain, Tied())
    refused("damaged", {**good, record: torch.zeros(4, dtype=torch.uint8)}, Tied())
    refused("lacks 1 entries", {k: v for k, v in good.items() if k != "mid.weight_quantizer.theta"}, Tied())
    refused("lacks 1 entries", {k: v for k, v in good.items() if k != "mid.bias"}, Tied())
    refused("does not fit", {**good, "mid.weight": torch.zeros(3, 3)}, Tied())
    refused("is this the model", good, nn.ModuleDict({"other": nn.Linear(2, 2)}))
