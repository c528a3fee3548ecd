"""Device functions of `mse_search`: the fields of a candidate, and its squared error over groups in registers."""

from __future__ import annotations

from typing import Any

from qat.fake_quant_kernels.device import project, rint, stored
from qat.fake_quant_kernels.dispatch import Device, tl


@Device
def stored_minimum(low: Any, STORAGE: tl.constexpr, smallest: Any, largest: Any, HALF: tl.constexpr) -> Any:
    """`storage.project_minimum`."""
    low = tl.where(low != low, 0.0, tl.minimum(tl.maximum(low, -largest), largest))
    low = stored(low, STORAGE)
    if HALF:
        low = low.to(tl.float16).to(tl.float32)
    elif STORAGE == 0:
        low = tl.where(tl.abs(low) < smallest, 0.0, low)
    return low


@Device
def candidate(
    low: Any,
    high: Any,
    lo: Any,
    hi: Any,
    inv_reach: Any,
    smallest: Any,
    largest: Any,
    KIND: tl.constexpr,
    STORAGE: tl.constexpr,
    HALF: tl.constexpr,
) -> Any:
    """Scale and zero point or minimum (kind 0: the scale again) of ranges: `mse_search._fields`."""
    if KIND == 2:
        offset = stored_minimum(low, STORAGE, smallest, largest, HALF)
        scale = project((high - offset) * inv_reach, STORAGE, smallest, largest)
    elif KIND == 1:
        # a comparison with NaN is false: NaN stays
        low, high = tl.where(low > 0.0, 0.0, low), tl.where(high < 0.0, 0.0, high)
        scale = project((high - low) * inv_reach, STORAGE, smallest, largest)
        offset = lo - rint(low * tl.math.div_rn(1.0, scale))
        offset = tl.where(offset != offset, 0.0, offset)
        offset = tl.minimum(tl.maximum(offset, lo), hi)
    else:
        scale = project(tl.maximum(-low, high) * inv_reach, STORAGE, smallest, largest)
        offset = scale
    return scale, offset


@Device
def squared_error(
    w: Any,
    h: Any,
    inside: Any,
    scale: Any,
    offset: Any,
    lo: Any,
    hi: Any,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN: tl.constexpr,
) -> Any:
    """Sums [GROUPS, 1] of the squared errors of w [GROUPS, BLOCK] under fields [GROUPS, 1]: `mse_search._errors`."""
    inverse = tl.math.div_rn(1.0, scale)
    if KIND == 2:
        value = rint(tl.minimum(tl.maximum((w - offset) * inverse, lo), hi)) * scale + offset
    elif KIND == 1:
        value = rint(tl.minimum(tl.maximum(w * inverse, lo - offset), hi - offset)) * scale
    else:
        value = rint(tl.minimum(tl.maximum(w * inverse, lo), hi)) * scale
    value = value - w
    value = value * value
    if WEIGHTED:
        value = value * h
    if not EVEN:
        value = tl.where(inside, value, 0.0)
    for level in tl.static_range(LEVELS):
        value = tl.sum(tl.reshape(value, (GROUPS, BLOCK >> (level + 1), 2)), axis=2)
    return value
