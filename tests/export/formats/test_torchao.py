"""torchao: what it decodes is what was trained, and transformers runs it.

Mutations that were tried one at a time, and the test that turned red for each:

    unsigned codes stored as they are            test_transformers_runs_the_trained_weights
    zero points left at 0                        test_transformers_runs_the_trained_weights
    Int8Tensor for 8 bits with zero points       test_every_grid_that_is_not_refused
    no list of the layers that stay in float     test_mixed_layers_embeddings_and_several_files
    one name only in tensor_names                test_transformers_runs_the_trained_weights
    float tensors left out of the metadata       test_mixed_layers_embeddings_and_several_files
    a tied head stored again                     test_mixed_layers_embeddings_and_several_files
    scales stored without asking                 test_golden_layers
    codes beyond their dtype read                test_damaged_metadata
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat.errors import ExportError, QATError
from qat.export import export
from qat.export.formats.torchao import FLOAT8, INT8, INTX, TorchAo, _described, kind_of, stored_as
from qat.init.file import start_from_file
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor
from qat.quantizers import make_quantizer
from qat.specs import QuantSpec
from qat.verify import verify

KEEP_HEAD = {"match": ["lm_head"], "keep_float": True}
BOTH = ("Linear", "Embedding")
BY_ROW = {"granularity": "channel", "group_size": None}
UNSIGNED = {"signed": False, "zero_point": "int", "quantizer": "minmax"}
IDS = torch.arange(24).reshape(2, 12)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

GRIDS: dict[str, dict[str, Any]] = {
    "int2": {"bits": 2},
    "int3 with zero points": {"bits": 3, **UNSIGNED},
    "int4": {"bits": 4},
    "int4 by row": {"bits": 4, **BY_ROW},
    "int5 with signed zero points": {"bits": 5, "zero_point": "int", "quantizer": "minmax"},
    "int8 in groups": {"bits": 8},
    "int8": {"bits": 8, **BY_ROW},
    "int8 by tensor": {"bits": 8, "granularity": "tensor", "group_size": None},
    "int8 with zero points": {"bits": 8, **BY_ROW, **UNSIGNED},
    "ternary": {"grid": "ternary", "bits": 2, "quantizer": "absmean", "granularity": "tensor", "group_size": None},
    "e4m3": {"grid": "e4m3", "bits": 8, **BY_ROW},
    "e5m2": {"grid": "e5m2", "bits": 8, **BY_ROW},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()  # type: ignore[no-any-return]


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Every tensor of the folder has found its place, and none was made up."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu", output_loading_info=True
    )
    assert not any(found.values()), found
    return model


def assert_same_weights(loaded: Any, bundle: Any) -> None:
    for name, trained in bundle.items():
        weight = loaded.get_submodule(name.rpartition(".")[0]).weight
        assert type(weight).__name__ == kind_of(trained.spec), name
        found = weight.dequantize()
        assert found.dtype == trained.out_dtype and torch.equal(found, trained.dequantize()), name
    state = loaded.state_dict()
    for name, value in bundle.floats.items():
        assert type(state[name]) is torch.Tensor and torch.equal(state[name], value), name


@pytest.mark.consumer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_transformers_runs_the_trained_weights(
    name: str, dtype: torch.dtype, make_model: Any, quantize: Any, ran: Any, tmp_path: Path
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = make_model(dtype=dtype, attention_bias=True)
    bundle = quantize(model, GRIDS[name], head=KEEP_HEAD)
    receipt = export(bundle, tmp_path / "out", "torchao")
    assert receipt.reader.startswith("torchao 0.") and receipt.max_abs_diff == 0.0
    loaded = load(tmp_path / "out", dtype)
    assert_same_weights(loaded, bundle)
    # whose frequencies `model.to(dtype)` rounded, while transformers loads them in fp32
    model.model.rotary_emb = loaded.model.rotary_emb
    ours, theirs = logits(model), logits(loaded)
    if name in ("int8", "int8 by tensor", "e4m3", "e5m2"):
        # Int8Tensor multiplies with the codes and scales the sums; Float8Tensor adds the bias to a rounded sum
        away = {"kl": kl(ours, theirs)}
        assert away["kl"] < (1e-9 if dtype == torch.float32 else 2e-3)
    else:
        away = {"logits": (theirs - ours).abs().max().item()}
        assert torch.equal(theirs, ours)
    ran("torchao", "transformers", f"{name} in {str(dtype)[6:]}", **away)
    verify(tmp_path / "out")


@pytest.mark.consumer
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_mixed_layers_embeddings_and_several_files(
    tied: bool, make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    monkeypatch.setattr(TorchAo, "shard_bytes", 20_000)
    own = {"granularity": "channel", "quantizer": "absmax", "bits": 8}
    rules = {
        "v": {"match": ["*v_proj"], "weight": own},
        "down": {"match": ["*down_proj"], "weight": {**own, "grid": "e4m3"}},
        "up": {"match": ["*.0.*up_proj"], "keep_float": True},
    }
    model = make_model(dtype=torch.bfloat16, tie_word_embeddings=tied)
    bundle = quantize(model, {"bits": 4}, BOTH, **rules)
    export(bundle, tmp_path / "out", "torchao")
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["tensor_names"])
            assert set(names) == {*bundle, *bundle.floats} and set(names) <= set(file.metadata())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["model.layers.0.mlp.up_proj"]
    assert config["include_input_output_embeddings"] is True
    said = config["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert said["model.layers.1.mlp.down_proj"]["_type"] == "Float8WeightOnlyConfig"
    assert said["model.layers.1.mlp.up_proj"]["_data"]["granularity"]["_data"] == {"group_size": 32}
    loaded = load(tmp_path / "out", torch.bfloat16)
    assert_same_weights(loaded, bundle)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    model.model.rotary_emb = loaded.model.rotary_emb
    assert kl(logits(model), logits(loaded)) < 2e-3


@pytest.mark.consumer
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_it_is_what_torchao_writes_of_such_tensors(name: str, make_model: Any, quantize: Any, tmp_path: Path) -> None:
    """Names, dtypes, metadata and `quant_type`, by its own writer and its own reader of configurations."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.core.config import AOBaseConfig, config_from_dict, config_to_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    bundle = quantize(make_model(num_hidden_layers=1), GRIDS[name], head=KEEP_HEAD)
    export(bundle, tmp_path / "out", "torchao")
    state = load(tmp_path / "out").state_dict()
    # which it keeps out of the way of, and transformers adds to the model's state
    tensors, metadata = flatten_tensor_state_dict({key: value.data for key, value in state.items()})
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        ours = file.metadata()
    assert {key: json.loads(ours[key]) for key in metadata if key != "tensor_names"} == {
        key: json.loads(value) | _sorted_names(value, ours[key]) for key, value in metadata.items() if key in bundle
    } | {key: {"_type": "Tensor"} for key in bundle.floats}
    assert set(json.loads(ours["tensor_names"])) == set(json.loads(metadata["tensor_names"]))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: (t.dtype, t.shape) for key, t in stored.items()} == {
        key: (t.dtype, t.shape) for key, t in tensors.items()
    }
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    config = config_from_dict(said)
    assert isinstance(config, AOBaseConfig) and config_to_dict(config) == said


def _sorted_names(theirs: str, ours: str) -> dict[str, Any]:
    """The same names in another order are the same."""
    mine = json.loads(ours)["_tensor_data_names"]
    assert sorted(mine) == sorted(json.loads(theirs)["_tensor_data_names"])
    return {"_tensor_data_names": mine}


def cases() -> Iterator[QuantSpec]:
    kinds = [("int", bits) for bits in range(1, 9)] + [("ternary", 2), ("e4m3", 8), ("e5m2", 8)]
    where = [("group", 16), ("group", 32), ("group", 128), ("channel", None), ("tensor", None)]
    axes = itertools.product(kinds, ("none", "int"), ("portable", "bf16", "fp16", "fp32", "e8m0"), where)
    for (kind, bits), zero, scale, (granularity, size) in axes:
        for signed, narrow, either in ((1, 0, 0), (1, 1, 0), (0, 0, 0), (1, 0, 1)):
            quantizer = "mse" if zero == "none" else "minmax"
            spec = QuantSpec(
                bits, bool(signed), bool(narrow), granularity, size, zero, scale, quantizer, kind, bool(either)
            )
            if not spec.reasons():
                yield spec


def row(spec: QuantSpec, **changes: Any) -> PlanRow:
    given = {"type": "Linear", "input": None, "kinds": {"weight": "linear"}, **changes}
    return PlanRow("x", given["type"], "r", spec, given["input"], 3 * 256, given["kinds"], 256)


@pytest.mark.consumer
def test_every_grid_that_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    monkeypatch.setattr("qat.quantizers.mse.CANDIDATES", 4)
    fmt, layout, count = (
        TorchAo(),
        Layout((3, 256)),
        {(kind, dtype): 0 for kind in (INTX, INT8, FLOAT8) for dtype in DTYPES},
    )
    for number, spec in enumerate(cases()):
        if fmt.row_reasons(row(spec)):
            continue
        for dtype in fmt.holds(spec):
            w = torch.randn(3, 256, generator=torch.Generator().manual_seed(number)).to(dtype)
            quantizer = make_quantizer(spec, layout)
            quantizer.init_from(w)
            trained = quantizer.integers(w)
            packed, wanted = fmt.pack("x.weight", trained), trained.dequantize()
            text = json.dumps(_described(stored_as(spec, 256, dtype)))
            config = {"metadata": {"x.weight": text, "tensor_names": '["x.weight"]'}}
            assert torch.equal(fmt.weight("x", packed, config), wanted), (spec, dtype)
            assert torch.equal(fmt.unpack(packed, spec, layout, dtype).dequantize(), wanted), (spec, dtype)
            with monkeypatch.context() as patch:
                patch.setattr(TorchAo, "installed", lambda self: False)
                assert torch.equal(fmt.weight("x", packed, config), wanted), (spec, dtype)
            count[kind_of(spec), dtype] += 1
    assert min(count.values()) >= 6 and count[INTX, torch.float32] > 800, count


# By hand, from the layout in the format's docstring.
def test_golden_layers() -> None:
    spec = QuantSpec(4, False, False, "group", 2, "int", "portable", "minmax")
    codes = torch.tensor([[0, 15, 8, 7], [1, 2, 3, 4]], dtype=torch.uint8)
    zero = torch.tensor([[0, 15], [8, 7]], dtype=torch.int16)
    scale = torch.tensor([[0.5, 2.0], [0.25, 1.0]]).bfloat16()
    four = QTensor(codes, scale, zero, None, spec, Layout((2, 4)), torch.float16)
    packed = TorchAo().pack("x.weight", four)
    assert {key: (t.dtype, t.tolist()) for key, t in packed.items()} == {
        "_weight_qdata": (torch.int8, [[-8, 7, 0, -1], [-7, -6, -5, -4]]),
        "_weight_scale": (torch.float16, [[0.5, 2.0], [0.25, 1.0]]),
        "_weight_zero_point": (torch.int8, [[-8, 7], [0, -1]]),
    }
    eight = torch.tensor([[-128, 127], [3, -4]], dtype=torch.int8)
    weight = QTensor(
        eight, torch.tensor([[0.5]]).bfloat16(), None, None,
        QuantSpec(8, granularity="tensor"), Layout((2, 2)), torch.float32,
    )  # fmt: skip
    packed = TorchAo().pack("x.weight", weight)
    assert set(packed) == {"_weight_qdata", "_weight_scale"} and packed["_weight_scale"].tolist() == [[0.5], [0.5]]
    assert packed["_weight_qdata"].tolist() == eight.tolist() and packed["_weight_scale"].dtype == torch.float32
    floats = torch.tensor([[448.0, -0.5]]).to(torch.float8_e4m3fn)
    spec = QuantSpec(8, kind="e4m3", granularity="channel", scale="e8m0")
    weight = QTensor(
        floats, torch.tensor([[0.25]]).to(spec.scale_grid.dtype), None, None, spec, Layout((1, 2)), torch.bfloat16
    )
    packed = TorchAo().pack("x.weight", weight)
    assert packed["_weight_qdata"].view(torch.uint8).tolist() == [[0x7E, 0xB0]]
    assert packed["_weight_scale"].tolist() == [[0.25]] and packed["_weight_scale"].dtype == torch.bfloat16
    wide = QTensor(
        eight, torch.tensor([[1.001]]), None, None,
        QuantSpec(8, granularity="tensor", scale="fp32"), Layout((2, 2)), torch.bfloat16,
    )  # fmt: skip
    with pytest.raises(ExportError, match="would be rounded"):
        TorchAo().pack("x.weight", wide)


def test_refusals(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    def reasons(given: dict[str, Any] | None = None, **words: Any) -> str:
        return "; ".join(TorchAo().row_reasons(row(QuantSpec(**words), **(given or {}))))

    g32: dict[str, Any] = {"granularity": "group", "group_size": 32}
    assert not reasons(**g32) and not reasons(bits=7) and not reasons(kind="e5m2", bits=8)
    assert "grid nf4: torchao stores integers, e4m3 and e5m2; nearest: grid: int" in reasons(kind="nf4", **g32)
    assert "grid e4m3 in groups: torchao has a scale per row" in reasons(kind="e4m3", bits=8, **g32)
    low = {"signed": False, "zero_point": "float", "quantizer": "minmax"}
    assert "nearest: zero_point: int" in reasons(**low)
    assert "set input: null" in reasons({"input": QuantSpec(8, granularity="token")}, **g32)
    assert "not Conv2d; add a rule" in reasons({"type": "Conv2d", "kinds": {"weight": "conv"}}, **g32)
    q4 = {"signed": False, "zero_point": "float", "scale": "q4_k", "quantizer": "minmax"}
    assert "scale=q4_k: torchao stores scales in the model's dtype" in reasons(**g32, **q4)
    bundles = {
        "scale=fp32 does not fit a model in torch.bfloat16": quantize(
            make_model(dtype=torch.bfloat16), {"scale": "fp32"}
        ),
        "scale=e8m0 does not fit a model in torch.float16": quantize(
            make_model(dtype=torch.float16), {"scale": "e8m0"}
        ),
        "has no transformers config": quantize(torch.nn.Sequential(torch.nn.Linear(64, 4)), {}),
    }
    for words, bundle in bundles.items():
        with pytest.raises(ExportError, match=words):
            export(bundle, tmp_path / "out", "torchao")
    assert list(tmp_path.iterdir()) == []


def test_our_own_unpacking_reads_the_same(
    make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchAo, "installed", lambda self: False)
    for number, name in enumerate(sorted(GRIDS)):
        model = make_model(num_hidden_layers=1, dtype=DTYPES[number % 3])
        export(quantize(model, GRIDS[name], head=KEEP_HEAD), tmp_path / str(number), "torchao")
        assert {found.reader for found in verify(tmp_path / str(number))} == {"qat"}


@pytest.mark.consumer
@pytest.mark.parametrize("name", ["int4", "int8", "e4m3"])
def test_training_starts_from_a_folder_of_its_own(name: str, make_model: Any, quantize: Any, tmp_path: Path) -> None:
    """Saved by transformers, of a model that torchao rounded."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    make_model().save_pretrained(tmp_path / "float")
    how = {
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "int8": Int8WeightOnlyConfig(),
        "e4m3": Float8WeightOnlyConfig(),
    }[name]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float",
        quantization_config=transformers.TorchAoConfig(how),
        dtype=torch.float32,
        device_map="cpu",
    )
    theirs.save_pretrained(tmp_path / "packed")
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    bundle = quantize(model, {**GRIDS[name], "quantizer": "lsq", "scale": "fp32"}, head=KEEP_HEAD)
    assert sorted(start_from_file(model, tmp_path / "packed")) == sorted(bundle)
    for layer, ours in bundle.items():
        weight = theirs.get_submodule(layer.rpartition(".")[0]).weight
        assert torch.equal(ours.dequantize(), weight.dequantize()), layer
    other = make_model()
    quantize(other, {"bits": 3, "quantizer": "lsq", "scale": "fp32"}, head=KEEP_HEAD)
    with pytest.raises(QATError, match="is not on the grid of its rule"):
        start_from_file(other, tmp_path / "packed")


@pytest.mark.parametrize("own", [False, True], ids=["consumer", "own"])
def test_damaged_files(
    own: bool, make_model: Any, quantize: Any, attack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own:
        pytest.importorskip("torchao", reason="its own reading is covered by the other case")
    for name in ("int3 with zero points", "int8", "e4m3"):
        model = make_model(dtype=torch.bfloat16, num_hidden_layers=1, intermediate_size=64)
        export(quantize(model, GRIDS[name], head=KEEP_HEAD), tmp_path / name, "torchao")
        with monkeypatch.context() as patch:
            if own:
                patch.setattr(TorchAo, "installed", lambda self: False)
            outcomes = attack(TorchAo(), tmp_path / name, 6)
        assert outcomes.total() == 48 and outcomes["refused"] > 15 and outcomes["noticed"] > 5, outcomes


def test_a_scale_too_few_is_no_scale_for_all(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=1, intermediate_size=64)
    export(quantize(model, GRIDS["int8"], head=KEEP_HEAD), tmp_path, "torchao")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = "model.layers.0.mlp.up_proj._weight_scale"
    save_file({**tensors, name: tensors[name][:1].clone()}, path, metadata=metadata)
    with pytest.raises(ExportError, match=r"up_proj cannot be decoded .*scale is torch.float32 \[1, 1\], not"):
        list(TorchAo().read(tmp_path))


@pytest.mark.parametrize("own", [False, True], ids=["consumer", "own"])
def test_damaged_metadata(
    own: bool, make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own:
        pytest.importorskip("torchao", reason="its own reading is covered by the other case")
    else:
        monkeypatch.setattr(TorchAo, "installed", lambda self: False)
    model = make_model(num_hidden_layers=1, intermediate_size=64)
    export(quantize(model, GRIDS["int4"], head=KEEP_HEAD), tmp_path, "torchao")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        good = dict(file.metadata())
    name = "model.layers.0.mlp.up_proj.weight"
    said = json.loads(good[name])

    def changed(**words: Any) -> str:
        return json.dumps({**said, "_data": {**said["_data"], **words}})

    bfloat = {"_type": "torch.dtype", "_data": "float64"}
    for text in (
        None, "", "null", "[]", "{", "7", json.dumps({"_type": "Tensor"}), json.dumps({**said, "_type": "MXTensor"}),
        json.dumps({**said, "_type": "Int8Tensor"}), json.dumps({**said, "_type": []}),
        json.dumps({**said, "_tensor_data_names": ["qdata"]}), json.dumps({**said, "_tensor_data_names": None}),
        json.dumps({**said, "_tensor_data_names": ["qdata", "scale", "zero_point", "x"]}),
        changed(block_size=[1, 64]), changed(block_size=[1, 0]), changed(block_size=[1, True]), changed(extra=None),
        changed(block_size=[1, -32]), changed(block_size=32), changed(block_size=[1, 32, 1]),
        changed(block_size=[1, 48]), changed(block_size=[2, 32]),
        changed(dtype=bfloat), changed(dtype="float32"), changed(dtype={"_type": "torch.dtype", "_data": ["x"]}),
        changed(target_dtype={"_type": "torch.dtype", "_data": "int9"}), changed(target_dtype="int4"),
        changed(target_dtype={"_type": "torch.dtype", "_data": "int3"}), changed(target_dtype=None),
        changed(activation_quantization="int8_asym_per_token"),
    ):  # fmt: skip
        metadata = {key: value for key, value in good.items() if key != name} | ({} if text is None else {name: text})
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ExportError) as problem:
            list(TorchAo().read(tmp_path))
        assert "\n" not in str(problem.value), text
    for names in (None, "", "[]", "{", json.dumps([key for key in tensors])):
        save_file(
            tensors,
            path,
            metadata={key: value for key, value in good.items() if key != "tensor_names"}
            | ({} if names is None else {"tensor_names": names}),
        )
        with pytest.raises(ExportError):
            list(TorchAo().read(tmp_path))
