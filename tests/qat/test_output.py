"""The output slot of a rule: what a layer gives is quantized as it is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import qat
from qat.export import get_format
from qat.layout import Layout
from qat.quantizers import make_quantizer, quantizers
from qat.specs import QuantSpec

TOKEN = {"bits": 4, "granularity": "token", "quantizer": "absmax"}
X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def rules(output: dict[str, Any], weight: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"first": {"match": ["0"], "output": {**TOKEN, **output}, "weight": weight}}


DYNAMIC = [name for name, cls in quantizers().items() if cls.for_activations and not cls.static_activations]


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("name", DYNAMIC)
def test_each_token_is_on_the_grid(recipe: Any, name: str, size: int | None) -> None:
    """It is quantizer(y), the dequantized integers of y, in training and evaluation; the gradient is that of y."""
    zero = quantizers()[name].zero_points[0]
    granularity = "token" if size is None else "group"
    slot = {"quantizer": name, "zero_point": zero, "granularity": granularity, "group_size": size}
    model = net()
    qat.prepare(model, recipe(rules=rules(slot, {"bits": 8, "quantizer": "absmax"})))
    spec = QuantSpec(4, zero == "none", False, granularity, size, zero, "portable", name)
    quantizer = make_quantizer(spec, Layout((1, 1), "tokens"))
    layer: Any = model[0]
    for train in (True, False):
        model.train(train)
        y = nn.functional.linear(X, layer.weight_quantizer(layer.weight), layer.bias).detach()
        out = layer(X)
        assert torch.equal(out, quantizer(y)) and torch.equal(out, quantizer.integers(y).dequantize())
        for i, j in ((0, 0), (1, 2)):
            assert len(out[i, j, : size or 8].unique()) <= 16 and torch.equal(layer(X[i, j : j + 1]), out[i, j : j + 1])
    g = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    layer(X).backward(g)
    torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)))
    assert set(model.state_dict()) - {"qat_state._extra_state"} == set(net().state_dict())


def test_output_alone_phases_and_unprepare(recipe: Any) -> None:
    model, plain = net(), net()
    phases = {"wait": {"steps": 1, "quantize": False}, "qat": {"steps": -1, "ramp": 3}}
    plan = qat.prepare(model, recipe(rules=rules({}), phases=phases))
    assert "output int4" in plan.render() and plan.coverage == 0
    y = plain[0](X).detach()
    assert torch.equal(model[0](X), y)
    qat.apply_schedule(model, 1)
    spec = QuantSpec(4, True, False, "token", None, "none", "portable", "absmax")
    fake = make_quantizer(spec, Layout((1, 1), "tokens"))(y)
    assert torch.equal(model[0](X), torch.lerp(y, fake, torch.tensor(0.25)))
    qat.apply_schedule(model, 9)
    assert torch.equal(model[0](X), fake)
    qat.unprepare(model)
    assert torch.equal(model[0](X), y) and not hasattr(model[0], "output_quantizer")


def test_it_is_trained_through_and_compiles(recipe: Any) -> None:
    torch._dynamo.reset()
    model = net()
    qat.prepare(model, recipe(rules=rules({"bits": 3}, {"bits": 4, "quantizer": "lsq"})))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target, losses = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3)), []
    for _ in range(30):
        loss = (model(X) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(X), model(X), rtol=0, atol=1e-6)
    torch._dynamo.reset()


def test_values_of_a_llama_as_its_cache_keeps_them(recipe: Any) -> None:
    """v_proj per head: what lies in the cache is on the grid, and decoding with the cache gives what one pass gives."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    slot = {**TOKEN, "granularity": "group", "group_size": 8}
    qat.prepare(model, recipe(rules={"cache": {"match": ["*k_proj", "*v_proj"], "output": slot}}))
    ids, seen = torch.randint(0, 64, (1, 6)), []
    v_proj: Any = model.model.layers[0].self_attn.v_proj
    v_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    values = whole.past_key_values.layers[0].values
    assert values.shape == (1, 2, 6, 8)
    spec = QuantSpec(4, True, False, "token", None, "none", "portable", "absmax")
    plain = nn.functional.linear(seen[0], v_proj.weight).view(1, 6, 2, 8).transpose(1, 2)
    assert torch.equal(make_quantizer(spec, Layout((1, 1), "tokens"))(plain), values)
    torch.testing.assert_close(rest.logits, whole.logits[:, 4:], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused(recipe: Any) -> None:
    with pytest.raises(qat.QATError, match=r"output is for Linear and Conv1D, not Conv2d"):
        qat.prepare(nn.Sequential(nn.Conv2d(1, 1, 1)), recipe(rules=rules({})))
    with pytest.raises(qat.QATError, match=r"output: .*group_size=3"):
        qat.prepare(net(), recipe(rules=rules({"granularity": "group", "group_size": 3})))
    plan = qat.plan(net(), recipe(rules=rules({}, {"bits": 4, "granularity": "group", "group_size": 16})))
    for name in ("gguf", "compressed-tensors"):
        assert any(f"{name} holds no grid of an output" in why for why in get_format(name).check(plan))


def test_records_without_the_word_stay_the_same(recipe: Any) -> None:
    data = qat.recipes.to_dict(recipe())
    assert "output" not in data["rules"]["all"] and "train" not in data["phases"]["qat"]
    with_both = recipe(rules=rules({}, {"bits": 4, "quantizer": "lsq"}), phases={"qat": {"train": "scales"}})
    data = qat.recipes.to_dict(with_both)
    assert qat.recipes.from_dict(data) == with_both and data["phases"]["qat"]["train"] == "scales"
