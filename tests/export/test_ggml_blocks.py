from __future__ import annotations

import gguf
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.export.ggml_blocks import TYPES, decode_blocks, encode_blocks, smallest_type


# Written by hand from ggml's structs. Turned red by: splitting neighbours instead of halves, the high nibble first,
# an offset of 7, the scale behind the codes, a big-endian scale.
def test_golden_q4_0() -> None:
    codes = torch.tensor([[*range(-8, 8), *range(7, -9, -1)]], dtype=torch.int8)
    data = encode_blocks("Q4_0", codes, torch.tensor([[0.5]]))
    # 0.5 in fp16 is 0x3800; byte j holds u[j] = j and u[j + 16] = 15 - j
    assert data.numpy().tobytes().hex() == "0038" + "f0e1d2c3b4a5968778695a4b3c2d1e0f"


def test_golden_q8_0() -> None:
    codes = torch.zeros(1, 32, dtype=torch.int8)
    codes[0, :4] = torch.tensor([1, -1, 127, -128])
    data = encode_blocks("Q8_0", codes, torch.tensor([[-2.0]]))
    assert data.numpy().tobytes().hex() == "00c0" + "01ff7f80" + "00" * 28


@given(st.sampled_from(sorted(TYPES)), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1))
def test_gguf_decodes_codes_times_scale(kind: str, rows: int, blocks_per_group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    _, low, high = TYPES[kind]
    codes = torch.randint(low, high + 1, (rows, 128), generator=generator).to(torch.int8)
    scale = (torch.rand(rows, 4 // blocks_per_group, generator=generator) * 3 + 1e-3).to(torch.float16)
    data = encode_blocks(kind, codes, scale)
    seen = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    groups = codes.float().reshape(rows, scale.shape[1], -1)
    assert torch.equal(seen, (groups * scale.float().unsqueeze(-1)).reshape(rows, 128))
    back, scales = decode_blocks(kind, data)
    assert torch.equal(back, codes)
    assert torch.equal(scales, scale.repeat_interleave(blocks_per_group, dim=1))


def test_smallest_type() -> None:
    assert smallest_type(-8, 7) == smallest_type(-2, 1) == "Q4_0"
    assert smallest_type(-16, 15) == smallest_type(-128, 127) == "Q8_0"
    assert smallest_type(0, 255) is None
