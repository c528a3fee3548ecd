"""torch.compile takes prepared layers whole: no graph break, no recompilation but where the schedule changes what is
computed, and the numbers of the eager layers.

Mutations tried: `_apart` in place of `_quantized`, strength as a float on `Live`, the version counter read while
compiling, `live.out_dtype` compared before it is set, an FMA in decode: each turns a test red.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qat
from qat.fake_quant_kernels import int8_linear, rowwise4
from qat.fake_quant_kernels.dispatch import Op
from qat.layers import weight_quantizers
from qat.quantizers import quantizers
from qat.recipes.checks import GRID_BITS
from qat.steps import qat_layers, refresh_codes

GROUPS = {"bits": 4, "granularity": "group", "group_size": 16}
TOKENS = {"bits": 8, "granularity": "token", "scale": "fp32", "quantizer": "absmax"}
GRIDS: dict[str, dict[str, Any]] = {
    "absmax": {"weight": {**GROUPS, "quantizer": "absmax"}},
    "lsq": {"weight": {**GROUPS, "quantizer": "lsq"}},
    "nf4": {"weight": {**GROUPS, "grid": "nf4", "quantizer": "absmax"}},
    "seq": {"weight": {"bits": 2, "grid": "seq", "quantizer": "lsq"}},
    "fp8": {"weight": {"bits": 8, "grid": "e4m3", "quantizer": "absmax"}, "input": {**TOKENS, "grid": "e4m3"}},
    "w8a8": {"weight": {"bits": 8, "narrow": True, "quantizer": "mse"}, "input": TOKENS},
}


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def llama(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()  # type: ignore[no-any-return]


IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def train(model: nn.Module, forward: Any, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(steps):
        loss = forward(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
def test_a_llama_is_one_graph(grid: str, recipe: Any) -> None:
    """Forward and backward, through Inductor: one graph, no break, the losses of the eager run."""
    found = []
    for compiled in (False, True):
        model = llama(1)
        qat.prepare(model, recipe(rules={"all": {"types": ["Linear"], **GRIDS[grid]}}), real=False)
        found.append(train(model, torch.compile(model, fullgraph=True) if compiled else model, 6))
    assert graphs() == 1 and not counters["graph_break"]
    eager, ours = found
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(eager), rtol=2e-4, atol=0)
    assert eager[0] - eager[-1] > 0.05


PHASES = {
    "float": {"steps": 20, "quantize": False},
    "ramped": {"steps": 40, "ramp": 15, "bits": {"all": 8}},
    "own": {"steps": 20},
    "frozen": {"steps": -1, "freeze_scales": True},
}
# float -> on the way to 8 bits -> 8 bits -> 4 bits -> frozen
CHANGES = 4


@pytest.mark.parametrize("grid", ["absmax", "lsq", "w8a8"])
def test_recompilations_of_a_scheduled_run(grid: str, recipe: Any) -> None:
    """100 steps; nothing is compiled again but where the schedule changes what a layer computes."""
    model = llama(1)
    phases = {name: dict(phase) for name, phase in PHASES.items()}
    changes = CHANGES
    if grid == "w8a8":
        # its own bits are those of the phase, and no scale is learned
        changes -= 1
    qat.prepare(model, recipe(rules={"all": {"types": ["Linear"], **GRIDS[grid]}}, phases=phases))
    train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), 100)
    assert not counters["graph_break"]
    assert 2 <= graphs() <= 1 + changes


def test_weights_of_another_place(recipe: Any) -> None:
    """functional_call, a Parameter that was replaced, LBFGS that steps within its step: not the codes of before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    qat.prepare(model, recipe(quantizer="absmax", granularity="group", group_size=8))
    x = torch.randn(4, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    other = {name: p.detach() * 2 + 1 for name, p in model.named_parameters()}
    call = torch.compile(lambda: torch.func.functional_call(model, other, (x,)), backend="aot_eager")
    expected = torch.func.functional_call(model, other, (x,))
    assert torch.equal(call(), expected)
    with torch.no_grad():
        model[0].weight = nn.Parameter(other["0.weight"])
        model[0].bias.copy_(other["0.bias"])
    assert torch.equal(compiled(x), expected)

    losses: dict[bool, list[float]] = {True: [], False: []}
    for way, found in losses.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16))
        qat.prepare(model, recipe(quantizer="absmax", granularity="group", group_size=8))
        run = torch.compile(model, backend="aot_eager") if way else model
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)

        def closure(run: Any = run, optimizer: Any = optimizer, found: list[float] = found) -> Any:
            optimizer.zero_grad()
            loss = run(x).square().mean()
            loss.backward()
            found.append(float(loss.detach()))
            return loss

        for _ in range(2):
            optimizer.step(closure)
            qat.after_optimizer_step(model)
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 16)])
def test_a_compiled_output_may_be_changed_in_place(shape: tuple[int, ...], recipe: Any) -> None:
    found = []
    for way in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(inplace=True))
        qat.prepare(model, recipe(quantizer="absmax"))
        y = (torch.compile(model, backend="aot_eager", fullgraph=True) if way else model)(torch.ones(shape))
        y.sum().backward()
        found.append(model[0].weight.grad)
    assert torch.equal(*found)


def with_codes(model: nn.Module) -> None:
    """As if the last step had had more than one backward."""
    for layer in qat_layers(model).values():
        layer._qat.cache.once = False
    refresh_codes(model, at_once=True)


def test_graphs_on_a_cpu_go_without_codes_of_integers(recipe: Any) -> None:
    """However many backwards a step has. Mutation: `CodeCache.spared` without `traced`."""
    held = []
    for way in (False, True):
        model = nn.Sequential(nn.Linear(16, 8))
        qat.prepare(model, recipe(quantizer="absmax"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if way else model
        for _ in range(2):
            for _ in range(2):
                run(torch.ones(3, 16)).sum().backward()
            held.append(bool(model[0]._qat.cache.entries))
            optimizer.step()
            qat.after_optimizer_step(model)
        run(torch.ones(3, 16))
    assert held == [False, True, False, False]


class Weights(nn.Module):
    """Gives the fake-quantized weight of every layer: eye @ w_hat^T has no rounding of its own."""

    def __init__(self, count: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs, bias=False, dtype=dtype) for _ in range(count))
        self.register_buffer("eye", torch.eye(inputs, dtype=dtype))

    def forward(self) -> list[Tensor]:
        return [layer(self.eye) for layer in self.layers]


WAYS = {"codes in the graph": (torch.float32, False), "codes from the cache": (torch.bfloat16, True)}


def grids() -> Iterator[dict[str, Any]]:
    """Every quantizer and zero point, every kind of grid, signed scales; bits, granularities and storages in turn."""
    sizes = ({"granularity": "group", "group_size": 16}, {"granularity": "channel"}, {"granularity": "tensor"})
    turn = 0
    for quantizer, zero in product(("absmax", "minmax", "mse", "lsq"), ("none", "int", "float")):
        if quantizers()[quantizer].zero_points.count(zero):
            for granularity in sizes:
                bits, scale = (2, 3, 4, 8)[turn % 4], ("portable", "fp16", "bf16", "fp32", "portable")[turn % 5]
                yield {"bits": bits, "zero_point": zero, "quantizer": quantizer, "scale": scale, **granularity}
                turn += 1
    for kind, bits in GRID_BITS.items():
        for quantizer in ("mse" if kind == "binary" else "absmax", "lsq"):
            scale = ("portable", "e8m0")[(turn + turn // 2) % 2]
            yield {"grid": kind, "bits": bits, "quantizer": quantizer, "scale": scale, **sizes[0]}
            turn += 1
    yield {"bits": 4, "quantizer": "mse", "signed_scale": True, **sizes[0]}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_law_through_the_layer_eager_and_compiled(way: str, recipe: Any, record_property: Any) -> None:
    """layer's weight == integers(w).dequantize(), with codes from the cache and with codes made in the graph."""
    dtype, cached = WAYS[way]
    weights = list(grids())
    torch.manual_seed(2)
    model = Weights(len(weights), 48, 6, dtype)
    with torch.no_grad():
        for layer in model.layers:
            w: Any = layer.weight
            w.mul_(torch.logspace(-1, 1, 6, dtype=dtype).unsqueeze(1))
            w[0, :16] = 0.0
    rules = {f"r{i}": {"match": [f"layers.{i}"], "weight": slot} for i, slot in enumerate(weights)}
    qat.prepare(model, recipe(rules=rules), code_cache=cached)
    layers = list(qat_layers(model).values())
    for q in (q for layer in layers for q in weight_quantizers(layer).values()):
        for theta in q.learned():
            nn.init.normal_(theta, 0, 0.02)
    with_codes(model)
    expected = [q.integers(w.weight).dequantize() for w in layers for q in weight_quantizers(w).values()]  # type: ignore[arg-type]
    assert all(bool(layer._qat.cache.nbytes) == cached for layer in layers)
    compiled = torch.compile(model, fullgraph=True)
    for found in (model(), compiled()):
        assert len(found) == len(weights) >= 27
        for slot, y, w_hat in zip(weights, found, expected, strict=True):
            assert torch.equal(y.t(), w_hat), slot
    assert graphs() == 1
    record_property("cases", f"{2 * len(weights)} equalities")


@pytest.mark.parametrize("kind", ["rows", "traced", "opaque", "direct", "opaque direct"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_graph_saves_codes_and_nothing_made_of_them(
    grid: str, kind: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between forward and backward lie parameters, the cache's codes and fields, and tensors smaller than any weight:
    of codes as a CPU keeps them, of other codes, and of codes that an operator decodes which the compiler does not see
    into, as on CUDA; direct: there are no codes where the graph can round without them.
    Mutations: decoding or rounding without a copy of its own, or without `again` -> the numbers are saved, four or
    eight times as large."""
    if kind != "rows":
        monkeypatch.setattr(rowwise4, "fits", lambda *_: False)
    if "opaque" in kind:
        monkeypatch.setattr(Op, "__call__", lambda op, *args: op.custom(*args))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False))
    qat.prepare(model, recipe(rules={"all": {"types": ["Linear"], **GRIDS[grid]}}))
    if "direct" not in kind:
        with_codes(model)
    compiled: Any = torch.compile(model, fullgraph=True)
    saved = compiled(torch.randn(2, 64, requires_grad=True)).grad_fn.saved_tensors
    entries = [entry for layer in qat_layers(model).values() for _, entry, _ in layer._qat.cache.entries.values()]
    known = {t.untyped_storage().data_ptr() for entry in entries for t in entry if t is not None}
    known |= {p.untyped_storage().data_ptr() for p in model.parameters()}
    others = [t for t in saved if t is not None and t.untyped_storage().data_ptr() not in known]
    products = grid == "w8a8" and not int8_linear.idle(torch.device("cpu"), torch.float32)
    assert bool(entries) == ("direct" not in kind or grid in ("nf4", "seq", "fp8") or products)
    assert all(t.numel() < 64 * 96 // 2 for t in others), [(t.shape, t.dtype) for t in others]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slot", [{"bits": 4}, {"bits": 8, "quantizer": "absmax"}, {"bits": 4, "grid": "nf4"}], ids=str)
def test_a_16_bit_embedding_that_is_cast_back(slot: dict[str, Any], dtype: torch.dtype, recipe: Any) -> None:
    """As RMSNorm does with it. Inductor drops such a pair of casts, and with it the grid. Mutation: no `through`."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 64, dtype=dtype)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids).float() * 1.0  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Lookup()
    qat.prepare(model, recipe(types=["Embedding"], **slot))
    expected = qat.convert(model)["table.weight"].dequantize().float()
    assert torch.equal(torch.compile(model, fullgraph=True)(torch.arange(64)), expected)
