"""The bytes of blocks are what ggml's own decoders, in Python and in C, read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.errors import ExportError
from qat.export.ggml_blocks import TYPES, decode_blocks, encode_blocks, smallest_type
from qat.grids import GRIDS
from qat.specs import QuantSpec

UP = [*range(16), *range(15, -1, -1)]
NIBBLES = "f0e1d2c3b4a5968778695a4b3c2d1e0f"  # byte j holds u[j] = j and u[j + 16] = 15 - j


def fp16(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float16)


# Written by hand from ggml's structs; 0.5 in fp16 is 0x3800, -2 is 0xc000. Turned red by: neighbours instead of halves,
# the high nibble first, an offset of 7, a scale on the other side of the codes, a big-endian scale, the fifth bits of
# the other half, base-3 digits from the other end or rounded down.
def test_golden_nibbles() -> None:
    codes = torch.tensor([UP])
    assert encode_blocks("Q4_0", codes - 8, fp16(0.5)).numpy().tobytes().hex() == "0038" + NIBBLES
    assert encode_blocks("IQ4_NL", codes, fp16(0.5)).numpy().tobytes().hex() == "0038" + NIBBLES
    assert encode_blocks("Q4_1", codes, fp16(0.5), fp16(-2.0)).numpy().tobytes().hex() == "0038" + "00c0" + NIBBLES
    # 2^-1 has the exponent 126 in e8m0
    power = torch.tensor([[0.5]]).to(torch.float8_e8m0fnu)
    assert encode_blocks("MXFP4", codes, power).numpy().tobytes().hex() == "7e" + NIBBLES


def test_golden_five_bits() -> None:
    codes = torch.arange(32).reshape(1, -1)
    body = "0000ffff" + "00112233445566778899aabbccddeeff"
    assert encode_blocks("Q5_0", codes - 16, fp16(0.5)).numpy().tobytes().hex() == "0038" + body
    assert encode_blocks("Q5_1", codes, fp16(0.5), fp16(-2.0)).numpy().tobytes().hex() == "0038" + "00c0" + body


def test_golden_q8_0() -> None:
    codes = torch.zeros(1, 32, dtype=torch.int8)
    codes[0, :4] = torch.tensor([1, -1, 127, -128])
    data = encode_blocks("Q8_0", codes, torch.tensor([[-2.0]]))
    assert data.numpy().tobytes().hex() == "00c0" + "01ff7f80" + "00" * 28


def test_golden_nvfp4() -> None:
    codes = torch.arange(16).repeat(1, 4)
    scales = torch.tensor([[1.0, 0.5, 2.0, 448.0]]).to(torch.float8_e4m3fn)
    assert encode_blocks("NVFP4", codes, scales).numpy().tobytes().hex() == "3830407e" + "8091a2b3c4d5e6f7" * 4


def test_golden_ternary() -> None:
    codes = torch.zeros(1, 256, dtype=torch.int8)
    codes[0, 0] = 1
    # 11111 in base 3 is 121, 21111 is 202, 11110 is 120; times 256 / 243, rounded up: 128, 213, 127
    assert encode_blocks("TQ1_0", codes, fp16(0.5)).numpy().tobytes().hex() == "d5" + "80" * 47 + "7f" * 4 + "0038"
    codes = torch.tensor([-1, 0, 1, 0, 2, 2, 2, 2]).repeat_interleave(32).reshape(1, -1)
    # 0, 1, 2, 1 from the lowest bits on, and four times 3
    assert encode_blocks("TQ2_0", codes, fp16(0.5)).numpy().tobytes().hex() == "64" * 32 + "ff" * 32 + "0038"


def a_tensor(name: str, rows: int, runs: int, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every code; scales of either sign where there are signs, one for each span."""
    g, kind = torch.Generator().manual_seed(seed), TYPES[name]
    codes = torch.randint(kind.low, kind.high + 1, (rows, runs * kind.run), generator=g)
    shape = rows, codes.shape[1] // kind.span
    if name == "MXFP4":
        scale = torch.exp2(torch.randint(-40, 40, shape, generator=g).float())
    elif name == "NVFP4":
        scale = torch.rand(shape, generator=g) * 400 + 2**-9
    else:
        scale = (torch.rand(shape, generator=g) * 3 + 1e-3) * (torch.randint(0, 2, shape, generator=g) * 2 - 1)
    minimum = torch.randn(shape, generator=g).to(torch.float16) if kind.minimum else None
    return codes.to(torch.int8 if kind.low < 0 else torch.uint8), scale.to(kind.stored), minimum


def numbers(name: str, codes: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    kind = TYPES[name].kind
    if kind != "int":
        return GRIDS[kind].decode(codes, scale.float(), None, None)
    found = codes.reshape(*scale.shape, -1) * scale.float().unsqueeze(-1)
    return (found if minimum is None else found + minimum.float().unsqueeze(-1)).reshape(codes.shape)


@given(st.sampled_from(sorted(TYPES)), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_gguf_reads_what_is_written(name: str, rows: int, runs: int, seed: int) -> None:
    codes, scale, minimum = a_tensor(name, rows, runs, seed)
    data = encode_blocks(name, codes, scale, minimum)
    assert data.shape == (rows, runs * TYPES[name].size)
    seen = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(seen, numbers(name, codes, scale, minimum))
    back, scales, minima = decode_blocks(name, data)
    assert torch.equal(back, codes) and back.dtype == codes.dtype
    assert torch.equal(scales.float(), scale.float()) and scales.dtype == scale.dtype
    assert (minima is None) == (minimum is None) and (minima is None or torch.equal(minima, minimum))


@pytest.mark.consumer
@pytest.mark.parametrize("name", sorted(TYPES))
def test_llama_cpp_reads_what_is_written(name: str, read_by_c: Callable[..., Tensor]) -> None:
    codes, scale, minimum = a_tensor(name, 1, 40, 7)
    data = encode_blocks(name, codes, scale, minimum)
    assert torch.equal(read_by_c(name, data, codes.numel()), numbers(name, codes, scale, minimum).flatten())


def test_a_scale_is_repeated_for_every_run_of_its_group() -> None:
    codes = torch.zeros(3, 128, dtype=torch.int8)
    for scale in (torch.tensor([[1.0, 2.0]] * 3), torch.tensor([[4.0]])):
        _, seen, _ = decode_blocks("Q5_0", encode_blocks("Q5_0", codes, scale))
        assert torch.equal(seen.float(), scale.repeat_interleave(4 // scale.shape[1], 1).expand(3, 4))


def test_bytes_that_are_no_blocks() -> None:
    with pytest.raises(ExportError, match="rows of 41 bytes are no Q4_1 blocks of 20 bytes"):
        decode_blocks("Q4_1", torch.zeros(1, 41, dtype=torch.uint8))


G32: dict[str, Any] = {"granularity": "group", "group_size": 32}
G256: dict[str, Any] = {"granularity": "group", "group_size": 256}
UNSIGNED: dict[str, Any] = {**G32, "signed": False}
MINIMUM: dict[str, Any] = {**UNSIGNED, "zero_point": "float"}
CHOICES: list[tuple[dict[str, Any], int, str | None]] = [
    ({**G32, "bits": 1}, 256, "Q4_0"),
    ({**G32, "bits": 4}, 32, "Q4_0"),
    ({**G32, "bits": 5}, 32, "Q5_0"),
    ({**G32, "bits": 5, "narrow": True}, 32, "Q5_0"),
    ({**G32, "bits": 6}, 32, "Q8_0"),
    ({**G32, "bits": 8}, 32, "Q8_0"),
    ({**G32, "bits": 8, "scale": "fp32"}, 32, None),
    ({**G32, "bits": 8, "scale": "e8m0"}, 32, None),
    ({**G32, "bits": 4, "group_size": 48}, 96, None),
    ({**UNSIGNED, "bits": 3}, 32, "Q4_0"),
    ({**UNSIGNED, "bits": 4}, 32, "Q4_1"),
    ({**UNSIGNED, "bits": 5}, 32, "Q5_1"),
    ({**UNSIGNED, "bits": 7}, 32, "Q8_0"),
    ({**UNSIGNED, "bits": 8}, 32, None),
    ({**UNSIGNED, "bits": 4, "zero_point": "int"}, 32, None),
    ({**MINIMUM, "bits": 2}, 32, "Q4_1"),
    ({**MINIMUM, "bits": 4, "scale": "fp16"}, 32, "Q4_1"),
    ({**MINIMUM, "bits": 5}, 32, "Q5_1"),
    ({**MINIMUM, "bits": 6}, 32, None),
    ({**G32, "kind": "ternary", "bits": 2}, 256, "Q4_0"),
    ({**G256, "kind": "ternary", "bits": 2}, 512, "TQ1_0"),
    ({"kind": "ternary", "bits": 2, "granularity": "tensor"}, 512, "TQ1_0"),
    ({"kind": "ternary", "bits": 2}, 128, "Q4_0"),
    ({**G256, "bits": 1}, 256, "TQ1_0"),
    ({**G256, "bits": 2, "narrow": True}, 256, "TQ1_0"),
    ({**G256, "bits": 2}, 256, "TQ2_0"),
    ({**G256, "bits": 3}, 256, "Q4_0"),
    ({**G256, "bits": 2, "signed": False}, 256, "Q4_0"),
    ({**G32, "kind": "iq4_nl", "signed_scale": True}, 32, "IQ4_NL"),
    ({**G32, "kind": "nf4"}, 32, None),
    ({**G32, "kind": "fp4", "scale": "e8m0"}, 32, "MXFP4"),
    ({**G32, "kind": "fp4"}, 32, None),
    ({"kind": "fp4", "scale": "nvfp4", "granularity": "group", "group_size": 16}, 64, "NVFP4"),
    ({"kind": "fp4", "scale": "nvfp4", "granularity": "group", "group_size": 16}, 96, None),
]


# Turned red by an order of TYPES that is not that of their sizes, or by a condition left out of `reasons`.
@pytest.mark.parametrize(("words", "columns", "name"), CHOICES)
def test_smallest_type(words: dict[str, Any], columns: int, name: str | None) -> None:
    spec = QuantSpec(**words)
    assert spec.reasons() == []
    assert smallest_type(spec, columns) == name


def test_types_are_in_the_order_of_their_sizes() -> None:
    sizes = [kind.size / kind.run for kind in TYPES.values()]
    assert sizes == sorted(sizes)
