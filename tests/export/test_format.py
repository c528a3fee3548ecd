from __future__ import annotations

import re
from itertools import product

import pytest
import torch

from qat.errors import ExportError, QATError
from qat.export import all_formats, get_format
from qat.export.hf_format import HfFormat
from qat.layout import Layout
from qat.plan import Plan, PlanRow
from qat.quantizers import make_quantizer
from qat.specs import QuantSpec

# every grid that some format might hold; a format refuses the others in `row_reasons`
SPECS = [
    spec
    for bits, zero, (granularity, size), scale, narrow in product(
        range(1, 9),
        ("none", "int"),
        (("tensor", None), ("channel", None), ("group", 32), ("group", 64)),
        ("portable", "fp16", "bf16", "fp32"),
        (False, True),
    )
    if not (
        spec := QuantSpec(
            bits=bits,
            signed=zero == "none",
            narrow=narrow,
            granularity=granularity,
            group_size=size,
            zero_point=zero,
            scale=scale,
            quantizer="absmax" if zero == "none" else "minmax",
        )
    ).reasons()
]


# inputs in float, or on the one grid without which a format holds no weight
INPUTS = (None, QuantSpec(8, granularity="token", zero_point="int", scale="fp32", quantizer="minmax"))


def row(spec: QuantSpec, x: QuantSpec | None = None) -> PlanRow:
    return PlanRow("layer", "Linear", "rule", spec, x, 10 * 128, {"weight": "linear"}, 128)


# The law, last step. Turned red by: the offset of signed codes left out of pack or unpack, the zero points packed along
# the rows, `repeat_interleave` -> `repeat` for scales.
@pytest.mark.parametrize("name", sorted(all_formats()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unpack_inverts_pack(name: str, dtype: torch.dtype) -> None:
    fmt = get_format(name)
    w = torch.randn(10, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    held = 0
    for spec in SPECS:
        exact = dtype == torch.float32 or spec.scale == "portable" or spec.scale_grid.dtype == dtype
        if all(fmt.row_reasons(row(spec, x)) for x in INPUTS) or not exact:
            continue
        trained = make_quantizer(spec, Layout((10, 128))).integers(w)
        back = fmt.unpack(fmt.pack("layer.weight", trained), spec, trained.layout, dtype)
        assert torch.equal(back.dequantize(), trained.dequantize()), spec
        assert torch.equal(back.codes, trained.codes) and torch.equal(back.scale, trained.scale), spec
        held += 1
    # others hold a few kinds of integers, or have tests of their own for what they hold; exl2 has scales of its own
    assert held >= {"gguf": 40, "compressed-tensors": 40, "exl2": 0}.get(name, 1)


# Turned red by dropping either check of the stored scale. (Graphs compute in float32 and store scales so.)
@pytest.mark.parametrize("name", sorted(name for name, cls in all_formats().items() if cls.needs == "tensors"))
def test_a_scale_that_would_be_rounded_is_refused(name: str) -> None:
    spec = QuantSpec(bits=4, granularity="group", group_size=32, scale="fp32")
    trained = make_quantizer(spec, Layout((4, 64))).integers(torch.randn(4, 64), torch.bfloat16)
    fmt = get_format(name)
    if isinstance(fmt, HfFormat) and torch.bfloat16 in fmt.holds(spec):
        pytest.skip("stores scales in fp32 whatever the model is")
    with pytest.raises(ExportError, match="would be rounded"):
        fmt.pack("layer.weight", trained)


def test_all_formats_are_found() -> None:
    assert {"gguf", "compressed-tensors"} <= set(all_formats())


def test_an_unknown_format_lists_the_known() -> None:
    with pytest.raises(QATError, match=r"format='ggml' is unknown; use one of .*compressed-tensors.*gguf"):
        get_format("ggml")


def test_reasons_name_layers_and_the_nearest_grid() -> None:
    spec = QuantSpec(bits=4, signed=False, granularity="group", group_size=32, zero_point="int", quantizer="minmax")
    rows = [PlanRow(f"layer{i}", "Linear", "r", spec, None, 1, {"weight": "linear"}, 64) for i in range(5)]
    (reason,) = get_format("gguf").check(Plan("r", rows, [], 5, 0))
    assert reason.startswith("layer0, layer1, layer2 and 2 more: zero_point=int")
    assert "nearest: {bits: 4, granularity: group, group_size: 32, zero_point: none, scale: portable} (Q4_0)" in reason


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gguf", {"scale": "fp32"}, "GGUF stores scales in fp16; use scale: portable"),
        ("gguf", {"scale": "bf16"}, "GGUF stores scales in fp16"),
        ("gguf", {"group_size": 16}, "GGUF blocks are 32 numbers; use group_size=32"),
        ("gguf", {"signed": False, "bits": 8}, "signed=false"),
        (
            "gguf",
            {"zero_point": "float", "signed": False, "bits": 6},
            "zero_point=float: GGUF types with a minimum, Q4_1 and Q5_1, have",
        ),
        ("compressed-tensors", {"zero_point": "float", "signed": False}, "nearest: zero_point: int"),
        ("compressed-tensors", {"scale": "e8m0"}, "scale=e8m0: compressed-tensors stores scales of integers as floats"),
        ("compressed-tensors", {"kind": "nf4"}, "grid nf4: compressed-tensors has integers, e4m3 and fp4"),
        ("compressed-tensors", {"signed_scale": True, "quantizer": "mse"}, "compressed-tensors has positive scales"),
        ("gguf", {"scale": "e8m0"}, "GGUF stores scales in fp16"),
        ("gguf", {"kind": "e4m3", "bits": 8}, "grid e4m3: GGUF types hold integers"),
    ],
)
def test_grids_that_do_not_fit(name: str, changes: dict[str, object], words: str) -> None:
    settings = {"bits": 4, "granularity": "group", "group_size": 32, **changes}
    reasons = get_format(name).row_reasons(row(QuantSpec(**settings)))  # type: ignore[arg-type]
    assert any(words in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("name", "kinds", "type", "words"),
    [
        ("compressed-tensors", {"weight": "embedding"}, "Embedding", "not Embedding; add a rule .* keep_float: true"),
        ("compressed-tensors", {"weight": "conv"}, "Conv2d", "not Conv2d"),
        ("compressed-tensors", {"weight": "transposed"}, "Conv1D", "not Conv1D"),
        ("compressed-tensors", {"gate_up_proj": "experts"}, "MixtralExperts", "not MixtralExperts"),
        ("gguf", {"weight": "conv"}, "Conv2d", "Conv2d has no place"),
    ],
)
def test_layers_that_do_not_fit(name: str, kinds: dict[str, str], type: str, words: str) -> None:
    spec = QuantSpec(bits=4, granularity="group", group_size=32)
    layer = PlanRow("block.layer", type, "rule", spec, None, 64, kinds, 64)
    (reason,) = get_format(name).check(Plan("r", [layer], [], 64, 0))
    assert re.match(f"block.layer: .*{words}", reason)


def test_inputs_that_do_not_fit() -> None:
    weight = QuantSpec(bits=8)
    for spec, words in (
        (QuantSpec(bits=8, granularity="group", group_size=32), "input granularity=group"),
        (QuantSpec(bits=8, granularity="token", narrow=True), "takes the whole signed grid"),
        (QuantSpec(bits=2, granularity="token", kind="ternary"), "takes the whole signed grid"),
        (QuantSpec(bits=8, granularity="token", scale="e8m0"), "input scale=e8m0: compressed-tensors has float"),
        (QuantSpec(bits=8, granularity="token", kind="e5m2"), "input grid e5m2: this writer has integers and e4m3"),
    ):
        layer = PlanRow("layer", "Linear", "r", weight, spec, 64, {"weight": "linear"}, 64)
        assert any(words in why for why in get_format("compressed-tensors").row_reasons(layer))
        assert any("holds no input quantization" in why for why in get_format("gguf").row_reasons(layer))
