"""bitsandbytes: what its kernels decode is what was trained, and transformers runs it.

Mutations that were tried one at a time, and the test that turned red for each:

    the first code in the low half of a byte             test_golden_layers, test_transformers_loads_...
    the codes of fp4 in ascending order                  test_golden_layers, test_transformers_loads_...
    SCB without the factor 127                           test_golden_layers, test_transformers_loads_...
    scale=fp16 allowed for 8 bits                        test_refusals, test_the_8_bit_scales_that_survive
    no list of the layers that stay in float             test_a_head_in_float_and_a_head_in_4_bits
    nested_offset left at 0                              test_transformers_loads_...
    absmax not measured before the consumer reads it     test_damaged_files
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
from qat.export.formats.bitsandbytes import BLOCKS, BitsAndBytes
from qat.fake_quant_kernels.codebook import BNB_FP4
from qat.init.file import start_from_file
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor
from qat.quantizers import make_quantizer
from qat.specs import QuantSpec
from qat.verify import verify

KEEP_HEAD = {"match": ["lm_head"], "keep_float": True}
BY_ROW = {"granularity": "channel", "group_size": None}
IDS = torch.arange(24).reshape(2, 12)
SERVED = {"bits": 8, "granularity": "token", "narrow": True, "quantizer": "absmax", "scale": "fp32"}

GRIDS: dict[str, dict[str, Any]] = {
    "nf4": {"grid": "nf4", "bits": 4, "scale": "fp32", "group_size": 64},
    "nf4 nested": {"grid": "nf4", "bits": 4, "scale": "bnb_nested", "group_size": 64},
    "nf4 in blocks of 32": {"grid": "nf4", "bits": 4, "scale": "portable", "group_size": 32},
    "fp4": {"grid": "bnb_fp4", "bits": 4, "scale": "fp32", "group_size": 64},
    "fp4 nested, learned": {"grid": "bnb_fp4", "bits": 4, "scale": "bnb_nested", "group_size": 32, "quantizer": "lsq"},
    "int8": {"bits": 8, "narrow": True, **BY_ROW},
    "int8, bf16 scales": {"bits": 8, "scale": "bf16", **BY_ROW, "quantizer": "mse"},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()  # type: ignore[no-any-return]


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")


def assert_same_weights(loaded: Any, bundle: Any) -> None:
    """Before the first forward, in which its CPU kernels repack a weight."""
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    for name, trained in bundle.items():
        weight = loaded.get_submodule(name.rpartition(".")[0]).weight
        if trained.spec.bits == 4:
            found = functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            found = functional.int8_vectorwise_dequant(weight.data, weight.SCB).to(trained.out_dtype)
        assert found.dtype == trained.out_dtype and torch.equal(found, trained.dequantize()), name
    state = loaded.state_dict()
    for name, value in bundle.floats.items():
        assert torch.equal(state[name], value), name


@pytest.mark.consumer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_transformers_loads_the_trained_weights(
    name: str, dtype: torch.dtype, make_model: Any, quantize: Any, tmp_path: Path, ran: Any
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = make_model(dtype=dtype, intermediate_size=128, attention_bias=True, tie_word_embeddings=True)
    bundle = quantize(model, GRIDS[name], head=KEEP_HEAD)
    receipt = export(bundle, tmp_path / "out", "bitsandbytes")
    assert receipt.reader.startswith("bitsandbytes 0.") and receipt.max_abs_diff == 0.0
    loaded = load(tmp_path / "out", dtype)
    assert_same_weights(loaded, bundle)
    # whose frequencies `model.to(dtype)` rounded, while transformers loads them in fp32
    model.model.rotary_emb = loaded.model.rotary_emb
    # in training mode it multiplies with the decoded weight; what it serves with is bf16 or 8-bit inputs
    ours = logits(model)
    assert torch.equal(logits(loaded.train()), ours)
    ran("bitsandbytes", "transformers, training", f"Llama in {dtype}, {name}", logits=0.0)
    found = kl(ours, logits(loaded.eval()))
    ran("bitsandbytes", "transformers, serving", f"Llama in {dtype}, {name}", kl=found)
    assert found < 2e-3
    verify(tmp_path / "out")


@pytest.mark.consumer
def test_8_bit_inputs_as_it_rounds_them(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    model = make_model()
    bundle = quantize(model, GRIDS["int8"], input=SERVED, seen=IDS, head=KEEP_HEAD)
    export(bundle, tmp_path / "out", "bitsandbytes")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_threshold"] == 0.0
    assert kl(logits(model), logits(load(tmp_path / "out").eval())) < 2e-3
    # it quantizes fp16: of such numbers the codes are ours
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).half()
    spec = {"kind" if key == "grid" else key: value for key, value in SERVED.items()}
    ours = make_quantizer(QuantSpec(**spec), Layout((1, 1), "tokens")).integers(x.float())
    codes, largest, _ = functional.int8_vectorwise_quant(x.clone())
    differ = (codes != ours.codes).float().mean()
    assert float(differ) < 1e-3
    torch.testing.assert_close(largest.reshape(-1, 1) / 127.0, ours.scale, rtol=1e-6, atol=0)


@pytest.mark.consumer
def test_tables_and_blocks_may_differ_by_layer(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    down = {"match": ["*down_proj"], "weight": {**GRIDS["fp4"], "granularity": "group", "quantizer": "absmax"}}
    v = {"match": ["*v_proj"], "weight": {**GRIDS["nf4 in blocks of 32"], "granularity": "group", "scale": "fp16"}}
    up = {"match": ["*.0.*up_proj"], "keep_float": True}
    model = make_model(intermediate_size=128)
    bundle = quantize(model, GRIDS["nf4 nested"], head=KEEP_HEAD, down=down, v=v, up=up)
    export(bundle, tmp_path / "out", "bitsandbytes")
    loaded = load(tmp_path / "out")
    assert_same_weights(loaded, bundle)
    assert torch.equal(logits(loaded.train()), logits(model))


@pytest.mark.consumer
def test_a_head_in_float_and_a_head_in_4_bits(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    for kept in (True, False):
        model = make_model(num_hidden_layers=1, intermediate_size=64)
        bundle = quantize(model, GRIDS["nf4"], **({"head": KEEP_HEAD} if kept else {}))
        export(bundle, tmp_path / str(kept), "bitsandbytes")
        config = json.loads((tmp_path / str(kept) / "config.json").read_text())["quantization_config"]
        assert config["llm_int8_skip_modules"] == (["lm_head"] if kept else [])
        loaded = load(tmp_path / str(kept))
        assert_same_weights(loaded, bundle)
        assert type(loaded.lm_head).__name__ == ("Linear" if kept else "Linear4bit")


@pytest.mark.consumer
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_training_starts_from_a_folder_of_its_own(
    kind: str, nested: bool, make_model: Any, quantize: Any, tmp_path: Path
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    make_model(intermediate_size=128).save_pretrained(tmp_path / "float")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "packed")
    model = make_model(intermediate_size=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    # of double quantization the scales that it comes to; a mean of its own would move them
    grid = {"nf4": GRIDS["nf4"], "fp4": GRIDS["fp4"]}[kind]
    bundle = quantize(model, {**grid, "quantizer": "lsq"}, head=KEEP_HEAD)
    assert sorted(start_from_file(model, tmp_path / "packed")) == sorted(bundle)
    for name, ours in bundle.items():
        weight = theirs.get_submodule(name.rpartition(".")[0]).weight
        assert torch.equal(ours.dequantize(), bnb.functional.dequantize_4bit(weight.data, weight.quant_state)), name


@pytest.mark.consumer
@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "fp4", "fp4 nested, learned"])
def test_every_block_size(name: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    fmt = BitsAndBytes()
    for block in BLOCKS:
        words = {"kind" if key == "grid" else key: value for key, value in GRIDS[name].items()}
        spec = QuantSpec(**{**words, "granularity": "group", "group_size": block, "quantizer": "absmax"})
        w = torch.randn(3, 2 * block, generator=torch.Generator().manual_seed(block))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tensor = make_quantizer(spec, Layout(tuple(w.shape))).integers(w.to(dtype))
            # large blocks go through code that it would compile
            with torch.compiler.set_stance("force_eager"):
                found = fmt.weight("x", fmt.pack("x.weight", tensor), {})
            assert found.dtype == dtype and torch.equal(found, tensor.dequantize()), (block, dtype)


@pytest.mark.consumer
def test_the_8_bit_scales_that_survive() -> None:
    """Every significand of up to 10 bits, with every code; with 11 bits some weights are others."""
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    codes = torch.arange(-128, 128).to(torch.int8)
    wrong = {}
    for bits in (8, 10, 11):
        scale = 1.0 + torch.arange(2.0 ** (bits - 1)) / 2 ** (bits - 1)
        decoded = functional.int8_vectorwise_dequant(codes.expand(len(scale), -1).contiguous(), scale * 127.0)
        wrong[bits] = int((decoded != codes.float() * scale.unsqueeze(1)).sum())
    assert wrong[8] == wrong[10] == 0 < wrong[11]


# By hand, from the layout in the format's docstring.
def test_golden_layers() -> None:
    codes = torch.arange(32).reshape(1, 32).remainder(16).to(torch.uint8)
    spec = QuantSpec(4, kind="nf4", granularity="group", group_size=32, scale="fp32")
    weight = QTensor(codes, torch.tensor([[0.75]]), None, None, spec, Layout((1, 32)), torch.bfloat16)
    packed = BitsAndBytes().pack("x.weight", weight)
    ascending = [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert packed["weight"].flatten().tolist() == ascending * 2 and packed["weight"].shape == (16, 1)
    assert packed["weight.absmax"].tolist() == [0.75] and packed["weight.quant_map"][7:9].tolist() == [
        0.0,
        0.07958029955625534,
    ]
    state = json.loads(bytes(packed["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state == {"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [1, 32]}
    # -1, -2/3, -1/2, -1/3, -1/4, -1/6, -1/192, 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1
    fifteen = torch.cat((codes[:, :15], codes[:, :15], codes[:, :2]), 1)
    spec = QuantSpec(4, kind="bnb_fp4", granularity="group", group_size=32, scale="bnb_nested")
    parts = {"absmax": torch.tensor([[200]], dtype=torch.uint8), "nested": torch.tensor([0.5])}
    parts["offset"] = torch.tensor([1.25])
    scale = spec.scale_grid.decode(parts)[0]  # type: ignore[attr-defined]
    weight = QTensor(fifteen, scale, None, None, spec, Layout((1, 32)), torch.float32, parts)
    packed = BitsAndBytes().pack("x.weight", weight)
    wanted = [0xBA, 0xDC, 0xFE, 0x90, 0x16, 0x74, 0x52, 0x3B, 0xAD, 0xCF, 0xE9, 0x01, 0x67, 0x45, 0x23, 0xBA]
    assert packed["weight"].flatten().tolist() == wanted
    table = packed["weight.quant_map"]
    assert table[[0, 1, 2, 3, 8, 9, 11]].tolist() == torch.tensor([0, 1 / 192, 2 / 3, 1, 0, -1 / 192, -1]).tolist()
    assert sorted(set(table.tolist())) == torch.tensor(BNB_FP4).tolist()
    assert packed["weight.absmax"].tolist() == [200] and packed["weight.nested_absmax"].tolist() == [0.5]
    state = json.loads(bytes(packed["weight.quant_state.bitsandbytes__fp4"].tolist()))
    assert state["nested_offset"] == 1.25 and state["nested_blocksize"] == 256 and state["nested_dtype"] == "float32"
    eight = torch.tensor([[-127, 0, 5], [1, 127, -2]]).to(torch.int8)
    spec = QuantSpec(8, narrow=True)
    weight = QTensor(eight, torch.tensor([[0.5], [2.0]]), None, None, spec, Layout((2, 3)), torch.float32)
    packed = BitsAndBytes().pack("x.weight", weight)
    assert packed["weight"].tolist() == eight.tolist() and packed["SCB"].tolist() == [63.5, 254.0]
    assert packed["weight_format"].item() == 0 and packed["weight_format"].dtype == torch.uint8


def test_refusals(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    def reasons(given: QuantSpec | None = None, kinds: str = "linear", **words: Any) -> str:
        row = PlanRow("x", "Linear", "r", QuantSpec(**words), given, 64, {"weight": kinds}, 64)
        return "; ".join(BitsAndBytes().row_reasons(row))

    nf4 = {"kind": "nf4", "bits": 4, "granularity": "group", "group_size": 64}
    int8 = {"bits": 8, "narrow": True, "granularity": "channel"}
    assert not reasons(**nf4) and not reasons(**int8) and not reasons(QuantSpec(**SERVED), **int8)
    assert "group_size=16: bitsandbytes has blocks of 32, 64" in reasons(**{**nf4, "group_size": 16})
    assert "granularity=channel: bitsandbytes has blocks" in reasons(kind="nf4", bits=4)
    assert "nearest: grid: bnb_fp4" in reasons(**{**nf4, "kind": "fp4"})
    assert "bitsandbytes has nf4, bnb_fp4 and signed 8-bit integers; nearest: {grid: nf4" in reasons(bits=4)
    assert "signed 8-bit integers" in reasons(bits=8, signed=False, zero_point="int")
    assert "one scale per row; use granularity: channel" in reasons(**{**int8, "granularity": "tensor"})
    for scale in ("fp16", "fp32"):
        assert "10 significant bits; use scale: portable" in reasons(**int8, scale=scale)
    assert "multiplies these weights with float inputs" in reasons(QuantSpec(**SERVED), **nf4)
    assert "8-bit inputs of its own" in reasons(QuantSpec(**{**SERVED, "narrow": False}), **int8)
    assert "not Linear; add a rule" in reasons(kinds="embedding", **nf4)
    cases = {
        "4-bit beside 8-bit layers": quantize(
            make_model(), GRIDS["nf4 in blocks of 32"], head={"match": ["lm_head"], "weight": GRIDS["int8"]}
        ),
        "has no transformers config": quantize(torch.nn.Sequential(torch.nn.Linear(64, 4)), GRIDS["nf4"]),
    }
    model = make_model(num_hidden_layers=1)
    model.proj = torch.nn.Linear(64, 64)
    model.model.layers[0].mlp.extra_proj = torch.nn.Linear(64, 64)
    cases["proj is float, and transformers would skip model.layers.0.*with it"] = quantize(
        model, GRIDS["nf4 in blocks of 32"], head=KEEP_HEAD, proj={"match": ["proj"], "keep_float": True}
    )
    for words, bundle in cases.items():
        with pytest.raises(ExportError, match=words):
            export(bundle, tmp_path / "out", "bitsandbytes")
    assert list(tmp_path.iterdir()) == []


def test_our_own_unpacking_reads_the_same(
    make_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BitsAndBytes, "installed", lambda self: False)
    for number, name in enumerate(sorted(GRIDS)):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        model = make_model(num_hidden_layers=1, intermediate_size=128, dtype=dtype)
        export(quantize(model, GRIDS[name], head=KEEP_HEAD), tmp_path / str(number), "bitsandbytes")
        assert {row.reader for row in verify(tmp_path / str(number))} == {"qat"}


# Each of these would have the consumer's kernels read beyond a tensor's end. Turned red by no check of the state.
def test_states_that_do_not_fit_their_tensors() -> None:
    words = {"kind" if key == "grid" else key: value for key, value in GRIDS["nf4 nested"].items()}
    spec = QuantSpec(**{**words, "granularity": "group"})
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    packed = BitsAndBytes().pack("x.weight", make_quantizer(spec, Layout((4, 128))).integers(w))
    (key,) = (key for key in packed if "quant_state" in key)
    good = json.loads(bytes(packed[key].tolist()))
    for change in (
        {"nested_blocksize": 1},
        {"nested_blocksize": 64},
        {"blocksize": 32},
        {"blocksize": True},
        {"shape": [4, 1280]},
        {"shape": [4000000, 128]},
        {"shape": [-4, -128]},
        {"shape": [512]},
        {"dtype": "int8"},
        {"quant_type": "fp4"},
        {"nested_offset": "x"},
    ):
        text = bytearray(json.dumps({**good, **change}).encode())
        bad = {**packed, key: torch.frombuffer(text, dtype=torch.uint8)}
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            BitsAndBytes().weight("x", bad, {})


@pytest.mark.parametrize("own", [False, True], ids=["consumer", "own"])
def test_damaged_files(
    own: bool, make_model: Any, quantize: Any, attack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own:
        pytest.importorskip("bitsandbytes", reason="its own reading is covered by the other case")
    for name in ("nf4", "fp4 nested, learned", "int8"):
        model = make_model(dtype=torch.bfloat16, num_hidden_layers=1, intermediate_size=64)
        export(quantize(model, GRIDS[name], head=KEEP_HEAD), tmp_path / name, "bitsandbytes")
        with monkeypatch.context() as patch:
            if own:
                patch.setattr(BitsAndBytes, "installed", lambda self: False)
            outcomes = attack(BitsAndBytes(), tmp_path / name, 6)
        assert outcomes.total() == 48 and outcomes["refused"] > 15 and outcomes["noticed"] > 5, outcomes
