"""blocks: the kernels with an element and a kind of scale that no format combines, e2m1 with an fp32 scale.

The formats' own checks go through families and sizes; here the launchers are held against plain arithmetic.

Mutations that were tried, and what turned red:

    hop = 0 for packed groups                       test_packed_halves
    scale_stride = groups for [1, 1] scales         test_packed_halves
    per-chunk sums not added                        test_long_blocks
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_equal, calls, elements, generator, nan_filled

from qat.fake_quant_kernels import block_launch
from qat.fake_quant_kernels.elements import E2M1, e2m1_codes, e2m1_round_, pack, scaled

NAME = "blocks"


def equal(found: torch.Tensor, wanted: torch.Tensor, context: str) -> None:
    assert_equal(found, wanted, context)
    elements[NAME] += found.numel()
    calls[NAME] += 1


@pytest.mark.parametrize(("rows", "groups"), [(5, 4), (5, 1), (1, 1), (5, 3)])
@pytest.mark.parametrize("columns", [24, 120, 9000])
def test_packed_halves(rows: int, groups: int, columns: int) -> None:
    """[R, G], one row or one number of scales. Mutation: `hop`, `scale_stride` -> red."""
    w = torch.randn(5, columns, generator=generator(columns)) * 3
    s = 0.2 + torch.rand(rows, groups, generator=generator(1))
    u = e2m1_round_(scaled(w, s))
    codes, numbers = e2m1_codes(u).reshape(w.shape), (u * s.unsqueeze(-1)).reshape(w.shape)
    with nan_filled():
        plain, kept = block_launch.quantize(w, E2M1, s, 0, True, torch.uint8)
        packed, _ = block_launch.quantize(w, E2M1, s, 0, True, torch.uint8, True)
        fake, _ = block_launch.quantize(w, E2M1, s, 0, False, torch.float32)
        back = block_launch.dequantize(packed, E2M1, s, torch.float32, True)
    assert kept is s
    equal(plain, codes, "codes")
    equal(packed, pack(codes), "packed")
    equal(fake, numbers, "fake")
    equal(back, numbers, "decoded")


@pytest.mark.parametrize("columns", [2048, 5000, 16385])
def test_long_blocks(columns: int) -> None:
    """Blocks of more than one tile: sums of pieces, and scales found in a loop. Mutation: one piece only -> red."""
    w = torch.randint(-12, 13, (3, columns), generator=generator(columns)).float() / 2
    w[1] *= 4
    s = torch.tensor([[1.0], [2.0], [0.5]])
    g = torch.randint(-2, 3, w.shape, generator=generator(4)).float()
    v = scaled(w, s).squeeze(1)
    inside = v.abs() <= 6
    u = e2m1_round_(v.clone())
    with nan_filled():
        dw, ds = block_launch.differentiate(g, w, E2M1, s, -6.0, 6.0, True, True)
        one, _ = block_launch.differentiate(g, w, E2M1, s[:1], -6.0, 6.0, False, True)
        fake, found = block_launch.quantize(w, E2M1, None, 1, False, torch.float32, inv_peak=0.25, largest=1e30)
    # all terms are small multiples of 1/4: sums are exact in any order
    equal(dw, g * inside, "dw")
    equal(ds, (g * (u - v * inside)).sum(1, keepdim=True), "ds")
    assert one.numel() == 0
    scale = w.abs().amax(1, keepdim=True) * 0.25
    equal(found, scale, "scale")
    equal(fake, e2m1_round_(scaled(w, scale)).squeeze(1) * scale, "fake of found scales")
