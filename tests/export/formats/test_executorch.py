"""ExecuTorch: codes and scales as its own serialization code finds them in the file, and whole models in its runtime.

Weights are compared with torch.equal. XNNPACK divides where training multiplies by a reciprocal: of 5,120,000 inputs 7
had a code that was one off, and scales differ in their last bits. One layer is within 1e-5 of its largest output; where
layers follow each other, a code that is one off moves what comes behind it: within 1 % of the largest logit.

Mutations that were tried one at a time, and the test that turned red for each:

    the second nibble first                         test_bytes_by_hand
    scales of groups left in fp32                   test_bytes_by_hand
    rows of an odd count allowed                    test_refusals
    a float input, or scales of one in bf16         test_refusals
    batch norms left to XNNPACK                     test_every_grid_is_what_executorch_computes
    bounds of an activation read as they are        test_every_grid_is_what_executorch_computes
    the input of a filter not looked at             test_a_weight_whose_input_is_not_rounded
    an exception that gets out of the reader        test_damaged_files
    the root logger not restored                    test_the_process_is_left_as_it_was
    the batch of the example for constant           test_every_grid_is_what_executorch_computes
    layers that nothing calls not looked for        test_layers_that_are_not_called_and_buffers_that_change
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.errors import ExportError
from qat.export import export, get_format, pte_reader
from qat.export.format import read_back
from qat.export.receipt import TensorRecord
from qat.layout import Layout
from qat.qtensor import QTensor
from qat.recipes import from_dict, load_recipe
from qat.specs import QuantSpec
from qat.verify import verify

needs = pytest.mark.skipif(not pte_reader.installed(), reason="the extra executorch is not installed")
BY_TOKEN = {"bits": 8, "granularity": "token", "zero_point": "int", "scale": "fp32", "quantizer": "minmax"}
BY_GROUP = {"granularity": "group", "group_size": 32, "quantizer": "absmax"}
BY_ROW = {"granularity": "channel", "quantizer": "absmax"}
# of Linear layers 64 -> 48
GRIDS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, **BY_GROUP},
    "int4_64_bf16": {"bits": 4, **BY_GROUP, "group_size": 64, "scale": "bf16", "narrow": True},
    "int4_e8m0": {"bits": 4, **BY_GROUP, "scale": "e8m0"},
    "int4_row": {"bits": 4, **BY_ROW, "scale": "fp32"},
    "int8": {"bits": 8, **BY_ROW, "scale": "fp32"},
    "int8_narrow": {"bits": 8, **BY_ROW, "narrow": True, "quantizer": "mse"},
    "int8_tensor": {"bits": 8, "granularity": "tensor", "quantizer": "absmax"},
}
Small = tuple[bytes, list[TensorRecord], qat.Bundle]
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Layers of every grid beside floats that XNNPACK and ExecuTorch's own kernels hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({name: nn.Linear(64, 48, bias=len(name) % 2 == 0) for name in GRIDS})
        self.conv, self.norm, self.depth = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 2, groups=6)
        self.twice, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.gain, self.layer_norm = nn.Parameter(torch.tensor(1.5)), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        image = torch.relu(self.norm(self.conv(x.reshape(-1, 4, 4, 4))))
        pooled = self.layer_norm(torch.relu(self.depth(image)).flatten(1)) * self.gain
        found = {name: layer(x) for name, layer in self.linear.items()}
        return found | {"head": self.head(self.twice(pooled)), "again": self.twice(pooled * 2)}


def prepared(model: nn.Module, rules: dict[str, Any]) -> qat.Bundle:
    recipe = from_dict({"name": "small", "rules": rules, "phases": {"qat": {"steps": -1}}})
    qat.prepare(model, recipe, real=False)
    return qat.convert(model.eval())


def run(folder: Path, *given: torch.Tensor) -> list[torch.Tensor]:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(folder / "model.pte").load_method("forward")
    return [value.clone() for value in method.execute(given)]


# ---- what is in the file, and what its program computes --------------------------------------------------------------


@needs
@pytest.mark.consumer
@pytest.mark.slow
def test_every_grid_is_what_executorch_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    for buffer in (model.norm.running_mean, model.norm.running_var):
        assert buffer is not None
        buffer.add_(torch.rand(6))
    rules: dict[str, Any] = {
        name: {"match": [f"linear.{name}"], "weight": weight, "input": BY_TOKEN} for name, weight in GRIDS.items()
    }
    rules["twice"] = {"match": ["twice"], "weight": {"bits": 8, **BY_ROW}, "input": {**BY_TOKEN, "signed": True}}
    bundle = prepared(model, rules)
    receipt = export(bundle, tmp_path / "out", "executorch", example_inputs=X)
    assert receipt.max_abs_diff == 0.0 and receipt.reader.startswith("executorch 1.")
    assert [file.name for file in receipt.files] == ["model.pte"]
    read = dict(get_format("executorch").read(tmp_path / "out"))
    for name, trained in bundle.items():
        assert torch.equal(read[name], trained.dequantize()), name
    for name, value in bundle.floats.items():
        # a counter that no graph reads
        assert name == "norm.num_batches_tracked" or torch.equal(read[name], value), name
    assert len(verify(tmp_path / "out")) == len(read)
    # memory is planned for a batch of 6
    for batch in (6, 2, 1):
        with torch.no_grad():
            ours = model(X[:batch])
        for (name, mine), theirs in zip(ours.items(), run(tmp_path / "out", X[:batch]), strict=True):
            assert mine.shape == theirs.shape, name
            assert float((mine - theirs).abs().max()) <= 1e-5 * float(mine.abs().max()), (name, batch)
    with pytest.raises(RuntimeError):
        run(tmp_path / "out", torch.cat((X, X)))


@needs
@pytest.mark.consumer
@pytest.mark.slow
def test_a_language_model_of_a_free_length(
    make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path, ran: Any
) -> None:
    model = make_model(num_hidden_layers=1, tie_word_embeddings=True)
    bundle = quantize(model, {"bits": 4}, input=BY_TOKEN, head={"match": ["lm_head"], "keep_float": True})
    export(bundle, tmp_path / "out", "executorch", tokenizer=tokenizer)
    largest = 0.0
    # 128 positions are what its config says, and what memory is planned for
    for length in (128, 11, 1):
        ids = torch.randint(0, 320, (1, length), generator=torch.Generator().manual_seed(length))
        (theirs,) = run(tmp_path / "out", ids, torch.ones_like(ids))
        with torch.no_grad():
            ours = model(ids).logits
        assert theirs.shape == ours.shape and torch.equal(ours.argmax(-1), theirs.argmax(-1)), length
        largest = max(largest, float((ours - theirs).abs().max()))
        assert float((ours - theirs).abs().max()) <= 1e-2 * float(ours.abs().max()), length
    ran("executorch", "executorch", "Llama, 8da4w in groups of 32", logits=largest)
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


@needs
@pytest.mark.consumer
@pytest.mark.slow
def test_a_language_model_of_a_free_batch(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=1)
    bundle = quantize(model, {"bits": 4}, input=BY_TOKEN, head={"match": ["lm_head"], "keep_float": True})
    example = torch.ones(2, 16, dtype=torch.int64)
    export(bundle, tmp_path / "out", "executorch", example_inputs={"input_ids": example, "attention_mask": example})
    for shape in ((2, 16), (1, 5), (2, 1), (1, 1)):
        ids = torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(shape[1]))
        (theirs,) = run(tmp_path / "out", ids, torch.ones_like(ids))
        with torch.no_grad():
            ours = model(ids).logits
        assert theirs.shape == ours.shape, shape
        assert float((ours - theirs).abs().max()) <= 1e-2 * float(ours.abs().max()), shape


@needs
@pytest.mark.consumer
def test_two_layers_of_one_weight_and_conv1d(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.turned = nn.Linear(32, 32), nn.Linear(32, 32), Conv1D(8, 32)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.turned(torch.relu(self.second(self.first(x))))
            return y

    torch.manual_seed(0)
    model = Tied()
    rules = {"all": {"match": ["*"], "types": ["Linear", "Conv1D"], "weight": {"bits": 4, **BY_GROUP}}}
    rules["all"]["input"] = BY_TOKEN
    bundle = prepared(model, rules)
    # of another dtype: floats are traced in fp32
    export(bundle, tmp_path / "out", "executorch", example_inputs=(X[:, :32].double(),))
    read = dict(get_format("executorch").read(tmp_path / "out"))
    assert read.keys() == {"first.weight", "turned.weight", "first.bias", "second.bias", "turned.bias"}
    assert torch.equal(read["turned.weight"], bundle["turned.weight"].dequantize())
    with torch.no_grad():
        ours = model(X[:, :32])
    (theirs,) = run(tmp_path / "out", X[:, :32].contiguous())
    assert float((ours - theirs).abs().max()) <= 1e-2 * float(ours.abs().max())


def test_bytes_by_hand() -> None:
    """Two codes, each 8 more, in a byte, the first one low; bf16 for groups, fp32 for rows."""
    fmt = get_format("executorch")
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 4)
    scale = torch.tensor([[0.5, 1.0], [2.0, 0.25]], dtype=torch.bfloat16)
    spec = QuantSpec(bits=4, granularity="group", group_size=32)
    packed = fmt.pack("w", group := QTensor(codes, scale, None, None, spec, Layout((2, 64)), torch.float32))
    assert packed["codes"][1, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert packed["scale"].dtype == torch.bfloat16 and torch.equal(packed["scale"], scale)
    assert torch.equal(pte_reader.decoded(packed["codes"], packed["scale"], 64), group.dequantize())
    row = QTensor(codes, scale[:, :1], None, None, QuantSpec(bits=8), Layout((2, 64)), torch.float32)
    packed = fmt.pack("w", row)
    assert torch.equal(packed["codes"], codes) and packed["scale"].tolist() == [0.5, 2.0]
    assert packed["scale"].dtype == torch.float32
    assert torch.equal(pte_reader.decoded(packed["codes"], packed["scale"], 64), row.dequantize())


# ---- what cannot be --------------------------------------------------------------------------------------------------


def reasons(columns: int = 64, layer: nn.Module | None = None, **words: Any) -> str:
    model = nn.Sequential(layer or nn.Linear(columns, 8))
    rule = {"types": ["Linear", "Conv2d", "Embedding"], "weight": {"bits": 4, **BY_GROUP}, "input": BY_TOKEN, **words}
    return "; ".join(get_format("executorch").check(qat.plan(model, from_dict({"name": "s", "rules": {"l": rule}}))))


def test_refusals() -> None:
    row4 = {"bits": 4, **BY_ROW}
    assert reasons() == reasons(weight=row4) == reasons(weight={"bits": 8, **BY_ROW}) == ""
    assert reasons(input={**BY_TOKEN, "signed": True}) == reasons(33, weight={"bits": 8, **BY_ROW}) == ""
    assert "of weights alone it computes wrong numbers" in reasons(input=None)
    assert "weight=null with a rounded input" in reasons(weight=None)
    for other in (
        {"bits": 8, "granularity": "tensor", "zero_point": "int", "quantizer": "ema"},
        {**BY_TOKEN, "bits": 4},
        {**BY_TOKEN, "scale": "portable"},
        {**BY_TOKEN, "zero_point": "none", "quantizer": "absmax"},
        {**BY_TOKEN, "granularity": "group", "group_size": 32},
    ):
        assert "XNNPACK rounds inputs to 8 bits, a range per token" in reasons(input=other), other
    for bits in (2, 3, 5):
        assert "XNNPACK multiplies integers of 4 and of 8 bits" in reasons(weight={"bits": bits, **BY_GROUP})
    assert "weight grid nf4" in reasons(weight={"bits": 4, "grid": "nf4", **BY_GROUP})
    assert "groups are of a multiple of 32" in reasons(weight={"bits": 4, **BY_GROUP, "group_size": 16})
    assert "bits=8 in groups" in reasons(weight={"bits": 8, **BY_GROUP})
    for scale in ("fp32", "fp16"):
        assert f"scale={scale}: XNNPACK rounds scales of groups to bf16" in reasons(
            weight={"bits": 4, **BY_GROUP, "scale": scale}
        )
        assert reasons(weight={**row4, "scale": scale}) == ""
    assert "without zero points" in reasons(weight={"bits": 4, **BY_GROUP, "zero_point": "int", "quantizer": "minmax"})
    assert "positive scales" in reasons(weight={"bits": 4, **BY_GROUP, "signed_scale": True, "quantizer": "mse"})
    assert "rows of 33 numbers" in reasons(33, weight=row4)
    assert "holds no quantized Conv2d" in reasons(layer=nn.Conv2d(32, 8, 1), input=None)
    assert "holds no quantized Embedding" in reasons(layer=nn.Embedding(8, 64), input=None)


def test_the_preset_fits() -> None:
    recipe = load_recipe("w4a8_executorch")
    model = nn.ModuleDict({"block": nn.Linear(64, 64), "lm_head": nn.Linear(64, 10)})
    plan = qat.plan(model, recipe)
    assert get_format("executorch").check(plan) == [] and recipe.export.targets == ["executorch"]
    assert [row.name for row in plan.rows] == ["block"]


def test_without_executorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = prepared(
        nn.Sequential(nn.Linear(64, 8)), {"l": {"match": ["*"], "weight": GRIDS["int4"], "input": BY_TOKEN}}
    )
    monkeypatch.setattr(pte_reader, "installed", lambda: False)
    fmt = get_format("executorch")
    assert fmt.check(bundle) == ["executorch is not installed; pip install 'lightning-qat[executorch]'"]
    assert fmt.reader() == "nothing: executorch is not installed"
    (tmp_path / "model.pte").write_bytes(b"")
    with pytest.raises(ExportError, match=r"pip install 'lightning-qat\[executorch\]'"):
        list(fmt.read(tmp_path))
    with pytest.raises(ExportError, match="is missing"):
        list(fmt.read(tmp_path / "nowhere"))


@needs
def test_models_that_cannot_be_traced(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            return y if y.sum() > 0 else -y

    rules = {"l": {"match": ["*"], "types": ["Linear"], "weight": GRIDS["int4"], "input": BY_TOKEN}}
    bundle = prepared(Branch(), rules)
    assert "it is not known what the model is called with" in get_format("executorch").check(bundle)[0]
    with pytest.raises(ExportError, match="Branch cannot be traced with these example inputs"):
        export(bundle, tmp_path / "out", "executorch", example_inputs=X)
    assert not (tmp_path / "out").exists()


@needs
def test_layers_that_are_not_called_and_buffers_that_change(tmp_path: Path) -> None:
    class Idle(nn.Module):
        def __init__(self, counts: bool) -> None:
            super().__init__()
            self.layer, self.idle, self.counts = nn.Linear(64, 8), nn.Linear(64, 8), counts
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.counts:
                self.calls.add_(1)
            y: torch.Tensor = self.layer(x)
            return y

    rule = {"weight": GRIDS["int4"], "input": BY_TOKEN}
    for counts, layer, words in (
        (False, "*", r"idle.weight is not read by the graph of this model; give its layer add a rule"),
        (
            True,
            "layer",
            "the forward of this model changes its buffer calls, which would not be a constant of the file",
        ),
    ):
        bundle = prepared(Idle(counts), {"l": {"match": [layer], **rule}})
        with pytest.raises(ExportError, match=words):
            export(bundle, tmp_path / "out", "executorch", example_inputs=X)
        assert not (tmp_path / "out").exists()


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8))
    rules = {
        "first": {"match": ["0"], "weight": GRIDS["int4"], "input": BY_TOKEN},
        "second": {"match": ["2"], "weight": GRIDS["int8"], "input": BY_TOKEN},
    }
    bundle, out = prepared(model, rules), tmp_path_factory.mktemp("small") / "out"
    receipt = export(bundle, out, "executorch", example_inputs=X)
    return (out / "model.pte").read_bytes(), receipt.tensors, bundle


def places(data: bytes, bundle: qat.Bundle) -> dict[str, range]:
    """Part of the file -> where it lies."""
    found = {"header": range(0, 64)}
    fmt = get_format("executorch")
    for name in ("0.weight", "2.weight"):
        for key, tensor in fmt.pack(name, bundle[name]).items():
            raw = bytes(tensor.contiguous().view(torch.uint8).reshape(-1).numpy())
            found[f"{key} of {name}"] = range(at := data.index(raw), at + len(raw))
    for name in ("0.bias", "3.weight"):
        raw = bundle.floats[name].detach().numpy().tobytes()
        found[f"float {name}"] = range(at := data.index(raw), at + len(raw))
    said = data.index(b'{"weights"')
    found["names"] = range(said, data.index(b"}}", said) + 2)
    graph = data.index(b"XH00")
    found["header of XNNPACK"] = range(graph - 4, graph + 26)
    found["graph of XNNPACK"] = range(graph + 28, graph + 28 + int.from_bytes(data[graph + 10 : graph + 14], "little"))
    found["program"] = range(64, int.from_bytes(data[16:24], "little"))
    return found


def mutations(data: bytes, bundle: qat.Bundle, each: int) -> Iterator[tuple[str, str, bytes]]:
    """(part, what was done, the file)."""
    g = torch.Generator().manual_seed(0)

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=g))

    for part, where in places(data, bundle).items():
        for _ in range(each):
            at = where[pick(len(where))]
            yield part, f"bit at {at}", data[:at] + bytes([data[at] ^ (1 << pick(8))]) + data[at + 1 :]
    for part in range(8):
        yield "cut", f"cut at {part}/8", data[: len(data) * part // 8]
    for part in ("header", "graph of XNNPACK", "program", "names"):
        where = places(data, bundle)[part]
        for number in range(4):
            at = where[pick(len(where) - 4)]
            word = (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80")[number]
            yield part, f"word at {at}", data[:at] + word + data[at + 4 :]


# The runtime trusts its files and is not asked: `read` parses them in Python, and flatc in a process of its own.
@needs
@pytest.mark.consumer
@pytest.mark.slow
def test_damaged_files(small: Small, tmp_path: Path, record_property: Any) -> None:
    data, records, bundle = small
    fmt, counts = get_format("executorch"), {"refused": 0, "as it was": 0}
    for part, what, changed in mutations(data, bundle, 11):
        (tmp_path / "model.pte").write_bytes(changed)
        try:
            read_back(fmt, tmp_path, records)
        except ExportError as problem:
            counts["refused"] += 1
            assert "\n" not in str(problem) and len(str(problem)) < 600, (part, what)
        except Exception as problem:
            raise AssertionError(f"{part}, {what}: {type(problem).__name__} got out") from problem
        else:
            counts["as it was"] += changed != data
            # bytes of a header or a graph that say nothing of a tensor
            assert not part.startswith(("codes", "scale", "float", "cut")), (part, what)
    record_property("cases", counts)
    assert sum(counts.values()) >= 100 and counts["refused"] > sum(counts.values()) // 3


@needs
def test_a_weight_whose_input_is_not_rounded(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XNNPACK computes wrong numbers then, so such a file holds no weight."""
    (tmp_path / "model.pte").write_bytes(small[0])
    graph = pte_reader._graph

    def changed(payload: bytes) -> dict[str, Any]:
        text = json.dumps(graph(payload)).replace("PerTokenDynamicQuant", "PerTensorQuant")
        return json.loads(text)  # type: ignore[no-any-return]

    monkeypatch.setattr(pte_reader, "_graph", changed)
    with pytest.raises(ExportError, match="inputs are not rounded token by token"):
        list(get_format("executorch").read(tmp_path))


# ---- the process -----------------------------------------------------------------------------------------------------

SCRIPT = """
import logging, os, sys, warnings
import torch, qat
from qat.export import get_format
from qat.recipes import from_dict
environment, handlers, level = dict(os.environ), list(logging.getLogger().handlers), logging.getLogger().level
filters, limit, threads = list(warnings.filters), sys.getrecursionlimit(), torch.get_num_threads()
read = dict(get_format("executorch").read(__import__("pathlib").Path(sys.argv[1])))
assert "0.weight" in read and "executorch" in sys.modules
assert dict(os.environ) == environment, set(os.environ) ^ set(environment)
assert logging.getLogger().handlers == handlers and logging.getLogger().level == level
assert warnings.filters == filters and sys.getrecursionlimit() == limit and torch.get_num_threads() == threads
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
"""


@needs
@pytest.mark.slow
def test_the_process_is_left_as_it_was(small: Small, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(small[0])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, cwd=Path(qat.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
