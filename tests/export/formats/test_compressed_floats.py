"""compressed-tensors' small floats: FP8, NVFP4, MXFP4, MXFP8, and groups of them beside integers.

Mutations that were tried one at a time, and the test that turned red for each:

    the odd column in the low half of a byte          test_golden_layers, test_transformers_loads_the_trained_weights
    the tensor's scale stored, not its inverse        test_golden_layers, test_transformers_loads_the_trained_weights
    the tensor's scale not a power of two             test_a_portable_tensor_scale_is_the_same_either_way
    nvfp4_over let into a model in fp32               test_refusals
    FP8 without a scheme for its inputs               test_fp8_inputs
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qat.errors import ExportError
from qat.export import export
from qat.export.formats.compressed_tensors import CompressedTensors
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor
from qat.quantizers import make_quantizer
from qat.scales import SCALE_GRIDS, TwoLevel
from qat.specs import QuantSpec
from qat.verify import verify

KEEP_HEAD = {"match": ["lm_head"], "keep_float": True}
BY_ROW = {"granularity": "channel", "group_size": None}
IDS = torch.arange(24).reshape(2, 12)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRIDS: dict[str, dict[str, Any]] = {
    "fp8 by row": {"grid": "e4m3", "bits": 8, **BY_ROW},
    "fp8 by tensor": {"grid": "e4m3", "bits": 8, "granularity": "tensor", "group_size": None},
    "mxfp8": {"grid": "e4m3", "bits": 8, "scale": "e8m0"},
    "mxfp4": {"grid": "fp4", "bits": 4, "scale": "e8m0"},
    "nvfp4": {"grid": "fp4", "bits": 4, "scale": "nvfp4_over", "group_size": 16},
    "nvfp4 portable": {"grid": "fp4", "bits": 4, "scale": "nvfp4_portable", "group_size": 16},
}
LEARNED = {**GRIDS["nvfp4 portable"], "quantizer": "lsq"}
DYNAMIC = {"grid": "e4m3", "bits": 8, "granularity": "token", "quantizer": "absmax", "scale": "fp32"}
LOCAL = {"grid": "fp4", "bits": 4, "granularity": "group", "group_size": 16, "quantizer": "local"}
STATIC = {"grid": "e4m3", "bits": 8, "granularity": "tensor", "quantizer": "ema"}


def load(folder: Path, dequantize: bool = False) -> Any:
    """The folder as transformers loads it, unpacked by one forward."""
    config = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **config).eval()
    logits(loaded)
    return loaded


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def assert_same(loaded: Any, bundle: Any, model: Any) -> None:
    state = loaded.state_dict()
    for name, trained in bundle.items():
        assert torch.equal(state[name], trained.dequantize()), name
    for name, value in bundle.floats.items():
        assert torch.equal(state[name], value), name
    # whose frequencies `model.to(dtype)` rounded, while transformers loads them in fp32
    model.model.rotary_emb = loaded.model.rotary_emb
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.consumer
@pytest.mark.parametrize(
    ("name", "dtype"),
    # nvfp4 in another dtype is refused: test_refusals
    [(n, d) for n in sorted(GRIDS) for d in DTYPES if n != "nvfp4" or d == torch.bfloat16],
    ids=str,
)
def test_transformers_loads_the_trained_weights(
    name: str, dtype: torch.dtype, make_model: Any, quantize: Any, tmp_path: Path, ran: Any
) -> None:
    model = make_model(dtype=dtype, attention_bias=True, tie_word_embeddings=True)
    bundle = quantize(model, GRIDS[name], head=KEEP_HEAD)
    receipt = export(bundle, tmp_path / "out", "compressed-tensors")
    assert receipt.reader.startswith("compressed-tensors 0.") and receipt.max_abs_diff == 0.0
    # 4-bit floats and mxfp8 are decoded to bf16, which another model takes only when it is loaded dequantized
    loaded = load(tmp_path / "out", dequantize=dtype != torch.bfloat16 and not name.startswith("fp8"))
    assert loaded.dtype == dtype
    assert_same(loaded, bundle, model)
    ran("compressed-tensors", "transformers", f"Llama in {dtype}, {name}", logits=0.0)
    verify(tmp_path / "out")


@pytest.mark.consumer
@pytest.mark.parametrize("weight", ["fp8 by row", "fp8 by tensor", "mxfp4", "int8"])
def test_fp8_inputs(weight: str, make_model: Any, quantize: Any, tmp_path: Path) -> None:
    for number, given in enumerate((STATIC, DYNAMIC)):
        model = make_model()
        grid = GRIDS.get(weight, {"bits": 8, **BY_ROW})
        bundle = quantize(model, grid, input=given, seen=IDS, head=KEEP_HEAD)
        export(bundle, tmp_path / str(number), "compressed-tensors")
        config = json.loads((tmp_path / str(number) / "config.json").read_text())["quantization_config"]
        inputs = config["config_groups"]["group_0"]["input_activations"]
        assert (inputs["type"], inputs["num_bits"], inputs["dynamic"]) == ("float", 8, given is DYNAMIC)
        verify(tmp_path / str(number))
        if weight == "mxfp4":
            # which a model in fp32 takes dequantized only, and then without its inputs' grid
            continue
        loaded = load(tmp_path / str(number))
        ours, theirs = logits(model), logits(loaded)
        if given is STATIC:
            assert torch.equal(theirs, ours)
        else:
            # it divides by the scale where we multiply by its reciprocal: a code of an input may be one off
            torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02 * float(ours.abs().max()))


@pytest.mark.consumer
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4 portable"])
def test_nvfp4_inputs(name: str, make_model: Any, quantize: Any, tmp_path: Path, record_property: Any) -> None:
    """Mutations: the tensor's scale stored, not its inverse; a scheme without `local`: red."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    dtype = torch.bfloat16
    model, grid = make_model(dtype=dtype), GRIDS[name]
    bundle = quantize(model, grid, input={**LOCAL, "scale": grid["scale"]}, seen=IDS, head=KEEP_HEAD)
    export(bundle, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs["dynamic"], inputs["strategy"], inputs["group_size"]) == ("local", "tensor_group", 16)
    verify(tmp_path / "out")
    loaded = load(tmp_path / "out")
    for layer, (_, fields) in bundle.inputs.items():
        stored = loaded.get_submodule(layer).input_global_scale
        assert stored.dtype == torch.float32 and fields is not None
        # 6 * 448 of the largest number, down to the power of two if portable
        exact = 448.0 / float(fields.scale)
        low = exact if name == "nvfp4" else exact / 2
        assert low * (1 - 1e-6) <= float(stored) <= exact * (1 + 1e-6)
    module = loaded.get_submodule("model.layers.0.mlp.down_proj")
    quantizer = model.get_submodule("model.layers.0.mlp.down_proj").input_quantizer
    x = 2.0 * torch.randn(64, module.weight.shape[1], generator=torch.Generator().manual_seed(3))
    x *= float(bundle.inputs["model.layers.0.mlp.down_proj"][1].scale)
    for given, share in ((x, 0.001), (x.to(dtype), 0.03)):
        theirs = forward_quantize(module, given, "input", module.quantization_scheme.input_activations)
        # of bf16 it takes the scales in bf16; vLLM's kernel computes in fp32
        off = float((theirs != quantizer(given)).float().mean())
        record_property(f"share of numbers that differ in {given.dtype}", off)
        assert off < share


@pytest.mark.consumer
def test_groups_of_many_kinds(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    rules = {
        "down": {"match": ["*down_proj"], "weight": {**GRIDS["mxfp4"], "granularity": "group", "group_size": 32}},
        "up": {"match": ["*up_proj"], "weight": GRIDS["fp8 by row"]},
        "v": {"match": ["*v_proj"], "weight": {"bits": 8, **BY_ROW}, "input": {**DYNAMIC, "grid": "int"}},
        "o": {"match": ["*o_proj"], "weight": {"bits": 3, "granularity": "group", "group_size": 32}},
        "k": {"match": ["*.0.*k_proj"], "weight": {"grid": "ternary", "bits": 2, **BY_ROW, "quantizer": "absmean"}},
        "q": {"match": ["*.1.*q_proj"], "keep_float": True},
    }
    bundle = quantize(model, {**LEARNED, "granularity": "group"}, head=KEEP_HEAD, **rules)
    export(bundle, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    kinds = sorted(group["format"] for group in config["config_groups"].values())
    assert kinds == [
        "float-quantized", "int-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized", "pack-quantized",
        "pack-quantized",
    ]  # fmt: skip
    loaded = load(tmp_path / "out")
    for name, trained in bundle.items():
        assert torch.equal(loaded.state_dict()[name], trained.dequantize()), name


def test_our_own_unpacking_reads_the_same(
    make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(sorted(GRIDS)):
        bundle = quantize(make_model(dtype=torch.bfloat16, num_hidden_layers=1), GRIDS[name], head=KEEP_HEAD)
        export(bundle, tmp_path / str(number), "compressed-tensors")
        with monkeypatch.context() as patch:
            patch.setattr(CompressedTensors, "installed", lambda self: False)
            assert {row.reader for row in verify(tmp_path / str(number))} == {"qat"}


# By hand, from the layout in the format's docstring.
def test_golden_layers() -> None:
    def spec(name: str) -> QuantSpec:
        words = {"granularity": "group", "group_size": 32, **GRIDS[name]}
        return QuantSpec(**{"kind" if key == "grid" else key: value for key, value in words.items()})

    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 1.0]
    row = torch.tensor([numbers])
    # two blocks of 16, the second eight times as large: block scales 1 / 8 and 1 of a tensor scale of 16
    w = torch.cat((row * 2.0, row * 16.0), 1)
    quantizer = make_quantizer(spec("nvfp4 portable"), Layout((1, 32)))
    packed = CompressedTensors().pack("x.weight", quantizer.integers(w))
    codes = [0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x2F]
    assert packed["weight_packed"].tolist() == [codes + codes] and packed["weight_packed"].dtype == torch.uint8
    # 16 * 6 / (6 * 448) = 1 / 28, the next power of two is 1 / 16
    assert packed["weight_global_scale"].tolist() == [16.0]
    assert packed["weight_scale"].float().tolist() == [[32.0, 256.0]]
    assert packed["weight_scale"].dtype == torch.float8_e4m3fn
    over = make_quantizer(spec("nvfp4"), Layout((1, 32))).integers(w)
    packed = CompressedTensors().pack("x.weight", over)
    assert packed["weight_global_scale"].tolist() == [28.0]
    assert packed["weight_scale"].float().tolist() == [[56.0, 448.0]]
    # OCP MX: the exponent of 6 * 2^k is that of the largest number
    mx = make_quantizer(spec("mxfp4"), Layout((1, 32))).integers(torch.cat((row, row), 1) * 0.25)
    packed = CompressedTensors().pack("x.weight", mx)
    assert packed["weight_scale"].tolist() == [[125]] and packed["weight_packed"].tolist() == [codes + codes]
    values = torch.tensor([[448.0, -1.0, 0.0, 1.125]]).to(torch.float8_e4m3fn)
    eight = QTensor(values, torch.tensor([[0.5]]), None, None, spec("fp8 by row"), Layout((1, 4)), torch.bfloat16)
    packed = CompressedTensors().pack("x.weight", eight)
    assert packed["weight"].view(torch.uint8).tolist() == [[0x7E, 0xB8, 0x00, 0x39]]
    assert packed["weight_scale"].dtype == torch.bfloat16 and packed["weight_scale"].tolist() == [[0.5]]
    by_tensor = QTensor(values, torch.tensor([[0.5]]), None, None, spec("fp8 by tensor"), Layout((1, 4)), torch.float16)
    assert CompressedTensors().pack("x.weight", by_tensor)["weight_scale"].tolist() == [0.5]


def test_a_portable_tensor_scale_is_the_same_either_way() -> None:
    grid = SCALE_GRIDS["nvfp4_portable"]
    assert isinstance(grid, TwoLevel)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        wanted = torch.rand(8, 16, generator=g) * 10.0 ** (seed - 10) + 1e-12
        parts = grid.encode(wanted, None)
        mantissa, _ = torch.frexp(parts["tensor"])
        assert mantissa.tolist() == [0.5]
        blocks = parts["block"].float()
        assert float(blocks.max()) > 200.0
        times, over = blocks * parts["tensor"], blocks / (1.0 / parts["tensor"])
        assert torch.equal(times, over) and torch.equal(times, grid.decode(parts)[0])
        for number in (0.5, 1.5, 3.0, 6.0):
            assert torch.equal((times * number).bfloat16().float(), times * number)


def test_refusals(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    def reasons(**words: Any) -> str:
        spec = QuantSpec(**{"granularity": "group", "group_size": 16, "kind": "fp4", "bits": 4, **words})
        row = PlanRow("x", "Linear", "r", spec, None, 64, {"weight": "linear"}, 64)
        return "; ".join(CompressedTensors().row_reasons(row))

    assert "use nvfp4_portable" in reasons(scale="nvfp4")
    assert "group_size=16, scale=portable" in reasons() and "nearest: granularity: group, group_size: 16" in reasons()
    assert "group_size=16, scale=e8m0" in reasons(scale="e8m0")
    assert "nearest: granularity: channel" in reasons(kind="e4m3", bits=8)
    assert not reasons(scale="e8m0", group_size=32) and not reasons(scale="nvfp4_over")
    assert "grid e5m2: compressed-tensors has integers, e4m3 and fp4" in reasons(kind="e5m2", bits=8)
    words = {"granularity": "group", "group_size": 16, "kind": "fp4", "scale": "nvfp4_portable", "quantizer": "local"}
    row = PlanRow("x", "Linear", "r", QuantSpec(8), QuantSpec(**words), 64, {"weight": "linear"}, 64)
    assert "goes with weights of nvfp4" in "; ".join(CompressedTensors().row_reasons(row))
    cases = {
        "nvfp4_over is decoded to bfloat16, not torch.float32; use nvfp4_portable": quantize(
            make_model(), GRIDS["nvfp4"], head=KEEP_HEAD
        ),
        "small floats beside other grids in a model in torch.float16.*bfloat16. before training": quantize(
            make_model(dtype=torch.float16),
            GRIDS["mxfp4"],
            head=KEEP_HEAD,
            up={"match": ["*up_proj"], "weight": GRIDS["fp8 by row"]},
        ),
    }
    for words, bundle in cases.items():
        with pytest.raises(ExportError, match=words):
            export(bundle, tmp_path / "out", "compressed-tensors")
    assert list(tmp_path.iterdir()) == []


DAMAGED = {
    **{name: GRIDS[name] for name in ("fp8 by row", "mxfp8", "mxfp4", "nvfp4")},
    "int4": {"bits": 4},
    "asymmetric int3": {"bits": 3, "zero_point": "int", "quantizer": "minmax"},
}


# Turned red by a reader that lets the consumer's AttributeError or OverflowError through.
@pytest.mark.parametrize("own", [False, True], ids=["consumer", "own"])
def test_damaged_files(
    own: bool, make_model: Any, quantize: Any, attack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own:
        pytest.importorskip("compressed_tensors", reason="its own reading is covered by the other case")
    for number, name in enumerate(DAMAGED):
        model = make_model(dtype=torch.bfloat16, num_hidden_layers=1, intermediate_size=64)
        export(quantize(model, DAMAGED[name], head=KEEP_HEAD), tmp_path / str(number), "compressed-tensors")
        with monkeypatch.context() as patch:
            if own:
                patch.setattr(CompressedTensors, "installed", lambda self: False)
            outcomes = attack(CompressedTensors(), tmp_path / str(number), 4)
        assert outcomes.total() == 32 and outcomes["refused"] > 8 and outcomes["noticed"] > 2, outcomes
