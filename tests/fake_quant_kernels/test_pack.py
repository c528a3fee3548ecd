"""Packed codes against one bit at a time, against compressed-tensors, and back.

Mutations of `fake_quant_kernels/pack.py` that were tried, and the test that turned red for each:

    _together: the first step's mask is the word      test_stream_is_one_bit_after_the_other
    _together: last step left out                     test_stream_is_one_bit_after_the_other
    _apart: steps not reversed                        test_back
    _unpack: sub_(sign) left out                      test_back
    columns of the last word not padded with zeros    test_stream_is_one_bit_after_the_other
    pack_halves: neighbours instead of halves         test_halves
    unpack_halves: xor 8, sub 8 left out              test_halves
    _row_bytes: rounded down                          test_stream_is_one_bit_after_the_other
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels import pack as module
from qat.fake_quant_kernels.pack import pack, pack_halves, unpack, unpack_halves

SIZES = (1, 2, 7, 8, 9, 63, 64, 100)


def codes_of(shape: tuple[int, int], bits: int, signed: bool) -> Tensor:
    low = -(1 << (bits - 1)) if signed else 0
    g = torch.Generator().manual_seed(shape[1] * 8 + bits)
    codes = torch.randint(low, low + (1 << bits), shape, generator=g)
    return codes.to(torch.int8 if signed else torch.uint8)


def bit_by_bit(codes: np.ndarray, bits: int) -> np.ndarray:
    """The docstring's first formula."""
    rows, columns = codes.shape
    packed = np.zeros((rows, -(-columns * bits // 8)), dtype=np.uint8)
    for row in range(rows):
        for place in range(columns * bits):
            bit = (int(codes[row, place // bits]) >> (place % bits)) & 1
            packed[row, place // 8] |= bit << (place % 8)
    return packed


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_stream_is_one_bit_after_the_other(bits: int, signed: bool) -> None:
    for size in SIZES:
        codes = codes_of((3, size), bits, signed)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert np.array_equal(packed.numpy(), bit_by_bit(codes.numpy(), bits)), size


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_back(bits: int, signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code, in one chunk of rows or many; from any memory layout."""
    for chunk in (1 << 22, 256):
        monkeypatch.setattr(module, "_STREAM_CHUNK", chunk)
        for size in SIZES:
            codes = codes_of((9, size), bits, signed)
            codes.view(-1)[: 1 << bits] = torch.arange(1 << bits)[: codes.numel()].to(codes.dtype) - (
                (1 << (bits - 1)) if signed else 0
            )
            found = unpack(pack(codes, bits), bits, size, signed)
            assert found.dtype == codes.dtype and torch.equal(found, codes), size
    across = codes_of((40, 24), bits, signed).t()
    assert torch.equal(pack(across, bits), pack(across.contiguous(), bits))
    packed = pack(across, bits).t().contiguous().t()
    assert torch.equal(unpack(packed, bits, 40, signed), across)


def test_upper_bits_are_dropped() -> None:
    """A code is what its lowest bits say, and the neighbour is left alone."""
    for bits in range(1, 8):
        wild = torch.randint(0, 256, (4, 21), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        tame = wild & ((1 << bits) - 1)
        assert torch.equal(pack(wild, bits), pack(tame, bits))
        assert torch.equal(unpack(pack(wild, bits), bits, 21, False), tame)


def test_results_have_memory_of_their_own() -> None:
    """Of 8 bits too, where packing changes nothing. Mutation: `return codes.view(torch.uint8)` -> red."""
    codes = codes_of((2, 8), 8, True)
    packed = pack(codes, 8)
    found = unpack(packed, 8, 8, True)
    assert len({t.data_ptr() for t in (codes, packed, found)}) == 3


def test_refused() -> None:
    with pytest.raises(QATError, match="9 bits"):
        pack(codes_of((2, 8), 8, True), 9)
    with pytest.raises(QATError, match="0 bits"):
        unpack(torch.zeros(2, 0, dtype=torch.uint8), 0, 8, True)
    with pytest.raises(QATError, match="take 7 bytes of a row, not 6"):
        unpack(torch.zeros(2, 6, dtype=torch.uint8), 3, 17, True)
    with pytest.raises(QATError, match="7"):
        pack_halves(codes_of((2, 7), 4, True))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_nothing(shape: tuple[int, int]) -> None:
    for bits in (3, 8):
        packed = pack(codes_of(shape, bits, True), bits)
        assert packed.shape == (shape[0], shape[1] * bits // 8)
        assert unpack(packed, bits, shape[1], True).shape == shape
    assert unpack_halves(pack_halves(codes_of(shape, 4, True)), True).shape == shape


@pytest.mark.consumer
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_compressed_tensors(bits: int) -> None:
    """Its int32 words are this stream of offset codes (code + 2^(bits - 1)), where 32 is a multiple of the bits."""
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of((5, 64), bits, True)
    offset = (codes.int() + (1 << (bits - 1))).to(torch.uint8)
    words = theirs.pack_to_int32(codes, bits)
    assert torch.equal(words.view(torch.uint8), pack(offset, bits))


@pytest.mark.parametrize("signed", [False, True])
def test_halves(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of codes; byte j has column j in its low and column j + K/2 in its high nibble."""
    low = -8 if signed else 0
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.int8).view(4, 64, 2) + low
    codes = torch.cat((pairs[..., 0], pairs[..., 1]), 1).to(torch.int8 if signed else torch.uint8)
    for chunk in (1 << 22, 128):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        packed = pack_halves(codes)
        assert packed.dtype == torch.uint8
        for row in range(4):
            for j in range(64):
                assert int(packed[row, j]) == int(codes[row, j]) % 16 + 16 * (int(codes[row, j + 64]) % 16)
        found = unpack_halves(packed, signed)
        assert found.dtype == codes.dtype and torch.equal(found, codes)
    across = codes.t().contiguous().t()
    assert torch.equal(pack_halves(across), packed)
    assert torch.equal(unpack_halves(packed.t().contiguous().t(), signed), codes)


def test_compiled_halves() -> None:
    """Mutation: another formula where a compiler looks on -> red."""
    for signed in (False, True):
        codes = codes_of((4, 64), 4, signed)
        run = torch.compile(lambda c, s=signed: unpack_halves(pack_halves(c) ^ 0, s), fullgraph=True)
        assert torch.equal(run(codes), codes)
        packed = torch.compile(pack_halves, fullgraph=True)(codes)
        assert torch.equal(packed, pack_halves(codes))


def test_opcheck() -> None:
    codes = codes_of((3, 21), 3, True)
    torch.library.opcheck(pack.custom, (codes, 3))
    torch.library.opcheck(unpack.custom, (pack(codes, 3), 3, 21, True))
