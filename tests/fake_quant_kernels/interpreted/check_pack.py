"""The interpreted kernels of `pack` write the reference's bytes and read its codes, for 1 to 8 bits.

Mutations that were tried, and what turned red:

    squeezed, spread: one step left out                      test_streams
    _pack_odd_kernel: one word instead of two                test_streams (3, 5, 6, 7 bits)
    _unpack_odd_kernel: one word instead of two              test_streams (3, 5, 6, 7 bits)
    spread: signs left out                                   test_streams
    MOST - 1                                                 test_rows
    _unpack_bytes_kernel: high byte left out                 test_rows
    _one_stream: columns * bits % 8 not asked for            test_rows
    _one_stream: neither addresses nor offsets asked for     test_layouts
"""

import pytest
import torch
from compare import SIZES, generator, same, views
from torch import Tensor

from qat.fake_quant_kernels.pack import pack, unpack


def codes_of(shape: tuple[int, int], bits: int, signed: bool, seed: int = 0) -> Tensor:
    low = -(1 << (bits - 1)) if signed else 0
    codes = torch.randint(low, low + (1 << bits), shape, generator=generator(seed))
    if codes.numel():
        codes[0, 0], codes[-1, -1] = low, low + (1 << bits) - 1
    return codes.to(torch.int8 if signed else torch.uint8)


def check(codes: Tensor, bits: int, context: str = "") -> None:
    where = f"{context} {tuple(codes.shape)} {bits} bits {codes.dtype}"
    (packed,), _ = same(pack, codes, bits, context=where)
    (found,), _ = same(unpack, packed, bits, codes.shape[1], codes.dtype == torch.int8, context=where)
    assert torch.equal(found, codes), where


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams(bits: int) -> None:
    """Whole words: one stream over all rows; the second shape takes several programs."""
    for shape in ((2, 64), (3, 5504), (16, 8), (1, 128), (32, 4), (128, 88), (1, 64)):
        for signed in (False, True):
            check(codes_of(shape, bits, signed, bits), bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows(bits: int) -> None:
    """Rows that start at bytes of their own."""
    for size in (*SIZES, 4, 62, 65):
        for signed in (False, True):
            check(codes_of((3, size), bits, signed, size), bits)
    # the rows would fit into whole words, one by one they do not
    check(codes_of((128, 3), bits, True), bits)
    for shape in ((0, 8), (3, 0), (0, 0)):
        check(codes_of(shape, bits, False), bits)


def test_layouts() -> None:
    for bits in (3, 4):
        codes = codes_of((4, 32), bits, True)
        for name, view in views(codes).items():
            check(view, bits, name)
        packed = pack.reference(codes, bits)
        for name, view in views(packed).items():
            same(unpack, view, bits, 32, True, context=f"packed {name}")
    # what is above the bits does not reach the neighbours
    same(pack, torch.full((2, 64), -1, dtype=torch.int8), 3)
    same(pack, torch.full((2, 63), 255, dtype=torch.uint8), 5)
