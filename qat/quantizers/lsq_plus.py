"""LSQ+ (Bhalgat et al. 2020): scale and offset are learned.

    zero point int     z = clamp(rint(z0 + k * phi), qmin, qmax)      the integer that is exported, also in training
    zero point float   m = project(m0 + k * phi * s0)

phi starts at 0 and moves the offset by about k * lr steps of the grid per optimizer step under Adam. Its gradient
(equation 5) is that of the clipped numbers: inside the range the offset moves nothing but the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.qtensor import Fields
from qat.quantizers.lsq import RATE, Lsq


class LsqPlus(Lsq):
    name = "lsq_plus"
    percentiles = False
    zero_points = ("int", "float")

    def build(self) -> None:
        super().build()
        self.phi = nn.Parameter(torch.zeros_like(self.theta))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.phi)

    def init_from(self, w: Tensor, importance: Tensor | None = None) -> None:
        super().init_from(w, importance)
        with torch.no_grad():
            self.phi.zero_()

    def learned(self) -> tuple[nn.Parameter, ...]:
        return self.theta, self.phi

    def differentiable(self, fields: Fields) -> Fields | None:
        return None

    def qparams(self, w_RK: Tensor) -> Fields:
        fields = super().qparams(w_RK)
        return fields if self.frozen else self._moved(fields)

    def _moved(self, fields: Fields) -> Fields:
        """With the offset where phi has brought it."""
        scale, zero, minimum = fields
        steps, grid = RATE * self.phi.float(), self.live_spec.int_grid
        if zero is not None:
            latent = (zero + steps).clamp(grid.qmin, grid.qmax)
            zero = latent + (torch.round(latent) - latent).detach()
        if minimum is not None:
            minimum = self.spec.scale_grid.project_minimum(minimum + steps * scale.detach())
        return Fields(scale, zero, minimum)

    @torch.no_grad()
    def freeze(self) -> None:
        before = self.start()
        super().freeze()
        self.store(self._moved(before._replace(scale=self.start().scale)))
