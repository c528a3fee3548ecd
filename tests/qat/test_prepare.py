"""`prepare` and back: what a user's model keeps, what the schedule does to it, what a checkpoint says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.layers import weight_quantizers
from qat.quantizers import Quantizer
from qat.state import require_state
from qat.steps import qat_layers

INPUT = {"bits": 8, "granularity": "tensor", "quantizer": "ema"}


class Tied(nn.Module):
    _tied_weights_keys: ClassVar = {"head.weight": "embed.weight"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.mid(self.norm(self.embed(ids)))))
        return y


IDS = torch.arange(10).reshape(2, 5)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What has to be the same before and after."""
    hooks = [key for key in vars(nn.Linear(1, 1)) if key.endswith("_hooks")]
    return {
        "classes": [(name, type(m)) for name, m in model.named_modules(remove_duplicate=False)],
        "keys": list(model.state_dict()),
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        "training": [m.training for m in model.modules()],
        "hooks": [list(getattr(m, key).values()) for m in model.modules() for key in hooks if getattr(m, key)],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "tied": getattr(model, "_tied_weights_keys", None),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key == "values":
            assert value.keys() == after[key].keys()
            assert all(torch.equal(value[k], after[key][k]) for k in value)
        else:
            assert value == after[key], key


def marked_model() -> tuple[Tied, list[str]]:
    """A model with hooks of every kind, attributes, mixed flags; and what its hooks have seen."""
    torch.manual_seed(0)
    model, seen = Tied(), []
    model.mid.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    model.mid.register_forward_hook(lambda m, a, y: seen.append("forward"))
    model.mid.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    model.mid.weight.register_hook(lambda g: seen.append("weight"))
    model.mid.mine = {"an": "attribute"}
    model.norm.eval()
    model.norm.weight.requires_grad_(False)
    return model, seen


def test_unprepare_restores_everything(recipe: Any) -> None:
    model, seen = marked_model()
    before, y = snapshot(model), model(IDS)
    qat.prepare(model, recipe())
    model(IDS).sum().backward()
    assert sorted(set(seen)) == ["backward", "forward", "pre", "weight"]
    assert model.mid.mine == {"an": "attribute"} and isinstance(model.mid, nn.Linear)
    now = snapshot(model)
    assert now["tied"] == before["tied"] and now["hooks"] == before["hooks"]
    assert [k for k in now["keys"] if k in before["values"]] == before["keys"], "keys are added, never renamed or moved"
    names = [name for name, _ in before["classes"]]
    assert [name for name, _ in now["classes"] if name in names] == names
    assert [p for p in now["parameters"] if "quantizer" not in p[0]] == before["parameters"]
    qat.unprepare(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(IDS), y) and not qat.is_prepared(model)
    qat.unprepare(model)


def test_prepare_twice_changes_nothing_even_after_training(recipe: Any) -> None:
    model = Tied()
    plan = qat.prepare(model, recipe())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model(IDS).square().mean().backward()
        optimizer.step()
        qat.after_optimizer_step(model)
    before = copy.deepcopy(model.state_dict())
    again = qat.prepare(model, recipe())
    assert [row.name for row in again.rows] == [row.name for row in plan.rows]
    assert model.mid.weight_quantizer.theta.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(qat.QATError, match="another recipe"):
        qat.prepare(model, recipe(bits=8))


def test_tied_weights_share_one_quantizer_and_one_gradient(recipe: Any) -> None:
    model = Tied()
    qat.prepare(model, recipe())
    assert model.head.weight_quantizer is model.embed.weight_quantizer
    assert [k for k in model.state_dict() if k.startswith("head.weight_quantizer")] == []
    assert sum(isinstance(m, Quantizer) for m in model.modules()) == 2
    model(IDS).square().sum().backward()
    both = model.embed.weight.grad.clone(), model.embed.weight_quantizer.theta.grad.clone()
    parts = []
    for frozen in ("embed", "head"):
        model.zero_grad()
        other = copy.deepcopy(model)
        layer = getattr(other, frozen)
        w = layer.weight_quantizer(layer.weight).detach()
        layer.forward = (
            (lambda i, w=w: nn.functional.embedding(i, w)) if frozen == "embed" else (lambda x, w=w: x @ w.t())
        )
        other(IDS).square().sum().backward()
        parts.append((other.embed.weight.grad, other.embed.weight_quantizer.theta.grad))
    for joint, a, b in zip(both, *parts, strict=True):
        torch.testing.assert_close(joint, a + b)
    bundle = qat.convert(model)
    assert list(bundle) == ["embed.weight", "mid.weight"] and bundle.tied == {"head.weight": "embed.weight"}
    for copied in (copy.deepcopy(model), qat_round_trip(model)):
        assert copied.head.weight_quantizer is copied.embed.weight_quantizer
        assert copied.head.weight is copied.embed.weight


def qat_round_trip(model: nn.Module) -> Any:
    import pickle

    return pickle.loads(pickle.dumps(model))


def test_state_dicts(recipe: Any, tmp_path: Path) -> None:
    """A round trip is exact; a float state dict loads strictly; a prepared one loads with weights_only."""
    model, plain = Tied(), Tied()
    plain_keys = list(plain.state_dict())
    qat.prepare(model, recipe(rules=mixed()))
    model.train()
    model(IDS).square().mean().backward()
    torch.optim.Adam(model.parameters(), 0.01).step()
    qat.after_optimizer_step(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    other = Tied()
    qat.prepare(other, recipe(rules=mixed()))
    other.load_state_dict(loaded)
    assert torch.equal(other.eval()(IDS), model.eval()(IDS))
    assert require_state(other).record == require_state(model).record
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.mid.weight, plain.mid.weight)
    plain.load_state_dict({k: v for k, v in loaded.items() if k in plain_keys})
    broken = {k: v for k, v in plain.state_dict().items() if k != "mid.weight"}
    with pytest.raises(RuntimeError, match=r"mid\.weight"):
        other.load_state_dict(broken)


def mixed() -> dict[str, Any]:
    return {
        "weights": {"weight": {"bits": 4, "granularity": "channel", "quantizer": "lsq"}},
        "inputs": {"match": ["mid"], "input": INPUT},
    }


def test_loading_brings_the_layers_to_the_step_of_the_checkpoint(recipe: Any) -> None:
    """Without a verb of ours in between: a loaded model computes what the saved one did."""
    phases = {"float": {"steps": 1, "quantize": False}, "qat": {"steps": 1}, "frozen": {"freeze_scales": True}}
    model, other = Tied(), Tied()
    for each in (model, other):
        qat.prepare(each, recipe(phases=phases))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        model(IDS).square().mean().backward()
        optimizer.step()
        qat.after_optimizer_step(model)
    for loaded in (other, copy.deepcopy(other), qat_round_trip(other)):
        loaded.load_state_dict(model.state_dict())
        assert loaded.mid._qat.active and loaded.mid.weight_quantizer.frozen
        assert torch.equal(loaded(IDS), model(IDS))


def test_a_checkpoint_of_other_rules_is_refused(recipe: Any) -> None:
    model, other = Tied(), Tied()
    qat.prepare(model, recipe(bits=4))
    qat.prepare(other, recipe(bits=8))
    with pytest.raises(qat.QATError, match="other rules or phases"):
        other.load_state_dict(model.state_dict())


def test_a_sequential_root_still_runs(recipe: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    x = torch.randn(2, 8)
    y = model(x)
    qat.prepare(model, recipe(phases={"float": {"steps": 1, "quantize": False}, "qat": {}}))
    assert torch.equal(model(x), y)


# ---- time ------------------------------------------------------------------------------------------------------------

PHASES = {
    "float": {"steps": 2, "quantize": False},
    "high": {"steps": 2, "bits": {"weights": 8}},
    "ramp": {"steps": 3, "ramp": 3},
    "frozen": {"steps": -1, "freeze_scales": True},
}


def test_the_schedule_drives_every_layer(recipe: Any) -> None:
    torch.manual_seed(0)
    model = Tied()
    qat.prepare(model, recipe(rules=mixed(), phases=PHASES))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    seen = []
    for _ in range(9):
        layer = model.mid
        quantizer = layer.weight_quantizer
        blend = layer._qat.blend
        strength = 1.0 if blend is None else round(float(blend), 2)
        seen.append((layer._qat.active, strength, quantizer.live_spec.bits, quantizer.frozen))
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
        qat.after_optimizer_step(model)
    assert seen == [
        *[(False, 1.0, 4, False)] * 2,
        *[(True, 1.0, 8, False)] * 2,
        *[(True, strength, 4, False) for strength in (0.25, 0.5, 0.75)],
        *[(True, 1.0, 4, True)] * 2,
    ]


def test_bits_of_a_phase_follow_the_rule_that_gave_the_weight(recipe: Any) -> None:
    """A later rule that only adds an input does not take the layer out of the phase."""
    model = Tied()
    plan = qat.prepare(model, recipe(rules=mixed(), phases={"a": {"steps": 1, "bits": {"weights": 8}}, "b": {}}))
    row = next(row for row in plan.rows if row.name == "mid")
    assert (row.rule, row.weight_rule) == ("inputs", "weights")
    assert {q.live_spec.bits for layer in qat_layers(model).values() for q in weight_quantizers(layer).values()} == {8}


def test_strength_lies_between_float_and_quantized(recipe: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(3, 8)
    plain = model(x)
    qat.prepare(model, recipe(bits=2, phases={"ramp": {"steps": 4, "ramp": 3}, "full": {}}))
    outputs = []
    for step in range(5):
        qat.apply_schedule(model, step)
        outputs.append(model(x))
    layer = model[0]
    w_hat = layer.weight_quantizer(layer.weight)
    for step, y in enumerate(outputs):
        w = torch.lerp(layer.weight, w_hat, (step + 1) / 4) if step < 3 else w_hat
        assert torch.equal(y, nn.functional.linear(x, w, layer.bias))
    distances = [float((y - plain).detach().abs().sum()) for y in outputs]
    assert distances == sorted(distances) and distances[0] > 0


def test_frozen_scales_do_not_move(recipe: Any) -> None:
    """Folding changes no scale, and an optimizer's momentum moves none afterwards; thawing goes on from there."""
    torch.manual_seed(0)
    model = Tied()
    phases = {"a": {"steps": 3}, "frozen": {"steps": 3, "freeze_scales": True}, "again": {"steps": -1}}
    qat.prepare(model, recipe(phases=phases))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    scales = []
    for _ in range(8):
        scales.append(model.mid.weight_quantizer.integers(model.mid.weight).scale.float())
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        if scales and 3 <= len(scales) - 1 < 6:
            assert not model.mid.weight_quantizer.theta.grad.any()
        optimizer.step()
        if len(scales) == 3:
            last = model.mid.weight_quantizer.integers(model.mid.weight).scale.float()
        qat.after_optimizer_step(model)
    assert not torch.equal(scales[0], scales[2])
    assert torch.equal(scales[3], last), "freezing moved a scale"
    assert torch.equal(scales[3], scales[4]) and torch.equal(scales[4], scales[5])
    assert torch.equal(scales[6], scales[5]) and not torch.equal(scales[7], scales[6])


def test_a_delayed_start_searches_the_weights_of_its_moment(recipe: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    qat.prepare(model, recipe(quantizer="mse", phases={"float": {"steps": 1, "quantize": False}, "qat": {}}))
    before = model[0].weight_quantizer.start_scale.clone()
    with torch.no_grad():
        model[0].weight.mul_(3)
    qat.after_optimizer_step(model)
    assert torch.allclose(model[0].weight_quantizer.start_scale.sum(0), before.sum(0) * 3, rtol=0.02)


def test_inputs_learn_their_range_once_per_step(recipe: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    rule = {"all": {"weight": {"bits": 8}, "input": {**INPUT, "signed": False, "zero_point": "int"}}}
    qat.prepare(model, recipe(rules=rule))
    quantizer = model[0].input_quantizer
    for low, high in ((-1.0, 2.0), (-3.0, 1.0)):
        model(torch.tensor([[low, 0.0, 0.5, high]]))
    assert float(quantizer.seen) == 0
    with pytest.raises(qat.ExportError, match="never seen"):
        qat.convert(model)
    qat.after_optimizer_step(model)
    assert quantizer.range.sum(0).tolist() == [3.0, 2.0]
    model.eval()
    model(torch.full((1, 4), 100.0))
    qat.after_optimizer_step(model)
    assert quantizer.range.sum(0).tolist() == [3.0, 2.0], "an evaluation moved a range"
    spec, fields = qat.convert(model).inputs["0"]
    assert spec.zero_point == "int" and fields is not None and int(fields.zero) == round(3 / 5 * 255)


@pytest.mark.parametrize("zero_point", ["none", "int", "float"])
def test_learned_input_scales_cover_both_signs(zero_point: str, recipe: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    slot = {"bits": 8, "granularity": "tensor", "quantizer": "lsq", "zero_point": zero_point}
    qat.prepare(model, recipe(rules={"all": {"weight": {"bits": 8}, "input": slot}}))
    x = torch.randn(64, 16)
    quantizer = model[0].input_quantizer
    for _ in range(2):
        assert float((quantizer(x) - x).detach().abs().max()) < 0.6
        assert float((quantizer(x) - x).detach().abs().mean()) < 0.03
        model(x).sum().backward()
        qat.after_optimizer_step(model)
    assert float(quantizer.seen) == 1
    other = nn.Sequential(nn.Linear(16, 4))
    qat.prepare(other, recipe(rules={"all": {"weight": {"bits": 8}, "input": slot}}))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x)) and other[0].input_quantizer._settled, "a loaded range is searched no more"


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_not_prepared_is_said_in_words() -> None:
    for verb in (qat.convert, qat.apply_schedule, qat.after_optimizer_step, qat.initialize):
        with pytest.raises(qat.QATError, match=r"qat\.prepare"):
            verb(nn.Linear(2, 2))


def test_weights_that_are_not_finite(recipe: Any) -> None:
    model = Tied()
    with torch.no_grad():
        model.mid.weight[0, 0] = torch.nan
    with pytest.raises(qat.QATError, match=r"mid\.weight has numbers that are not finite"):
        qat.prepare(model, recipe())
    assert type(model.mid) is nn.Linear and not qat.is_prepared(model), "a refusal left traces"
    model = Tied()
    qat.prepare(model, recipe())
    with torch.no_grad():
        model.mid.weight[0, 0] = torch.inf
    with pytest.raises(qat.ExportError, match=r"mid\.weight: 1 of 64 numbers are not finite"):
        qat.convert(model)["mid.weight"]


def test_meta_models(recipe: Any) -> None:
    """Planned and prepared without memory; searched once there are weights."""
    with torch.device("meta"):
        model = Tied()
    qat.prepare(model, recipe())
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    qat.initialize(model)
    assert torch.isfinite(model(IDS)).all()
    assert torch.equal(qat.convert(model)["mid.weight"].dequantize(), model.mid.weight_quantizer(model.mid.weight))


def test_a_shared_scale_is_frozen_once(recipe: Any) -> None:
    """Tied layers have one quantizer. Mutation: no `seen` in `_freeze`."""
    model = Tied()
    phases = {"a": {"steps": 1}, "frozen": {"steps": -1, "freeze_scales": True}}
    qat.prepare(model, recipe(phases=phases))
    quantizers = {id(q): q for layer in qat_layers(model).values() for q in weight_quantizers(layer).values()}
    assert len(quantizers) < sum(len(weight_quantizers(layer)) for layer in qat_layers(model).values())
    tied: Any = next(iter(quantizers.values()))
    with torch.no_grad():
        tied.theta.fill_(0.02)
    before = tied.qparams(torch.zeros(1)).scale.detach()
    qat.after_optimizer_step(model)
    assert tied.frozen and torch.equal(tied.qparams(torch.zeros(1)).scale, before)
