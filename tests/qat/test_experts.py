"""Experts kept as 3-D parameters: the module's own forward on fake-quantized weights, its gradients, its refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.fake_quant_kernels.affine import fake_quantize
from qat.quantizers import Quantizer


def straight_through(quantizer: Quantizer, w: Tensor) -> Tensor:
    """w_hat in plain autograd, its gradients tested in tests/fake_quant_kernels."""
    rows = quantizer.layout.to_rows(w)
    grid = quantizer.live_spec.grid
    return quantizer.layout.from_rows(fake_quantize(rows, *quantizer.qparams(rows), grid.qmin, grid.qmax))


def close(a: Tensor | None, b: Tensor | None) -> None:
    assert a is not None and b is not None
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * max(float(b.abs().max()), 1e-3))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed: bool, recipe: Any) -> None:
    """3-D weights of a mixture of experts, both memory orders, against the module's own forward on fake weights."""
    model, reference, ids = mixture(transposed)
    plan = qat.prepare(model, recipe(types=["Experts"], granularity="group", group_size=16))
    (row,) = plan.rows
    assert set(row.kinds.values()) == {"experts_t" if transposed else "experts"}
    layer: Any = model.get_submodule(row.name)
    other: Any = reference.get_submodule(row.name)
    latents = {}
    for key in row.kinds:
        latents[key] = getattr(other, key)
        del other._parameters[key]
        setattr(other, key, straight_through(getattr(layer, f"{key}_quantizer"), latents[key]))
    y, expected = model(ids).logits, reference(ids).logits
    assert torch.equal(y, expected)
    y.square().mean().backward()
    expected.square().mean().backward()
    for key, latent in latents.items():
        close(getattr(layer, key).grad, latent.grad)
        assert getattr(layer, f"{key}_quantizer").theta.grad.abs().max() > 0
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs:
            close(parameter.grad, theirs[name].grad)
    bundle = qat.convert(model)
    for name in bundle:
        assert torch.equal(
            bundle[name].dequantize(), getattr(layer, f"{name.split('.')[-1]}_quantizer")(model.get_parameter(name))
        )


def mixture(transposed: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    common = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(2)
    if transposed:
        model: nn.Module = GptOssForCausalLM(GptOssConfig(**common, **heads, head_dim=16, pad_token_id=0))
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.1)
    else:
        model = MixtralForCausalLM(MixtralConfig(**common, **heads))
    return model, copy.deepcopy(model), torch.randint(0, 40, (2, 5))


def test_llama4_experts_are_transposed_without_saying_so() -> None:
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    from qat.layers import layer_type

    layer = Llama4TextExperts(Llama4TextConfig(hidden_size=16, intermediate_size=24, num_local_experts=2))
    entry = layer_type(layer)
    assert entry is not None and set(entry[1].kinds(layer).values()) == {"experts_t"}


def test_experts_that_are_called_with_a_list_are_refused_in_words(recipe: Any) -> None:
    class ParallelExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, 8))

        def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
            return torch.cat([F.linear(part, w) for part, w in zip(x.split(sizes), self.weight, strict=True)])

    model = nn.ModuleDict({"experts": ParallelExperts()})
    qat.prepare(model, recipe())
    with pytest.raises(qat.QATError, match="called with a list"):
        model["experts"](torch.randn(5, 8), [2, 3])


def test_routing_weights_keep_their_dtype(recipe: Any) -> None:
    """A bf16 model with routing weights in fp32 multiplies by fp32 numbers, quantized or not."""

    class TwoExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, 8))
            self.bias = nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor, index: Tensor, routing: Tensor | None = None) -> Tensor:
            assert routing is not None and routing.dtype == torch.float32
            y = torch.einsum("ti,toi->to", x, self.weight[index]) + self.bias[index]
            return (y * routing.unsqueeze(1)).to(x.dtype)

    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": TwoExperts().to(torch.bfloat16)})
    layer: Any = model["experts"]
    x, index, routing = torch.randn(5, 8).bfloat16(), torch.randint(0, 2, (5,)), torch.rand(5, requires_grad=True)
    reference = copy.deepcopy(layer)
    qat.prepare(model, recipe(granularity="group", group_size=4))
    reference.weight.data = layer.weight_quantizer(layer.weight).detach()
    # named arguments in any order reach the parameters of the forward that they name
    y = layer(routing=routing, index=index, x=x)
    assert torch.equal(y, reference(x, index, routing))
    y.float().square().sum().backward()
    assert routing.grad is not None and routing.grad.dtype == torch.float32
    assert layer.bias.grad is not None and layer.weight_quantizer.theta.grad.abs().max() > 0


class NoisyExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.stack([x @ up.t() for up in self.up]).sum(0)
        return nn.functional.dropout(hidden, 0.5, self.training)


def test_backward_drops_what_forward_dropped(recipe: Any) -> None:
    """Mutation: `replays = True` removed from ExpertsOp."""
    model = nn.ModuleDict({"e": NoisyExperts()})
    qat.prepare(model, recipe(types=["Experts"]))
    x = torch.randn(5, 8, requires_grad=True)
    y = model["e"](x)
    kept = (y != 0).float() * 2
    after = torch.get_rng_state()
    y.sum().backward()
    up = qat.convert(model)["e.up"].dequantize()
    assert torch.allclose(x.grad, kept @ up.sum(0), atol=1e-5)
    assert torch.equal(torch.get_rng_state(), after)
