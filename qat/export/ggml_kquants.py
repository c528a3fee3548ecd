"""ggml's k-quants as bytes: super-blocks of 256 numbers of a row, with scales of two levels (`qat.scales`).

    Q2_K    84 bytes   | sc, mn: 16 | qs: 64 | d | d_min |                 u = code
    Q3_K   110 bytes   | hmask: 32 | qs: 64 | sc: 12 | d |                 u = code + 4
    Q4_K   144 bytes   | d | d_min | sc, mn: 12 | qs: 128 |                u = code
    Q5_K   176 bytes   | d | d_min | sc, mn: 12 | qh: 32 | qs: 128 |       u = code
    Q6_K   210 bytes   | ql: 128 | qh: 64 | sc: 16 | d |                   u = code + 32
    IQ4_XS 136 bytes   | d | sc: 2 and 4 | qs: 128 |                       u = code of iq4_nl, sc + 32

d and d_min are fp16. They decode to d * sc * code - d_min * mn in fp32 with one rounding, that of the difference.
Source: ggml's block_q2_K .. block_q6_K and block_iq4_xs; the consumer's decoders are gguf.quants and llama.cpp.

Shapes: codes [R, K] with K % 256 == 0; parts as `qat.scales` has them; bytes uint8 [R, K / 256 * size].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qat.fake_quant_kernels.two_level import KQUANTS, SUPER

# bytes of a super-block
SIZES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_XS": 136}


def encode_super_blocks(kind: str, codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Codes and parts of scales -> bytes."""
    rows, columns = codes.shape
    count = columns // SUPER
    u = (codes.to(torch.int16) - _lowest(kind)).reshape(rows, count, SUPER)
    sc = parts["sc"].to(torch.int16).reshape(rows, count, -1)
    d = _halves(parts["d"])
    if kind == "Q2_K":
        pieces = [sc | _minima(parts, sc) << 4, quarters(u), d, _halves(parts["d_min"])]
    elif kind == "Q3_K":
        high = (u >> 2).reshape(rows, count, 8, 32)
        hmask = (high << torch.arange(8).reshape(8, 1)).sum(2)
        t = sc + 32
        low = t[..., :8] & 15 | (t[..., 8:] & 15) << 4
        tops = (t >> 4).reshape(rows, count, 4, 4)
        top = (tops << 2 * torch.arange(4).reshape(4, 1)).sum(2)
        pieces = [hmask, quarters(u & 3), low, top, d]
    elif kind in ("Q4_K", "Q5_K"):
        mn = _minima(parts, sc)
        first, last = (sc[..., :4], mn[..., :4]), (sc[..., 4:], mn[..., 4:])
        shared = [a & 63 | (b >> 4) << 6 for a, b in zip(first, last, strict=True)]
        pieces = [d, _halves(parts["d_min"]), *shared, last[0] & 15 | (last[1] & 15) << 4]
        if kind == "Q5_K":
            fifth = (u >> 4).reshape(rows, count, 8, 32)
            pieces.append((fifth << torch.arange(8).reshape(8, 1)).sum(2))
        nibbles = (u & 15).reshape(rows, count, 4, 2, 32)
        pieces.append((nibbles[..., 0, :] | nibbles[..., 1, :] << 4).flatten(2))
    elif kind == "IQ4_XS":
        t = sc.int() + 32
        high = ((t >> 4) << 2 * torch.arange(8)).sum(-1)
        nibbles = u.reshape(rows, count, 8, 2, 16)
        qs = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).flatten(2)
        pieces = [d, torch.stack([high & 255, high >> 8], -1), t[..., ::2] & 15 | (t[..., 1::2] & 15) << 4, qs]
    else:
        g = u.reshape(rows, count, 2, 4, 32)
        ql = torch.stack(
            [g[..., 0, :] & 15 | (g[..., 2, :] & 15) << 4, g[..., 1, :] & 15 | (g[..., 3, :] & 15) << 4], 3
        )
        qh = sum((g[..., j, :] >> 4) << 2 * j for j in range(4))
        pieces = [ql.flatten(2), qh.flatten(2), sc & 255, d]  # type: ignore[union-attr]
    return torch.cat([piece.to(torch.uint8) for piece in pieces], -1).reshape(rows, -1)


def decode_super_blocks(kind: str, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The inverse: bytes -> codes int8 (uint8 with minima) [R, K] and the parts of scales."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, SIZES[kind])
    count, minima = blocks.shape[1], kind in KQUANTS and KQUANTS[kind][4]
    b = blocks.to(torch.int16)
    found: dict[str, Tensor] = {}
    if kind == "Q2_K":
        sc, found["mn"] = b[..., :16] & 15, b[..., :16] >> 4
        u = four(b[..., 16:80])
        found["d"], found["d_min"] = _half(blocks[..., 80:82]), _half(blocks[..., 82:84])
    elif kind == "Q3_K":
        hmask, packed = b[..., :32], b[..., 96:108]
        high = (hmask.unsqueeze(2) >> torch.arange(8).reshape(8, 1) & 1).flatten(2)
        u = four(b[..., 32:96]) | high << 2
        halves = torch.cat([packed[..., :8] & 15, packed[..., :8] >> 4], -1)
        tops = torch.cat([packed[..., 8:] >> 2 * i & 3 for i in range(4)], -1)
        sc = (halves | tops << 4) - 32
        found["d"] = _half(blocks[..., 108:110])
    elif kind in ("Q4_K", "Q5_K"):
        found["d"], found["d_min"] = _half(blocks[..., :2]), _half(blocks[..., 2:4])
        first, second, third = b[..., 4:8], b[..., 8:12], b[..., 12:16]
        sc = torch.cat([first & 63, third & 15 | (first >> 6) << 4], -1)
        found["mn"] = torch.cat([second & 63, third >> 4 | (second >> 6) << 4], -1)
        nibbles = b[..., -128:].reshape(rows, count, 4, 1, 32)
        u = torch.cat([nibbles & 15, nibbles >> 4], 3).flatten(2)
        if kind == "Q5_K":
            fifth = b[..., 16:48].unsqueeze(2) >> torch.arange(8).reshape(8, 1) & 1
            u = u | fifth.flatten(2) << 4
    elif kind == "IQ4_XS":
        found["d"] = _half(blocks[..., :2])
        high = (b[..., 2:4].unsqueeze(-1) >> 2 * torch.arange(4) & 3).flatten(2)
        low = torch.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], -1).flatten(2)
        sc = (low | high << 4) - 32
        nibbles = b[..., 8:].reshape(rows, count, 8, 1, 16)
        u = torch.cat([nibbles & 15, nibbles >> 4], 3).flatten(2)
    else:
        ql = b[..., :128].reshape(rows, count, 2, 2, 32)
        qh = b[..., 128:192].reshape(rows, count, 2, 1, 32)
        pairs = torch.cat([ql & 15, ql >> 4], 3)
        u = (pairs | (qh >> 2 * torch.arange(4).reshape(4, 1) & 3) << 4).flatten(2)
        sc = blocks[..., 192:208].contiguous().view(torch.int8).to(torch.int16)
        found["d"] = _half(blocks[..., 208:210])
    code = torch.uint8 if minima else torch.int8
    parts = {"sc": sc.to(code), **{name: value.to(torch.uint8) for name, value in found.items() if name == "mn"}}
    parts |= {name: value.reshape(rows, -1) for name, value in found.items() if name != "mn"}
    numbers = torch.uint8 if _lowest(kind) == 0 else torch.int8
    return (u + _lowest(kind)).to(numbers).reshape(rows, -1), {n: p.reshape(rows, -1) for n, p in parts.items()}


def _lowest(kind: str) -> int:
    """The code that is stored as 0."""
    return KQUANTS[kind][1] if kind in KQUANTS else 0


def _minima(parts: Mapping[str, Tensor], like: Tensor) -> Tensor:
    return parts["mn"].to(torch.int16).reshape(like.shape)


def _halves(value: Tensor) -> Tensor:
    """fp16 [R, B] -> its bytes [R, B, 2]."""
    return value.to(torch.float16).contiguous().view(torch.uint8).reshape(*value.shape, 2)


def _half(data: Tensor) -> Tensor:
    """Bytes [R, B, 2] -> fp16 [R, B]."""
    return data.contiguous().view(torch.float16).squeeze(-1)


def quarters(u: Tensor) -> Tensor:
    """Two-bit numbers [R, B, 256] -> bytes [R, B, 64]: in each half, four runs of 32 side by side."""
    g = u.reshape(*u.shape[:2], 2, 4, 32)
    return (g << 2 * torch.arange(4).reshape(4, 1)).sum(3).flatten(2)


def four(packed: Tensor) -> Tensor:
    """The inverse of `quarters`."""
    g = packed.reshape(*packed.shape[:2], 2, 1, 32)
    return (g >> 2 * torch.arange(4).reshape(4, 1) & 3).flatten(2).to(torch.int16)
