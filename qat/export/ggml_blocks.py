"""ggml's 32-number blocks as bytes: [R, K] codes and fp16 scales -> [R, K/32 * size] uint8, and back.

    Q4_0   18 bytes   | d, fp16 | u0 + 16*u16 | u1 + 16*u17 | ... | u15 + 16*u31 |     u = code + 8
    Q8_0   34 bytes   | d, fp16 | c0 | c1 | ... | c31 |                                c = code, two's complement

Both decode to `d * code` in fp32: the product of an 11-bit and an 8-bit significand is exact. A grid whose groups are a
multiple of 32 numbers repeats its scale in every block of a group; nothing is rounded.
Source: ggml's block_q4_0 and block_q8_0; the consumer's decoder is gguf.quants.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
# ggml type -> bytes of one block, smallest and largest code
TYPES = {"Q4_0": (18, -8, 7), "Q8_0": (34, -128, 127)}


def smallest_type(qmin: int, qmax: int) -> str | None:
    """The type with the fewest bytes that holds the codes qmin..qmax, or None."""
    return next((name for name, (_, low, high) in TYPES.items() if low <= qmin and qmax <= high), None)


def encode_blocks(kind: str, codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [R, K] (K % 32 == 0), scales [R, G] or [1, 1] that fp16 holds exactly -> uint8 [R, K/32 * size]."""
    rows, columns = codes.shape
    blocks = columns // BLOCK
    scale = scale.expand(rows, scale.shape[1])
    d = scale.repeat_interleave(blocks // scale.shape[1], dim=1).to(torch.float16).contiguous()
    head = d.view(torch.uint8).reshape(rows, blocks, 2)
    grouped = codes.to(torch.int16).reshape(rows, blocks, BLOCK)
    if kind == "Q4_0":
        low, high = (grouped + 8).chunk(2, dim=-1)
        body = (low | high << 4).to(torch.uint8)
    else:
        body = grouped.to(torch.int8).view(torch.uint8)
    return torch.cat([head, body], dim=-1).reshape(rows, -1)


def decode_blocks(kind: str, data: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: uint8 [R, bytes] -> codes int8 [R, K] and one fp16 scale per block [R, K/32]."""
    rows, size = data.shape[0], TYPES[kind][0]
    blocks = data.reshape(rows, -1, size)
    scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    body = blocks[..., 2:].contiguous()
    nibbles = kind == "Q4_0"
    codes = torch.cat([body & 15, body >> 4], dim=-1).to(torch.int8) - 8 if nibbles else body.view(torch.int8)
    return codes.reshape(rows, -1), scale
