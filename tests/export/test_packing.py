from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import helpers
from hypothesis import given
from hypothesis import strategies as st

from qat.export import packing
from qat.export.packing import pack_bits, unpack_bits, words_per_row


def packed(codes: list[int], bits: int) -> str:
    """The bytes of one row as hex."""
    return pack_bits(torch.tensor([codes]), bits).view(torch.uint8).numpy().tobytes().hex()


# Written by hand. Turned red by: `* bits` -> `* (bits - 1)` in the shift, `[..., :bits]` -> `[..., 8 - bits:]` (high
# bytes first), reversing the arange (most significant first).
def test_golden_bytes() -> None:
    assert packed([1, 2, 3, 4, 5, 6, 7, 8], 4) == "21436587"
    assert packed([0, 1, 2, 3, 3, 2, 1, 0], 2) == "e41b0000"
    assert packed([1, 0, 0, 0, 0, 0, 0, 0, 1, 1], 1) == "01030000"
    # 5 = 101, 1 = 100 (LSB first), 2 = 010: bits 101 100 01 | 0
    assert packed([5, 1, 2], 3) == "8d000000"
    assert packed([0x1F, 0x00, 0x1F, 0x10, 0x01, 0x0F, 0x00, 0x1F], 5) == "1f7c181ef8000000"
    assert packed([255, 0, 128, 7, 1], 8) == "ff00800701000000"


def test_a_word_is_little_endian() -> None:
    assert pack_bits(torch.arange(8).reshape(1, 8), 4).tolist() == [[0x76543210]]


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, words_per_row(columns, bits))
    assert torch.equal(unpack_bits(words, bits, columns), codes.to(torch.int16))


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_the_consumer_packs_the_same_words(bits: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (3, columns), generator=generator)
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_bits(codes, bits), helpers.pack_to_int32(signed, bits))


def test_pieces_make_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 8, (5, 40), generator=torch.Generator().manual_seed(0))
    whole = pack_bits(codes, 3)
    monkeypatch.setattr(packing, "_CHUNK", 50)
    assert torch.equal(pack_bits(codes, 3), whole)
    assert torch.equal(unpack_bits(whole, 3, 40), codes.to(torch.int16))
