"""Frozen scale, searched once: the candidate with the least squared error of each group.

Candidates shrink the group's range by 60 factors from 1.0 down to 0.2 of absmax / minmax (`algorithms`: MSE search,
e.g. OMSE, Choukroun et al. 2019). The scale then stays; weights are trained under it with the straight-through
gradient inside the grid and none where it clips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.fake_quant_kernels.affine import decode, encode
from qat.qtensor import Fields
from qat.quantizers.base import Quantizer, fields_of_range, grouped, joined, split
from qat.specs import QuantSpec

CANDIDATES = 60
SMALLEST_FACTOR = 0.2


@torch.no_grad()
def search(w_RK: Tensor, spec: QuantSpec) -> Fields:
    """Fields [R, G] of least squared error for fp32 rows [R, K]; ties go to the widest range."""
    blocks = grouped(w_RK, spec)
    empty = blocks.shape[-1] == 0 or blocks.numel() == 0
    low = blocks.new_zeros(blocks.shape[:-1]) if empty else blocks.amin(-1)
    high = blocks.new_zeros(blocks.shape[:-1]) if empty else blocks.amax(-1)
    best = fields_of_range(low, high, spec)
    if empty:
        return best
    least = torch.full_like(best.scale, torch.inf)
    for factor in torch.linspace(1.0, SMALLEST_FACTOR, CANDIDATES).tolist():
        found = fields_of_range(low * factor, high * factor, spec)
        codes = encode(w_RK, *found, spec.grid.qmin, spec.grid.qmax)
        error = grouped((decode(codes, *found) - w_RK).square(), spec).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = Fields(
            torch.where(better, found.scale, best.scale),
            None if best.zero is None or found.zero is None else torch.where(better, found.zero, best.zero),
            None if best.minimum is None or found.minimum is None else torch.where(better, found.minimum, best.minimum),
        )
    return best


class Stored(Quantizer):
    """A quantizer whose fields start from a search and are kept in buffers that survive casts.

    start_scale [P, R, G], start_zero [1, R, G] and start_minimum [P, R, G] with P = `spec.scale_grid.parts`.
    """

    zero_points = ("none", "int", "float")

    def build(self) -> None:
        rows, columns = self.layout.rows_shape
        shape = (1, 1) if self.spec.granularity == "tensor" else (rows, self.spec.groups(columns))
        parts = self.spec.scale_grid.parts
        self.start_scale: Tensor
        self.start_zero: Tensor | None
        self.start_minimum: Tensor | None
        self.register_buffer("start_scale", split(torch.ones(shape), parts))
        self.register_buffer("start_zero", torch.zeros(1, *shape) if self.spec.zero_point == "int" else None)
        self.register_buffer("start_minimum", torch.zeros(parts, *shape) if self.spec.zero_point == "float" else None)

    def reset_parameters(self) -> None:
        """Called on modules that were made on the meta device; `init_from` gives the values their meaning."""
        self.start_scale.zero_()[0].fill_(1.0)
        for start in (self.start_zero, self.start_minimum):
            if start is not None:
                start.zero_()

    @torch.no_grad()
    def init_from(self, w: Tensor) -> None:
        found = search(self.layout.to_rows(w).float(), self.spec)
        self.store(found)

    @torch.no_grad()
    def store(self, found: Fields) -> None:
        """Keep stored fields [R, G]."""
        parts = self.spec.scale_grid.parts
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
            own, live = self.spec.grid, self.live_spec.grid
            scale = scale * (own.steps / live.steps)
            if zero is not None:
                zero = live.qmin + torch.round((zero - own.qmin) * (live.steps / own.steps))
        return Fields(scale, zero, minimum)


class Mse(Stored):
    name = "mse"

    def qparams(self, w_RK: Tensor) -> Fields:
        scale, zero, minimum = self.start()
        return Fields(self.spec.scale_grid.project(scale), zero, minimum)
