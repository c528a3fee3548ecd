"""Rows -> int8 codes by stochastic rounding, for gradients: a rounding whose expectation is the number itself.

Encode, for each row of v = g * fold (fold: one factor per column, optional):

    top   = max |v|                             NaN counts as infinity
    s     = max(top / 127, 2^-126)              IEEE division; 2^-126 is the smallest normal fp32 number
    t     = v * r,  r = 1 / s                   one IEEE reciprocal per row
    code  = floor(t) + (u < t - floor(t))       u uniform on {0, 1, ..., 2^24 - 1} / 2^24, then clamped to -127..127

Decode: v_hat = code * s. As t - floor(t) is exact in fp32 (but for -2^-24 < t < 0, where it is off by at most 2^-24),

    E[code] = t within 2^-24,      Var[code] = p (1 - p) <= 1/4,  p = t - floor(t)

and a product that is linear in v_hat, such as a gradient, is unbiased. A row that holds a NaN or an infinity gets
s = infinity and codes 0: everything made of it is NaN, so that a gradient scaler sees it.

Random bits: Philox-4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section
3.3), key = the 64 bits of the seed, counter = (j, row, 0, 0). Its four words belong to the columns j, j + Q, j + 2 Q,
j + 3 Q with Q = ceil(K / 4): whole tiles of a quarter row, no shuffle of elements. The reference and the kernel
draw the same bits; the codes of a row depend on the seed, the row's number and K, not on the launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.device import clip
from qat.fake_quant_kernels.dispatch import AotCase, Device, Kernel, Op, tl

SMALLEST = 2.0**-126
_WORD = 0xFFFFFFFF


def _wide_product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * words; an int64 product keeps all 64 bits, whatever its sign."""
    product = words * factor
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four int64 tensors of 32-bit words -> four such tensors, broadcast together.

    seed: int64, one element; its low and high 32 bits are the key.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _wide_product(0xD2511F53, c0)
        high1, low1 = _wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniforms(rows: int, columns: int, seed: Tensor) -> Tensor:
    """u [rows, columns] fp32 of the module's docstring: multiples of 2^-24 in 0 <= u < 1."""
    quarter = -(-columns // 4)
    j = torch.arange(quarter, device=seed.device).unsqueeze(0)
    row = torch.arange(rows, device=seed.device).unsqueeze(1)
    zero = torch.zeros_like(j)
    words = torch.cat(philox((j, row, zero, zero), seed.reshape(())), dim=1)[:, :columns]
    return (words >> 8).to(torch.float32) * 2.0**-24


def _reference(g: Tensor, seed: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor]:
    """g [R, K] fp32, bf16 or fp16; seed int64 with one element; fold [1, K] or [1, 1] fp32 or None.

    Returns codes [R, K] int8 within -127..127 and their scales [R, 1] fp32.
    """
    rows, columns = g.shape
    v = g.to(torch.float32)
    if fold is not None:
        v = v * fold
    if columns == 0:
        return g.new_empty((rows, 0), dtype=torch.int8), g.new_full((rows, 1), SMALLEST, dtype=torch.float32)
    top = v.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(1, keepdim=True)
    scale = (top / 127.0).clamp(min=SMALLEST)
    t = (v * (1.0 / scale)).nan_to_num(nan=0.0)
    below = torch.floor(t)
    codes = below + (uniforms(rows, columns, seed) < t - below)
    return codes.clamp_(-127.0, 127.0).to(torch.int8), scale


def _fake(g: Tensor, seed: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor]:
    return g.new_empty(g.shape, dtype=torch.int8), g.new_empty((g.shape[0], 1), dtype=torch.float32)


@Device
def _load(g: Any, fold: Any, rows: Any, cols: Any, K: Any, mask: Any, FS: tl.constexpr, EVEN: tl.constexpr) -> Any:
    """A tile of v, with 0 outside the matrix."""
    at = rows[:, None] * K + cols[None, :]
    v = tl.load(g + at, mask=None if EVEN else mask, other=None if EVEN else 0.0).to(tl.float32)
    if fold is not None:
        v = v * tl.load(fold + cols * FS, mask=cols < K, other=0.0)[None, :]
    return v


@Device
def _top(v: Any) -> Any:
    """The largest magnitude of each row, infinite if one is NaN."""
    return tl.max(tl.where(v != v, float("inf"), tl.abs(v)), axis=1)


@Device
def _store(codes: Any, v: Any, r: Any, bits: Any, rows: Any, cols: Any, K: Any, mask: Any, EVEN: tl.constexpr) -> Any:
    """Round a tile of v by its random bits and store the codes."""
    t = v * r[:, None]
    t = tl.where(t != t, 0.0, t)
    below = tl.floor(t)
    u = (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    q = clip(below + tl.where(u < t - below, 1.0, 0.0), -127.0, 127.0).to(tl.int8)
    at = rows[:, None] * K + cols[None, :]
    tl.store(codes + at, q, mask=None if EVEN else mask)


@Kernel
def _stochastic(
    g: Any,
    fold: Any,
    seed: Any,
    codes: Any,
    scale: Any,
    R: Any,
    K: Any,
    Q: Any,
    FS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
) -> Any:
    """ROWS rows per program, a quarter row in tiles of BLOCK columns; WHOLE: one tile, the row stays in registers.

    EVEN: R, K and Q fill the tiles, no masks.
    """
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = number.to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = (number < R)[:, None]
    if WHOLE:
        mask = inside & (j < Q)[None, :]
        # K is at least Q, 2 Q and 3 Q only where there are columns: each quarter has its own end
        m1 = mask & (j + Q < K)[None, :]
        m2 = mask & (j + 2 * Q < K)[None, :]
        m3 = mask & (j + 3 * Q < K)[None, :]
        v0 = _load(g, fold, rows, j, K, mask, FS, EVEN)
        v1 = _load(g, fold, rows, j + Q, K, m1, FS, EVEN)
        v2 = _load(g, fold, rows, j + 2 * Q, K, m2, FS, EVEN)
        v3 = _load(g, fold, rows, j + 3 * Q, K, m3, FS, EVEN)
        top = tl.maximum(tl.maximum(_top(v0), _top(v1)), tl.maximum(_top(v2), _top(v3)))
    else:
        top = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, K, BLOCK):
            cols = start + j
            top = tl.maximum(top, _top(_load(g, fold, rows, cols, K, inside & (cols < K)[None, :], FS, False)))
    s = tl.maximum(tl.math.div_rn(top, 127.0), 1.1754943508222875e-38)
    r = tl.math.div_rn(1.0, s)
    tl.store(scale + rows, s, mask=number < R)
    key = tl.load(seed)
    nothing = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
    if WHOLE:
        b0, b1, b2, b3 = tl.philox(key, nothing + j[None, :], nothing + number[:, None], nothing, nothing)
        _store(codes, v0, r, b0, rows, j, K, mask, EVEN)
        _store(codes, v1, r, b1, rows, j + Q, K, m1, EVEN)
        _store(codes, v2, r, b2, rows, j + 2 * Q, K, m2, EVEN)
        _store(codes, v3, r, b3, rows, j + 3 * Q, K, m3, EVEN)
    else:
        for start in range(0, Q, BLOCK):
            c0 = start + j
            c1 = c0 + Q
            c2 = c1 + Q
            c3 = c2 + Q
            n0 = inside & (c0 < Q)[None, :]
            n1 = n0 & (c1 < K)[None, :]
            n2 = n0 & (c2 < K)[None, :]
            n3 = n0 & (c3 < K)[None, :]
            b0, b1, b2, b3 = tl.philox(key, nothing + c0[None, :], nothing + number[:, None], nothing, nothing)
            _store(codes, _load(g, fold, rows, c0, K, n0, FS, False), r, b0, rows, c0, K, n0, False)
            _store(codes, _load(g, fold, rows, c1, K, n1, FS, False), r, b1, rows, c1, K, n1, False)
            _store(codes, _load(g, fold, rows, c2, K, n2, FS, False), r, b2, rows, c2, K, n2, False)
            _store(codes, _load(g, fold, rows, c3, K, n3, FS, False), r, b3, rows, c3, K, n3, False)


def _triton(g: Tensor, seed: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor]:
    g = g.contiguous()
    rows, columns = g.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=g.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=g.device)
    if rows == 0 or columns == 0:
        return codes, scale.fill_(SMALLEST)
    quarter = -(-columns // 4)
    # a power of two that holds a quarter row; 2048 numbers a tile are 16 for each of 128 threads, stored in 16 bytes
    block = min(max(1 << (quarter - 1).bit_length(), 16), 2048)
    per_program = max(1, 2048 // block)
    _stochastic[(-(-rows // per_program),)](
        g,
        None if fold is None else fold.contiguous(),
        seed.to(device=g.device, dtype=torch.int64),
        codes,
        scale,
        rows,
        columns,
        quarter,
        FS=0 if fold is not None and fold.shape[1] == 1 else 1,
        ROWS=per_program,
        BLOCK=block,
        WHOLE=quarter <= block,
        EVEN=columns == 4 * block and rows % per_program == 0,
        num_warps=4,
    )
    return codes, scale


op = Op("stochastic_int8", _reference, _fake, _triton)


def stochastic_int8(g: Tensor, seed: Tensor | int, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """g [R, K] (fp32, bf16, fp16) -> codes [R, K] int8 within -127..127 and scales [R, 1] fp32, see above.

    seed: an int64 tensor with one element, best on g's device, or an int of 64 bits; the same seed gives the same
    codes, so take another for every step and layer. fold [1, K] or [1, 1] fp32 multiplies the columns first.
    """
    if isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=g.device)
    return op(g, seed, fold)  # type: ignore[no-any-return]


_SIGNATURE = {
    "g": "*bf16",
    "fold": "*fp32",
    "seed": "*i64",
    "codes": "*i8",
    "scale": "*fp32",
    "R": "i32",
    "K": "i32",
    "Q": "i32",
}
AOT = (
    AotCase(
        "stochastic 4096 bf16",
        _stochastic,
        _SIGNATURE,
        {"FS": 1, "ROWS": 2, "BLOCK": 1024, "WHOLE": True, "EVEN": True},
        max_registers=192,
    ),
    AotCase(
        "stochastic 8192 fp32 no fold",
        _stochastic,
        {name: "*fp32" if name == "g" else kind for name, kind in _SIGNATURE.items() if name != "fold"},
        {"fold": None, "FS": 1, "ROWS": 1, "BLOCK": 2048, "WHOLE": True, "EVEN": True},
        max_registers=192,
    ),
    AotCase(
        "stochastic long rows bf16",
        _stochastic,
        _SIGNATURE,
        {"FS": 1, "ROWS": 1, "BLOCK": 2048, "WHOLE": False, "EVEN": False},
        max_registers=192,
    ),
)
