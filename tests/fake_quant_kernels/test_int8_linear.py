"""The integer matmul against int64 sums, its epilogue against NumPy, and when it says that it should not run.

Mutations of `fake_quant_kernels/int8_linear.py` that were tried, and the test that turned red for each:

    _exact() returns True                                test_never_saturates
    _PIECE = 2048                                        test_sums_are_exact[pieces]
    pieces summed in fp32, not int32                     test_sums_are_exact[pieces]
    (acc * w_scale) * x_scale                            test_epilogue_bits
    acc + zero * sums                                    test_zero_points
    x_zero - 127.0 for unsigned codes                    test_unsigned_codes
    LONGEST = 131072                                     test_longest_sum
    `_row` left out, K = 1 given to torch._int_mm        test_strides_of_single_rows
    the token rule left out                              test_reasons_on_a_cpu
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels import int8_linear as module
from qat.fake_quant_kernels.int8_linear import accumulate, int8_linear, op, reasons

SIZES = [(1, 1, 1), (1, 512, 64), (3, 63, 5), (17, 1000, 33), (33, 1023, 70), (64, 2100, 16), (0, 4, 4), (4, 3, 0)]
SIZES += [(4, 0, 3)]


def codes(tokens: int, inputs: int, outputs: int, kind: str = "random") -> tuple[Tensor, Tensor]:
    """x [T, K], w [O, K]; the extremes are those on which 16-bit pair sums saturate."""
    g = torch.Generator().manual_seed(tokens + inputs + outputs)
    x = torch.randint(-128, 128, (tokens, inputs), generator=g, dtype=torch.int8)
    w = torch.randint(-128, 128, (outputs, inputs), generator=g, dtype=torch.int8)
    if kind == "large odd":
        # sums far beyond 2^24 that are no multiples of a power of two
        x, w = x.abs().clamp(101, 127), w.abs().clamp(101, 127)
    values = {"lowest": (-128, -128), "mixed": (127, -128), "highest": (127, 127)}
    if kind in values:
        x.fill_(values[kind][0])
        w.fill_(values[kind][1])
    return x, w


def scales(tokens: int, outputs: int, per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    rows, columns = (1, 1) if per_tensor else (tokens, outputs)
    return torch.rand(rows, 1, generator=g) * 0.03 + 1e-4, torch.rand(columns, 1, generator=g) * 0.002 + 1e-5


@pytest.mark.parametrize("way", ["int_mm", "pieces"])
def test_sums_are_exact(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.equal with int64, by torch._int_mm where it is exact and by fp32 in pieces. Mutation: _PIECE = 2048."""
    if way == "pieces":
        monkeypatch.setattr(module, "int_mm_is_exact", lambda: False)
    for size in SIZES:
        for kind in ("random", "lowest", "mixed", "highest", "large odd"):
            x, w = codes(*size, kind)
            found = accumulate(x, w)
            assert found.dtype == torch.int32
            assert torch.equal(found.long(), x.long() @ w.long().t()), (size, kind)
    x, w = codes(34, 130, 65)
    for a, b in ((x[::2], w), (x[:, 1:], w[:, 1:]), (x[:, ::2], w[:, ::2]), (x, w.t().contiguous().t())):
        assert torch.equal(accumulate(a, b).long(), a.long() @ b.long().t())


def test_strides_of_single_rows() -> None:
    """torch._int_mm steps by the stride of a dimension of size 1. Mutation: without `_row`, or with K = 1 -> red."""
    for tokens, inputs, outputs in ((1, 64, 5), (5, 64, 1), (1, 64, 1), (5, 1, 7), (1, 1, 33)):
        x, w = codes(tokens, inputs, outputs)
        wanted = x.long() @ w.long().t()
        for step in (1, 2, 7):
            a = torch.as_strided(x, x.shape, (step, 1)) if tokens == 1 else x
            b = torch.as_strided(w, w.shape, (step, 1)) if outputs == 1 else w
            assert torch.equal(accumulate(a, b).long(), wanted), (tokens, inputs, outputs, step)
            assert torch.equal(accumulate(a.t().contiguous().t(), b.t().contiguous().t()).long(), wanted)


# runs with oneDNN held back from VNNI: on such a CPU torch._int_mm is wrong, and ours has to be right
SATURATING = """
import torch
from qat.fake_quant_kernels.int8_linear import accumulate, int_mm_is_exact, reasons
x, w = torch.full((32, 512), 127, dtype=torch.int8), torch.full((48, 512), 127, dtype=torch.int8)
raw = bool((torch._int_mm(x, w.t()) == 512 * 127 * 127).all())
assert int_mm_is_exact() or not raw
assert bool((accumulate(x, w) == 512 * 127 * 127).all())
assert int_mm_is_exact() or reasons(x, w, torch.float32)
print("raw", raw, "exact", int_mm_is_exact())
"""


@pytest.mark.parametrize("instructions", ["AVX512_CORE", "AVX2"])
def test_never_saturates(instructions: str) -> None:
    """On CPUs without VNNI, torch._int_mm silently saturates. Mutation: `_exact` returns True -> red."""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", SATURATING], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    # where oneDNN honours the variable; other CPUs and builds never saturate
    if "raw False" in done.stdout:
        assert "exact False" in done.stdout


def test_longest_sum() -> None:
    """K = 131071 fits int32 at its worst, 131072 does not. Mutation: LONGEST = 131072 -> red."""
    for inputs, zero in ((131071, None), (65793, torch.full((1, 1), 127.0))):
        x, w = codes(1, inputs, 2, "lowest")
        one = torch.ones(1, 1)
        y = int8_linear(x, one, w, one, None, torch.float32, zero)
        shift = 0 if zero is None else 127
        assert y.tolist() == [[float(np.float32((128 + shift) * 128 * inputs))] * 2]
        x, w = codes(1, inputs + 1, 2, "lowest")
        with pytest.raises(QATError, match=rf"up to {inputs} fit"):
            int8_linear(x, one, w, one, None, torch.float32, zero)
        assert any("leave int32" in reason for reason in reasons(x, w, torch.float32, zero is not None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_epilogue_bits(dtype: torch.dtype, per_tensor: bool) -> None:
    """((acc * x_scale) * w_scale) + bias in fp32, one cast. Mutation: the scales in the other order -> red."""
    for size in SIZES:
        x, w = codes(*size)
        xs, ws = scales(size[0], size[2], per_tensor)
        for bias in (None, torch.randn(size[2], generator=torch.Generator().manual_seed(1)).to(dtype)):
            acc = (x.long() @ w.long().t()).numpy().astype(np.float32)
            wanted = (acc * xs.numpy()) * ws.numpy().T
            if bias is not None:
                wanted = wanted + bias.float().numpy()
            y = int8_linear(x, xs, w, ws, bias, dtype)
            assert y.dtype == dtype and torch.equal(y, torch.from_numpy(wanted).to(dtype)), size


@pytest.mark.parametrize("per_tensor", [False, True])
def test_zero_points(per_tensor: bool) -> None:
    """The correction by column sums against (x - z) in int64. Mutation: its sign -> red."""
    for size in SIZES:
        x, w = codes(*size)
        xs, ws = scales(size[0], size[2], per_tensor)
        zero = torch.randint(-128, 128, xs.shape, generator=torch.Generator().manual_seed(2)).float()
        acc = (x.long() - zero.long()) @ w.long().t()
        wanted = (acc.numpy().astype(np.float32) * xs.numpy()) * ws.numpy().T
        assert torch.equal(int8_linear(x, xs, w, ws, None, torch.float32, zero), torch.from_numpy(wanted))


def test_unsigned_codes() -> None:
    """uint8 codes with and without zero points. Mutation: `x_zero - 127.0` -> red."""
    x, w = codes(17, 100, 33)
    unsigned = (x.short() + 128).to(torch.uint8)
    xs, ws = scales(17, 33)
    for zero in (None, torch.randint(0, 256, (17, 1), generator=torch.Generator().manual_seed(2)).float()):
        acc = (unsigned.long() - (0 if zero is None else zero.long())) @ w.long().t()
        wanted = (acc.numpy().astype(np.float32) * xs.numpy()) * ws.numpy().T
        assert torch.equal(int8_linear(unsigned, xs, w, ws, None, torch.float32, zero), torch.from_numpy(wanted))


def test_close_to_the_simulated_forward() -> None:
    """|y - F.linear(x_hat, w_hat, bias)| <= (2 K + 6) 2^-24 (sum |x_hat| |w_hat| + |bias|), as `fp8_linear` says."""
    for size in SIZES:
        x, w = codes(*size)
        xs, ws = scales(size[0], size[2])
        bias = torch.randn(size[2], generator=torch.Generator().manual_seed(1))
        x_hat, w_hat = x.float() * xs, w.float() * ws
        simulated = torch.nn.functional.linear(x_hat, w_hat, bias)
        allowed = (2 * size[1] + 6) * 2.0**-24 * (x_hat.double().abs() @ w_hat.double().abs().t() + bias.abs())
        assert bool(((int8_linear(x, xs, w, ws, bias, torch.float32) - simulated).abs() <= allowed).all())


def test_reasons_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of the module's table. Mutation: without the token rule -> red."""
    monkeypatch.setattr(module, "_cpu_reason", lambda sixteen_bits: "")
    w = torch.zeros(64, 512, dtype=torch.int8)
    pays = {torch.float32: {1, 4, 31, 32, 512}, torch.bfloat16: {1, 32, 512}, torch.float16: {1, 32, 512}}
    for dtype, yes in pays.items():
        for tokens in (1, 2, 3, 4, 31, 32, 512):
            found = reasons(torch.zeros(tokens, 512, dtype=torch.int8), w, dtype)
            assert (found == []) == (tokens in yes), (dtype, tokens, found)
    x = torch.zeros(64, 512, dtype=torch.int8)
    assert reasons(x.to(torch.uint8), w, torch.float32) == []
    assert "weight codes are torch.uint8" in reasons(x, w.to(torch.uint8), torch.float32)[0]
    assert "x codes are torch.float32" in reasons(x.float(), w, torch.float32)[0]
    assert "no integer matmul for meta" in reasons(x.to("meta"), w.to("meta"), torch.float32)[0]
    monkeypatch.setattr(module, "_cpu_reason", lambda sixteen_bits: "16" if sixteen_bits else "32")
    assert reasons(x, w, torch.bfloat16) == ["16"] and reasons(x, w, torch.float32) == ["32"]


def test_reasons_without_onednn() -> None:
    """oneDNN switched off: torch._int_mm is a plain loop, 100 times as slow."""
    x = torch.zeros(64, 512, dtype=torch.int8)
    with torch.backends.mkldnn.flags(enabled=False):
        assert any("oneDNN" in reason for reason in reasons(x, x, torch.float32))
        assert bool((accumulate(x + 3, x + 5) == 512 * 15).all())


@pytest.mark.parametrize("zero", [False, True])
def test_custom_op_and_compiled(zero: bool) -> None:
    x, w = codes(33, 100, 20)
    xs, ws = scales(33, 20)
    args = (x, xs, w, ws, torch.randn(20), torch.bfloat16, torch.round(xs * 1000) if zero else None)
    torch.library.opcheck(op.custom, args)
    compiled = torch.compile(int8_linear, fullgraph=True)
    assert torch.equal(compiled(*args), int8_linear(*args))
