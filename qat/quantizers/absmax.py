"""Dynamic symmetric scale: absmax of each group, recomputed in every forward; no state.

    s = project(absmax / ((qmax - qmin) / 2))

The gradient of the weight passes unchanged, also where the grid clips (the scale follows the weight, so a clipped
weight is not stuck). For activations the granularity `token` is what W8A8 servers compute at run time.
"""

from __future__ import annotations

from torch import Tensor

from qat.quantizers.base import Fields, Quantizer, absmax_scale


class Absmax(Quantizer):
    name = "absmax"
    identity_gradient = True
    for_activations = True

    def qparams(self, w_RK: Tensor) -> Fields:
        return Fields(self.live_spec.scale_grid.project(absmax_scale(w_RK.detach(), self.live_spec)))
