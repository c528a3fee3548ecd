"""Frozen scale, searched once: the candidate with the least squared error of each group.

Candidates shrink the group's range by 60 factors from 1.0 down to 0.2 of absmax / minmax (`algorithms`: MSE search,
e.g. OMSE, Choukroun et al. 2019), and with minima, or scales of two levels, fields of least squares after that
(`_least_squares`, `_super_blocks`); powers of two: that of OCP MX, its double and its half. Scales that may be negative
are searched for -w too. Where all rows share a scale of scales, that of the largest row and less of it, whichever is
best for all of them. The scale then stays; weights are trained under it with the straight-through gradient inside
the grid and none where it clips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.fake_quant_kernels import mse_search
from qat.fake_quant_kernels.fields import amax_of, range_of
from qat.qtensor import Fields
from qat.quantizers._least_squares import refined
from qat.quantizers._parts import digits, joined, split
from qat.quantizers._ranges import fields_of_range, percentile_range, scales_of_amax
from qat.quantizers._super_blocks import settled
from qat.quantizers.base import Quantizer
from qat.scales import TwoLevel
from qat.specs import QuantSpec

CANDIDATES = 60
SMALLEST_FACTOR = 0.2
# What a scale of scales that all rows share is of the largest scale: less than 3/4 was best in no weight that was tried
# (normal numbers, rows of one size and of sizes that differ as exp(1.2 * normal), 2 to 4 bits).
SHARES = (1.0, 0.9375, 0.875, 0.8125, 0.75)
_AT_ONCE = 1 << 20


@torch.no_grad()
def search(w_RK: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Fields:
    """Fields [R, G] of least squared error for fp32 rows [R, K]; ties go to the widest range. With `spec.percentile`
    those of that range: nothing is searched, and the importance counts for nothing.

    importance: fp32 [K] or [R, K], never negative, by which the squared error of each number counts (1 if None).
    """
    if spec.percentile is not None:
        return fields_of_range(*percentile_range(w_RK, spec), spec)
    if importance is not None:
        importance = importance.expand(w_RK.shape)
    search_one_side = _search_integers if spec.is_int and spec.scale != "e8m0" else _search_levels
    fields, error = search_one_side(w_RK, spec, importance)
    stored = spec.scale_grid
    if isinstance(stored, TwoLevel) and stored.over_rows:
        return _for_all_rows(w_RK, spec, fields, importance)
    if spec.signed_scale:
        mirrored, other = search_one_side(-w_RK, spec, importance)
        fields = Fields(torch.where(other < error, -mirrored.scale, fields.scale))
    super_blocks = spec.is_int and isinstance(stored, TwoLevel)
    return settled(w_RK, spec, [fields], importance) if super_blocks else fields


def _search_levels(w_RK: Tensor, spec: QuantSpec, importance: Tensor | None) -> tuple[Fields, Tensor]:
    """Positive scales of grids for which there is no kernel of candidates, and their squared errors [R, G]."""
    whole = spec.granularity == "tensor"
    rows = w_RK.reshape(1, -1) if whole else w_RK
    groups = 1 if whole else spec.groups(w_RK.shape[1])
    amax = amax_of(rows, groups)
    if spec.scale == "e8m0":
        middle = scales_of_amax(amax, spec).scale
        candidates = [spec.scale_grid.project(middle * factor) for factor in (2.0, 1.0, 0.5)]
    else:
        factors = torch.linspace(1.0, SMALLEST_FACTOR, CANDIDATES).tolist()
        candidates = [scales_of_amax(amax * factor, spec).scale for factor in factors]
    best, least = candidates[0], torch.full_like(amax, torch.inf)
    for scale in candidates:
        fake = spec.grid.fake_quantize(rows, scale, None, None)
        # as the kernel of candidates has it: a pass in fp32 whose order could depend on the machine decides nothing
        errors = (fake.double() - rows.double()).square()
        if importance is not None:
            errors *= importance.reshape(rows.shape)
        error = errors.reshape(*scale.shape, -1).sum(-1).float()
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return Fields(best), least


def _search_integers(w_RK: Tensor, spec: QuantSpec, importance: Tensor | None) -> tuple[Fields, Tensor]:
    """(fields, their squared errors [R, G])."""
    grid, stored = spec.int_grid, spec.scale_grid
    whole = spec.granularity == "tensor"
    kind = ("none", "int", "float").index(spec.zero_point)
    scale, offset, error = mse_search.search(
        w_RK.reshape(1, -1) if whole else w_RK,
        # made on a CPU: another device may round the factors in another way
        torch.linspace(1.0, SMALLEST_FACTOR, CANDIDATES).to(w_RK.device),
        1 if whole else spec.groups(w_RK.shape[1]),
        kind,
        grid.qmin,
        grid.qmax,
        1.0 / (grid.steps if kind else grid.reach),
        stored.dtype,
        stored.smallest,
        stored.largest,
        stored.name == "portable",
        # per tensor all numbers are one row
        importance.reshape(-1) if whole and importance is not None else importance,
    )
    if kind == 2 and isinstance(stored, TwoLevel):
        # stored minima are never positive
        above = offset > 0
        high = range_of(w_RK, spec.groups(w_RK.shape[1]))[1]
        scale, offset = torch.where(above, high * (1.0 / grid.steps), scale), offset.clamp(max=0.0)
    found = Fields(scale, offset if kind == 1 else None, offset if kind == 2 else None)
    if kind == 2 or (kind == 0 and isinstance(stored, TwoLevel)):
        # without the importance as well, which would else now and then end in the lower hollow of the error
        plain = [] if importance is None else [_search_integers(w_RK, spec, None)[0]]
        return refined(w_RK, spec, [found, *plain], importance)
    return found, error


def _for_all_rows(w_RK: Tensor, spec: QuantSpec, wanted: Fields, importance: Tensor | None) -> Fields:
    """Stored scales for those that the groups would like, [R, G]: of every column of groups the scale of scales that
    has the least squared error, and under it of every group the best of three neighbouring codes."""
    stored = spec.scale_grid
    assert isinstance(stored, TwoLevel)
    rows, groups = wanted.scale.shape
    if not w_RK.numel():
        return wanted
    blocks = w_RK.reshape(rows, groups, -1)
    h = None if importance is None else importance.reshape(blocks.shape)
    found = []
    for at in torch.arange(groups).tensor_split(min(groups, max(1, w_RK.numel() // _AT_ONCE))):
        part = slice(int(at[0]), int(at[-1]) + 1)
        w, s0 = blocks[:, part].flatten(1), wanted.scale[:, part]

        def error(scale: Tensor, w: Tensor = w, part: slice = part) -> Tensor:
            squares = (spec.grid.fake_quantize(w, scale, None, None) - w).square_().reshape(*scale.shape, -1)
            return (squares if h is None else squares * h[:, part]).sum(-1, dtype=torch.float64)

        best, least = s0, torch.full((1, s0.shape[1]), torch.inf, dtype=torch.float64, device=w.device)
        for share in SHARES:
            parts = stored.encode(torch.minimum(s0, s0.amax(0, keepdim=True) * share), None)
            scale = stored.decode(parts)[0]
            own = error(scale)
            for near in stored.beside(parts):
                now = error(near)
                scale, own = torch.where(now < own, near, scale), torch.minimum(now, own)
            total = own.sum(0, keepdim=True)
            best, least = torch.where(total < least, scale, best), torch.minimum(total, least)
        found.append(best)
    return Fields(torch.cat(found, 1))


class Stored(Quantizer):
    """A quantizer whose fields start from a search and are kept in buffers that survive casts.

    start_scale [P, R, G], start_zero [1, R, G] and start_minimum [P, R, G] with P = `spec.scale_grid.parts`; order
    [3, K], of `spec.desc_act`, that of `Layout`: no average of models and no cast changes it.
    """

    zero_points: tuple[str, ...] = ("none", "int", "float")
    keeps_fields = True

    def build(self) -> None:
        rows, columns = self.layout.rows_shape
        shape = (1, 1) if self.spec.granularity == "tensor" else (rows, self.spec.groups(columns))
        parts = self.spec.scale_grid.parts
        self.start_scale: Tensor
        self.start_zero: Tensor | None
        self.start_minimum: Tensor | None
        self.order: Tensor | None
        self.register_buffer("start_scale", split(torch.ones(shape), parts))
        self.register_buffer("start_zero", torch.zeros(1, *shape) if self.spec.zero_point == "int" else None)
        self.register_buffer("start_minimum", torch.zeros(parts, *shape) if self.spec.zero_point == "float" else None)
        self.register_buffer("order", digits(torch.arange(columns)) if self.spec.desc_act else None)

    def reset_parameters(self) -> None:
        """Called on modules that were made on the meta device; `init_from` gives the values their meaning."""
        self.start_scale.zero_()[0].fill_(1.0)
        for start in (self.start_zero, self.start_minimum):
            if start is not None:
                start.zero_()
        if self.order is not None:
            self.regroup(torch.arange(self.order.shape[1], device=self.order.device))

    @torch.no_grad()
    def regroup(self, order: Tensor) -> None:
        """Of `spec.desc_act`: group k is of the inputs order[k * size : (k + 1) * size], a permutation int64 [K]; they
        stay sorted within it. The fields are still those of the groups before."""
        assert self.order is not None
        groups = order.reshape(self.spec.groups(order.numel()), -1)
        self.order.copy_(digits(groups.sort(1).values.flatten()))

    @torch.no_grad()
    def init_from(self, w: Tensor, importance: Tensor | None = None) -> None:
        self.store(search(self.layout.to_rows(w).float(), self.spec, importance))

    @torch.no_grad()
    def store(self, found: Fields) -> None:
        """Keep stored fields [R, G]."""
        parts = self.spec.scale_grid.parts
        self.rewritten = True
        self.start_scale.copy_(split(found.scale, parts))
        if found.zero is not None and self.start_zero is not None:
            self.start_zero.copy_(found.zero.unsqueeze(0))
        if found.minimum is not None and self.start_minimum is not None:
            self.start_minimum.copy_(split(found.minimum, parts))

    def start(self) -> Fields:
        """The stored fields; a phase with other bits keeps the range and spreads its own number of steps over it."""
        scale = joined(self.start_scale)
        zero = None if self.start_zero is None else torch.round(joined(self.start_zero))
        minimum = None if self.start_minimum is None else joined(self.start_minimum)
        if self.live_spec is not self.spec:
            own, live = self.spec.int_grid, self.live_spec.int_grid
            scale = scale * (own.steps / live.steps)
            if zero is not None:
                zero = live.qmin + torch.round((zero - own.qmin) * (live.steps / own.steps))
        return Fields(scale, zero, minimum)

    def starts(self) -> tuple[Tensor, ...]:
        scale = joined(self.start_scale)
        return (scale,) if self.start_minimum is None else (scale, joined(self.start_minimum))

    @torch.no_grad()
    def start_from(self, grown: tuple[Tensor, ...]) -> None:
        stored = self.spec.scale_grid
        self.start_scale.copy_(split(stored.project(grown[0], self.spec.signed_scale), stored.parts))
        if self.start_minimum is not None:
            self.start_minimum.copy_(split(stored.project_minimum(grown[1]), stored.parts))

    def start_fields(self) -> Fields:
        scale, zero, minimum = self.start()
        return Fields(self.spec.scale_grid.project(scale, self.spec.signed_scale), zero, minimum)


class Mse(Stored):
    name = "mse"

    def qparams(self, w_RK: Tensor) -> Fields:
        return self.start_fields()
