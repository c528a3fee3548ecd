"""Static activation range: an exponential moving average of each optimizer step's minimum and maximum, or of the range
that holds `spec.percentile` % of the numbers.

Forward only raises a scratch range (idempotent, so a recomputed forward changes nothing); `commit`, once per optimizer
step and after the ranks have agreed on the scratch, moves the average by MOMENTUM. Until something was seen, a forward
uses the range of its own input. Gradient: none where the grid clips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.qtensor import Fields
from qat.quantizers._parts import joined, split
from qat.quantizers._ranges import fields_of_range, percentile_range
from qat.quantizers.base import Quantizer

# Jacob et al. 2018 smooth over thousands of steps; 0.1 follows fine-tuning runs of hundreds of steps.
MOMENTUM = 0.1
_PARTS = 3


class Ema(Quantizer):
    name = "ema"
    for_weights = False
    for_activations = True
    static_activations = True
    percentiles = True
    zero_points: tuple[str, ...] = ("none", "int", "float")

    def build(self) -> None:
        self.range: Tensor
        self.seen: Tensor
        self.scratch: Tensor
        # [parts, 2]: (-low, high), so that the maximum is what ranks and micro-batches agree on
        self.register_buffer("range", torch.zeros(_PARTS, 2))
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("scratch", torch.full((2,), -torch.inf), persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Called on modules that were made on the meta device."""
        self.range.zero_()
        self.seen.zero_()
        self.forget()

    def qparams(self, w_RK: Tensor) -> Fields:
        now = self._range_of(w_RK)
        low, high = torch.where(self.seen.float() > 0, joined(self.range), now).unbind(0)
        return fields_of_range(-low.reshape(1, 1), high.reshape(1, 1), self.live_spec)

    @torch.no_grad()
    def _range_of(self, x_TI: Tensor) -> Tensor:
        if not x_TI.numel():
            return x_TI.new_zeros(2, dtype=torch.float32)
        if self.spec.percentile is None:
            low, high = x_TI.float().aminmax()
        else:
            low, high = percentile_range(x_TI, self.spec)
        return torch.stack([-low, high]).reshape(2)

    @torch.no_grad()
    def observe(self, x_TI: Tensor) -> None:
        if not self.frozen:
            self.scratch.copy_(torch.maximum(self.scratch, self._range_of(x_TI).to(self.scratch.dtype)))

    @torch.no_grad()
    def commit(self) -> None:
        fresh = self.scratch.float()
        ready = torch.isfinite(fresh).all()
        old = joined(self.range)
        moved = torch.where(self.seen.float() > 0, old + MOMENTUM * (fresh - old), fresh)
        self.range.copy_(split(torch.where(ready, moved, old), _PARTS))
        self.seen.copy_(torch.where(ready, torch.ones_like(self.seen), self.seen))
        self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        self.scratch.fill_(-torch.inf)
