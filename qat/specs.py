"""`QuantSpec`: how one tensor's numbers are mapped to codes. Pure data; a behaviour belongs to a quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qat.errors import RecipeError
from qat.grids import IntGrid
from qat.scales import SCALE_GRIDS, ScaleGrid

GRANULARITIES = ("tensor", "channel", "group", "token")
ZERO_POINTS = ("none", "int", "float")


@dataclass(frozen=True)
class QuantSpec:
    """Grid, granularity, zero point, scale storage and the quantizer that finds the scale.

    bits, signed, narrow   the codes (`qat.grids.IntGrid`)
    granularity            numbers that share one scale: the tensor, an output channel, `group_size` consecutive
                           numbers along a row, or a token (activations: one row of the last dimension)
    zero_point             none: w = code * scale; int: w = (code - zero_point) * scale with qmin <= zero_point <= qmax;
                           float: w = code * scale + minimum, the minimum stored like a scale
    scale                  how scales are stored (`qat.scales.SCALE_GRIDS`)
    quantizer              the name of a quantizer (`qat.quantizers`)
    """

    bits: int = 4
    signed: bool = True
    narrow: bool = False
    granularity: str = "channel"
    group_size: int | None = None
    zero_point: str = "none"
    scale: str = "portable"
    quantizer: str = "absmax"

    @property
    def grid(self) -> IntGrid:
        return IntGrid(self.bits, self.signed, self.narrow)

    @property
    def scale_grid(self) -> ScaleGrid:
        return SCALE_GRIDS[self.scale]

    def reasons(self) -> list[str]:
        """Why this spec cannot be; empty means it can."""
        found = self.grid.reasons()
        if self.granularity not in GRANULARITIES:
            found.append(f"granularity={self.granularity!r} is unknown; use one of {', '.join(GRANULARITIES)}")
        if (self.granularity == "group") != (self.group_size is not None):
            found.append(
                f"granularity={self.granularity!r} with group_size={self.group_size}; group_size goes with 'group'"
            )
        if self.group_size is not None and self.group_size < 1:
            found.append(f"group_size={self.group_size} is not positive")
        if self.zero_point not in ZERO_POINTS:
            found.append(f"zero_point={self.zero_point!r} is unknown; use one of {', '.join(ZERO_POINTS)}")
        if self.zero_point == "float" and self.signed:
            found.append("zero_point='float' needs signed=false: w = code * scale + minimum counts up from the minimum")
        if self.scale not in SCALE_GRIDS:
            found.append(f"scale={self.scale!r} is unknown; use one of {', '.join(SCALE_GRIDS)}")
        return found

    def shape_reasons(self, columns: int) -> list[str]:
        """Why rows of `columns` numbers cannot be cut into groups; empty means they can."""
        size = self.group_size
        if size is None or (columns % size == 0 and columns):
            return []
        divisors = [d for d in (16, 32, 64, 128, 256) if columns % d == 0]
        hint = f"use one of {divisors}" if divisors else "use granularity=channel"
        return [f"group_size={size} does not divide the {columns} inputs of a row; {hint} or keep this layer in float"]

    def groups(self, columns: int) -> int:
        """Scales per row of `columns` numbers."""
        return columns // self.group_size if self.group_size else 1

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight of a row of `columns` numbers: codes, scales and zero points."""
        extra = {"none": 0, "int": self.bits, "float": self.scale_grid.bits}[self.zero_point]
        per_scale = {"tensor": 0.0, "group": float(self.group_size or 1)}.get(self.granularity, float(columns))
        return self.bits + ((self.scale_grid.bits + extra) / per_scale if per_scale else 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """Raises RecipeError for unknown keys or an impossible spec."""
        try:
            spec = cls(**data)
        except TypeError as problem:
            raise RecipeError(f"not a quantization spec: {problem}") from None
        reasons = spec.reasons()
        if reasons:
            raise RecipeError("; ".join(reasons))
        return spec

    def __str__(self) -> str:
        sign = "" if self.signed else "u"
        where = f"g{self.group_size}" if self.group_size else self.granularity
        zero = {"none": "", "int": " zp", "float": " min"}[self.zero_point]
        return f"{sign}int{self.bits}{' narrow' if self.narrow else ''} {where}{zero} {self.scale} {self.quantizer}"
