"""Integer codes of 1..8 bits in as few bytes: a bit stream for storage in general, planar halves for caches.

Stream: code j of a row occupies the bits j * b .. j * b + b - 1 of that row, bit 0 being the lowest of byte 0; a row
starts at a byte and takes ceil(K * b / 8) of them. A negative code is its two's complement in b bits.

    byte i, bit k   =   bit (8 i + k) mod b  of code  (8 i + k) // b

Halves (4 bits, K even): byte j holds code j in its low and code j + K/2 in its high nibble, so that both halves of a
row are read and written as runs of neighbours, by vectors of a CPU and by threads of a GPU alike.

    byte j   =   (code[j] mod 16) + 16 * (code[j + K/2] mod 16)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import QATError

# numbers of a row chunk whose packed bytes stay in cache between two passes (measured: 2^18 to 2^20 are slower)
_CHUNK = 1 << 22


def pack_halves(codes: Tensor) -> Tensor:
    """int8 (-8..7) or uint8 (0..15) codes [R, K], K even -> uint8 [R, K/2]. Raises QATError for an odd K."""
    rows, columns = codes.shape
    if columns % 2:
        raise QATError(f"4-bit halves need an even number of columns, not {columns}; keep these codes as bytes")
    half, wide = columns // 2, codes.view(torch.uint8)
    if torch.compiler.is_compiling():
        return (wide[:, :half] & 15) + wide[:, half:] * 16
    packed = torch.empty(rows, half, dtype=torch.uint8, device=codes.device)
    for part, whole in _chunks(packed, wide):
        torch.bitwise_and(whole[:, :half], 15, out=part)
        # modulo 256: the product drops the sign bits of the upper nibble
        part.add_(whole[:, half:], alpha=16)
    return packed


def unpack_halves(packed: Tensor, signed: bool) -> Tensor:
    """uint8 [R, K/2] -> codes [R, K]: int8 -8..7 if signed, else uint8 0..15."""
    rows, half = packed.shape
    dtype = torch.int8 if signed else torch.uint8
    both = packed.view(dtype)
    if torch.compiler.is_compiling():
        low = ((both & 15) ^ 8) - 8 if signed else both & 15
        return torch.cat((low, both >> 4), 1)
    codes = torch.empty(rows, 2 * half, dtype=dtype, device=packed.device)
    for whole, part in _chunks(codes, both):
        low = torch.bitwise_and(part, 15, out=whole[:, :half])
        if signed:
            low.bitwise_xor_(8).sub_(8)
        # arithmetic for int8: the sign comes along
        torch.bitwise_right_shift(part, 4, out=whole[:, half:])
    return codes


def _chunks(out: Tensor, source: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the same rows of both, small enough for the cache."""
    if out.device.type != "cpu":
        return [(out, source)]
    rows = max(1, _CHUNK // max(1, out.shape[1]))
    return list(zip(torch.split(out, rows), torch.split(source, rows), strict=True))
