"""Which codes exist.

A grid knows nothing of scales. A weight is `(code - zero_point) * scale` with `code` from `qmin..qmax`:

    bits  signed  narrow    qmin   qmax
    8     yes     no        -128    127
    8     yes     yes       -127    127
    8     no      no           0    255
    4     yes     no          -8      7
    4     yes     yes         -7      7
    2     yes     no          -2      1
    2     yes     yes         -1      1      (ternary)
    1     yes     no          -1      0
    1     no      no           0      1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class IntGrid:
    """Consecutive integers of `bits` bits. Raises nothing; ask `reasons()` (empty means usable)."""

    bits: int
    signed: bool = True
    narrow: bool = False

    @property
    def qmin(self) -> int:
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def steps(self) -> int:
        """Distance between the outermost codes: `qmax - qmin`."""
        return self.qmax - self.qmin

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def reasons(self) -> list[str]:
        """Why there is no such grid; empty means there is."""
        found = []
        if not 1 <= self.bits <= 8:
            found.append(f"bits={self.bits} is not in 1..8")
        if self.narrow and not self.signed:
            found.append("narrow=true needs a signed grid (an unsigned one has no extra negative code to drop)")
        if self.narrow and self.bits == 1:
            found.append("narrow=true leaves a 1-bit grid with the single code 0; use bits=2 for ternary")
        return found
