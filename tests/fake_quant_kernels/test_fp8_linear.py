"""The fp8 matmul on a CPU: decoded codes, the stated distance from the simulated forward, and why it does not run.

Mutations of `fake_quant_kernels/fp8_linear.py` that were tried, and the test that turned red for each:

    the matmul in bf16                                   test_within_the_bound
    (acc * w_scale) * x_scale                            test_epilogue_bits
    y.to(bf16).to(dtype)                                 test_epilogue_bits
    row_wise without .t() on the weight                  test_scaled_mm_takes_it
    capability 8.6 is enough                             test_reasons
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.fake_quant_kernels import fp8_linear as module
from qat.fake_quant_kernels.fp8_linear import bound, fp8_linear, op, reasons, row_wise

E4M3 = torch.float8_e4m3fn
SIZES = [(1, 1, 1), (3, 63, 5), (17, 1000, 33), (33, 1023, 70), (64, 512, 16), (0, 4, 4), (4, 3, 0), (4, 0, 3)]


def every_code() -> Tensor:
    """The 254 finite numbers of e4m3."""
    numbers = torch.arange(256).to(torch.uint8).view(E4M3).float()
    return numbers[numbers.isfinite()]


def operands(tokens: int, inputs: int, outputs: int, tensor: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_codes, x_scale, w_codes, w_scale; codes from all of e4m3, subnormal numbers and 448 included."""
    g = torch.Generator().manual_seed(inputs)
    codes = every_code()
    x = codes[torch.randint(0, 254, (tokens, inputs), generator=g)].to(E4M3)
    w = codes[torch.randint(0, 254, (outputs, inputs), generator=g)].to(E4M3)
    rows, columns = (1, 1) if tensor else (tokens, outputs)
    return x, torch.rand(rows, 1, generator=g) + 0.01, w, torch.rand(columns, 1, generator=g) * 0.1 + 1e-4


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_within_the_bound(size: tuple[int, int, int], tensor: bool) -> None:
    """|y_real - y_simulated| <= c u (sum |x_hat| |w_hat| + |bias|). Mutation: a matmul in bf16 -> red."""
    x, xs, w, ws = operands(*size, tensor)
    bias = torch.randn(size[2], generator=torch.Generator().manual_seed(1))
    x_hat, w_hat = x.float() * xs, w.float() * ws
    simulated = torch.nn.functional.linear(x_hat, w_hat, bias)
    magnitude = x_hat.double().abs() @ w_hat.double().abs().t() + bias.double().abs()
    real = fp8_linear(x, xs, w, ws, bias, torch.float32)
    assert bool(((real - simulated).double().abs() <= bound(size[1]) * magnitude).all())
    # the half of it that is the real forward's own, against exact sums
    exact = (x.double() * xs.double()) @ (w.double() * ws.double()).t() + bias
    assert bool(((real - exact).abs() <= (size[1] + 3) * 2.0**-24 * magnitude).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_epilogue_bits(dtype: torch.dtype) -> None:
    """Sums of small integers are exact, so every bit is known. Mutation: the scales in the other order -> red."""
    g = torch.Generator().manual_seed(0)
    for tokens, inputs, outputs in SIZES:
        x = torch.randint(-16, 17, (tokens, inputs), generator=g).float()
        w = torch.randint(-16, 17, (outputs, inputs), generator=g).float()
        xs, ws = torch.rand(tokens, 1, generator=g) * 0.01, torch.rand(outputs, 1, generator=g) * 0.01
        for bias in (None, torch.randn(outputs, generator=g).to(dtype)):
            wanted = ((x.numpy().astype(np.float64) @ w.numpy().T).astype(np.float32) * xs.numpy()) * ws.numpy().T
            if bias is not None:
                wanted = wanted + bias.float().numpy()
            found = fp8_linear(x.to(E4M3), xs, w.to(E4M3), ws, bias, dtype)
            assert found.dtype == dtype and torch.equal(found, torch.from_numpy(wanted).to(dtype))


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.zeros(4, 32, dtype=E4M3), torch.zeros(8, 32, dtype=E4M3)
    assert reasons(x, w, torch.bfloat16) == [
        "a CPU has no fp8 arithmetic: decoding and multiplying is what the simulated forward does"
    ]
    assert "x codes are torch.float8_e5m2" in reasons(x.to(torch.float8_e5m2), w, torch.bfloat16)[0]
    assert "no fp8 matmul for meta" in reasons(x.to("meta"), w.to("meta"), torch.bfloat16)[0]
    with torch._subclasses.FakeTensorMode():
        on_gpu = torch.empty(4, 32, dtype=E4M3, device="cuda"), torch.empty(8, 32, dtype=E4M3, device="cuda")
        odd = torch.empty(4, 40, dtype=E4M3, device="cuda"), torch.empty(8, 40, dtype=E4M3, device="cuda")
    for capability, runs in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((0, 0), False)):
        monkeypatch.setattr(module, "_capability", lambda index, capability=capability: capability)
        assert (reasons(*on_gpu, torch.bfloat16) == []) == runs
    monkeypatch.setattr(module, "_capability", lambda index: (9, 0))
    assert "multiple of 16 bytes" in reasons(*odd, torch.bfloat16)[0]


def test_scaled_mm_takes_it() -> None:
    """torch._scaled_mm accepts the layouts, dtypes and scales of `row_wise`: checked on fake CUDA tensors."""
    with torch._subclasses.FakeTensorMode():
        x, w = (torch.empty(n, 64, dtype=E4M3, device="cuda") for n in (48, 80))
        y = row_wise(x, torch.empty(48, 1, device="cuda"), w, torch.empty(80, 1, device="cuda"))
        assert y.shape == (48, 80) and y.dtype == torch.bfloat16 and y.is_cuda
    for sizes, bias, dtype, takes in (
        ((48, 64, 80), False, torch.bfloat16, True),
        ((48, 72, 80), False, torch.bfloat16, False),
        ((48, 64, 72), False, torch.bfloat16, False),
        ((0, 64, 80), False, torch.bfloat16, False),
        ((48, 64, 80), True, torch.bfloat16, False),
        ((48, 64, 80), False, torch.float32, False),
    ):
        x, w = torch.empty(sizes[0], sizes[1], dtype=E4M3), torch.empty(sizes[2], sizes[1], dtype=E4M3)
        assert module._row_wise_takes(x, w, torch.empty(sizes[2]) if bias else None, dtype) == takes


def test_never_scaled_mm_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take a minute."""

    def refused(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("torch._scaled_mm on a CPU")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    x, xs, w, ws = operands(32, 64, 32)
    assert fp8_linear(x, xs, w, ws, None, torch.bfloat16).shape == (32, 32)


def test_custom_op_and_compiled() -> None:
    x, xs, w, ws = operands(17, 40, 9)
    args = (x, xs, w, ws, torch.randn(9), torch.float32)
    # test_schema compares the arguments before and after by allclose, which PyTorch lacks for fp8
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.custom, args, test_utils=checks)
    found, wanted = torch.compile(fp8_linear, fullgraph=True)(*args), fp8_linear(*args)
    assert bool(
        ((found - wanted).abs() <= bound(40) * (x.float() * xs).abs() @ (w.float() * ws).abs().t() + 1e-6).all()
    )
