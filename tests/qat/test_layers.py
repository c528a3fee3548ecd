"""Every kind of layer: forward is the float op on (x_hat, w_hat), backward is plain autograd through the formula.

Mutations of `qat/layers.py` and `qat/ops.py` that were tried, and the test that turned red for each:

    a view handed out by the node                test_an_output_may_be_changed_in_place
    scales get ones, not zeros, while inactive   test_before_its_start_a_layer_is_the_float_layer
    a copy of the weight saved for backward      test_nothing_as_large_as_the_weight_stays_alive
    unbatched gradient not squeezed back         test_forward_and_gradients
    padding_idx ignored in backward              test_forward_and_gradients
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import qat
from qat.fake_quant_kernels.affine import encode
from qat.layers import QATLayer, swapped_class, weight_quantizers
from qat.quantizers import Quantizer
from qat.state import require_state

Op = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


def linear(m: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(x, w, b)


def conv1d(m: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x @ w + b


def embedding(m: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.embedding(x, w, m.padding_idx, None, 2.0, m.scale_grad_by_freq, False)


def conv(m: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if m.padding_mode != "zeros":
        x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
    f = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(m.kernel_size)]
    padding = m.padding if m.padding_mode == "zeros" else 0
    return f(x, w, b, m.stride, padding, m.dilation, m.groups)


def deconv(m: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    f = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(m.kernel_size)]
    return f(x, w, b, m.stride, m.padding, m.output_padding, m.groups, m.dilation)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Op]] = {
    "Linear": (lambda: nn.Linear(8, 6), (4, 8), linear),
    "Linear 3-D": (lambda: nn.Linear(8, 6), (2, 3, 8), linear),
    "Linear 1-D": (lambda: nn.Linear(8, 6), (8,), linear),
    "Linear, no bias": (lambda: nn.Linear(8, 6, bias=False), (2, 8), linear),
    "Linear, empty batch": (lambda: nn.Linear(8, 6), (0, 8), linear),
    "Conv1D": (lambda: Conv1D(6, 8), (2, 3, 8), conv1d),
    "Embedding": (lambda: nn.Embedding(11, 8), (3, 4), embedding),
    "Embedding, padding": (lambda: nn.Embedding(11, 8, padding_idx=2, scale_grad_by_freq=True), (3, 4), embedding),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9), conv),
    "Conv1d, unbatched": (lambda: nn.Conv1d(4, 6, 3), (4, 9), conv),
    "Conv1d, reflect": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 9), conv),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=(1, 2), dilation=2, padding=(1, 2), groups=2), (2, 4, 9, 9), conv),
    "Conv2d, same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2), (2, 4, 7, 7), conv),
    "Conv2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", bias=False), (2, 4, 7, 7), conv),
    "Conv2d, same circular": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 7, 7), conv),
    "Conv2d, replicate": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 7, 7), conv),
    "Conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 7), conv),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=2, padding=1), (1, 2, 5, 5, 5), conv),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5), deconv),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), (2, 4, 5, 5), deconv),
    "ConvTranspose2d, unbatched": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), (4, 5, 5), deconv),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 2, stride=2), (1, 2, 3, 3, 3), deconv),
}
TOKENS = {"bits": 8, "granularity": "token", "quantizer": "absmax"}
TENSOR = {"bits": 8, "granularity": "tensor", "quantizer": "lsq"}


class Holder(nn.Module):
    """A model of one layer, called as often as asked."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def ste(quantizer: Quantizer, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula in plain autograd: straight through the rounding, and through the scale where it is learned."""
    layout = quantizer.layout.of(value)
    rows = layout.to_rows(value).float()
    s, z, m = quantizer.qparams(rows)
    lo, hi = quantizer.live_spec.grid.qmin, quantizer.live_spec.grid.qmax
    codes = encode(rows, s, z, m, lo, hi).detach()
    blocks, c = (t.reshape(rows.shape[0], s.shape[1], rows.shape[1] // s.shape[1]) for t in (rows, codes))
    s3, z3, m3 = (None if t is None else t.unsqueeze(-1) for t in (s, z, m))
    zero = 0.0 if z3 is None else z3
    v = (blocks if m3 is None else blocks - m3) * (1.0 / s3)
    q = c - zero
    # inside the grid the rounding passes the gradient; outside, the code is a constant
    inside = (v >= lo - zero) & (v <= hi - zero)
    q = torch.where(inside, v + (q - v).detach(), q)
    fake = q * s3 if m3 is None else q * s3 + m3
    if quantizer.identity_gradient:
        fake = blocks + (fake - blocks).detach()
    return layout.from_rows(fake.reshape(rows.shape)).to(dtype)


def close(a: Tensor | None, b: Tensor | None) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        scale = float(b.detach().abs().max()) if b.numel() else 1.0
        # one number is the sum of thousands of terms that cancel, in another order of addition
        rtol = 1e-3 if b.numel() == 1 else 1e-5
        torch.testing.assert_close(a, b, rtol=rtol, atol=2e-6 * max(scale, 1e-3))


def sample(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    g = torch.Generator().manual_seed(3)
    if isinstance(layer, nn.Embedding):
        # the padding index among them
        ids = torch.randint(0, layer.num_embeddings, shape, generator=g)
        return ids.index_fill(0, torch.tensor([0]), 2)
    return torch.randn(shape, generator=g)


def prepared(case: str, recipe: Any, input: dict[str, Any] | None = None, **weight: Any) -> tuple[Holder, Tensor, Op]:
    make, shape, op = CASES[case]
    torch.manual_seed(1)
    model = Holder(make())
    x = sample(model.layer, shape)
    qat.prepare(model, recipe(input=input, **weight))
    for parameter in (p for q in weight_quantizers(model.layer).values() for p in q.learned()):
        nn.init.normal_(parameter, 0, 0.02)
    return model, x, op


@pytest.mark.parametrize("quantizer", ["absmax", "mse", "lsq"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case: str, quantizer: str, recipe: Any) -> None:
    takes_tokens = case.startswith(("Linear", "Conv1D"))
    x_slot = None if quantizer == "mse" or case.startswith("Embedding") else TOKENS if takes_tokens else TENSOR
    model, x, op = prepared(case, recipe, x_slot, quantizer=quantizer)
    layer: Any = model.layer
    if x.is_floating_point():
        x.requires_grad_()
    y = model(x)
    assert type(y) is Tensor
    w_hat = layer.weight_quantizer(layer.weight).detach()
    x_quantizer = getattr(layer, "input_quantizer", None)
    bias = getattr(layer, "bias", None)
    x_hat = x if x_quantizer is None else x_quantizer(x).detach()
    assert torch.equal(y, op(layer, x_hat, w_hat, bias)) or case == "Conv1D"
    close(y, op(layer, x_hat, w_hat, bias))

    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    leaves = [p for p in (x, *layer.parameters()) if p.requires_grad]
    ours = torch.autograd.grad(y, leaves, g, allow_unused=True)
    x_ste = x if x_quantizer is None else ste(x_quantizer, x, torch.float32)
    plain = torch.autograd.grad(
        op(layer, x_ste, ste(layer.weight_quantizer, layer.weight, torch.float32), bias), leaves, g, allow_unused=True
    )
    assert len(leaves) >= 1
    for a, b in zip(ours, plain, strict=True):
        # a scale that is not used has a gradient of zero, so that no parameter is unused under DDP
        close(a, torch.zeros_like(a) if b is None and a is not None else b)


@pytest.mark.parametrize("zero_point", ["int", "float"])
@pytest.mark.parametrize("quantizer", ["minmax", "mse", "lsq"])
def test_gradients_with_zero_points(quantizer: str, zero_point: str, recipe: Any) -> None:
    weight = {"zero_point": zero_point, "granularity": "group", "group_size": 4, "quantizer": quantizer}
    model, x, _ = prepared("Linear", recipe, **weight)
    layer: Any = model.layer
    y = model(x)
    ours = torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True)
    again = F.linear(x, ste(layer.weight_quantizer, layer.weight, torch.float32), layer.bias)
    for a, b in zip(ours, torch.autograd.grad(again.square().sum(), list(layer.parameters())), strict=True):
        close(a, b)


def test_output_size_reaches_a_transposed_convolution(recipe: Any) -> None:
    for size in (9, 10):
        model, x, _ = prepared("ConvTranspose1d", recipe)
        layer: Any = model.layer
        y = model(x, output_size=[size])
        expected = F.conv_transpose1d(
            x,
            layer.weight_quantizer(layer.weight),
            layer.bias,
            layer.stride,
            layer.padding,
            size - 9,
            1,
            layer.dilation,
        )
        assert torch.equal(y, expected)
        y.sum().backward()
        assert torch.equal(model(x, [size]), y) and torch.equal(model(output_size=[size], input=x), y)


def test_one_layer_twice_in_a_forward(recipe: Any) -> None:
    model = Holder(nn.Linear(8, 8))
    qat.prepare(model, recipe())
    layer: Any = model.layer
    x = torch.randn(3, 8)
    layer(layer(x)).square().sum().backward()
    ours = [p.grad.clone() for p in layer.parameters()]
    model.zero_grad()
    w = ste(layer.weight_quantizer, layer.weight, torch.float32)
    F.linear(F.linear(x, w, layer.bias), w, layer.bias).square().sum().backward()
    for a, p in zip(ours, layer.parameters(), strict=True):
        close(a, p.grad)


def test_the_graph_can_be_kept(recipe: Any) -> None:
    model, x, _ = prepared("Conv2d", recipe)
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_weights(recipe: Any) -> None:
    """requires_grad=False before prepare: no gradient, no learned scale, x still gets its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].requires_grad_(False)
    qat.prepare(model, recipe())
    x = torch.randn(3, 8, requires_grad=True)
    model(x).sum().backward()
    assert model[1].weight.grad is None and model[1].weight_quantizer.theta.grad is None
    assert model[0].weight.grad.abs().max() > 0 and x.grad.abs().max() > 0
    model.requires_grad_(False)
    assert not model(torch.randn(2, 8)).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, recipe: Any) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    found = []
    for use in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
        qat.prepare(model, recipe(input=TENSOR))
        y = checkpoint(model, x, use_reentrant=reentrant) if use else model(x)
        y.square().sum().backward()
        qat.after_optimizer_step(model)
        found.append([y, *(p.grad for p in model.parameters()), *model.buffers(), x.grad.clone()])
        x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast(recipe: Any) -> None:
    """Quantizers read fp32 whatever autocast says; the product runs in its dtype, like the float layer."""
    model, x, _ = prepared("Linear", recipe)
    layer: Any = model.layer
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    w_hat = layer.weight_quantizer(layer.weight, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.bfloat16(), w_hat, layer.bias.bfloat16()))
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.weight_quantizer.theta.grad.dtype == torch.float32
    qat.after_optimizer_step(model)
    tensor = qat.convert(model)["layer.weight"]
    assert tensor.out_dtype == torch.bfloat16 and torch.equal(tensor.dequantize(), w_hat)
    embedding, ids, _ = prepared("Embedding", recipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding(ids).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, recipe: Any) -> None:
    model = Holder(nn.Linear(8, 4)).to(dtype)
    qat.prepare(model, recipe())
    layer: Any = model.layer
    assert layer.weight_quantizer.theta.dtype == dtype
    x = torch.randn(3, 8, dtype=dtype)
    y = model(x)
    assert torch.equal(y, F.linear(x, layer.weight_quantizer(layer.weight), layer.bias))
    y.sum().backward()
    assert layer.weight.grad.dtype == dtype
    assert torch.equal(qat.convert(model)["layer.weight"].dequantize(), layer.weight_quantizer(layer.weight))


@pytest.mark.parametrize(("code_cache", "once"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("case", ["Linear", "Conv2d", "Embedding", "Conv1D"])
def test_nothing_as_large_as_the_weight_stays_alive(case: str, code_cache: bool, once: bool, recipe: Any) -> None:
    """A forward saves its input, the parameters themselves, scales, and at most a byte of codes per weight: those of
    the cache, where there are codes. Mutations: w_hat, or x where only dx is wanted, saved by the node; `Slot.keep`
    always true."""
    make, shape, _ = CASES[case]
    model = Holder(make())
    x = sample(model.layer, shape)
    qat.prepare(model, recipe(), code_cache=code_cache)
    layer: Any = model.layer
    layer._qat.cache.once = once
    qat.weights_changed(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    kept: list[Tensor] = []
    if x.is_floating_point():
        x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    others = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    cached = {t.data_ptr() for _, entry, _ in layer._qat.cache.entries.values() for t in entry if t is not None}
    codes = [t for t in others if t.data_ptr() in cached]
    assert bool(codes) == bool(cached) == (code_cache and (not once or case == "Embedding"))
    scales = layer.weight_quantizer.theta.numel()
    assert sum(t.nbytes for t in codes) <= layer.weight.numel() + 4 * scales
    assert all(t.shape == layer.weight_quantizer.theta.shape for t in others if t.data_ptr() not in cached)


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_an_output_may_be_changed_in_place(case: str, delayed: bool, recipe: Any) -> None:
    """`nn.ReLU(inplace=True)` after a layer, while the layer is quantized and while it is not yet."""
    make, shape, _ = CASES[case]
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = Holder(make())
        phases = {"float": {"steps": 9, "quantize": False}, "qat": {}} if delayed else None
        qat.prepare(model, recipe(phases=phases))
        y = model(sample(model.layer, shape))
        F.relu(y, inplace).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_before_its_start_a_layer_is_the_float_layer(case: str, recipe: Any) -> None:
    """Bit for bit, gradients included; learned scales get zeros."""
    make, shape, _ = CASES[case]
    torch.manual_seed(0)
    model = Holder(make())
    plain = copy.deepcopy(model)
    qat.prepare(model, recipe(phases={"float": {"steps": 5, "quantize": False}, "qat": {}}))
    x = sample(model.layer, shape)
    y, expected = model(x), plain(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad)
    assert not any(p.grad.any() for q in weight_quantizers(model.layer).values() for p in q.learned())


def test_copies_and_pickles(recipe: Any) -> None:
    model, x, _ = prepared("Conv2d", recipe)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.layer) is type(model.layer) is swapped_class(nn.Conv2d)
        assert torch.equal(other(x), y)
        qat.unprepare(other)
        assert type(other.layer) is nn.Conv2d
    assert isinstance(model.layer, QATLayer)


def test_a_class_with_a_forward_of_its_own_is_left_alone(recipe: Any) -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Standardized(nn.Conv1d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight / weight.std(), bias)

    model = nn.ModuleDict({"own": Own(8, 8), "std": Standardized(4, 4, 3), "plain": nn.Linear(8, 8)})
    plan = qat.plan(model, recipe())
    assert [row.name for row in plan.rows] == ["plain"]
    assert {row.name: row.note for row in plan.float_rows} == {
        "own": "its forward is its own",
        "std": "its forward is its own",
    }


def test_dtypes_of_a_layer_alone_are_recorded(recipe: Any) -> None:
    """A prepared root that is a layer itself, in a wrapper (as DDP is). Mutation: in `after_optimizer_step` layers by
    the prefix of the root's children."""
    layer = nn.Linear(8, 4)
    qat.prepare(layer, recipe(types=["Linear"]))
    wrapper = nn.ModuleDict({"module": layer})
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 8)).sum().backward()
    qat.after_optimizer_step(wrapper)
    assert require_state(layer).record.dtypes == {"": ["float32", "bfloat16"]}
