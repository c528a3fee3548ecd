"""The bytes of k-quants are what ggml's own decoders, in Python and in C, read."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.export.ggml_kquants import SIZES, decode_super_blocks, encode_super_blocks
from qat.fake_quant_kernels.two_level import KQUANTS, SUPER
from qat.grids import GRIDS
from qat.scales import SCALE_GRIDS, TwoLevel


def a_tensor(kind: str, rows: int, supers: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Every code of numbers and of scales, of either sign where there are signs."""
    g = torch.Generator().manual_seed(seed)
    size, low, high, top, minima = KQUANTS.get(kind, (32, 0, 15, 31, False))
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
    return codes.to(torch.int8 if low < 0 else torch.uint8), parts


def numbers(kind: str, codes: Tensor, parts: dict[str, Tensor]) -> Tensor:
    grid = SCALE_GRIDS[kind.lower()]
    assert isinstance(grid, TwoLevel)
    scale, minimum = grid.decode(parts)
    if kind == "IQ4_XS":
        return GRIDS["iq4_nl"].decode(codes, scale, None, None)
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


# By hand from ggml's struct. Turned red by: the high bits of scales before the low ones, an offset of 31.
def test_golden_iq4_xs() -> None:
    codes = torch.tensor([[*range(16), *range(15, -1, -1)] * 8], dtype=torch.uint8)
    sc = torch.tensor([[-31, 1, 1, 1, 1, 1, 1, 2]], dtype=torch.int8)
    data = encode_super_blocks("IQ4_XS", codes, {"sc": sc, "d": torch.tensor([[0.5]], dtype=torch.float16)})
    # sc + 32 is 1, 33 six times, 34: high bits 0, 2, .., 2 from the lowest on, low ones 1, .., 1, 2
    assert data.numpy().tobytes().hex() == "0038" + "a8aa" + "11111121" + "f0e1d2c3b4a5968778695a4b3c2d1e0f" * 8


@pytest.mark.consumer
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_llama_cpp_reads_what_is_written(kind: str, read_by_c: Callable[..., Tensor]) -> None:
    codes, parts = a_tensor(kind, 1, 8, 5)
    data = encode_super_blocks(kind, codes, parts)
    assert torch.equal(read_by_c(kind, data, codes.numel()), numbers(kind, codes, parts).flatten())
