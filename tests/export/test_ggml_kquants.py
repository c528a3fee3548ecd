"""The bytes of k-quants are what ggml's own decoders, in Python and in C, read."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.export.ggml_kquants import SIZES, decode_super_blocks, encode_super_blocks
from qat.fake_quant_kernels.two_level import KQUANTS, SUPER
from qat.scales import SCALE_GRIDS, TwoLevel


def a_tensor(kind: str, rows: int, supers: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Every code of numbers and of scales, of either sign where there are signs."""
    g = torch.Generator().manual_seed(seed)
    size, low, high, top, minima = KQUANTS[kind]
    codes = torch.randint(low, high + 1, (rows, supers * SUPER), generator=g)
    shape = rows, supers * SUPER // size
    parts = {"d": (torch.rand(rows, supers, generator=g) * 3 + 1e-3).to(torch.float16)}
    if minima:
        parts["sc"] = torch.randint(1, top + 1, shape, generator=g).to(torch.uint8)
        parts["mn"] = torch.randint(0, top + 1, shape, generator=g).to(torch.uint8)
        parts["d_min"] = torch.rand(rows, supers, generator=g).to(torch.float16)
    else:
        sign = torch.randint(0, 2, shape, generator=g) * 2 - 1
        parts["sc"] = (torch.randint(1, top + 1, shape, generator=g) * sign).to(torch.int8)
    return codes.to(torch.uint8 if minima else torch.int8), parts


def numbers(kind: str, codes: Tensor, parts: dict[str, Tensor]) -> Tensor:
    grid = SCALE_GRIDS[kind.lower()]
    assert isinstance(grid, TwoLevel)
    scale, minimum = grid.decode(parts)
    found = codes.reshape(*scale.shape, -1) * scale.unsqueeze(-1)
    return (found if minimum is None else found + minimum.unsqueeze(-1)).reshape(codes.shape)


# Turned red, one at a time, by: a shift of any field, halves for neighbours, a sign of Q3_K's or Q6_K's scales lost.
@given(st.sampled_from(sorted(SIZES)), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_gguf_reads_what_is_written(kind: str, rows: int, supers: int, seed: int) -> None:
    codes, parts = a_tensor(kind, rows, supers, seed)
    data = encode_super_blocks(kind, codes, parts)
    assert data.shape == (rows, supers * SIZES[kind])
    seen = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(seen, numbers(kind, codes, parts))
    back, found = decode_super_blocks(kind, data)
    assert torch.equal(back, codes) and back.dtype == codes.dtype
    assert set(found) == set(parts)
    for name, part in parts.items():
        assert found[name].dtype == part.dtype and torch.equal(found[name], part), name


@pytest.mark.consumer
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_llama_cpp_reads_what_is_written(kind: str) -> None:
    """By the C code that llama.cpp runs."""
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    read = getattr(library, f"dequantize_row_{kind.lower()[:-1]}K")
    codes, parts = a_tensor(kind, 1, 8, 5)
    data = encode_super_blocks(kind, codes, parts).numpy()
    seen = np.empty(codes.numel(), np.float32)
    pointer = ctypes.c_void_p
    read(data.ctypes.data_as(pointer), seen.ctypes.data_as(pointer), ctypes.c_int64(seen.size))
    assert torch.equal(torch.from_numpy(seen), numbers(kind, codes, parts).flatten())
