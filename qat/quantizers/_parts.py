"""State that must survive `.to(bfloat16)` (bf16-true, FSDP's buffer dtype), as a sum of bf16-representable parts: one
for portable and bf16 scales, two for fp16, three for fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(value: Tensor, parts: int) -> Tensor:
    """fp32 [...] -> [parts, ...] of bf16-representable fp32 numbers whose sum is `value` exactly (24 bits need 3).

    Exact where |value| >= 2^-110: below, the last bits of an fp32 number are smaller than any bf16 number.
    """
    rest, found = value.float(), []
    for _ in range(parts):
        part = rest.to(torch.bfloat16).float()
        found.append(part)
        rest = rest - part
    return torch.stack(found)


def joined(parts: Tensor) -> Tensor:
    """The inverse of `split`; the smallest part is added first so that every sum is exact."""
    total = parts[-1].float()
    for part in reversed(parts[:-1].unbind(0)):
        total = part.float() + total
    return total


def digits(order: Tensor) -> Tensor:
    """int64 [K] below 2^24 -> fp32 [3, K], its digits to the base of 256: bf16 holds them, and an average of equal
    ones, however it is computed in fp32, rounds to them (of a larger number it would drift by more than 1/2)."""
    return torch.stack([(order >> shift) & 255 for shift in (0, 8, 16)]).float()


def number(parts: Tensor) -> Tensor:
    """The inverse of `digits`."""
    low, middle, high = parts.float().round().long().unbind(0)
    return low + (middle << 8) + (high << 16)
