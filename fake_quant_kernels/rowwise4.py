"""4-bit groups as FBGEMM keeps embedding rows: a CPU decodes them in one pass, from nibbles to fp32.

One row per group of n = K/G codes (n divisible by 8), uint8 [R * G, n/2 + 4]:

    byte j < n/2   =   u[2j] + 16 u[2j + 1]        u = code + 8 of signed codes, else the code
    then fp16 s, fp16 b                            b = -8 s of signed codes, else 0
    w_hat = u * s + b

which is code * s exactly: s has at most 11 significant bits, u 4, and their products and sums fit fp32 in any order of
rounding. So s must be a number of fp16 with 8 s within its range (`holds` looks). The layout and the operator are those
of torch.ops.quantized.embedding_bag_4bit_rowwise_offsets; it is asked once whether it is there and exact.

Against `affine.decode` of planar halves (2.6 GHz EPYC of family 25, one thread, [2048, 512] in groups of 32, memory not
in cache): 0.36 against 0.90 ns per number. For caches on CPUs; files never see it.

`absmax` and `encode` are `dynamic.absmax` and `affine.encode` that write rows, chunk by chunk, in few operations: after
a matmul each of them begins with a cold cache.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.fake_quant_kernels.fields import amax_of, scale_of_amax
from qat.fake_quant_kernels.rows import broadcast, eager_on_cpu, fp32_chunks, grouped, no_nan

# above, 8 s leaves fp16
_LARGEST = 65504.0 / 8


def fits(w: Tensor, groups: int) -> bool:
    """Whether the codes of w [R, K] in groups can lie so, if their scales can (`holds`)."""
    rows, columns = w.shape
    narrow = w.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return eager_on_cpu(w) and narrow and bool(rows * columns) and columns % (8 * groups) == 0 and _exact()


def holds(scale: Tensor) -> bool:
    """Whether rows hold these scales, fp32 numbers of fp16 that are no NaN. Looks at them, which on a CPU waits for
    nothing."""
    # a NaN compares false
    return bool(np.abs(scale.numpy()).max() <= _LARGEST)


def absmax(
    w: Tensor,
    groups: int,
    inv_reach: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
) -> tuple[Tensor, Tensor]:
    """w [R, K] that `fits` -> (rows, scale fp32 [R, G]), a scale of NaN where a group holds one. Rows count if the
    scales are held."""
    rows, scale = _empty(w, groups), w.new_empty((w.shape[0], groups), dtype=torch.float32)
    for at, x, buffer in fp32_chunks(w):
        s = scale_of_amax(amax_of(x, groups, buffer), inv_reach, storage, smallest, largest, True)
        scale[at] = s
        value = torch.mul(grouped(x, groups), broadcast(s.reciprocal()), out=_grouped(buffer, groups))
        _put(value, s, lo, hi, rows[at])
    return rows.view(scale.numel(), -1), scale


def encode(w: Tensor, scale: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """w [R, K] that `fits`, scale fp32 [R, G] -> (rows, scale), the scale NaN throughout if w holds one. Rows count if
    the scales are held."""
    groups, found = scale.shape[1], scale
    rows = _empty(w, groups)
    for at, x, buffer in fp32_chunks(w):
        s = scale[at]
        value = torch.mul(grouped(x, groups), broadcast(s.reciprocal()), out=_grouped(buffer, groups))
        if not no_nan(value.amax()):
            found = torch.full_like(scale, torch.nan)
        _put(value, s, lo, hi, rows[at])
    return rows.view(scale.numel(), -1), found


def _empty(w: Tensor, groups: int) -> Tensor:
    rows, columns = w.shape
    return w.new_empty((rows, groups, columns // groups // 2 + 4), dtype=torch.uint8)


def _grouped(buffer: Tensor | None, groups: int) -> Tensor | None:
    return None if buffer is None else grouped(buffer, groups)


def _put(value: Tensor, scale: Tensor, lo: int, hi: int, rows: Tensor) -> None:
    """A chunk: w / s fp32, r G n numbers, overwritten, and s [r, G] -> rows [r, G, n/2 + 4]."""
    value = value.view(*scale.shape, -1)
    half, offset = value.shape[2] // 2, 8 if lo < 0 else 0
    codes = value.new_empty(value.shape, dtype=torch.int8).copy_(value.round_().clamp_(lo, hi))
    # two codes as one little-endian 16-bit number: the upper one moves down by four bits
    pairs = (codes.add_(offset) if offset else codes).view(torch.int16)
    rows[..., :half].copy_((pairs >> 4).bitwise_or_(pairs))
    fields = rows[..., half:].view(torch.float16)
    fields[..., 0].copy_(scale)
    fields[..., 1].copy_(scale * -offset)


def decode(rows: Tensor, dtype: torch.dtype, again: bool = False) -> Tensor:
    """The numbers of the groups in `dtype`, [R * G, n]; again as in `affine.decode`."""
    graph = torch.compiler.is_compiling()
    wide: Tensor = torch.ops.qat.rowwise4_decode(rows, again) if graph else _decode(rows, again)
    return wide if dtype == torch.float32 else wide.to(dtype)


def _decode(rows: Tensor, again: bool) -> Tensor:
    """fp32 [R * G, n]."""
    places, ends = _places(rows.shape[0])
    return _bags()(rows, places, ends, False, 0, False, None, None, True)  # type: ignore[no-any-return]


@functools.cache
def _bags() -> Any:
    return torch.ops.quantized.embedding_bag_4bit_rowwise_offsets.default


# What graphs call: torch keeps its operator's shapes from them. Not `torch.library.custom_op`, whose wrapper takes as
# long as decoding a small weight.
_library = torch.library.Library("qat", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("rowwise4_decode(Tensor rows, bool again) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("rowwise4_decode", _decode, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("qat::rowwise4_decode", lib=_library)  # type: ignore[untyped-decorator]
def _shape(rows: Tensor, again: bool) -> Tensor:
    return rows.new_empty((rows.shape[0], 2 * (rows.shape[1] - 4)), dtype=torch.float32)


@functools.lru_cache(maxsize=8)
def _places(count: int) -> tuple[Tensor, Tensor]:
    """Each row as a bag of its own: which rows, and where bags begin and end."""
    ends = torch.arange(count + 1, dtype=torch.int32, device="cpu")
    return ends[:-1], ends


@functools.cache
def _exact() -> bool:
    """Whether torch has the operator here (x86 with FBGEMM) and it gives code * s."""
    with torch.device("cpu"):
        g = torch.Generator().manual_seed(0)
        codes = torch.randint(-8, 8, (6, 2, 32), generator=g).float()
        scale = (torch.rand(6, 2, generator=g) + 0.5).mul(2.0 ** torch.arange(-13, -1).view(6, 2)).half().float()
    expected = (codes * scale.unsqueeze(-1)).view(6, 64)
    try:
        return torch.equal(decode(encode(expected, scale, -8, 7)[0], torch.float32).view(6, 64), expected)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
