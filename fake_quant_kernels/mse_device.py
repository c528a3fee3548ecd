"""Device functions of `mse_search`: the fields of a candidate, and its squared error over groups in registers."""

from __future__ import annotations

from typing import Any

from qat.fake_quant_kernels.device import project, rint, stored
from qat.fake_quant_kernels.dispatch import Device, tl


@Device
def product(x: Any, lowest: Any) -> Any:
    """A product as it is (-inf as `lowest`). An addition may follow, and the two stay two instructions.

    Assemblers of 2025 (that of Triton 3.6 for sm_100) fuse multiplications and additions of pairs of fp32 numbers even
    where the code says that each rounds. A maximum between them, with a number known only at run time, keeps them so.
    """
    return tl.maximum(x, lowest, propagate_nan=tl.PropagateNan.ALL)


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
    lowest: Any,
    KIND: tl.constexpr,
    STORAGE: tl.constexpr,
    HALF: tl.constexpr,
) -> Any:
    """Scale and zero point or minimum (kind 0: the scale again) of ranges: `mse_search._fields`."""
    if KIND == 2:
        offset = stored_minimum(low, STORAGE, smallest, largest, HALF)
        scale = project((product(high, lowest) - offset) * inv_reach, STORAGE, smallest, largest)
    elif KIND == 1:
        # a comparison with NaN is false: NaN stays
        low, high = tl.where(low > 0.0, 0.0, low), tl.where(high < 0.0, 0.0, high)
        scale = project((high - low) * inv_reach, STORAGE, smallest, largest)
        offset = lo - rint(product(low * tl.math.div_rn(1.0, scale), lowest))
        offset = tl.where(offset != offset, 0.0, offset)
        offset = tl.minimum(tl.maximum(offset, lo), hi)
    else:
        scale = project(tl.maximum(tl.abs(low), tl.abs(high)) * inv_reach, STORAGE, smallest, largest)
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
    lowest: Any,
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
        value = rint(tl.minimum(tl.maximum((w - offset) * inverse, lo), hi))
    elif KIND == 1:
        value = rint(tl.minimum(tl.maximum(w * inverse, lo - offset), hi - offset))
    else:
        value = rint(tl.minimum(tl.maximum(w * inverse, lo), hi))
    value = product(value * scale, lowest)
    if KIND == 2:
        value = value + offset
    value = value - w
    value = value * value
    if WEIGHTED:
        value = value * h
    value = product(value, lowest)
    if not EVEN:
        value = tl.where(inside, value, 0.0)
    for level in tl.static_range(LEVELS):
        value = tl.sum(tl.reshape(value, (GROUPS, BLOCK >> (level + 1), 2)), axis=2)
    return value
