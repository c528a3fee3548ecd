"""The stored fields of groups of numbers, in plain torch: scales, integer zero points, float minima.

Symmetric, over each group of K/G numbers of a row:

    s = project(amax |w| * (1 / reach))         reach: half the distance of the outermost codes if signed, else hi

Asymmetric with an integer zero point (the range includes 0):

    a = min(amin w, 0),  b = max(amax w, 0),  s = project((b - a) * (1 / steps)),  z = clamp(lo - rint(a / s), lo, hi)

or with a float minimum:

    m = project_minimum(amin w),  s = project((amax w - m) * (1 / steps))

The reciprocals of reach, steps and s are multiplied: that is what CUDA makes of a division by a number, and a scale
must not depend on the device. Fields are finite numbers of their storage (`storage`); a group of nothing has amax 0.

Shapes: w [R, K] in any float dtype, read as fp32; fields fp32 [R, G]; K % G == 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qat.fake_quant_kernels.storage import project, project_minimum


def amax_of(w: Tensor, groups: int, buffer: Tensor | None = None) -> Tensor:
    """w [R, K] -> the largest magnitude of each group, fp32 [R, G]; NaN where the group holds one.

    buffer: fp32 memory of the shape of w that may be overwritten.
    """
    blocks = _blocks(w, groups)
    if not blocks.numel():
        return blocks.new_zeros(blocks.shape[:-1])
    return torch.abs(blocks, out=None if buffer is None else buffer.view(blocks.shape)).amax(-1)


def range_of(w: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """w [R, K] -> the smallest and the largest number of each group, fp32 [R, G]; both NaN where it holds one."""
    blocks = _blocks(w, groups)
    if not blocks.numel():
        return blocks.new_zeros(blocks.shape[:-1]), blocks.new_zeros(blocks.shape[:-1])
    return blocks.amin(-1), blocks.amax(-1)


def percentiles_of(w: Tensor, groups: int, share: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """w [R, K] -> ranges -high..high or low..high, fp32 [R, G], beyond which lie at most 1 - `share` of the numbers
    of each group: of their magnitudes if symmetric, else of the numbers on either side. Both ends are numbers of the
    group; a NaN counts as the largest."""
    blocks = _blocks(w, groups)
    count = blocks.shape[-1]
    if not blocks.numel():
        return blocks.new_zeros(blocks.shape[:-1]), blocks.new_zeros(blocks.shape[:-1])
    # a share like 0.999 of 1000 is a little more than 999 in floats
    rank = max(1, math.ceil(count * share - 1e-6))
    if symmetric:
        high = blocks.abs().kthvalue(rank).values
        return -high, high
    return blocks.kthvalue(count - rank + 1).values, blocks.kthvalue(rank).values


def _blocks(w: Tensor, groups: int) -> Tensor:
    # in fp32 before the reduction: torch's reductions of bf16 take ten times as long
    return w.reshape(w.shape[0], groups, w.shape[1] // groups).float()


def scale_of_amax(
    amax: Tensor, inv_reach: float, storage: torch.dtype, smallest: float, largest: float, poison: bool = False
) -> Tensor:
    """The stored scale of largest magnitudes of any shape; inv_reach is 1 / reach, a float. poison: a NaN stays."""
    return project(amax * inv_reach, storage, smallest, largest, poison)


def fields_of_range(
    low: Tensor,
    high: Tensor,
    inv_steps: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    half: bool,
    float_minimum: bool,
) -> tuple[Tensor, Tensor]:
    """The stored scale and zero point, or scale and minimum (`float_minimum`), of ranges low..high of any shape.

    inv_steps is 1 / (hi - lo), a Python float; half: the minimum is a number of fp16 too.
    """
    if float_minimum:
        minimum = project_minimum(low, storage, smallest, largest, half)
        return project((high - minimum) * inv_steps, storage, smallest, largest), minimum
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = project((high - low) * inv_steps, storage, smallest, largest)
    return scale, zero_of(low, scale, lo, hi)


def zero_of(low: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    """Integer zero point that maps `low` to the smallest code: clamp(lo - rint(low / scale), lo, hi); 0 for a NaN."""
    zero = lo - torch.round(low * (1.0 / scale))
    return torch.nan_to_num(zero, nan=0.0).clamp(lo, hi)


def absmax_fields(
    w: Tensor,
    groups: int,
    inv_reach: float,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    poison: bool = False,
    buffer: Tensor | None = None,
) -> Tensor:
    """w [R, K] -> stored scales fp32 [R, G]; with `poison` NaN where the group holds a NaN. buffer as in `amax_of`."""
    amax = amax_of(w, groups, buffer)
    return scale_of_amax(amax, inv_reach, storage, smallest, largest, poison)


def minmax_fields(
    w: Tensor,
    groups: int,
    inv_steps: float,
    lo: int,
    hi: int,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    half: bool,
    float_minimum: bool,
    poison: bool = False,
) -> tuple[Tensor, Tensor]:
    """w [R, K] -> stored scales and zero points, or scales and minima, fp32 [R, G]; `poison` as in `absmax_fields`."""
    low, high = range_of(w, groups)
    scale, second = fields_of_range(low, high, inv_steps, lo, hi, storage, smallest, largest, half, float_minimum)
    return torch.where(torch.isnan(high), high, scale) if poison else scale, second
