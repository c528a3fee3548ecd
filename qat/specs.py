"""`QuantSpec`: how one tensor's numbers are mapped to codes. Pure data; a behaviour belongs to a quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qat.errors import QATError, RecipeError
from qat.grids import GRIDS, KINDS, TERNARY, Grid, IntGrid
from qat.scales import SCALE_GRIDS, ScaleGrid, TwoLevel

GRANULARITIES = ("tensor", "channel", "group", "token")
ZERO_POINTS = ("none", "int", "float")


@dataclass(frozen=True)
class QuantSpec:
    """Grid, granularity, zero point, scale storage and the quantizer that finds the scale.

    kind                   which codes exist (`qat.grids`): int, or a grid with its own bits
    bits, signed, narrow   the codes of integers (`qat.grids.IntGrid`)
    signed_scale           a scale may be negative, which gives the extra negative code to either side
    granularity            numbers that share one scale: the tensor, an output channel, `group_size` consecutive
                           numbers along a row, or a token (activations: one row of the last dimension)
    zero_point             none: w = code * scale; int: w = (code - zero_point) * scale with qmin <= zero_point <= qmax;
                           float: w = code * scale + minimum, the minimum stored like a scale
    scale                  how scales are stored (`qat.scales.SCALE_GRIDS`)
    quantizer              the name of a quantizer (`qat.quantizers`)
    desc_act               groups are of inputs in an order of their own (`qat.layout`), which the quantizer keeps
    percentile             ranges that are found once or averaged hold this share of the numbers, in % (with
                           a zero point: but for its rest on either side); None: as the
                           quantizer finds them
    """

    bits: int = 4
    signed: bool = True
    narrow: bool = False
    granularity: str = "channel"
    group_size: int | None = None
    zero_point: str = "none"
    scale: str = "portable"
    quantizer: str = "absmax"
    kind: str = "int"
    signed_scale: bool = False
    percentile: float | None = None
    desc_act: bool = False

    @property
    def grid(self) -> Grid:
        return self.int_grid if self.kind == "int" else GRIDS[self.kind]

    @property
    def int_grid(self) -> IntGrid:
        """The grid of consecutive integers (ternary included); raises QATError for another one."""
        if self.kind == "int":
            stored = SCALE_GRIDS.get(self.scale)
            return IntGrid(self.bits, self.signed, self.narrow, half=stored is not None and stored.half)
        if self.kind != TERNARY.kind:
            raise QATError(f"the codes of {self} are no consecutive integers")
        return TERNARY

    @property
    def is_int(self) -> bool:
        """Whether codes are consecutive integers."""
        return self.kind in ("int", TERNARY.kind)

    @property
    def scale_grid(self) -> ScaleGrid:
        return SCALE_GRIDS[self.scale]

    def reasons(self) -> list[str]:
        """Why this spec cannot be; empty means it can."""
        if self.kind not in KINDS:
            return [f"kind={self.kind!r} is unknown; use one of {', '.join(KINDS)}"]
        found = self.grid.reasons()
        if self.kind != "int":
            found += self._kind_reasons()
        # the other grids are the same on both sides
        if self.signed_scale and not (self.kind in ("int", "iq4_nl") and self.signed and self.zero_point == "none"):
            found.append("signed_scale=true needs signed integers with zero_point=none, or kind=iq4_nl")
        elif self.signed_scale and self.narrow:
            found.append("signed_scale=true does nothing for a narrow grid, which is the same on both sides")
        if self.granularity not in GRANULARITIES:
            found.append(f"granularity={self.granularity!r} is unknown; use one of {', '.join(GRANULARITIES)}")
        if (self.granularity == "group") != (self.group_size is not None):
            found.append(
                f"granularity={self.granularity!r} with group_size={self.group_size}; group_size goes with 'group'"
            )
        if self.group_size is not None and self.group_size < 1:
            found.append(f"group_size={self.group_size} is not positive")
        if self.desc_act and self.granularity != "group":
            found.append(f"desc_act=true is about groups, and granularity={self.granularity!r} has none")
        if self.zero_point not in ZERO_POINTS:
            found.append(f"zero_point={self.zero_point!r} is unknown; use one of {', '.join(ZERO_POINTS)}")
        if self.zero_point == "float" and self.signed:
            found.append("zero_point='float' needs signed=false: w = code * scale + minimum counts up from the minimum")
        if self.scale == "e8m0" and (self.zero_point != "none" or self.signed_scale):
            found.append("scale='e8m0' stores powers of two for symmetric grids: no zero points, no signed scales")
        if self.percentile is not None and not 50.0 < self.percentile <= 100.0:
            found.append(f"percentile={self.percentile} is not in (50, 100]")
        if self.percentile is not None and isinstance(SCALE_GRIDS.get(self.scale), TwoLevel):
            found.append(f"percentile with scale={self.scale!r}: scales of two levels are searched together")
        if self.percentile is not None and self.signed_scale:
            found.append("percentile with signed_scale=true: a share of the numbers says nothing of the scale's sign")
        if self.scale not in SCALE_GRIDS:
            found.append(f"scale={self.scale!r} is unknown; use one of {', '.join(SCALE_GRIDS)}")
        elif isinstance(self.scale_grid, TwoLevel):
            needs = self.scale_grid.words
            other = self.kind in self.scale_grid.also
            fits = {word: getattr(self, word) == value or (word == "kind" and other) for word, value in needs}
            wrong = ", ".join(f"{word}={value}" for word, value in needs if not fits[word])
            found += [f"scale={self.scale!r} stores scales of one kind of tensor only; use {wrong}"] if wrong else []
        return found

    def _kind_reasons(self) -> list[str]:
        found = []
        if self.bits != self.grid.bits:
            found.append(f"kind={self.kind!r} has {self.grid.bits} bits, not {self.bits}")
        if self.zero_point != "none" or not self.signed:
            found.append(f"kind={self.kind!r} has no zero point and codes of either sign; use zero_point=none")
        if self.narrow and self.kind != TERNARY.kind:
            found.append(f"narrow=true is for integers, not kind={self.kind!r}")
        return found

    def shape_reasons(self, columns: int) -> list[str]:
        """Why rows of `columns` numbers cannot be cut into groups; empty means they can."""
        size, grid = self.group_size, self.scale_grid
        if isinstance(grid, TwoLevel) and (columns % grid.run or not columns):
            return [f"scale={self.scale!r} needs rows of a multiple of {grid.run} numbers, not {columns}"]
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
        if isinstance(self.scale_grid, TwoLevel):
            return self.bits + self.scale_grid.extra / (self.group_size or columns)
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
        name = f"{sign}int{self.bits}{' narrow' if self.narrow else ''}" if self.kind == "int" else self.kind
        where = f"g{self.group_size}" if self.group_size else self.granularity
        where += " desc_act" if self.desc_act else ""
        zero = {"none": "", "int": " zp", "float": " min"}[self.zero_point]
        either = " +-" if self.signed_scale else " "
        share = "" if self.percentile is None else f" p{self.percentile:g}"
        return f"{name} {where}{zero}{either}{self.scale} {self.quantizer}{share}"
