"""How a scale (and a minimum) is stored: scales live on a grid too.

`project` moves a scale onto the numbers that its storage can hold, inside the training forward and with a
straight-through gradient, so that packing it later changes nothing. Magnitudes are kept between the smallest
normal number and a maximum for which `code * scale` stays finite; a NaN or infinite input becomes the nearest end
of that range, so a stored scale is always finite and positive.

    portable   rounded to bf16 (8-bit significand) and kept within fp16's normal range 2^-14 .. 65280:
               exactly the same number in bf16, fp16 and fp32, hence in almost every file format
    fp16       2^-14 .. 65504
    bf16       2^-126 .. 2^119
    e8m0       powers of two, 2^-110 .. 2^119 (OCP Microscaling formats, v1.0)
    fp32       2^-110 .. 2^119 (below, three bf16 numbers no longer hold all bits: `qat.quantizers.base.split`)

A minimum (zero_point float) has any sign and may be 0; a portable one is a number of fp16 as well, denormals included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import RecipeError
from qat.fake_quant_kernels.storage import project, project_minimum

# (code - zero_point) spans at most 255 < 2^8 steps: below 2^119 no product leaves fp32's or bf16's range.
_LARGEST = 2.0**119
_FP16_SMALLEST_NORMAL = 2.0**-14
_BF16_SMALLEST_NORMAL = 2.0**-126
_FP32_SMALLEST = 2.0**-110
# older versions of torch lack it
_E8M0 = getattr(torch, "float8_e8m0fnu", None)


@dataclass(frozen=True)
class ScaleGrid:
    """The storage of one scale. `dtype` is what a file holds; `smallest`/`largest` bound the magnitude."""

    name: str
    dtype: torch.dtype
    smallest: float
    largest: float

    def project(self, scale: Tensor, signed: bool = False) -> Tensor:
        """fp32 scales of any shape -> the nearest storable fp32 numbers, positive or (signed) of the same sign;
        gradient passes straight through."""
        with torch.no_grad():
            stored = project(scale.abs() if signed else scale, self.dtype, self.smallest, self.largest)
            if signed:
                stored = torch.copysign(stored, scale)
        return _straight_through(scale, stored)

    def project_minimum(self, minimum: Tensor) -> Tensor:
        """fp32 minima (any sign, zero included) -> the nearest storable numbers; gradient passes straight through."""
        with torch.no_grad():
            portable = self.name == "portable"
            stored = project_minimum(minimum, self.dtype, self.smallest, self.largest, portable)
        return _straight_through(minimum, stored)

    @property
    def bits(self) -> int:
        return self.dtype.itemsize * 8

    @property
    def parts(self) -> int:
        """How many bf16 numbers add up to any stored scale exactly (`qat.quantizers.base.split`)."""
        return {torch.float16: 2, torch.float32: 3}.get(self.dtype, 1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, stored: Tensor) -> Tensor:
        return stored

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


def _straight_through(value: Tensor, stored: Tensor) -> Tensor:
    if value.requires_grad:
        return _StraightThrough.apply(value, stored)  # type: ignore[no-any-return, no-untyped-call]
    return stored


SCALE_GRIDS: dict[str, ScaleGrid] = {
    grid.name: grid
    for grid in (
        # 65280 = 255 * 2^8 is the largest bf16 number that fp16 can hold.
        ScaleGrid("portable", torch.bfloat16, _FP16_SMALLEST_NORMAL, 65280.0),
        ScaleGrid("fp16", torch.float16, _FP16_SMALLEST_NORMAL, 65504.0),
        ScaleGrid("bf16", torch.bfloat16, _BF16_SMALLEST_NORMAL, _LARGEST),
        ScaleGrid("fp32", torch.float32, _FP32_SMALLEST, _LARGEST),
        *([ScaleGrid("e8m0", _E8M0, _FP32_SMALLEST, _LARGEST)] if _E8M0 else ()),
    )
}


def scale_grid(name: str) -> ScaleGrid:
    """The grid called `name`; raises RecipeError listing the known names."""
    if name not in SCALE_GRIDS:
        raise RecipeError(f"scale={name!r} is unknown; use one of {', '.join(SCALE_GRIDS)}")
    return SCALE_GRIDS[name]
