"""NVFP4 of inputs: scales of blocks from each input, the tensor's scale from an average (compressed-tensors: `local`).

    s = f * T or f / T,  f = e4m3(amax of the block / 6, in units of T)        `fake_quant_kernels.nvfp4`

T is that of the largest magnitude that `ema` averages over optimizer steps, so that a token's codes do not depend on
the others of its batch, and a server needs no pass over the whole tensor. A block beyond it has f = 448. The gradient
passes unchanged: the blocks' scales follow the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.qtensor import Fields
from qat.quantizers._parts import joined
from qat.quantizers._ranges import absmax_fields
from qat.quantizers.ema import Ema
from qat.scales import TwoLevel
from qat.specs import QuantSpec


class Local(Ema):
    name = "local"
    identity_gradient = True
    local_activations = True
    percentiles = False
    zero_points: tuple[str, ...] = ("none",)

    @classmethod
    def reasons(cls, spec: QuantSpec, *, activation: bool = False) -> list[str]:
        found = super().reasons(spec, activation=activation)
        if not (isinstance(spec.scale_grid, TwoLevel) and spec.scale_grid.local):
            found.append(f"quantizer='local' is for scale=nvfp4 and its kin, not {spec.scale!r}; use absmax")
        return found

    def qparams(self, w_RK: Tensor) -> Fields:
        return absmax_fields(w_RK.detach(), self.live_spec)

    @torch.no_grad()
    def largest(self, scale: Tensor) -> Tensor:
        own = scale.amax().reshape(1) if scale.numel() else scale.new_zeros(1)
        return torch.where(self.seen.float() > 0, self._averaged(), own)

    def _averaged(self) -> Tensor:
        return joined(self.range).amax().reshape(1) * (1.0 / self.spec.grid.reach)

    @torch.no_grad()
    def kept(self) -> Fields:
        """The largest scale, [1, 1]."""
        return Fields(self._averaged().reshape(1, 1))
