"""float8's reference against a table of all fp8 numbers in fp64, which shares nothing with PyTorch's casts.

Mutations that were tried, and the test that turned red:

    the clamp left out                      test_every_number_and_midpoint (above 448 PyTorch's e4m3fn gives NaN)
    448 -> 240                              test_every_number_and_midpoint
    `- v * inside` left out of ds           test_gradients
    group_amax without abs                  test_dynamic_scales
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.fake_quant_kernels import float8

F8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def table(f8: torch.dtype) -> Tensor:
    """All finite magnitudes in fp64, ascending, built from the format's definition."""
    mantissa, bias, last = (3, 7, 0x7E) if f8 == torch.float8_e4m3fn else (2, 15, 0x7B)
    found = []
    for code in range(last + 1):
        exponent, fraction = code >> mantissa, (code & ((1 << mantissa) - 1)) / 2**mantissa
        found.append(2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("f8", F8)
def test_every_number_and_midpoint(f8: torch.dtype) -> None:
    """Half to even, denormals, saturation, signs. Mutation: no clamp -> red."""
    numbers = table(f8)
    assert float(numbers[-1]) == float8.ELEMENTS[f8].top
    points = torch.cat(
        (numbers, (numbers[1:] + numbers[:-1]) / 2, numbers[-1:] * torch.tensor([1.01, 1.5, 1e9]))
    ).float()
    up = torch.full_like(points, torch.inf)
    w = torch.cat((points, torch.nextafter(points, up), torch.nextafter(points, -up).abs())).unsqueeze(0)
    far = (w.double().unsqueeze(-1) - numbers).abs()
    best = far == far.amin(-1, keepdim=True)
    # of two that are as near, the one with an even code
    even = torch.arange(len(numbers)) % 2 == 0
    index = (best.double() * (2.0 - (~even).double())).argmax(-1)
    one = torch.ones(1, 1)
    assert torch.equal(float8.encode(w, one, f8).view(torch.uint8), index.to(torch.uint8))
    assert torch.equal(float8.encode(-w, one, f8).view(torch.uint8), index.to(torch.uint8) | 128)
    assert torch.equal(float8.decode(float8.encode(w, one, f8), one, torch.float32).double(), numbers[index])
    assert bool(float8.fake(torch.tensor([[torch.nan]]), one, f8, torch.float32).isnan())
    assert float(float8.fake(torch.tensor([[-torch.inf]]), one, f8, torch.float32)) == -float(numbers[-1])


@pytest.mark.parametrize("f8", F8)
@pytest.mark.parametrize(("rows", "groups"), [(4, 2), (4, 1), (1, 1)])
def test_scales(f8: torch.dtype, rows: int, groups: int) -> None:
    g = torch.Generator().manual_seed(0)
    w, s = torch.randn(4, 48, generator=g) * 99, 0.1 + torch.rand(rows, groups, generator=g)
    wide = s.expand(4, groups).repeat_interleave(48 // groups, 1)
    codes = (w * (1 / wide)).clamp(-float8.ELEMENTS[f8].top, float8.ELEMENTS[f8].top).to(f8)
    assert torch.equal(float8.encode(w, s, f8).float(), codes.float())
    assert torch.equal(float8.fake(w, s, f8, torch.float32), codes.float() * wide)
    assert float8.fake(w.bfloat16(), s, f8, torch.bfloat16).dtype == torch.bfloat16


def test_dynamic_scales() -> None:
    w = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    w[1, :24], w[2] = 0, -w[2].abs()
    storage = (torch.bfloat16, 2.0**-14, 65280.0)
    codes, s = float8.encode_dynamic(w, 2, F8[0], *storage)
    wanted = (w.reshape(4, 2, 24).abs().amax(-1) * (1 / 448)).clamp(min=2.0**-14).bfloat16().float()
    assert torch.equal(s, wanted) and codes.dtype == F8[0]
    assert torch.equal(codes.float(), float8.encode(w, s, F8[0]).float())
    numbers, again = float8.fake_dynamic(w, 2, F8[0], *storage, torch.float32)
    assert torch.equal(again, s) and torch.equal(numbers, float8.decode(codes, s, torch.float32))
    assert float((numbers - w).abs().max()) < 0.07 * float(w.abs().max())
    top = float8.amax(w)
    assert float(top) == float(w.abs().max()) and top.shape == (1, 1)
    assert float8.tensor_scale(top, 1 / 448, torch.float32, 2.0**-110, 2.0**119).shape == (1, 1)


@pytest.mark.parametrize("f8", F8)
def test_gradients(f8: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    top = float8.ELEMENTS[f8].top
    w, s, grad = (
        torch.randn(5, 32, generator=g) * top,
        0.7 + torch.rand(5, 2, generator=g),
        torch.randn(5, 32, generator=g),
    )
    dw, ds = float8.vjp(grad, w, s, f8, True, True)
    leaf_w, leaf_s = w.double().requires_grad_(), s.double().requires_grad_()
    v = leaf_w.reshape(5, 2, 16) / leaf_s.unsqueeze(-1)
    u = float8.encode(w, s, f8).double().reshape(v.shape)
    out = (torch.where(v.abs() <= top, v - v.detach(), 0.0) + u) * leaf_s.unsqueeze(-1)
    out.reshape(w.shape).backward(grad.double())
    assert torch.equal(dw, leaf_w.grad.float()) and 0 < int((dw == 0).sum()) < dw.numel()
    torch.testing.assert_close(ds.double(), leaf_s.grad, rtol=1e-5, atol=1e-5 * top)


def test_opcheck_and_compile() -> None:
    w, s = torch.randn(4, 32), torch.rand(4, 2) + 0.1
    storage = (torch.float32, 2.0**-110, 2.0**119)
    for op, args in (
        (float8.encode, (w, s, F8[0])),
        (float8.decode, (w.to(F8[1]), s, torch.bfloat16)),
        (float8.fake, (w, s, F8[1], torch.float32)),
        (float8.encode_dynamic, (w, 2, F8[0], *storage)),
        (float8.fake_dynamic, (w, 2, F8[0], *storage, torch.float32)),
        (float8.vjp, (w, w, s, F8[0], True, True)),
        (float8.amax, (w,)),
    ):
        # test_schema compares arguments by arithmetic that PyTorch lacks for fp8
        known = ("test_faketensor", "test_autograd_registration", "test_schema")
        torch.library.opcheck(op.custom, args, test_utils=known[: 3 - (op is float8.decode)])
    compiled = torch.compile(lambda w: float8.fake_dynamic(w, 2, F8[0], *storage, torch.float32), fullgraph=True)
    for found, wanted in zip(compiled(w), float8.fake_dynamic(w, 2, F8[0], *storage, torch.float32), strict=True):
        assert torch.equal(found, wanted)
