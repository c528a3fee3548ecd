"""4-bit groups as embedding rows: every code with every kind of scale comes back as code * s.

Mutations tried: 7 for 8 in the offset, the upper nibble shifted by 3, offsets and scales written in the wrong order,
`_LARGEST` doubled, `% (8 * groups)` left out: each turns a test red.
"""

from __future__ import annotations

import pytest
import torch

from qat.fake_quant_kernels import dynamic, rowwise4
from qat.fake_quant_kernels import rows as rows_module
from qat.fake_quant_kernels.affine import decode, encode

pytestmark = pytest.mark.skipif(not rowwise4._exact(), reason="torch has no FBGEMM embedding rows here (not x86)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 8), (3, 5, 32), (7, 1, 1000), (64, 4, 24)])
def test_same_numbers_as_decode(rows: int, groups: int, size: int, signed: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    low = -8 if signed else 0
    codes = torch.randint(low, low + 16, (rows, groups * size), generator=g)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    # all of fp16's normal range, and some of its denormals
    octave = torch.randint(-20, 13, (rows, groups), generator=g).float()
    scale = ((torch.rand(rows, groups, generator=g) + 1) * 2.0**octave).half().float()
    assert rowwise4.holds(scale)
    w = decode(codes, scale, None, None)
    assert rowwise4.fits(w, groups)
    packed, given = rowwise4.encode(w, scale, low, low + 15)
    assert packed.nbytes == codes.numel() // 2 + 4 * scale.numel() and given is scale
    found = rowwise4.decode(packed, dtype).view(rows, groups * size)
    assert found.dtype == dtype
    assert torch.equal(found, decode(codes, scale, None, None, dtype))


@pytest.mark.parametrize("chunk", [64, 1 << 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("lo", "hi"), [(-8, 7), (-7, 7), (-2, 1), (0, 15)])
def test_same_codes_and_scales(
    lo: int, hi: int, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `dynamic.absmax` and of `affine.encode`, with clipping, ties, a group of zeros, and in chunks."""
    monkeypatch.setattr(rows_module, "_CHUNK", chunk)
    w = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    w[0, :16], w[1, 16:32] = 0.0, torch.arange(16) - 7.5
    how = 3, 2 / (hi - lo), lo, hi, torch.bfloat16, 2.0**-14, 65280.0
    codes, scale = dynamic.absmax(w, *how, lo < 0, poison=True)
    packed, found = rowwise4.absmax(w, *how)
    assert torch.equal(found, scale)
    assert torch.equal(rowwise4.decode(packed, torch.float32).view(7, 48), decode(codes, scale, None, None))
    scale = (scale * 0.7).half().float()
    packed, _ = rowwise4.encode(w, scale, lo, hi)
    codes = encode(w, scale, None, None, lo, hi)
    assert torch.equal(rowwise4.decode(packed, torch.float32).view(7, 48), decode(codes, scale, None, None))


def test_a_nan_shows_in_the_scale() -> None:
    w = torch.randn(2, 16)
    w[1, 3] = torch.nan
    _, scale = rowwise4.absmax(w, 2, 1 / 7.5, -8, 7, torch.float16, 2.0**-14, 65504.0)
    assert torch.isnan(scale).tolist() == [[False, False], [True, False]] and not rowwise4.holds(scale)
    assert bool(torch.isnan(rowwise4.encode(w, torch.ones(2, 2), -8, 7)[1]).all())


def test_what_it_does_not_hold() -> None:
    w = torch.zeros(2, 16)
    assert rowwise4.fits(w, 2)
    assert not rowwise4.fits(w[:, :12], 1)
    assert not rowwise4.fits(w[:0], 2)
    assert not rowwise4.fits(w.double(), 2)
    assert rowwise4.holds(torch.full((2, 2), 8188.0))
    assert not rowwise4.holds(torch.tensor([[1.0, 8192.0], [1.0, 1.0]]))
    assert not rowwise4.holds(torch.tensor([[1.0, torch.nan], [1.0, 1.0]]))
