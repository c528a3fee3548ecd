"""ONNX: weights as onnxruntime computes them, and whole models as it runs them.

onnxruntime adds up products in another order than torch does: sums of n fp32 products differ by up to n * 2^-24 of
their magnitude, layer after layer. The bounds below are 1e-5 of the largest output (measured: 3e-6 and less).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import onnx  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

import qat  # noqa: E402
from qat.errors import ExportError  # noqa: E402
from qat.export import export, get_format, onnx_reader, onnx_tensors  # noqa: E402
from qat.layout import Layout  # noqa: E402
from qat.qtensor import QTensor  # noqa: E402
from qat.recipes import from_dict  # noqa: E402
from qat.specs import QuantSpec  # noqa: E402
from qat.verify import verify  # noqa: E402

STATIC = {"bits": 8, "granularity": "tensor", "quantizer": "ema"}
BY_GROUP = {"granularity": "group", "group_size": 32, "quantizer": "absmax"}
BY_ROW = {"granularity": "channel", "quantizer": "absmax"}
BY_TENSOR = {"granularity": "tensor", "quantizer": "absmax"}
ASYMMETRIC = {"zero_point": "int", "quantizer": "minmax"}

# of Linear layers 64 -> 64
GRIDS: dict[str, dict[str, Any]] = {
    "int1": {"bits": 1, **BY_GROUP, "quantizer": "mse"},
    "int2": {"bits": 2, **BY_GROUP},
    "ternary": {"bits": 2, "grid": "ternary", **BY_ROW, "quantizer": "absmean"},
    "uint2": {"bits": 2, "signed": False, **BY_GROUP, **ASYMMETRIC},
    "int3": {"bits": 3, **BY_GROUP},
    "int4": {"bits": 4, **BY_GROUP},
    "int4_either": {"bits": 4, **BY_GROUP, "signed_scale": True, "quantizer": "mse"},
    "int4_small": {"bits": 4, **BY_GROUP, "group_size": 16},
    "int4_row": {"bits": 4, **BY_ROW},
    "int4_tensor": {"bits": 4, **BY_TENSOR},
    "int4_zero": {"bits": 4, **BY_GROUP, **ASYMMETRIC},
    "uint4_zero": {"bits": 4, "signed": False, **BY_GROUP, **ASYMMETRIC},
    "uint4_row": {"bits": 4, "signed": False, **BY_ROW, **ASYMMETRIC},
    "int5": {"bits": 5, **BY_GROUP, "scale": "fp16"},
    "int8": {"bits": 8, **BY_ROW, "scale": "fp32"},
    "int8_narrow": {"bits": 8, "narrow": True, **BY_TENSOR},
    "uint8": {"bits": 8, "signed": False, **BY_ROW, **ASYMMETRIC},
    "int8_group": {"bits": 8, **BY_GROUP, **ASYMMETRIC},
    "power": {"bits": 8, **BY_GROUP, "scale": "e8m0"},
}
FLOATS: dict[str, dict[str, Any]] = {
    "e4m3": {"bits": 8, "grid": "e4m3", **BY_ROW},
    "e5m2": {"bits": 8, "grid": "e5m2", **BY_GROUP},
}
# layers beside the linear ones, and their grids
OTHERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3), {"bits": 8, **BY_ROW}),
    "conv_group": (lambda: nn.Conv2d(4, 6, 2), {"bits": 4, **BY_GROUP, "group_size": 8}),
    "conv_depth": (lambda: nn.Conv2d(4, 4, 3, groups=4), {"bits": 4, **BY_ROW}),
    "deconv": (lambda: nn.ConvTranspose2d(4, 6, 3), {"bits": 8, **BY_ROW}),
    "table": (lambda: nn.Embedding(10, 64), {"bits": 4, **BY_GROUP}),
}


class Net(nn.Module):
    """Every layer on the same input; a pooler that nothing reads, a counter, two equal norms, a bias of zeros."""

    def __init__(self, grids: dict[str, Any]) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({name: nn.Linear(64, 64, bias=name != "int4") for name in grids})
        self.other = nn.ModuleDict({name: make() for name, (make, _) in OTHERS.items()})
        self.norms = nn.ModuleList([nn.LayerNorm(64), nn.LayerNorm(64)])
        self.pooler = nn.Linear(64, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        nn.init.zeros_(self.linear["int8"].bias)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {name: layer(x) for name, layer in self.linear.items()}
        image = x.reshape(-1, 4, 4, 4)
        found |= {name: layer(ids if name == "table" else image) for name, layer in self.other.items()}
        return found | {"normed": self.norms[1](self.norms[0](x))}


def prepared(model: nn.Module, rules: dict[str, Any], *seen: Any) -> qat.Bundle:
    # the readers compute with floats
    qat.prepare(model, from_dict({"name": "small", "rules": rules, "phases": {"qat": {"steps": -1}}}), real=False)
    for batch in seen:
        model.train()(**batch) if isinstance(batch, dict) else model.train()(batch)
        qat.after_optimizer_step(model)
    model.eval()
    return qat.convert(model)


def session(folder: Path, exact: bool = False, apart: bool = False) -> Any:
    """exact: a DequantizeLinear and a MatMul that are fused multiply in fp32; by default their input becomes int8.
    apart: nothing is fused."""
    options = ort.SessionOptions()
    if apart:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def run(
    folder: Path, given: dict[str, torch.Tensor], exact: bool = False, apart: bool = False
) -> dict[str, torch.Tensor]:
    live = session(folder, exact, apart)
    outputs = live.run(None, {name: value.numpy() for name, value in given.items()})
    return {out.name: torch.from_numpy(value) for out, value in zip(live.get_outputs(), outputs, strict=True)}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours.float() - theirs).abs().max()) <= 1e-5 * float(ours.abs().max())


BATCH = {"x": torch.randn(5, 64, generator=torch.Generator().manual_seed(3)), "ids": torch.arange(7)}


def every_grid(format: str) -> tuple[nn.Module, qat.Bundle]:
    grids = GRIDS | (FLOATS if format == "onnx" else {})
    torch.manual_seed(0)
    model = Net(grids).eval()
    rules = {name: {"match": [f"linear.{name}"], "weight": words} for name, words in grids.items()}
    rules |= {name: {"match": [f"other.{name}"], "weight": words} for name, (_, words) in OTHERS.items()}
    return model, prepared(model, rules)


@pytest.fixture(scope="module", params=["onnx", "onnx-nbits"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(format, model, bundle, folder) of a model with every grid."""
    model, bundle = every_grid(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "out"
    # fewer numbers than the calls below have: the first dimension is free
    example = {"x": BATCH["x"][:2], "ids": BATCH["ids"][:3]}
    receipt = export(bundle, folder, request.param, example_inputs=example)
    assert receipt.max_abs_diff == 0.0 and receipt.reader.startswith("onnxruntime 1.")
    yield request.param, model, bundle, folder


# Turned red by: an axis or a block size of 0 for 1, the high nibble first, zero points left out, an offset of
# MatMulNBits, scales of a tensor not repeated, codes of a transposed or convolved weight in the order of its rows.
@pytest.mark.consumer
def test_every_grid_is_what_onnxruntime_computes(exported: Any) -> None:
    format, model, bundle, folder = exported
    rows = {row.name: row for row in verify(folder)}
    assert set(bundle) <= set(rows) and all(row.max_abs_diff == 0 for row in rows.values())
    read = dict(get_format(format).read(folder))
    for name, trained in bundle.items():
        assert torch.equal(read[name], trained.dequantize()), name
    found = run(folder, BATCH)
    with torch.no_grad():
        wanted = model(**BATCH)
    assert set(found) == set(wanted)
    for name, ours in wanted.items():
        assert_close(ours, found[name])


# Turned red by reading the file's own arithmetic otherwise: no zero point, scales of another axis.
def test_our_own_arithmetic_is_onnxruntimes(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    format, _, bundle, folder = exported
    theirs = dict(get_format(format).read(folder))
    monkeypatch.setattr(onnx_reader, "installed", lambda: False)
    ours = dict(get_format(format).read(folder))
    assert {row.reader for row in verify(folder)} == {"qat"}
    assert set(ours) == set(theirs) and len(bundle) < len(ours)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# Turned red by types of 8 bits for all codes, and by stack traces that are left in the file.
def test_what_lies_in_the_file(exported: Any) -> None:
    format, _, bundle, folder = exported
    model = onnx.load(folder / "model.onnx")
    kinds = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in model.graph.initializer}
    names = set(kinds)
    if format == "onnx":
        wanted = {
            "int1": "INT2",
            "uint2": "UINT2",
            "int3": "INT4",
            "uint4_row": "UINT4",
            "int5": "INT8",
            "uint8": "UINT8",
        }
        wanted |= {"e4m3": "FLOAT8E4M3FN", "e5m2": "FLOAT8E5M2"}
        assert {name: kinds[f"linear.{name}.weight_quantized"] for name in wanted} == wanted
        assert "linear.int4.weight_zero_point" not in names and "linear.int4_zero.weight_zero_point" in names
    else:
        products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        assert len(products) == len(GRIDS) and {node.domain for node in products} == {"com.microsoft"}
        assert "linear.int4.weight_zero_points" not in names and "linear.int4_zero.weight_zero_points" in names
    # no float copy of a planned weight, no mark, no place where the graph was made
    assert not names & set(bundle) and not any("parametrizations" in name for name in names)
    assert all(node.domain in ("", "com.microsoft") and not node.metadata_props[1:] for node in model.graph.node)
    assert b".py" not in (folder / "model.onnx").read_bytes()
    # what the graph does not read is not in the file; what is equal, or zero, is
    assert not {"pooler.weight", "count"} & names
    assert {"norms.0.weight", "norms.1.weight", "linear.int8.bias"} <= names
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", ""]


def qtensor(codes: torch.Tensor, scale: Any, zero: Any = None, kind: str = "linear", **words: Any) -> QTensor:
    spec = QuantSpec(quantizer="minmax" if zero is not None else "absmax", **words)
    shape = tuple(codes.shape)
    rows = Layout(shape, kind).to_rows(codes)
    zeros = None if zero is None else torch.tensor(zero, dtype=torch.int16)
    return QTensor(
        rows.to(spec.grid.code_dtype), torch.tensor(scale), zeros, None, spec, Layout(shape, kind), torch.float32
    )


# By hand, from the layouts in the modules' docstrings.
def test_golden_bytes() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    packed = onnx_tensors.pack(qtensor(codes, [[0.5], [2.0]], [[1], [2]], bits=2, signed=False, zero_point="int"))
    assert packed["quantized"].tolist() == [0b11100100, 0b00011011] and packed["zero_point"].tolist() == [0b1001]
    assert packed["scale"].tolist() == [0.5, 2.0]
    packed = onnx_tensors.pack(qtensor(torch.tensor([[-8, 7, -1]]), [[0.5]], bits=4))
    assert packed["quantized"].tolist() == [0x78, 0x0F]
    # [I, O] as GPT-2 keeps it: blocks of two inputs run down the columns
    turned = qtensor(
        torch.tensor([[1, 2], [3, 4], [5, 6], [7, -8]]),
        [[1.0, 2.0], [3.0, 4.0]],
        None,
        "transposed",
        bits=4,
        granularity="group",
        group_size=2,
    )
    assert onnx_tensors.place_of(turned.spec, turned.layout) == onnx_tensors.Place((4, 2), 0, 2)
    packed = onnx_tensors.pack(turned)
    assert packed["quantized"].tolist() == [0x21, 0x43, 0x65, 0x87] and packed["scale"].tolist() == [[1, 3], [2, 4]]
    by_group = qtensor(torch.arange(-8, 8).repeat(2, 1), [[0.5], [2.0]], bits=4, granularity="group", group_size=16)
    packed = get_format("onnx-nbits").pack("x.weight", by_group)
    assert packed["B"].tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]] * 2
    assert packed["scales"].tolist() == [[0.5], [2.0]] and "zero_points" not in packed
    zeros = qtensor(
        torch.arange(16).repeat(2, 1),
        [[0.5], [2.0]],
        [[3], [9]],
        bits=4,
        signed=False,
        zero_point="int",
        granularity="group",
        group_size=16,
    )
    assert get_format("onnx-nbits").pack("x.weight", zeros)["zero_points"].tolist() == [[3], [9]]


@pytest.mark.parametrize("kind", sorted(onnx_tensors.CHANNEL))
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_every_layout_comes_back(kind: str, granularity: str) -> None:
    shape = {"conv": (4, 4, 2, 2), "deconv": (4, 4, 2, 2)}.get(kind, (16, 16))
    if (kind, granularity) == ("deconv", "group"):
        return
    size = 4 if granularity == "group" else None
    spec = QuantSpec(bits=4, granularity=granularity, group_size=size, zero_point="int", quantizer="minmax")
    from qat.quantizers import make_quantizer

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantizer = make_quantizer(spec, Layout(shape, kind))
    tensor = quantizer.integers(weight)
    back = onnx_tensors.unpack(onnx_tensors.pack(tensor), spec, tensor.layout, torch.float32)
    assert torch.equal(back.codes, tensor.codes) and torch.equal(back.dequantize(), tensor.dequantize())


# ---- models of transformers ------------------------------------------------------------------------------------------


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = pytest.importorskip("sklearn.datasets", reason="digits come with scikit-learn").load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


# Turned red by an input that is not rounded, by zero points of the other sign, by batch norms of training; folded: by a
# bias that stays the layer's own, by a norm that stays in the graph.
@pytest.mark.consumer
@pytest.mark.parametrize(
    "fold, bits", [(False, 8), (True, 8), (True, 7)], ids=["with norms", "norms folded", "norms folded, 7 bits"]
)
def test_a_resnet_of_8_bits_classifies_digits_as_its_fake_quantized_model(
    fold: bool, bits: int, tmp_path: Path, ran: Any, exact_sums: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    model = transformers.ResNetForImageClassification(config)
    images, labels = digits()
    slot = {"bits": bits, "granularity": "channel", "quantizer": "lsq"}
    rules = {"layers": {"types": ["Conv2d", "Linear"], "weight": slot, "input": {**STATIC, "zero_point": "int"}}}
    phases = {"learn": {"steps": 60}, "settle": {"freeze_batch_norm": True}} if fold else {"qat": {"steps": -1}}
    norms = {"fold": True} if fold else {}
    qat.prepare(model, from_dict({"name": "w8a8", "rules": rules, "phases": phases, "batch_norm": norms}), real=False)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(90 if fold else 60):
        if step == 60:
            # nothing normalizes what the weights do now
            optimizer.param_groups[0]["lr"] = 5e-4
        at = torch.arange(step * 64, step * 64 + 64) % 1400
        if step == 59:
            # the statistics that stay are those of these weights
            qat.reestimate_batch_norm(model, images[:1400].split(200))
        nn.functional.cross_entropy(model.train()(images[at]).logits, labels[at]).backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model)
    model.eval()
    with pytest.raises(ExportError, match=r"not known what the model is called with; give qat\.export"):
        export(qat.convert(model), tmp_path / "out", "onnx")
    export(model, tmp_path / "out", "onnx", example_inputs=images[:2])
    held_out = images[1400:]
    # a convolution and its ReLU become one integer kernel where no norm is between them; of codes of 8 bits its sums of
    # two products saturate on a CPU without VNNI
    whole = fold and bits == 8 and not exact_sums
    theirs = run(tmp_path / "out", {"pixel_values": held_out}, apart=whole)["logits"]
    nodes = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert ("BatchNormalization" in nodes) != fold
    with torch.no_grad():
        ours = model(held_out).logits
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    what = f"ResNet of {bits} bits trained on digits{', batch norms folded' if fold else ''}"
    ran("onnx", "onnxruntime", what, logits=(ours - theirs).abs().max())
    assert float((ours.argmax(-1) == labels[1400:]).float().mean()) > 0.8
    # an input within 1e-6 of the middle between two codes may round the other way: one step of one number
    assert float((ours - theirs).abs().mean()) < 1e-3 * float(ours.abs().mean())
    names = {row.name for row in verify(tmp_path / "out")}
    assert "resnet.embedder.embedder.convolution.input_zero_point" in names
    assert any(".normalization." in name for name in names) != fold
    assert ("resnet.embedder.embedder.convolution.bias" in names) == fold
    json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.consumer
def test_an_encoder_of_8_and_4_bits(tmp_path: Path, ran: Any, exact_sums: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=64)).eval()
    ids = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([[9], [6], [3]])).long()
    given = {"input_ids": ids, "attention_mask": mask}
    rules = {
        "linears": {"types": ["Linear"], "weight": {"bits": 8, **BY_ROW}, "input": STATIC},
        "tables": {"types": ["Embedding"], "weight": {"bits": 8, **BY_ROW}},
        "wide": {"match": ["*.intermediate.dense", "*.value"], "weight": {"bits": 4, **BY_GROUP}},
    }
    bundle = prepared(model, rules, given, given)
    export(bundle, tmp_path / "out", "onnx")
    theirs = run(tmp_path / "out", given, apart=not exact_sums)["last_hidden_state"]
    with torch.no_grad():
        ours = model(**given).last_hidden_state
    assert float(nn.functional.cosine_similarity(ours, theirs, dim=-1).min()) > 1 - 1e-6
    ran("onnx", "onnxruntime", "BERT of 8 and 4 bits", states=(ours - theirs).abs().max())
    assert_close(ours, theirs)


# Turned red by [I, O] taken for [O, I], by a tied head that is written twice, by a mark that is left.
@pytest.mark.consumer
@pytest.mark.parametrize("format", ["onnx", "onnx-nbits"])
def test_gpt2(format: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=64, n_positions=32, **ends)
    model = transformers.GPT2LMHeadModel(config).eval()
    types = ["Conv1D", "Linear", "Embedding"]
    bundle = prepared(model, {"layers": {"types": types, "weight": {"bits": 4, **BY_GROUP}}})
    export(bundle, tmp_path / "out", format)
    ids = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(1))
    theirs = run(tmp_path / "out", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, exact=True)["logits"]
    with torch.no_grad():
        assert_close(model(ids).logits, theirs)
    stored = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert sum(i.name.endswith("wte.weight_quantized") for i in stored.initializer) == 1
    assert not any(i.name.startswith("lm_head") for i in stored.initializer)
    assert any(node.op_type == "MatMulNBits" for node in stored.node) == (format == "onnx-nbits")


# ---- how it is called ------------------------------------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).to(dtype).eval()


LINEAR4 = {"linears": {"types": ["Linear"], "weight": {"bits": 4, **BY_GROUP, "group_size": 16}}}
X = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))


# Turned red by weights of the file in another dtype than the graph's, or by floats that are rounded.
@pytest.mark.consumer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_half_precision_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small(dtype)
    bundle = prepared(model, LINEAR4)
    export(bundle, tmp_path / "out", "onnx", example_inputs=X)
    read = dict(get_format("onnx").read(tmp_path / "out"))
    for name, trained in bundle.items():
        assert torch.equal(read[name], trained.dequantize(torch.float32)), name
        assert torch.equal(read[name].to(dtype), trained.dequantize())
    theirs = run(tmp_path / "out", {"input": X})
    with torch.no_grad():
        ours = model(X.to(dtype))
    assert float((ours.float() - next(iter(theirs.values()))).abs().max()) < 2e-2 * float(ours.abs().max())


# Turned red by tensors that are all put into the graph's own file, or by an external file that is not read.
@pytest.mark.consumer
def test_a_large_model_lies_in_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_format("onnx")), "external", 100)
    model = small()
    model.example_input_array = X  # Lightning's word
    receipt = export(prepared(model, LINEAR4), tmp_path / "out", "onnx")
    assert [file.name for file in receipt.files] == ["model.onnx", "model.onnx.data"]
    with torch.no_grad():
        assert_close(model(X), next(iter(run(tmp_path / "out", {"input": X}).values())))
    data = tmp_path / "out" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-40])
    with pytest.raises(ExportError, match=r"model.onnx.data has"):
        verify(tmp_path / "out")
    with pytest.raises(ExportError, match=r"is not an ONNX file|cannot be decoded"):
        list(get_format("onnx").read(tmp_path / "out"))


# Turned red by a copy that takes the trainer or the teacher along, or by a callback that forgets its example.
@pytest.mark.consumer
def test_the_callback_rehearses_and_exports(tmp_path: Path) -> None:
    import pytorch_lightning as pl

    from qat.callbacks import DistillationCallback, ExportCallback, QATCallback

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-2)

    recipe = from_dict({"name": "small", "rules": LINEAR4, "export": {"targets": ["onnx"]}})
    module, data = Lit(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X.repeat(4, 1)), batch_size=4)
    exporter = ExportCallback(tmp_path / "out", example_inputs=X)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[QATCallback(recipe, real=False), DistillationCallback(), exporter],
    )
    trainer.fit(module, data)
    assert exporter.receipts["onnx"].max_abs_diff == 0
    with torch.no_grad():
        assert_close(module.eval()(X), run(tmp_path / "out", {"x": X})["output"])


# Turned red by the adapter's own forward in the graph, and by arguments that are taken for one.
@pytest.mark.consumer
def test_adapters_are_in_the_codes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    model = peft.get_peft_model(small(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    bundle = prepared(model, LINEAR4)
    export(bundle, tmp_path / "out", "onnx", example_inputs=X)
    (given,) = (value.name for value in session(tmp_path / "out").get_inputs())
    with torch.no_grad():
        assert_close(model(X), next(iter(run(tmp_path / "out", {given: X}).values())))
    assert set(dict(get_format("onnx").read(tmp_path / "out"))) == {"0.weight", "0.bias", "2.weight", "2.bias"}


# Turned red by example inputs that a config does not give, and by a tokenizer that is not saved.
@pytest.mark.consumer
def test_the_command_line_exports_a_tied_model(
    make_model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qat.cli import main

    model = make_model(tie_word_embeddings=True, num_hidden_layers=1, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    rules = {"layers": {"types": ["Linear", "Embedding"], "weight": {"bits": 4, **BY_GROUP}}}
    prepared(model, rules)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    folder = tmp_path / "out"
    words = ["export", str(tmp_path / "x.ckpt"), "--model", str(tmp_path / "float"), "--out", str(folder)]
    assert main([*words, "--format", "onnx"]) == 0 and "equals the trained weight" in capsys.readouterr().out
    assert (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file()
    ids = torch.randint(0, 300, (3, 11), generator=torch.Generator().manual_seed(1))
    theirs = run(folder, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"]
    with torch.no_grad():
        assert_close(model(ids).logits, theirs)
    assert main(["verify", str(folder)]) == 0


def plan_reasons(format: str, rules: dict[str, Any], model: nn.Module) -> str:
    plan = qat.plan(model, from_dict({"name": "small", "rules": rules}))
    return "; ".join(get_format(format).check(plan))


def test_refusals_before_training() -> None:
    def linear(**words: Any) -> dict[str, Any]:
        return {"linears": {"types": ["Linear"], "weight": {"bits": 4, **BY_GROUP, "group_size": 16, **words}}}

    def with_input(**words: Any) -> dict[str, Any]:
        return {"l": {"types": ["Linear"], "weight": {"bits": 8, **BY_ROW}, "input": {**STATIC, **words}}}

    model = small()
    assert plan_reasons("onnx", linear(), model) == "" and plan_reasons("onnx-nbits", linear(), model) == ""
    assert "zero_point=float" in plan_reasons(
        "onnx", linear(signed=False, zero_point="float", quantizer="minmax"), model
    )
    assert "grid nf4" in plan_reasons("onnx", linear(grid="nf4"), model)
    assert "blocks of MatMulNBits" in plan_reasons("onnx-nbits", linear(group_size=8), model)
    assert plan_reasons("onnx", with_input(), model) == ""
    dynamic = with_input(granularity="token", quantizer="absmax")
    assert "input granularity=token: onnx holds one range per input" in plan_reasons("onnx", dynamic, model)
    assert "gives all codes" in plan_reasons("onnx", with_input(narrow=True), model)
    assert "integers of 8 or 4 bits" in plan_reasons("onnx", with_input(bits=6), model)
    either = {"l": {**with_input()["l"], "weight": {"bits": 4, **BY_ROW, "quantizer": "mse", "signed_scale": True}}}
    assert "signed_scale=true beside a quantized input" in plan_reasons("onnx", either, model)
    turned = {"l": {"types": ["ConvTranspose2d"], "weight": {"bits": 4, "granularity": "group", "group_size": 4}}}
    assert "transposed convolution" in plan_reasons("onnx", turned, nn.Sequential(nn.ConvTranspose2d(4, 4, 2)))


def test_refusals_of_a_model(tmp_path: Path) -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if float(x.sum()) > 0 else x

    wide = {"linears": {"types": ["Linear"], "weight": {"bits": 4, **BY_GROUP}}}
    by_call = {**STATIC, "quantizer": "absmax"}
    cases: dict[str, qat.Bundle] = {
        "idle.weight is not read by the graph": prepared(Unread().eval(), wide),
        "cannot be traced with these example inputs": prepared(Branch().eval(), wide),
        "is torch.float64; the graph computes in float32": prepared(small(torch.float64), LINEAR4),
        "the input of 0 has a range of its own in every call": prepared(
            small(), {"l": {"types": ["Linear"], "weight": {"bits": 8, **BY_ROW}, "input": by_call}}
        ),
    }
    for words, bundle in cases.items():
        with pytest.raises(ExportError, match=words):
            export(bundle, tmp_path / "out", "onnx", example_inputs=X)
    assert list(tmp_path.iterdir()) == []


# ---- damaged files ---------------------------------------------------------------------------------------------------


def mutations(path: Path) -> Iterator[tuple[str, bytes]]:
    """What was done -> the file: bytes anywhere, tensors, shapes, types, attributes, nodes and names."""
    whole = path.read_bytes()
    g = torch.Generator().manual_seed(0)

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=g))

    for number in range(40):
        at = pick(len(whole))
        yield f"byte {at}", whole[:at] + bytes([whole[at] ^ (1 << pick(8))]) + whole[at + 1 :]
        if number % 4 == 0:
            yield f"cut at {at}", whole[:at]
    fresh = lambda: onnx.ModelProto.FromString(whole)  # noqa: E731
    count = len(fresh().graph.initializer)
    for index in range(count):
        for what in ("raw", "short", "dims", "type", "name", "gone", "outside"):
            model = fresh()
            tensor = model.graph.initializer[index]
            if what == "raw":
                tensor.raw_data = bytes([tensor.raw_data[0] ^ 0x15]) + tensor.raw_data[1:]
            elif what == "short":
                tensor.raw_data = tensor.raw_data[:-1]
            elif what == "dims":
                tensor.dims[:] = [*tensor.dims, 2]
            elif what == "type":
                tensor.data_type = onnx.TensorProto.STRING
            elif what == "name":
                tensor.name += "x"
            elif what == "gone":
                del model.graph.initializer[index]
            else:
                tensor.data_location = onnx.TensorProto.EXTERNAL
                tensor.external_data.add(key="location", value="../../etc/passwd")
            yield f"{what} of {index}", model.SerializeToString()
    for index, node in enumerate(fresh().graph.node):
        for what in ("op", "axis", "output"):
            model = fresh()
            changed = model.graph.node[index]
            if what == "op":
                changed.op_type = "Nothing"
            elif what == "axis":
                for attribute in changed.attribute:
                    attribute.i += 7
            else:
                changed.output[0] += "x"
            yield f"{what} of node {index} {node.op_type}", model.SerializeToString()
    for value in ("", "[]", "{", '{"weights": {}}', '{"weights": {"a": 1}, "floats": {}, "inputs": {}}'):
        model = fresh()
        for entry in model.metadata_props:
            entry.value = value
        yield f"metadata {value}", model.SerializeToString()


# Turned red by an exception of protobuf's or onnxruntime's that gets out.
@pytest.mark.parametrize("format", ["onnx", "onnx-nbits"])
def test_damaged_files(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.export.format import read_back

    rules = {"l": {**LINEAR4["linears"], "input": {**STATIC, "zero_point": "int"}}}
    bundle = prepared(small(), rules, X)
    receipt = export(bundle, tmp_path / "out", format, example_inputs=X)
    path = tmp_path / "out" / "model.onnx"
    whole = path.read_bytes()
    # a node without attributes has none to change
    damaged = [(what, data) for what, data in mutations(path) if data != whole]
    count = refused = 0
    for consumer, (what, data) in [(consumer, each) for consumer in (True, False) for each in damaged]:
        monkeypatch.setattr(onnx_reader, "installed", lambda now=consumer: now)
        path.write_bytes(data)
        count += 1
        try:
            read_back(get_format(format), tmp_path / "out", receipt.tensors)
        except ExportError as problem:
            refused += 1
            assert "\n" not in str(problem), what
        except Exception as problem:
            raise AssertionError(f"{what}: {type(problem).__name__} got out") from problem
        # whatever the tensors say, it is not the file that was exported
        with pytest.raises(ExportError):
            verify(tmp_path / "out")
    assert count >= 200 and refused > count // 2
    path.write_bytes(whole)
    assert len(verify(tmp_path / "out")) == len(receipt.tensors)


def test_numpy_helper_knows_the_types() -> None:
    """`onnx` itself unpacks what we packed: the order of nibbles and bits is its own."""
    tensor = qtensor(torch.tensor([[-8, 7, -1], [3, -4, 0]]), [[0.5], [1.0]], bits=4)
    raw = onnx_tensors.pack(tensor)["quantized"].numpy().tobytes()
    proto = helper.make_tensor("w", onnx.TensorProto.INT4, (2, 3), raw, raw=True)
    assert numpy_helper.to_array(proto).astype(int).tolist() == [[-8, 7, -1], [3, -4, 0]]
