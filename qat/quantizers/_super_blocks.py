"""Scales of super-blocks: the stored fields of least squared error, once each group has said what it would like.

A group's own best scale and minimum (`_least_squares`) are rounded to codes times what a super-block shares, and that
moves its numbers. Here the error is that of the stored fields, and what does not lower it is undone by super-block:

    shared    for codes q, stored scales s and minima m: a and b of least squares of  sum h (w - a s q - b m)^2
    groups    under what is shared, groups are independent: each takes the codes of its scale and minimum, among those
              it has and their neighbours, with the least error
    starts    the groups' wishes, with the largest scale, which decides what is shared, `STARTS` times as large

ggml's k-quants fit what is shared too (make_qp_quants), to the wishes, and not to the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from qat.qtensor import Fields
from qat.scales import TwoLevel
from qat.specs import QuantSpec

ROUNDS = 3
STARTS = (1.0, 0.94, 0.97, 1.03)
_AT_ONCE = 1 << 20


def settled(w_RK: Tensor, spec: QuantSpec, wishes: Sequence[Fields], importance: Tensor | None) -> Fields:
    """Fields [R, G] (of any sign) of integers whose squared error, stored, is in no super-block above that of any of
    `wishes`.

    w_RK fp32 [R, K]; importance fp32 [R, K], never negative, or None.
    """
    rows = w_RK.shape[0]
    if not w_RK.numel():
        return wishes[0]
    pieces = max(1, w_RK.numel() // _AT_ONCE)
    parts = []
    for at in torch.arange(rows).tensor_split(min(pieces, rows)):
        one = slice(int(at[0]), int(at[-1]) + 1)
        h = None if importance is None else importance[one]
        fields = [Fields(f.scale[one], None, None if f.minimum is None else f.minimum[one]) for f in wishes]
        parts.append(_settled(w_RK[one], spec, fields, h))
    scale, minimum = zip(*parts, strict=True)
    return Fields(torch.cat(scale), None, None if wishes[0].minimum is None else torch.cat(minimum))


def _settled(w_RK: Tensor, spec: QuantSpec, wishes: list[Fields], importance: Tensor | None) -> tuple[Tensor, Tensor]:
    x = w_RK.reshape(w_RK.shape[0], spec.groups(w_RK.shape[1]), -1)
    h = torch.ones_like(x) if importance is None else importance.reshape(x.shape)
    grid, stored, has_minimum = spec.int_grid, spec.scale_grid, wishes[0].minimum is not None
    assert isinstance(stored, TwoLevel)
    subs = stored.run // x.shape[-1]

    def hold(s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        scale, low = stored.stored(s, m if has_minimum else None)
        return scale, m if low is None else low

    def codes(s: Tensor, m: Tensor) -> Tensor:
        return ((x - m.unsqueeze(-1)) * (1.0 / s).unsqueeze(-1)).clamp_(grid.qmin, grid.qmax).round_()

    def error(s: Tensor, m: Tensor) -> Tensor:
        off = codes(s, m).mul_(s.unsqueeze(-1)).add_(m.unsqueeze(-1)).sub_(x)
        return off.square_().mul_(h).sum(-1, dtype=torch.float64)

    def shared(t_RG: Tensor) -> Tensor:
        """Sums of super-blocks, for each of their groups."""
        blocks = t_RG.reshape(t_RG.shape[0], -1, subs)
        return blocks.sum(-1, keepdim=True).expand(blocks.shape).reshape(t_RG.shape)

    def largest(t_RG: Tensor) -> Tensor:
        blocks = t_RG.abs().reshape(t_RG.shape[0], -1, subs)
        return blocks.amax(-1, keepdim=True).expand(blocks.shape).reshape(t_RG.shape)

    def nearby(s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Of stored fields, those of the codes beside them where that lowers a group's error."""
        most, deepest = largest(s), largest(m)
        step, deep = most * (1.0 / stored.top), deepest * (1.0 / stored.top)
        best_s, best_m, least = s, m, error(s, m)
        for up, down in product((-1, 0, 1), (-1, 0, 1) if has_minimum else (0,)):
            # the largest stays, and with it what is shared
            size = torch.where(s.abs() < most, (s.abs() + up * step).clamp(step, most), most)
            low = torch.where(-m < deepest, (m + down * deep).clamp(-deepest, torch.zeros_like(m)), m)
            size = torch.copysign(size, s)
            now = error(size, low)
            better = now < least
            best_s, best_m = torch.where(better, size, best_s), torch.where(better, low, best_m)
            least = torch.where(better, now, least)
        return best_s, best_m

    def refitted(s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """With what is shared by least squares, under the codes of stored fields."""
        scaled = codes(s, m) * s.unsqueeze(-1)
        hp = h * scaled
        pp, px = (shared(_sum(hp * other)) for other in (scaled, x))
        a, b = px / pp, torch.ones_like(px)
        if has_minimum:
            pm, mm, mx = shared(_sum(hp) * m), shared(_sum(h) * m.double().square()), shared(_sum(h * x) * m)
            det = pp * mm - pm.square()
            a = torch.where(det > 0, (px * mm - mx * pm) / det, (px - pm) / pp)
            b = torch.where(det > 0, (mx * pp - px * pm) / det, b)
        good = torch.isfinite(a) & torch.isfinite(b) & (a > 0) & (b >= 0)
        return torch.where(good, a * s, s).float(), torch.where(good, b * m, m).float()

    # kept as wishes: stored fields would now and then, where d is denormal, be stored as others
    best_s, best_m = wishes[0].scale, _minimum(wishes[0])
    least = shared(error(*hold(best_s, best_m)))

    def keep(s: Tensor, m: Tensor) -> None:
        nonlocal best_s, best_m, least
        now = shared(error(*hold(s, m)))
        better = now < least
        best_s, best_m = torch.where(better, s, best_s), torch.where(better, m, best_m)
        least = torch.where(better, now, least)

    for wish in wishes[1:]:
        keep(wish.scale, _minimum(wish))
    s, m = best_s, best_m
    most = largest(s)
    for factor in STARTS:
        size = torch.where(s.abs() < most, torch.minimum(s.abs(), most * factor), most * factor)
        near = nearby(*hold(torch.copysign(size, s), m))
        keep(*near)
        keep(*refitted(*hold(*near)))
    for _ in range(ROUNDS):
        keep(*nearby(*hold(best_s, best_m)))
        keep(*refitted(*hold(best_s, best_m)))
    return best_s, best_m


def _minimum(fields: Fields) -> Tensor:
    return torch.zeros_like(fields.scale) if fields.minimum is None else fields.minimum


def _sum(t: Tensor) -> Tensor:
    # in double: the order in which a device adds up shows no more
    return t.sum(-1, dtype=torch.float64)
