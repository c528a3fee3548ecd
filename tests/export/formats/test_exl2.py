"""exl2: layouts by hand, our reader against a scalar one, and training on the grid. exllamav2 itself is not run.

Mutations that were tried one at a time, and the test that turned red for each:

    k stored instead of k - 1 / codes not counted from 0            test_golden_layers
    M / 256 not rounded to fp16 / the product not rounded           test_a_file_of_several_bits_in_another_order
    packed[order] the other way round                               test_a_file_of_several_bits_in_another_order
    no rounding to fp16 in `forward` / in `decode`                  test_weights_are_numbers_of_fp16
    that rounding as a pair of casts where it is compiled           test_compiled_weights_are_the_same
    one share of the largest scale / no neighbouring codes          test_the_search_looks_at_all_rows
    bits without scales, or with the head's                         test_what_is_written_reads_back
    biases in any dtype / prescales not looked for                  test_refusals_of_models
    one share, of a mix, changed by a bit                           test_a_target_of_bits_per_weight
    o_proj, or down_proj, left out of its block                     test_blocks_are_quantized_whole
    a prescale of the head looked for in all layers                 test_prescales_where_they_reach
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import qat
from qat.errors import IMPOSSIBLE_FORMATS, ExportError, QATError
from qat.export import all_formats, export, formats_for, get_format
from qat.export.formats.exl2 import BITS, FUSED, MOST, Exl2, dequantized
from qat.export.hf_format import KEEP
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor
from qat.quantizers import make_quantizer, mse
from qat.quantizers.mse import search
from qat.recipes import from_dict
from qat.scales import SCALE_GRIDS, TwoLevel
from qat.specs import QuantSpec
from qat.verify import verify

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KEEP_HEAD = {"match": ["lm_head"], "keep_float": True}
EXL2 = {"bits": 4, "scale": "exl2", "quantizer": "lsq"}
IDS = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(1))


def spec_of(bits: int = 4, size: int = 32, quantizer: str = "mse", **words: Any) -> QuantSpec:
    return QuantSpec(bits, granularity="group", group_size=size, scale="exl2", quantizer=quantizer, **words)


def trained(spec: QuantSpec, shape: tuple[int, int] = (64, 192), dtype: torch.dtype = FP32) -> QTensor:
    """Rows of different sizes, one of zeros."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(spec.bits)) * 0.02
    w = w * torch.logspace(-1, 1, shape[0]).unsqueeze(1)
    w[0] = 0.0
    quantizer = make_quantizer(spec, Layout(shape))
    quantizer.init_from(w.to(dtype))
    return quantizer.integers(w.to(dtype))


def read(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.from_numpy(dequantized("x", {key: tensor.numpy() for key, tensor in packed.items()}).T.copy())


# ---- one tensor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("size", [32, 64, 96, 192])
@pytest.mark.parametrize("bits", BITS)
def test_round_trip(bits: int, size: int, dtype: torch.dtype) -> None:
    spec = spec_of(bits, size, "absmax" if size == 96 else "mse")
    tensor = trained(spec, dtype=dtype)
    packed = Exl2().pack("x.weight", tensor)
    again = Exl2().unpack(packed, spec, tensor.layout, dtype)
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.scale, tensor.scale)
    assert all(torch.equal(again.parts[key], tensor.parts[key]) for key in ("k", "largest"))
    assert torch.equal(read(packed).to(dtype), tensor.dequantize())
    assert torch.equal(read(packed).float(), tensor.dequantize(FP32))
    stored = sum(8 * t.numel() * t.element_size() for t in packed.values())
    assert stored == Exl2().stored_bits(spec, tensor.layout, dtype)


def words_of(numbers: list[int], bits: int) -> list[int]:
    """Numbers one bit after the other, least significant first, as words of 32 bits."""
    stream = [number >> bit & 1 for number in numbers for bit in range(bits)]
    return [sum(bit << at for at, bit in enumerate(stream[i : i + 32])) for i in range(0, len(stream), 32)]


# By hand, from the layout in the format's docstring: the codes of output 0 count up from the lowest, the others are 0.
WORDS = {
    2: [0xE4E4E4E4, 0xE4E4E4E4],
    3: [0x88FAC688, 0xC688FAC6, 0xFAC688FA],
    4: [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98],
    8: [0x03020100, 0x07060504, 0x0B0A0908, 0x0F0E0D0C, 0x13121110, 0x17161514, 0x1B1A1918, 0x1F1E1D1C],
}


@pytest.mark.parametrize("bits", BITS)
def test_golden_layers(bits: int) -> None:
    middle, inputs = 1 << (bits - 1), 64
    codes = torch.zeros(32, inputs, dtype=torch.int8)
    codes[0] = torch.arange(inputs) % 32 % (1 << bits) - middle
    k = (torch.arange(32).unsqueeze(1) % 16 + 1).expand(32, 2).to(torch.uint8)
    parts = {"k": k, "largest": torch.tensor([1.0, 0.5], dtype=FP16)}
    stored = SCALE_GRIDS["exl2"]
    assert isinstance(stored, TwoLevel)
    scale = stored.decode(parts)[0]
    assert scale[:3].tolist() == [[1 / 256, 1 / 512], [4 / 256, 4 / 512], [9 / 256, 9 / 512]]
    tensor = QTensor(codes, scale, None, None, spec_of(bits), Layout((32, inputs)), FP32, parts)
    packed = Exl2().pack("x.weight", tensor)
    assert set(packed) == {"q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm"}
    column = [word & 0xFFFFFFFF for word in packed["q_weight"][:, 0].tolist()]
    wanted = words_of([r % 32 % (1 << bits) for r in range(inputs)], bits)
    assert column == wanted and column[: len(WORDS.get(bits, []))] == WORDS.get(bits, [])
    others = [word & 0xFFFFFFFF for word in packed["q_weight"][:, 1].tolist()]
    assert others == words_of([middle] * inputs, bits)
    assert packed["q_weight"].shape == (2 * bits, 32) and packed["q_weight"].dtype == torch.int32
    row = [word & 0xFFFFFFFF for word in packed["q_scale"][1].tolist()]
    assert row == [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98] and packed["q_scale"].shape == (2, 4)
    assert packed["q_scale_max"].tolist() == [1.0, 0.5] and packed["q_scale_max"].dtype == FP16
    assert packed["q_groups"].tolist() == [bits, 0, bits, bits] and packed["q_groups"].dtype == torch.int16
    assert packed["q_invperm"].tolist() == list(range(inputs)) and packed["q_invperm"].dtype == torch.int32


def test_a_file_of_several_bits_in_another_order() -> None:
    """As exllamav2 writes them itself: groups of falling bits, inputs sorted by size, 2 bits in groups of 16 too.

    Here bit by bit and number by number, products in double and rounded.
    """
    chance = np.random.default_rng(0)
    groups = [(8, 32), (6, 64), (5, 32), (4, 32), (4, 96), (3, 64), (2, 32), (2, 16), (2, 48)]
    inputs, outputs = sum(rows for _, rows in groups), 32
    order = chance.permutation(inputs).astype(np.int32)
    k = chance.integers(1, 17, (len(groups), outputs))
    largest = (2.0 ** chance.uniform(-12, 8, len(groups))).astype(np.float16)
    words: list[list[int]] = []
    pairs: list[int] = []
    wanted = np.empty((inputs, outputs), dtype=np.float16)
    row = 0
    for g, (bits, rows) in enumerate(groups):
        u = chance.integers(0, 1 << bits, (rows, outputs))
        pairs += [bits, len(words)]
        words += [list(line) for line in zip(*(words_of(u[:, n].tolist(), bits) for n in range(outputs)), strict=True)]
        step = np.float16(float(largest[g]) / 256)
        for r in range(rows):
            for n in range(outputs):
                scale = np.float16(int(k[g, n]) ** 2 * float(step))
                wanted[row + r, n] = np.float16((int(u[r, n]) - (1 << (bits - 1))) * float(scale))
        row += rows
    q_scale = [words_of((k[g] - 1).tolist(), 4) for g in range(len(groups))]
    file = {
        "q_weight": torch.tensor(words, dtype=torch.int64).to(torch.int32),
        "q_scale": torch.tensor(q_scale, dtype=torch.int64).to(torch.int32),
        "q_scale_max": torch.from_numpy(largest),
        "q_groups": torch.tensor(pairs, dtype=torch.int16),
        "q_invperm": torch.from_numpy(order),
    }
    perm = np.argsort(order)
    original = np.empty_like(wanted)
    original[perm] = wanted
    assert np.array_equal(read(file).numpy().T, original)
    assert np.array_equal(Exl2().weight("x", file, {}).numpy().T, original)
    with pytest.raises(ValueError, match="another order"):
        Exl2().unpack(file, spec_of(), Layout((outputs, inputs)), FP32)
    file["q_invperm"] = torch.arange(inputs, dtype=torch.int32)
    with pytest.raises(ValueError, match="not groups of 32 with 4 bits"):
        Exl2().unpack(file, spec_of(), Layout((outputs, inputs)), FP32)


# ---- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_numbers_of_fp16(bits: int) -> None:
    """In every dtype what exllamav2 computes with, cast once; gradients pass through that rounding."""
    spec = spec_of(bits, quantizer="lsq")
    w = (torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * 0.02).requires_grad_()
    quantizer = make_quantizer(spec, Layout((32, 64)))
    quantizer.init_from(w.detach())
    fake = quantizer(w)
    tensor = quantizer.integers(w.detach())
    exact = tensor.codes.float() * tensor.scale.repeat_interleave(32, 1)
    assert torch.equal(fake, exact.half().float()) and torch.equal(tensor.dequantize(), fake)
    # at few bits the product of two such numbers often is one of fp16
    assert bits == 2 or not torch.equal(fake, exact)
    for dtype in (BF16, FP16):
        assert torch.equal(tensor.dequantize(dtype), exact.half().to(dtype))
        assert torch.equal(spec.grid.decode(tensor.codes, tensor.scale, None, None, dtype), exact.half().to(dtype))
    fake.sum().backward()
    assert w.grad is not None and bool((w.grad == 1).any())
    theta = quantizer.learned()[0]
    assert theta.grad is not None and bool(theta.grad.any())


def test_compiled_weights_are_the_same() -> None:
    spec = spec_of(8, quantizer="lsq")
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    quantizer = make_quantizer(spec, Layout((32, 256)))
    quantizer.init_from(w)

    def both(w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes, fields = quantizer.quantize(w, spec)
        return quantizer(w), *(spec.grid.decode(codes, *fields, dtype) * 1.0 for dtype in (FP32, BF16))

    tensor = quantizer.integers(w)
    with torch.no_grad():
        found = torch.compile(both, fullgraph=True)(w)
    for each, wanted in zip(found, (quantizer(w), tensor.dequantize(), tensor.dequantize(BF16)), strict=True):
        assert torch.equal(each, wanted)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_looks_at_all_rows(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better than the nearest codes of the scales that each row would like, also with one row that is far larger."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(128, 128, generator=g) * torch.exp(0.5 * torch.randn(128, 1, generator=g)) * 0.02
    h = torch.rand(128, generator=g) ** 4 if weighted else None
    spec = spec_of(4)

    def error(scale: torch.Tensor) -> float:
        squares = (spec.grid.fake_quantize(w, scale, None, None) - w).square()
        return float((squares if h is None else squares * h).double().sum())

    found = search(w, spec, h).scale
    stored = spec.scale_grid
    assert isinstance(stored, TwoLevel) and torch.equal(stored.stored(found, None)[0], found)
    monkeypatch.setattr(mse, "SHARES", (1.0,))
    largest = search(w, spec, h).scale
    monkeypatch.setattr(type(stored), "beside", lambda self, parts: [])
    nearest = search(w, spec, h).scale
    assert error(found) <= error(largest) < 0.98 * error(nearest)
    assert weighted or error(found) < 0.999 * error(largest)
    monkeypatch.undo()
    # in columns of groups that do not fit at once
    monkeypatch.setattr(mse, "_AT_ONCE", 1 << 12)
    assert torch.equal(search(w, spec, h).scale, found)


def test_training_on_the_grid_ends_in_the_file(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    model = make_model()
    bundle = quantize(model, EXL2, head=KEEP_HEAD)
    before = {name: (tensor.codes.clone(), tensor.scale.clone()) for name, tensor in bundle.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(5):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model, optimizer)
    model.eval()
    seen = {name: module._qat for name, module in model.named_modules() if f"{name}.weight" in bundle}
    assert set(seen) == {name.rpartition(".")[0] for name in bundle}
    receipt = export(bundle, tmp_path / "out", "exl2")
    assert receipt.reader == "qat (exllamav2 not run)" and receipt.max_abs_diff == 0.0
    files = dict(Exl2().read(tmp_path / "out"))
    for name, tensor in bundle.items():
        codes, scale = before[name]
        assert not torch.equal(tensor.codes, codes) and not torch.equal(tensor.scale, scale), name
        assert files[name].dtype == FP16 and torch.equal(files[name].float(), tensor.dequantize()), name


def test_gptq_starts_on_the_grid(make_model: Any, quantize: Any, tmp_path: Path) -> None:
    from qat.init.gptq import gptq

    model = make_model()
    bundle = quantize(model, {**EXL2, "bits": 3}, head=KEEP_HEAD)
    rows = [row for row in gptq(model, [IDS]) if row.error is not None]
    assert len(rows) == len(bundle) and all(row.error <= row.rtn for row in rows)  # type: ignore[operator]
    export(bundle, tmp_path / "out", "exl2")


# ---- folders ---------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits": bits} for bits in BITS},
    "groups of 64": {"bits": 4, "group_size": 64},
    "absmax, -7..7": {"bits": 4, "narrow": True, "quantizer": "absmax"},
    "mse": {"bits": 3, "quantizer": "mse"},
}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_reads_back(
    name: str, dtype: torch.dtype, make_model: Any, quantize: Any, tmp_path: Path
) -> None:
    """Layers of different bits, and a head of its own."""
    words = {**EXL2, **MODELS[name]}
    model = make_model(dtype=dtype, intermediate_size=192)
    down = {"match": ["*down_proj"], "weight": {**EXL2, "bits": 8, "granularity": "group", "group_size": 96}}
    head = {"match": ["lm_head"], "weight": {**EXL2, "bits": 6, "granularity": "group", "group_size": 32}}
    export(quantize(model, words, down=down, head=head), tmp_path / "out", "exl2")
    assert len(verify(tmp_path / "out")) == len(list(model.parameters())) - len(qat_thetas(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    own = {key: tensor for key, tensor in tensors.items() if ".q_" in key and not key.startswith("lm_head")}
    weights = sum(module.weight.numel() for key, module in model.named_modules() if f"{key}.q_weight" in own)
    bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in own.values()) / weights
    wanted = {"quant_method": "exl2", "version": "0.3.2", "head_bits": 6, "bits": pytest.approx(bits, abs=1e-3)}
    assert config["quantization_config"] == wanted


def qat_thetas(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith("theta")]


@pytest.mark.parametrize(("mlp", "attention"), [(3, 4), (4, 6), (6, 3)])
def test_a_target_of_bits_per_weight(mlp: int, attention: int, make_model: Any, quantize: Any, tmp_path: Path) -> None:
    """Rules for layers make any average; at these sizes q_invperm alone is half a bit."""
    model = make_model(hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    rule = {"match": ["*mlp*"], "weight": {**EXL2, "bits": mlp, "granularity": "group", "group_size": 128}}
    bundle = quantize(model, {**EXL2, "bits": attention, "group_size": 128}, head=KEEP_HEAD, mlp=rule)
    export(bundle, tmp_path / "out", "exl2")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    shapes = [(128, 128, attention), (64, 128, attention), (64, 128, attention), (128, 128, attention)]
    shapes += [(256, 128, mlp), (256, 128, mlp), (128, 256, mlp)]
    # k of 4 bits for a group and an output; for a group M of 16 bits, its bits and its row; 32 bits for an input
    stored = sum(o * i * bits + i // 128 * (4 * o + 16 + 16 + 16) + 32 * i for o, i, bits in shapes)
    assert abs(found["bits"] - stored / sum(o * i for o, i, _ in shapes)) < 0.01 and found["head_bits"] == 16


def test_refusals() -> None:
    def reasons(spec: QuantSpec | None, given: QuantSpec | None = None, kind: str = "linear") -> str:
        row = PlanRow("x", "Linear", "r", spec, given, 64 * 64, {"weight": kind}, 64)
        return "; ".join(Exl2().row_reasons(row))

    for bits in BITS:
        assert not reasons(spec_of(bits)) and not reasons(spec_of(bits, 64, "lsq", narrow=bits > 2))
    assert reasons(spec_of(7)) == "bits=7: exl2 has 2, 3, 4, 5, 6, 8; nearest: bits: 8"
    assert reasons(spec_of(1)) == "bits=1: exl2 has 2, 3, 4, 5, 6, 8; nearest: bits: 2"
    assert "group_size=16: exl2 has groups of a multiple of 32; nearest:" in reasons(spec_of(4, 16))
    plain = QuantSpec(4, granularity="group", group_size=32)
    near = "nearest: granularity: group, group_size: 32, scale: exl2"
    assert reasons(plain) == f"scale=portable: exl2 has scales of its own, shared by all rows; {near}"
    nf4 = QuantSpec(4, kind="nf4", granularity="group", group_size=32)
    assert reasons(nf4).startswith("grid nf4 with scale=portable: exl2 has scales of its own")
    given = QuantSpec(8, granularity="token", quantizer="absmax")
    assert "exl2 holds no input quantization; set input: null" in reasons(spec_of(), given)
    assert "exl2 holds quantized Linear layers" in reasons(spec_of(), kind="embedding")
    for fused in FUSED:
        row = PlanRow(f"layers.0.{fused}", "Linear", "r", spec_of(), None, 64 * 64, {"weight": "linear"}, 64)
        assert f"exllamav2 cuts {fused} into matrices" in Exl2().row_reasons(row)[0]
    row = PlanRow("x", "Linear", "r", spec_of(), None, 1 << 22, {"weight": "linear"}, MOST + 32)
    assert Exl2().row_reasons(row) == ["65568 inputs: exllamav2 counts up to 65536; " + KEEP]
    for bits in BITS:
        row = PlanRow("x", "Linear", "r", spec_of(bits), None, 64 * 64, {"weight": "linear"}, 64)
        # nobody else rounds weights to fp16
        assert [name for name, cls in all_formats().items() if not cls().row_reasons(row)] == ["exl2"]
    words = "stores scales of one kind of tensor only; use"
    for wrong in ({"signed": False, "zero_point": "int"}, {"signed_scale": True}, {"kind": "nf4"}):
        assert any(words in why for why in spec_of(**wrong).reasons()), wrong
    assert words in "; ".join(QuantSpec(4, scale="exl2").reasons())


@pytest.fixture
def refused(quantize: Any, tmp_path: Path) -> Any:
    """Whether an export is refused in words, or goes through where there are none."""

    def check(words: str | None, model: torch.nn.Module, **rules: Any) -> None:
        bundle = quantize(model, EXL2, **{"head": KEEP_HEAD, **rules})
        if words is None:
            assert Exl2().check(bundle) == []
            return
        with pytest.raises(ExportError, match=words) as problem:
            export(bundle, tmp_path / "out", "exl2")
        assert "\n" not in str(problem.value) and not (tmp_path / "out").exists()

    return check


def test_refusals_of_models(make_model: Any, quantize: Any, refused: Any, tmp_path: Path) -> None:
    refused(r"k_proj.weight has 48 outputs, which exl2 packs by 32", make_model(head_dim=24))
    for dtype in (FP32, BF16):
        said = "q_proj.bias: exllamav2 takes biases of quantized layers in fp16 only.*float16"
        refused(said, make_model("Qwen2", dtype=dtype))
        refused(None, make_model("Qwen2", dtype=dtype), **kept("q_proj", "k_proj", "v_proj"))
    moe = make_model("Mixtral", num_local_experts=2)
    refused("mlp.experts has all experts in one tensor: exllamav2 loads a matrix for each", moe)
    refused("exllamav2 cuts qkv_proj into matrices", make_model("Phi3", pad_token_id=0))
    refused(None, make_model("Phi3", pad_token_id=0), **kept("qkv_proj", "gate_up_proj"))
    export(quantize(make_model("Qwen2", dtype=FP16), EXL2, head=KEEP_HEAD), tmp_path / "out", "exl2")
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert load_file(tmp_path / "out" / "model.safetensors")[bias].dtype == FP16


def kept(*layers: str) -> dict[str, Any]:
    """A rule that keeps layers of this name in float."""
    return {"kept": {"match": [f"*{layer}" for layer in layers], "keep_float": True}}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("k_proj",), "self_attn has q_proj, v_proj, o_proj quantized and k_proj in float"),
        (("v_proj",), "self_attn has q_proj, k_proj, o_proj quantized and v_proj in float"),
        (
            ("o_proj",),
            "self_attn has q_proj, k_proj, v_proj quantized and o_proj in float, which exllamav2 cannot load; ",
        ),
        (("k_proj", "v_proj", "o_proj"), "self_attn has q_proj quantized"),
        # only a quantized q_proj asks for the others
        (("q_proj",), None),
        (("q_proj", "k_proj", "v_proj"), None),
        (("self_attn.*_proj",), None),
        (("gate_proj",), "mlp has up_proj, down_proj quantized and gate_proj in float"),
        (("up_proj",), "mlp has gate_proj, down_proj quantized and up_proj in float"),
        (("down_proj",), "mlp has gate_proj, up_proj quantized and down_proj in float"),
        (("gate_proj", "up_proj"), "mlp has down_proj quantized .* keep the whole block float, or quantize it whole"),
        (("mlp.*_proj",), None),
    ],
)
def test_blocks_are_quantized_whole(names: tuple[str, ...], words: str | None, make_model: Any, refused: Any) -> None:
    refused(words, make_model(num_hidden_layers=1), **kept(*names))


@pytest.mark.parametrize(
    "key", ["logit_scale", "logits_scaling", "dim_model_base", "residual_multiplier", "scale_depth"]
)
def test_prescales_where_they_reach(key: str, make_model: Any, refused: Any) -> None:
    """Those of the head, and those of what is added to the residual stream."""
    model = make_model(num_hidden_layers=1)
    setattr(model.config, key, 4.0)
    head = {"match": ["lm_head"], "weight": {**EXL2, "granularity": "group", "group_size": 32}}
    of_head = key in ("logit_scale", "logits_scaling", "dim_model_base")
    words = f"config has {key}=4.0, which exllamav2 multiplies into the scales of {'its head' if of_head else 'o_proj'}"
    refused(None if of_head else words, model)
    model = make_model(num_hidden_layers=1)
    setattr(model.config, key, 4.0)
    refused(words if of_head else None, model, head=head, **kept("self_attn.*_proj", "mlp.*_proj"))
    model = make_model(num_hidden_layers=1)
    setattr(model.config, key, 1)
    # scale_depth is divided by the root of the layers, dim_model_base by the width
    neutral = key not in ("scale_depth", "dim_model_base")
    refused(None if neutral else f"config has {key}=1", model, head=head)


def test_a_folder_of_the_name_is_no_exllamav2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exllamav2").mkdir()
    (tmp_path / "exllamav2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert set(Exl2().versions()) == {"transformers", "safetensors"}


def test_exl3_is_refused_in_words() -> None:
    with pytest.raises(QATError, match=r"exl3.* trellis .* nearest format is exl2") as problem:
        get_format("exl3")
    assert "\n" not in str(problem.value)
    with pytest.raises(QATError, match="nearest format is exl2"):
        formats_for("gguf,exl3", None)
    weight = {"granularity": "group", "group_size": 32, **EXL2}
    recipe = {"name": "x", "rules": {"linears": {"weight": weight}}, "export": {"targets": ["exl3"]}}
    with pytest.raises(
        QATError, match=r'export.targets\[0\]: "exl3" is not allowed: .* nearest format is exl2'
    ) as said:
        from_dict(recipe)
    assert "did you mean" not in str(said.value)
    assert not set(IMPOSSIBLE_FORMATS) & set(all_formats())


def test_damaged_files(make_model: Any, quantize: Any, attack: Any, tmp_path: Path) -> None:
    model = make_model(dtype=FP16, num_hidden_layers=1)
    bundle = quantize(model, EXL2, head=KEEP_HEAD, down={"match": ["*down_proj"], "weight": {**WIDE}})
    export(bundle, tmp_path / "good", "exl2")
    outcomes = attack(Exl2(), tmp_path / "good", 16)
    print(dict(outcomes))
    assert outcomes.total() == 128 and outcomes["refused"] > 40 and outcomes["noticed"] > 20, outcomes


WIDE = {**EXL2, "bits": 5, "granularity": "group", "group_size": 96}


@pytest.mark.parametrize(
    ("key", "at", "value", "words"),
    [
        ("q_invperm", 3, 4, "no permutation of 96 inputs"),
        ("q_invperm", 0, -1, "no permutation of 96 inputs"),
        ("q_groups", 0, 7, "do not cut 12 words and 96 inputs"),
        ("q_groups", 0, 0, "do not cut"),
        ("q_groups", 0, 3, "do not cut"),
        ("q_groups", 2, 8, "do not cut"),
        ("q_groups", 1, 4, "do not cut"),
        ("q_groups", 3, -4, "do not cut"),
        ("q_groups", 3, 300, "do not cut"),
    ],
)
def test_tables_that_are_none(key: str, at: int, value: int, words: str) -> None:
    packed = Exl2().pack("x.weight", trained(spec_of(4), (32, 96)))
    packed[key][at] = value
    with pytest.raises(ExportError, match=f"x.{key} .*{words}|x.{key} is {words}"):
        Exl2().weight("x", packed, {})


@pytest.mark.parametrize("bits", [2, 8])
def test_the_largest_weights_stay_finite(bits: int) -> None:
    """fp16 ends at 65504, and the lowest code of 8 bits times the largest scale has to fit."""
    w = torch.tensor([[3e38, -3e38] * 16, [-7e4, 1.0] * 16]).repeat(16, 1)
    for quantizer in ("absmax", "mse"):
        made = make_quantizer(spec_of(bits, quantizer=quantizer), Layout((32, 32)))
        made.init_from(w)
        tensor = made.integers(w)
        assert bool(torch.isfinite(made(w)).all()) and torch.equal(made(w), tensor.dequantize())
        assert torch.equal(read(Exl2().pack("x.weight", tensor)).float(), tensor.dequantize())
