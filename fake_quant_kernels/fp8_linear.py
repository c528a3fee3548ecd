"""The matmul of FP8 e4m3 codes as it is served: fp8 products, fp32 sums, scaled once.

Forward, with x_hat = x_codes * x_scale per token and w_hat = w_codes * w_scale per output channel:

    acc[t, o] = sum_k x_codes[t, k] * w_codes[o, k]               each product is exact in fp32 (4 + 4 significant bits)
    y[t, o]   = dtype((acc[t, o] * x_scale[t]) * w_scale[o] + bias[o])                            in this order, fp32

The simulated forward is F.linear(x_hat, w_hat, bias) in fp32. With u = 2^-24 and sums in any order, it makes at most
K + 2 relative errors of u on a product (scaling x, scaling w, multiplying, adding), the real one K + 1; each adds bias:

    |y_real - y_simulated|  <=  c u (sum_k |x_hat[t, k]| |w_hat[o, k]| + |bias[o]|),       c = 2 K + 6       (`bound`)

as long as c u is far below 1, before the cast to `dtype` and outside of fp32's subnormal numbers (Higham 2002,
"Accuracy and Stability of Numerical Algorithms", section 3.1). So it holds for the reference, and wherever tensor
cores add in full fp32.

Hopper's do not: they keep about 14 bits of a running sum (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section
3.3.2). There the kernel takes the tensor core's sum out every 128 products and adds it in fp32 registers, as that paper
does; torch._scaled_mm with use_fast_accum=False does the like. u is then 2^-14 within such a piece, 2^-24 between them.

CUDA from compute capability 8.9 on. On a CPU the reference decodes and multiplies in fp32, which is slower than the
simulated forward; torch._scaled_mm took 75 s there for 512 x 2048 x 2048 and is never called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.dispatch import AotCase, Kernel, Op, constant, tl
from qat.fake_quant_kernels.int8_linear import place, scaled

# products that a Hopper tensor core adds before fp32 registers take over: DeepSeek-V3's N_C; at most BK
_PIECE = 128


def bound(inputs: int) -> float:
    """c u of the docstring for K = inputs: times sum |x_hat| |w_hat| + |bias|, the largest difference in fp32."""
    return float(2 * inputs + 6) * 2.0**-24


@constant
def _capability(index: int) -> tuple[int, int]:
    """Of a CUDA device; (0, 0) for AMD's, some of which have another e4m3 (without negative zero)."""
    return (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(index)


def reasons(x_codes: Tensor, w_codes: Tensor, dtype: torch.dtype) -> list[str]:
    """Why x_codes [T, K] should not be multiplied with w_codes [O, K] in fp8; empty: it can be and it pays.

    dtype is the one that the simulated matmul would run in. Looks at shapes, dtypes and the machine only.
    """
    device, inputs, found = x_codes.device, x_codes.shape[1], []
    for name, codes in (("x", x_codes), ("weight", w_codes)):
        if codes.dtype != torch.float8_e4m3fn:
            found.append(f"{name} codes are {codes.dtype}, not torch.float8_e4m3fn")
    if device.type == "cpu":
        found.append("a CPU has no fp8 arithmetic: decoding and multiplying is what the simulated forward does")
    elif device.type != "cuda":
        found.append(f"there is no fp8 matmul for {device.type}")
    elif _capability(device.index or 0) < (8, 9):
        found.append("fp8 tensor cores need an NVIDIA GPU of compute capability 8.9 or more")
    elif inputs % 16 != 0:
        found.append(f"rows of {inputs} codes are not a multiple of 16 bytes: loads would be narrow")
    return found


def _reference(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x_codes [T, K], w_codes [O, K] e4m3; x_scale [T, 1], w_scale [O, 1] or [1, 1] fp32; bias [O] -> y [T, O]."""
    y = x_codes.to(torch.float32) @ w_codes.to(torch.float32).t()
    y.mul_(x_scale).mul_(w_scale.t())
    if bias is not None:
        y.add_(bias.to(torch.float32))
    return y.to(dtype)


def _fake(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x_codes.new_empty((x_codes.shape[0], w_codes.shape[0]), dtype=dtype)


@Kernel
def _fp8_matmul(
    x: Any,
    x_scale: Any,
    w: Any,
    w_scale: Any,
    bias: Any,
    y: Any,
    T: Any,
    N: Any,
    K: Any,
    XS: tl.constexpr,
    WS: tl.constexpr,
    EVEN: tl.constexpr,
    PIECE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> Any:
    """One tile [BM, BN] of y per program; XS, WS, EVEN as in `int8_linear`, PIECE products per sum of a tensor core."""
    tile_row, tile_col = place(tl.program_id(0), T, N, BM, BN, 8)
    rows = tile_row * BM + tl.arange(0, BM)
    cols = tile_col * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at_x = x + (rows % T).to(tl.int64)[:, None] * K + k[None, :]
    at_w = w + (cols % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            a = tl.load(at_x)
            b = tl.load(at_w)
        else:
            a = tl.load(at_x, mask=(k < K - start)[None, :], other=0.0)
            b = tl.load(at_w, mask=(k < K - start)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=PIECE)
        at_x += BK
        at_w += BK
    xs = tl.load(x_scale + rows * XS, mask=rows < T, other=0.0)
    ws = tl.load(w_scale + cols * WS, mask=cols < N, other=0.0)
    value = scaled(acc, xs, ws, bias, cols, N)
    inside = (rows < T)[:, None] & (cols < N)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * N + cols[None, :], value.to(y.dtype.element_ty), mask=inside)


def _tiles(tokens: int) -> tuple[int, int, int, int, int]:
    """BM, BN, BK, warps and stages: few tokens are bound by the weight's bytes, many by the tensor cores."""
    return (64, 64, 128, 4, 4) if tokens <= 64 else (128, 128, 128, 8, 3)


def _row_wise_takes(x_codes: Tensor, w_codes: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """What torch._scaled_mm asks for scales per row and column; a bias it would add after rounding to bf16."""
    (tokens, inputs), outputs = x_codes.shape, w_codes.shape[0]
    sizes = tokens > 0 and inputs > 0 and outputs > 0 and inputs % 16 == 0 and outputs % 16 == 0
    return sizes and bias is None and dtype == torch.bfloat16


def row_wise(x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor) -> Tensor:
    """torch._scaled_mm with one scale per token and output channel -> y [T, O] bf16; CUDA only, sizes as above."""
    xs = x_scale.to(torch.float32).expand(x_codes.shape[0], 1).contiguous()
    ws = w_scale.to(torch.float32).expand(w_codes.shape[0], 1).contiguous().t()
    return torch._scaled_mm(
        x_codes.contiguous(), w_codes.contiguous().t(), xs, ws, out_dtype=torch.bfloat16, use_fast_accum=False
    )


def _triton(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    # row-wise scales: Hopper's and Blackwell's data-centre GPUs; elsewhere PyTorch may have been built without
    if (
        x_codes.is_cuda
        and _row_wise_takes(x_codes, w_codes, bias, dtype)
        and _capability(x_codes.device.index or 0)[0] in (9, 10)
    ):
        return row_wise(x_codes, x_scale, w_codes, w_scale)
    (tokens, inputs), outputs = x_codes.shape, w_codes.shape[0]
    y = torch.empty((tokens, outputs), dtype=dtype, device=x_codes.device)
    if y.numel() == 0:
        return y
    bm, bn, bk, warps, stages = _tiles(tokens)
    _fp8_matmul[(-(-tokens // bm) * -(-outputs // bn),)](
        x_codes.contiguous(),
        x_scale.contiguous(),
        w_codes.contiguous(),
        w_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        tokens,
        outputs,
        inputs,
        XS=int(x_scale.shape[0] > 1),
        WS=int(w_scale.shape[0] > 1),
        EVEN=inputs % bk == 0,
        PIECE=_PIECE,
        BM=bm,
        BN=bn,
        BK=bk,
        num_warps=warps,
        num_stages=stages,
    )
    return y


op = Op("fp8_linear", _reference, _fake, _triton)


def fp8_linear(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y [T, O] of `dtype` from x_codes [T, K] and w_codes [O, K], both float8_e4m3fn; the equations are above.

    x_scale [T, 1] or [1, 1], w_scale [O, 1] or [1, 1] fp32; bias [O] of any float dtype. Whether it pays: `reasons`.
    """
    return op(x_codes, x_scale, w_codes, w_scale, bias, dtype)  # type: ignore[no-any-return]


def _case(name: str, tokens: int, constants: dict[str, Any]) -> AotCase:
    """The kernel as the launcher would start it for so many tokens."""
    bm, bn, bk, warps, stages = _tiles(tokens)
    types = {"x": "*fp8e4nv", "x_scale": "*fp32", "w": "*fp8e4nv", "w_scale": "*fp32", "bias": "*bf16", "y": "*bf16"}
    types |= {"T": "i32", "N": "i32", "K": "i32"}
    plain: dict[str, Any] = {"XS": 1, "WS": 1, "EVEN": True, "PIECE": _PIECE}
    return AotCase(
        f"fp8_linear {name} {bm}x{bn}x{bk}",
        _fp8_matmul,
        {key: kind for key, kind in types.items() if constants.get(key, 0) is not None},
        {**plain, **constants, "BM": bm, "BN": bn, "BK": bk},
        num_warps=warps,
        num_stages=stages,
        matmul=True,
        min_arch=89,
        max_registers=255,
    )


AOT = (
    _case("many tokens", 2048, {"bias": None}),
    _case("bias", 2048, {}),
    _case("odd K", 2048, {"bias": None, "EVEN": False}),
    _case("few tokens", 64, {"bias": None}),
)
