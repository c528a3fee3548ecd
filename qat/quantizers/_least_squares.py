"""Scales, and minima, of least squares: what is left to gain once a search by candidates has found the codes.

Under codes q and weights h of the squared errors, a group's error is quadratic in its scale and minimum:

    sum h (w - q s - m)^2  is least for   s = (H Hqw - Hq Hw) / (H Hqq - Hq^2),   m = (Hw - Hq s) / H
    without a minimum                     s = Hqw / Hqq

with sums H = sum h, Hq = sum h q and so on. New fields give new codes: `ROUNDS` rounds of both. With a minimum, fields
are fitted under the codes of `STARTS` other ranges first, which is what ggml's search for its k-quants does
(make_qkx3_quants), since one start ends in the next hollow of the error. Fields are on the grid of scales throughout,
and what does not lower the error is undone, so that the result is never worse than what was given. Of two levels this
is what a group would like, before its scale is stored: `_super_blocks` goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.qtensor import Fields
from qat.scales import TwoLevel
from qat.specs import QuantSpec

ROUNDS = 4
# how much more than the codes' steps a range is cut into
STARTS = tuple(-0.9 + 0.2 * step for step in range(20))
_AT_ONCE = 1 << 20


def refined(w_RK: Tensor, spec: QuantSpec, found: Sequence[Fields], importance: Tensor | None) -> tuple[Fields, Tensor]:
    """Fields [R, G] or [1, 1] of integers without zero points, positive scales -> fields and their squared errors, not
    larger than those of any in `found`.

    w_RK fp32 [R, K]; importance fp32 [R, K], never negative, or None.
    """
    if spec.granularity == "tensor":
        w_RK = w_RK.reshape(1, -1)
        importance = None if importance is None else importance.reshape(1, -1)
    rows = w_RK.shape[0]
    if not w_RK.numel():
        return found[0], torch.zeros_like(found[0].scale)
    pieces = max(1, w_RK.numel() // _AT_ONCE)
    parts = []
    for at in torch.arange(rows).tensor_split(min(pieces, rows)):
        one = slice(int(at[0]), int(at[-1]) + 1)
        h = None if importance is None else importance[one]
        fields = [Fields(f.scale[one], None, None if f.minimum is None else f.minimum[one]) for f in found]
        parts.append(_refined(w_RK[one], spec, fields, h))
    scale, low, error = (torch.cat(field) for field in zip(*parts, strict=True))
    return Fields(scale, None, None if found[0].minimum is None else low), error


def _refined(
    w_RK: Tensor, spec: QuantSpec, found: list[Fields], importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    x = w_RK.reshape(w_RK.shape[0], spec.groups(w_RK.shape[1]), -1)
    h = torch.ones_like(x) if importance is None else importance.reshape(x.shape)
    grid, stored, has_minimum = spec.int_grid, spec.scale_grid, found[0].minimum is not None
    never_above = isinstance(stored, TwoLevel)  # stored minima are never positive
    total, total_w = _sum(h), _sum(h * x)

    def codes(s: Tensor, m: Tensor) -> Tensor:
        return ((x - m.unsqueeze(-1)) * (1.0 / s).unsqueeze(-1)).clamp_(grid.qmin, grid.qmax).round_()

    def error(q: Tensor, s: Tensor, m: Tensor) -> Tensor:
        return _sum((q * s.unsqueeze(-1)).add_(m.unsqueeze(-1)).sub_(x).square_().mul_(h))

    def fitted(q: Tensor, s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Fields of least squares under q; s and m where there are none."""
        hq = h * q
        squares, products = _sum(hq * q), _sum(hq * x)
        alone = products / squares
        low = torch.zeros_like(alone)
        if has_minimum:
            sum_q = _sum(hq)
            both = (total * products - sum_q * total_w) / (total * squares - sum_q.square())
            low = (total_w - both * sum_q) / total
            alone = torch.where((low > 0) & never_above, alone, both)
            low = low.clamp(max=0.0) if never_above else low
        good = torch.isfinite(alone) & (alone > 0) & torch.isfinite(low)
        low = stored.project_minimum(torch.where(good, low.float(), m)) if has_minimum else m
        return stored.project(torch.where(good, alone.float(), s)), low

    pairs = [(f.scale, torch.zeros_like(f.scale) if f.minimum is None else f.minimum) for f in found]
    best_s, best_m = pairs[0]
    least = error(codes(best_s, best_m), best_s, best_m)

    def keep(s: Tensor, m: Tensor) -> None:
        nonlocal best_s, best_m, least
        now = error(codes(s, m), s, m)
        better = now < least
        best_s, best_m = torch.where(better, s, best_s), torch.where(better, m, best_m)
        least = torch.where(better, now, least)

    for s, m in pairs[1:]:
        keep(s, m)
    if has_minimum:
        low, high = x.amin(-1), x.amax(-1)
        low = low.clamp(max=0.0) if never_above else low
        for more in STARTS:
            s = stored.project((high - low) * (1.0 / (grid.steps + more)))
            keep(*fitted(codes(s, low), s, low))
    for _ in range(ROUNDS):
        keep(*fitted(codes(best_s, best_m), best_s, best_m))
    return best_s, best_m, least.float()


def _sum(t: Tensor) -> Tensor:
    # in double: the order in which a device adds up shows no more
    return t.sum(-1, dtype=torch.float64)
