"""4-bit groups as embedding rows: every code with every kind of scale comes back as code * s.

Mutations tried: 7 for 8 in the offset, the upper nibble shifted by 3, offsets and scales written in the wrong order,
`_LARGEST` doubled, `size % 4` left out: each turns a test red.
"""

from __future__ import annotations

import pytest
import torch

from qat.fake_quant_kernels import rowwise4
from qat.fake_quant_kernels.affine import decode

pytestmark = pytest.mark.skipif(not rowwise4._exact(), reason="torch has no FBGEMM embedding rows here (not x86)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 4), (3, 5, 32), (7, 1, 1000), (64, 4, 24)])
def test_same_numbers_as_decode(rows: int, groups: int, size: int, signed: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    low = -8 if signed else 0
    codes = torch.randint(low, low + 16, (rows, groups * size), generator=g)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    # all of fp16's normal range, and some of its denormals
    octave = torch.randint(-20, 13, (rows, groups), generator=g).float()
    scale = ((torch.rand(rows, groups, generator=g) + 1) * 2.0**octave).half().float()
    assert rowwise4.holds(codes, scale)
    packed = rowwise4.pack(codes, scale)
    assert packed.nbytes == codes.numel() // 2 + 4 * scale.numel()
    found = rowwise4.decode(packed, (rows, groups * size), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, decode(codes, scale, None, None, dtype))


def test_what_it_does_not_hold() -> None:
    codes = torch.zeros(2, 8, dtype=torch.int8)
    assert rowwise4.holds(codes, torch.full((2, 2), 8188.0))
    assert not rowwise4.holds(codes, torch.tensor([[1.0, 8192.0], [1.0, 1.0]]))
    assert not rowwise4.holds(codes, torch.tensor([[1.0, torch.nan], [1.0, 1.0]]))
    assert not rowwise4.holds(codes[:, :6], torch.ones(2, 1))
    assert not rowwise4.holds(codes[:0], torch.ones(0, 2))
    assert not rowwise4.holds(codes, torch.ones(1, 1))
