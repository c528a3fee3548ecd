"""The fp8 matmul's kernel: equal bits where sums are exact, elsewhere within half the stated bound of the exact sums.

The interpreter decodes e4m3's NaN as 480, so codes are finite here.

Mutations of the kernel that were tried, all red here: the masks of K left out; XS or WS always 1; the bias left out;
sums started again with each tile of K.
"""

from __future__ import annotations

import pytest
import torch
from compare import generator, same, views
from torch import Tensor

from qat.fake_quant_kernels.fp8_linear import op

E4M3 = torch.float8_e4m3fn
SIZES = [(1, 1, 1), (3, 63, 5), (64, 128, 64), (65, 64, 130), (17, 1000, 33), (130, 1023, 200), (128, 256, 128)]
SIZES += [(0, 4, 4), (4, 0, 3), (4, 3, 0)]


def scales(tokens: int, outputs: int, tensor: bool) -> tuple[Tensor, Tensor]:
    rows, columns = (1, 1) if tensor else (tokens, outputs)
    return torch.rand(rows, 1, generator=generator(5)), torch.rand(columns, 1, generator=generator(6)) * 0.01


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact_sums(size: tuple[int, int, int]) -> None:
    """Integers up to 16 are numbers of e4m3, and their sums are exact in fp32 in any order."""
    tokens, inputs, outputs = size
    g = generator(inputs)
    x = torch.randint(-16, 17, (tokens, inputs), generator=g).float().to(E4M3)
    w = torch.randint(-16, 17, (outputs, inputs), generator=g).float().to(E4M3)
    for tensor in (False, True):
        xs, ws = scales(tokens, outputs, tensor)
        bias = torch.randn(outputs, generator=g) if tensor else None
        for dtype in (torch.float32, torch.float16):
            same(op, x, xs, w, ws, bias, dtype, context=f"{size} tensor={tensor} {dtype}")


@pytest.mark.parametrize("size", SIZES[:7], ids=str)
def test_all_codes(size: tuple[int, int, int]) -> None:
    """Codes from the whole of e4m3: |y - exact| <= (K + 3) 2^-24 (sum |x_hat| |w_hat| + |bias|)."""
    tokens, inputs, outputs = size
    numbers = torch.arange(256).to(torch.uint8).view(E4M3).float()
    numbers = numbers[numbers.isfinite()]
    g = generator(inputs)
    x = numbers[torch.randint(0, 254, (tokens, inputs), generator=g)].to(E4M3)
    w = numbers[torch.randint(0, 254, (outputs, inputs), generator=g)].to(E4M3)
    bias = torch.randn(outputs, generator=g)
    xs, ws = scales(tokens, outputs, False)
    # counted and checked for writes; the sums run in another order
    (found,), _ = same(op, x, xs, w, ws, bias, torch.float32, but=(0,))
    x_hat, w_hat = x.double() * xs.double(), w.double() * ws.double()
    exact, magnitude = x_hat @ w_hat.t() + bias, x_hat.abs() @ w_hat.abs().t() + bias.abs()
    assert bool(((found - exact).abs() <= (inputs + 3) * 2.0**-24 * magnitude).all())


def test_layouts() -> None:
    x = torch.randint(-16, 17, (17, 100), generator=generator(0)).float()
    w = torch.randint(-16, 17, (33, 100), generator=generator(1)).float().to(E4M3)
    xs, ws = scales(17, 33, False)
    for name, view in views(x.to(E4M3)).items():
        same(op, view, xs, w.t().contiguous().t(), ws, None, torch.float32, context=name)
