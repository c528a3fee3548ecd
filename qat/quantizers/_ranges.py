"""Stored fields of rows by a spec: what the quantizers find in numbers, and the ranges that fields stand for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qat.fake_quant_kernels import dynamic, rowwise4
from qat.fake_quant_kernels import fields as ranges
from qat.fake_quant_kernels.pack import HALVES, ROWS
from qat.grids import FloatGrid
from qat.qtensor import Fields
from qat.scales import TwoLevel
from qat.specs import QuantSpec


def _grouping(w_RK: Tensor, spec: QuantSpec) -> tuple[Tensor, int]:
    """(rows, groups in a row); per tensor all numbers are one row."""
    return (w_RK.reshape(1, -1), 1) if spec.granularity == "tensor" else (w_RK, spec.groups(w_RK.shape[1]))


def grouped(w_RK: Tensor, spec: QuantSpec) -> Tensor:
    """Rows [R, K] as [R, G, K / G], or [1, 1, R * K] where one scale serves all."""
    rows, groups = _grouping(w_RK, spec)
    return rows.reshape(rows.shape[0], groups, -1)


def _bounds(spec: QuantSpec) -> tuple[torch.dtype, float, float]:
    storage = spec.scale_grid
    return storage.dtype, storage.smallest, storage.largest


def absmax_fields(w_RK: Tensor, spec: QuantSpec) -> Fields:
    """The scale [R, G] or [1, 1] that spreads the grid over +-absmax of each group."""
    rows, groups = _grouping(w_RK, spec)
    return scales_of_amax(ranges.amax_of(rows, groups), spec)


def scales_of_amax(amax: Tensor, spec: QuantSpec) -> Fields:
    """Stored scales of largest magnitudes of any shape. Powers of two for floats by the rule of OCP MX v1.0, section
    6.3: the exponent of the largest number is that of amax; for other grids the least that clips nothing."""
    if spec.scale == "e8m0":
        floats = isinstance(spec.grid, FloatGrid)
        reach = 2.0 ** math.floor(math.log2(spec.grid.reach)) if floats else spec.grid.reach
        wanted = torch.nan_to_num(amax * (1.0 / reach), nan=spec.scale_grid.largest)
        octave = (wanted.view(torch.int32) & 0x7F800000).view(torch.float32)
        return Fields(spec.scale_grid.project(octave if floats else torch.where(octave < wanted, octave * 2, octave)))
    return Fields(ranges.scale_of_amax(amax, 1.0 / spec.grid.reach, *_bounds(spec)))


def minmax_fields(w_RK: Tensor, spec: QuantSpec) -> Fields:
    """Fields that spread the grid over [min, max]; with an integer zero point the range includes 0."""
    return fields_of_range(*ranges.range_of(*_grouping(w_RK, spec)), spec)


def percentile_range(w_RK: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Ranges low, high [R, G] that hold `spec.percentile` % of each group: of magnitudes without a zero point."""
    return ranges.percentiles_of(*_grouping(w_RK, spec), (spec.percentile or 100.0) / 100.0, spec.zero_point == "none")


def fields_of_range(low: Tensor, high: Tensor, spec: QuantSpec) -> Fields:
    """Stored fields [R, G] for ranges low..high [R, G]."""
    if spec.zero_point == "none":
        return scales_of_amax(torch.maximum(-low, high), spec)
    grid = spec.int_grid
    half, real = spec.scale_grid.name == "portable", spec.zero_point == "float"
    if isinstance(spec.scale_grid, TwoLevel):
        # stored minima are never positive
        low = low.clamp(max=0.0)
    found = ranges.fields_of_range(low, high, 1.0 / grid.steps, grid.qmin, grid.qmax, *_bounds(spec), half, real)
    return _asymmetric(*found, spec)


def fused_absmax(w_RK: Tensor, spec: QuantSpec, form: str) -> tuple[Tensor, Fields] | None:
    """`Quantizer.fused` with `absmax_fields`."""
    if spec.granularity == "tensor" or not spec.is_int or spec.scale == "e8m0" or isinstance(spec.scale_grid, TwoLevel):
        return None
    grid, groups = spec.int_grid, spec.groups(w_RK.shape[1])
    how = groups, 1.0 / grid.reach, grid.qmin, grid.qmax, *_bounds(spec)
    if form == ROWS:
        codes, scale = rowwise4.absmax(w_RK, *how)
    else:
        codes, scale = dynamic.absmax(w_RK, *how, grid.signed, form == HALVES, poison=True)
    return codes, Fields(scale)


def fused_minmax(w_RK: Tensor, spec: QuantSpec, form: str) -> tuple[Tensor, Fields] | None:
    """`Quantizer.fused` with `minmax_fields`."""
    if spec.granularity == "tensor" or isinstance(spec.scale_grid, TwoLevel):
        return None
    grid, groups = spec.int_grid, spec.groups(w_RK.shape[1])
    half, real, packed = spec.scale_grid.name == "portable", spec.zero_point == "float", form == HALVES
    codes, scale, second = dynamic.minmax(
        w_RK, groups, 1.0 / grid.steps, grid.qmin, grid.qmax, *_bounds(spec), half, real, packed, poison=True
    )
    return codes, _asymmetric(scale, second, spec)


def _asymmetric(scale: Tensor, second: Tensor, spec: QuantSpec) -> Fields:
    return Fields(scale, None, second) if spec.zero_point == "float" else Fields(scale, second)


def range_of_fields(fields: Fields, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The ranges low, high [R, G] from which `fields_of_range` makes these fields."""
    if fields.minimum is not None:
        return fields.minimum, fields.minimum + fields.scale * spec.int_grid.steps
    if fields.zero is not None:
        grid = spec.int_grid
        return (grid.qmin - fields.zero) * fields.scale, (grid.qmax - fields.zero) * fields.scale
    reach = fields.scale * spec.grid.reach
    return -reach, reach
