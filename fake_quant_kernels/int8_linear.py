"""The matmul of 8-bit codes as it is served: exact integer sums, scaled once.

Forward, with x_hat = (x_codes - z) * x_scale per token and w_hat = w_codes * w_scale per output channel:

    acc[t, o] = sum_k (x_codes[t, k] - z[t]) * w_codes[o, k]
              = sum_k x_codes[t, k] * w_codes[o, k] - z[t] * sum_k w_codes[o, k]              exact in int32
    y[t, o]   = dtype((fp32(acc[t, o]) * x_scale[t]) * w_scale[o] + bias[o])                  in this order

It differs from the simulated x_hat w_hat^T + bias by rounding in fp32 only. |acc| <= K * 2^14 (K * 255 * 2^7 with zero
points) must stay below 2^31, so K <= 131071 (65793), and more is refused: no partial sum leaves int32 either, where
CPUs wrap and NVIDIA's IMMA saturates. The gradients from codes are in `int8_gradients`.

CPU: torch._int_mm, that is oneDNN. Without VNNI or AMX it multiplies by vpmaddubsw, which adds pairs of products in
saturating 16 bits: 127 * 127 + 127 * 127 is then *silently* wrong (seen with ONEDNN_MAX_CPU_ISA=AVX512_CORE, AVX2,
AVX2_VNNI and SSE41; torch 2.13, November 2026). So it is asked once with such numbers, and used only if it is exact.
Otherwise the sum runs in fp32 in pieces of 1024, each exact in any order: 1024 * 2^14 = 2^24.

When it pays on a CPU with VNNI, one thread, 2.6 GHz EPYC of family 25, times of F.linear over this with its epilogue:

    T             1     2     4     8    16    32    64   512  2048        (least of the K, O below)
    fp32        1.1  0.65   1.3   1.5   1.9   2.4   3.0   3.9   3.2
    bf16        1.8  0.44  0.50  0.62  0.81   1.1   1.3   1.7   1.5        (K, O): 512 and 2048 in each place
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels.dispatch import AotCase, Device, Kernel, Op, constant, tl, uses_triton

# the longest contraction whose sum fits int32: floor((2^31 - 1) / 2^14), and with zero points floor(... / (255 * 2^7))
LONGEST = 131071
LONGEST_WITH_ZERO = 65793
# products of 8-bit codes that fp32 adds exactly in any order: 2^24 / 2^14
_PIECE = 1024


def _pattern(rows: int, columns: int, step: int) -> Tensor:
    """int8 codes from the whole range, without a random generator; the first row is 127, the second -128."""
    codes = (torch.arange(rows * columns) * step % 256 - 128).reshape(rows, columns).to(torch.int8)
    codes[0] = 127
    codes[1:2] = -128
    return codes


@functools.cache
def _exact() -> bool:
    """Whether this CPU's torch._int_mm gives integer sums, on sizes that take different ways through oneDNN."""
    for tokens, inputs, outputs in ((1, 512, 64), (3, 7, 5), (32, 512, 64), (65, 1000, 33)):
        x, w = _pattern(tokens, inputs, 37), _pattern(outputs, inputs, 101)
        if not torch.equal(torch._int_mm(x, w.t()).double(), x.double() @ w.double().t()):
            return False
    return True


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    enabled: Any = torch.backends.mkldnn.enabled
    return available and bool(enabled)


# asked while a graph is traced, its answer is a constant of that graph
@constant
def int_mm_is_exact() -> bool:
    """Whether torch._int_mm on the CPU runs in oneDNN and is exact there."""
    return _has_onednn() and _exact()


@constant
def _cpu_reason(sixteen_bits: bool) -> str:
    """Why integer codes do not pay on this CPU at any size; empty if they do."""
    if not _has_onednn():
        return "torch has no oneDNN here or it is switched off (torch.backends.mkldnn.enabled)"
    if not torch.cpu._is_vnni_supported():
        return f"this CPU ({platform.machine()}) has no AVX512-VNNI: integer matmuls are inexact or slow there"
    if not _exact():
        return "torch._int_mm is not exact here: oneDNN was told to leave VNNI alone (ONEDNN_MAX_CPU_ISA)"
    if sixteen_bits and torch.cpu._is_amx_tile_supported():
        # 1.04 TFLOP/s in bf16, 0.85 in int8: one thread of a Xeon with AMX, torch 2.13, November 2026
        return "this CPU multiplies bf16 in AMX tiles, 1.2 times as fast as torch._int_mm"
    return ""


@constant
def _cuda_reason(index: int) -> str:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "integer tensor cores are used from compute capability 8.0 on"
    return ""


def idle(device: torch.device, dtype: torch.dtype) -> str:
    """Why no product of integer codes pays on this device, whatever their sizes; empty: some do. dtype as in
    `reasons`."""
    if device.type == "cpu":
        return _cpu_reason(dtype != torch.float32)  # type: ignore[no-any-return]
    if device.type == "cuda":
        return _cuda_reason(device.index or 0)  # type: ignore[no-any-return]
    return f"there is no integer matmul for {device.type}"


def _too_long(inputs: int, zero: bool) -> list[str]:
    limit = LONGEST_WITH_ZERO if zero else LONGEST
    if inputs <= limit:
        return []
    return [f"sums over {inputs} products may leave int32; up to {limit} fit{' with zero points' if zero else ''}"]


def reasons(x_codes: Tensor, w_codes: Tensor, dtype: torch.dtype, zero: bool | None = None) -> list[str]:
    """Why x_codes [T, K] should not be multiplied with w_codes [O, K] as integers; empty: it can be and it pays.

    dtype is the one that the simulated matmul would run in. zero: whether x has zero points; None: unsigned codes do.
    Looks at shapes, dtypes and the machine only.
    """
    (tokens, inputs), outputs, device = x_codes.shape, w_codes.shape[0], x_codes.device
    unsigned = x_codes.dtype == torch.uint8
    found = _too_long(inputs, unsigned if zero is None else zero or unsigned)
    if x_codes.dtype not in (torch.int8, torch.uint8):
        found.append(f"x codes are {x_codes.dtype}, not int8 or uint8")
    if w_codes.dtype != torch.int8:
        found.append(f"weight codes are {w_codes.dtype}, not int8")
    if reason := idle(device, dtype):
        found.append(reason)
    elif device.type == "cpu" and 2 <= tokens < (4 if dtype == torch.float32 else 32):
        found.append(f"{tokens} tokens are too few: torch._int_mm costs about as much as for 32")
    if device.type == "cuda":
        if uses_triton(device):
            if inputs % 16 != 0:
                found.append(f"rows of {inputs} codes are not a multiple of 16 bytes: loads would be narrow")
        elif not _int_mm_takes(tokens, inputs, outputs):
            found.append(f"torch._int_mm takes more than 16 tokens and multiples of 8, not {tokens, inputs, outputs}")
    return found


def _int_mm_takes(tokens: int, inputs: int, outputs: int) -> bool:
    """What torch._int_mm asks of sizes on CUDA."""
    return tokens > 16 and inputs > 0 and inputs % 8 == 0 and outputs > 0 and outputs % 8 == 0


def _row(t: Tensor) -> Tensor:
    """t [R, K]; a single row gets the stride of a whole row (see `accumulate`)."""
    return t.reshape(-1).unsqueeze(0) if t.shape[0] == 1 else t


def accumulate(a: Tensor, b: Tensor) -> Tensor:
    """a [T, K] int8 times b [O, K] int8 transposed -> the exact sums [T, O] in int32, K <= LONGEST; any strides.

    A dimension of size 1 may have any stride, but on a CPU torch._int_mm (2.13) steps by it and then reads memory that
    is not the tensor's: it gets single rows with a stride of K, and no K = 1, where the transposed b has such a row.
    """
    if a.shape[1] > 1 and (
        int_mm_is_exact() if a.device.type == "cpu" else a.is_cuda and _int_mm_takes(a.shape[0], a.shape[1], b.shape[0])
    ):
        return torch._int_mm(_row(a), _row(b).t())
    total = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _PIECE):
        piece = a[:, start : start + _PIECE].to(torch.float32) @ b[:, start : start + _PIECE].to(torch.float32).t()
        total += piece.to(torch.int32)
    return total


def _column_sums(w_codes: Tensor) -> Tensor:
    """sum_k w_codes[o, k], [1, O] int32."""
    # a row of ones: four times as fast on a CPU as sum(1)
    return accumulate(torch.ones_like(w_codes[:1]), w_codes) if w_codes.shape[0] > 0 else w_codes.new_zeros(1, 0).int()


def _checked(x_codes: Tensor, w_codes: Tensor, zero: bool) -> None:
    if found := _too_long(x_codes.shape[1], zero):
        raise QATError(f"integer matmul of {tuple(x_codes.shape)} and {tuple(w_codes.shape)} codes: {found[0]}")


def _reference(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    x_zero: Tensor | None,
) -> Tensor:
    """x_codes [T, K], w_codes [O, K] int8; x_scale [T, 1], w_scale [O, 1] or [1, 1] fp32; bias [O] -> y [T, O] dtype.

    x_zero [T, 1] or [1, 1]: int32, or integral fp32, within -128..127; None for 0.
    """
    _checked(x_codes, w_codes, x_zero is not None)
    acc = accumulate(x_codes, w_codes)
    if x_zero is not None:
        acc = acc - x_zero.to(torch.int32) * _column_sums(w_codes)
    y = acc.to(torch.float32)
    y.mul_(x_scale).mul_(w_scale.t())
    if bias is not None:
        y.add_(bias.to(torch.float32))
    return y.to(dtype)


def _fake(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    x_zero: Tensor | None,
) -> Tensor:
    return x_codes.new_empty((x_codes.shape[0], w_codes.shape[0]), dtype=dtype)


@Device
def place(program: Any, T: Any, N: Any, BM: tl.constexpr, BN: tl.constexpr, TALL: tl.constexpr) -> Any:
    """Program number -> its tile's row and column: columns in turn under TALL rows, so that both stay in the L2."""
    tall = tl.cdiv(T, BM)
    wide = tl.cdiv(N, BN)
    first = (program // (TALL * wide)) * TALL
    height = tl.minimum(tall - first, TALL)
    rest = program % (TALL * wide)
    return first + rest % height, rest // height


@Device
def scaled(value: Any, xs: Any, ws: Any, bias: Any, cols: Any, N: Any) -> Any:
    """The epilogue of a tile of sums in fp32, multiplications and addition in the docstring's order."""
    value = value * xs[:, None]
    value = value * ws[None, :]
    if bias is not None:
        value = value + tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return value


@Kernel
def _int8_matmul(
    x: Any,
    x_scale: Any,
    w: Any,
    w_scale: Any,
    bias: Any,
    zero: Any,
    sums: Any,
    y: Any,
    T: Any,
    N: Any,
    K: Any,
    XS: tl.constexpr,
    WS: tl.constexpr,
    ZS: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> Any:
    """One tile [BM, BN] of y per program. XS, WS, ZS: 0 where there is one scale or zero point for all, else 1.

    EVEN: BK divides K. Rows beyond T and N are read from the start again and not stored.
    """
    tile_row, tile_col = place(tl.program_id(0), T, N, BM, BN, 8)
    rows = tile_row * BM + tl.arange(0, BM)
    cols = tile_col * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # a size may pass 2^31, a row number does not
    at_x = x + (rows % T).to(tl.int64)[:, None] * K + k[None, :]
    at_w = w + (cols % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K, BK):
        if EVEN:
            a = tl.load(at_x)
            b = tl.load(at_w)
        else:
            a = tl.load(at_x, mask=(k < K - start)[None, :], other=0)
            b = tl.load(at_w, mask=(k < K - start)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        at_x += BK
        at_w += BK
    if zero is not None:
        z = tl.load(zero + rows * ZS, mask=rows < T, other=0)
        acc = acc - z[:, None] * tl.load(sums + cols, mask=cols < N, other=0)[None, :]
    xs = tl.load(x_scale + rows * XS, mask=rows < T, other=0.0)
    ws = tl.load(w_scale + cols * WS, mask=cols < N, other=0.0)
    value = scaled(acc.to(tl.float32), xs, ws, bias, cols, N)
    inside = (rows < T)[:, None] & (cols < N)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * N + cols[None, :], value.to(y.dtype.element_ty), mask=inside)


def tiles(tokens: int) -> tuple[int, int, int, int, int]:
    """BM, BN, BK, warps and stages: few tokens are bound by the weight's bytes, many by the tensor cores."""
    return (64, 64, 128, 4, 4) if tokens <= 64 else (128, 128, 64, 8, 4)


def _triton(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    x_zero: Tensor | None,
) -> Tensor:
    _checked(x_codes, w_codes, x_zero is not None)
    (tokens, inputs), outputs = x_codes.shape, w_codes.shape[0]
    y = torch.empty((tokens, outputs), dtype=dtype, device=x_codes.device)
    if y.numel() == 0:
        return y
    bm, bn, bk, warps, stages = tiles(tokens)
    _int8_matmul[(-(-tokens // bm) * -(-outputs // bn),)](
        x_codes.contiguous(),
        x_scale.contiguous(),
        w_codes.contiguous(),
        w_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        None if x_zero is None else x_zero.to(torch.int32).contiguous(),
        None if x_zero is None else w_codes.sum(1, dtype=torch.int32),
        y,
        tokens,
        outputs,
        inputs,
        XS=int(x_scale.shape[0] > 1),
        WS=int(w_scale.shape[0] > 1),
        ZS=0 if x_zero is None else int(x_zero.shape[0] > 1),
        EVEN=inputs % bk == 0,
        BM=bm,
        BN=bn,
        BK=bk,
        num_warps=warps,
        num_stages=stages,
    )
    return y


op = Op("int8_linear", _reference, _fake, _triton)


def signed(x_codes: Tensor, x_scale: Tensor, x_zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """uint8 codes and their zero points as int8: q - z = (q - 128) - (z - 128), and q - 128 flips the top bit."""
    if x_codes.dtype != torch.uint8:
        return x_codes, x_zero
    zero = torch.full_like(x_scale[:1], -128.0) if x_zero is None else x_zero - 128.0
    return (x_codes ^ 128).view(torch.int8), zero


def int8_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    x_zero: Tensor | None = None,
) -> Tensor:
    """y [T, O] of `dtype` from x_codes [T, K] int8 or uint8 and w_codes [O, K] int8; the equations are above.

    x_scale and x_zero [T, 1] or [1, 1], w_scale [O, 1] or [1, 1] fp32; x_zero integral and within the codes' range;
    bias [O] of any float dtype. Raises QATError if a sum could leave int32. Whether it pays: `reasons`.
    """
    x_codes, x_zero = signed(x_codes, x_scale, x_zero)
    return op(x_codes, x_scale, w_codes, w_scale, bias, dtype, x_zero)  # type: ignore[no-any-return]


def _signature(but: tuple[str, ...]) -> dict[str, str]:
    types = {"x": "*i8", "x_scale": "*fp32", "w": "*i8", "w_scale": "*fp32", "bias": "*bf16", "zero": "*i32"}
    types |= {"sums": "*i32", "y": "*bf16", "T": "i32", "N": "i32", "K": "i32"}
    return {name: kind for name, kind in types.items() if name not in but}


_PLAIN: dict[str, Any] = {"XS": 1, "WS": 1, "ZS": 0, "EVEN": True}
_NO_ZERO: dict[str, Any] = {"zero": None, "sums": None}


def _case(name: str, tokens: int, constants: dict[str, Any], registers: int) -> AotCase:
    """The kernel as the launcher would start it for so many tokens."""
    bm, bn, bk, warps, stages = tiles(tokens)
    return AotCase(
        f"int8_linear {name} {bm}x{bn}x{bk}",
        _int8_matmul,
        _signature(tuple(key for key, value in constants.items() if value is None)),
        {**_PLAIN, **constants, "BM": bm, "BN": bn, "BK": bk},
        num_warps=warps,
        num_stages=stages,
        matmul=True,
        max_registers=registers,
    )


AOT = (
    _case("many tokens", 2048, {"bias": None, **_NO_ZERO}, 255),
    _case("bias and zero points", 2048, {"ZS": 1}, 255),
    _case("odd K", 2048, {"bias": None, **_NO_ZERO, "EVEN": False}, 255),
    _case("few tokens", 64, {"bias": None, **_NO_ZERO}, 255),
)
