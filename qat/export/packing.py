"""Dense bit streams: codes of 1..8 bits without a wasted bit.

Code i of a row occupies bits i*b .. i*b+b-1 of a little-endian stream, least significant bit first, so a code may lie
across two bytes or two words. Eight codes are always exactly b bytes:

    b = 3     code    |  0  |  1  |   2   |  3  |  4  |   5   |  6  |  7  |
              bits     0 1 2 3 4 5 6 7|8 ...         15|16 ...         23
                       +-- byte 0 ---+ +--- byte 1 ---+ +--- byte 2 ---+
                                    ^ code 2 = bits 6, 7 of byte 0 and bit 0 of byte 1

    b = 2     byte = c0 | c1 << 2 | c2 << 4 | c3 << 6
    b = 4     byte = c0 | c1 << 4

A row is padded with zero bits to whole 32-bit words. Read as little-endian int32 words this is the stream of
compressed-tensors >= 0.18, GPTQ, EXL2 and MLX (they differ in the direction they run through a matrix).
"""

from __future__ import annotations

import torch
from torch import Tensor

_OCTET = 8
# codes widened to 64 bits at a time
_CHUNK = 1 << 22


def words_per_row(columns: int, bits: int) -> int:
    """32-bit words that hold `columns` codes of `bits` bits."""
    return -(-columns * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, K], any integer dtype, each within 0..2^bits-1 -> int32 words [R, ceil(K * bits / 32)]."""
    if codes.numel() > _CHUNK and codes.shape[0] > 1:
        pieces = -(-codes.numel() // _CHUNK)
        return torch.cat([pack_bits(part, bits) for part in codes.chunk(min(pieces, codes.shape[0]))])
    rows, columns = codes.shape
    octets = -(-columns // _OCTET)
    padded = torch.zeros(rows, octets * _OCTET, dtype=torch.int64)
    padded[:, :columns] = codes.cpu()
    # eight codes side by side in one 64-bit number (8 bits: the top one wraps into the sign, which keeps its bits)
    together = (padded.reshape(rows, octets, _OCTET) << (torch.arange(_OCTET) * bits)).sum(-1)
    stream = together.unsqueeze(-1).view(torch.uint8)[..., :bits].reshape(rows, octets * bits)
    words = torch.zeros(rows, words_per_row(columns, bits) * 4, dtype=torch.uint8)
    used = min(words.shape[1], stream.shape[1])
    words[:, :used] = stream[:, :used]
    return words.view(torch.int32)


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_bits`: int32 words [R, W] -> codes [R, columns] as int16 within 0..2^bits-1."""
    if words.shape[0] * columns > _CHUNK and words.shape[0] > 1:
        pieces = -(-words.shape[0] * columns // _CHUNK)
        return torch.cat([unpack_bits(part, bits, columns) for part in words.chunk(min(pieces, words.shape[0]))])
    rows = words.shape[0]
    octets = -(-columns // _OCTET)
    stream = torch.zeros(rows, octets * bits, dtype=torch.uint8)
    raw = words.contiguous().cpu().view(torch.uint8)
    used = min(raw.shape[1], stream.shape[1])
    stream[:, :used] = raw[:, :used]
    eight = torch.zeros(rows, octets, _OCTET, dtype=torch.uint8)
    eight[..., :bits] = stream.reshape(rows, octets, bits)
    together = eight.view(torch.int64)
    codes = (together >> (torch.arange(_OCTET) * bits)) & ((1 << bits) - 1)
    return codes.reshape(rows, octets * _OCTET)[:, :columns].to(torch.int16)
