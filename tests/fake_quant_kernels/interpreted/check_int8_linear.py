"""The int8 matmul's kernel equals its reference bit for bit: sums are integers, and the epilogue's order is one.

Mutations of the kernel that were tried, all red here: the masks of K left out; the last turn of the order taken as
full; the scales in the other order; XS, WS or ZS always 1; `acc + z * sums`; columns beyond the matrix stored.
"""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, generator, same, views
from torch import Tensor

from qat.fake_quant_kernels.int8_linear import op

# 128 x 128 and 64 x 64 tiles, filled and not; several tiles each way, more rows of tiles than one turn of the order
SIZES = [(1, 1, 1), (3, 63, 5), (64, 128, 64), (65, 64, 130), (17, 1000, 33), (130, 1023, 200), (128, 256, 128)]
SIZES += [(1200, 32, 300), (0, 4, 4), (4, 0, 3), (4, 3, 0)]


def operands(tokens: int, inputs: int, outputs: int, tensor: bool, zero: bool) -> list[Tensor | None]:
    g = generator(inputs)
    x = torch.randint(-128, 128, (tokens, inputs), generator=g, dtype=torch.int8)
    w = torch.randint(-128, 128, (outputs, inputs), generator=g, dtype=torch.int8)
    if tokens > 1 and outputs > 1:
        # the largest sums
        x[-1], w[-1] = -128, -128
    rows, columns = (1, 1) if tensor else (tokens, outputs)
    xs, ws = torch.rand(rows, 1, generator=g), torch.rand(columns, 1, generator=g) * 1e-3
    return [x, xs, w, ws, torch.randint(-128, 128, (rows, 1), generator=g).float() if zero else None]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int, int]) -> None:
    for tensor in (False, True):
        for zero in (False, True):
            x, xs, w, ws, z = operands(*size, tensor, zero)
            bias = torch.randn(size[2], generator=generator(1)) if zero != tensor else None
            for dtype in (torch.float32, torch.float16):
                same(op, x, xs, w, ws, bias, dtype, z, context=f"{size} tensor={tensor} zero={zero} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_dtypes(dtype: torch.dtype) -> None:
    x, xs, w, ws, _ = operands(17, 100, 33, False, False)
    same(op, x, xs, w, ws, torch.randn(33, generator=generator(2)).to(dtype), torch.float32, None, context=str(dtype))


def test_layouts() -> None:
    """Any strides: transposed weights are what the gradients hand over."""
    x, xs, w, ws, z = operands(17, 100, 33, False, True)
    assert x is not None and xs is not None and w is not None and ws is not None
    for name, x_view in views(x).items():
        for w_view in views(w).values():
            same(op, x_view, xs, w_view, views(ws)["every second"], None, torch.float32, z, context=name)


def test_not_finite_scales() -> None:
    """An infinite scale (a gradient's, say) makes its row not finite, a NaN stays one."""
    x, xs, w, ws, _ = operands(5, 64, 7, False, False)
    assert xs is not None and ws is not None
    xs[1], xs[2], ws[3] = float("inf"), float("nan"), -float("inf")
    same(op, x, xs, w, ws, None, torch.float32, None)
