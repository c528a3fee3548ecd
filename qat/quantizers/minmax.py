"""Dynamic asymmetric range: minimum and maximum of each group, recomputed in every forward; no state.

    zero point int     s = project((max(w, 0) - min(w, 0)) / (qmax - qmin)),  z = clamp(qmin - rint(min / s))
    zero point float   m = project(min(w)),  s = project((max(w) - m) / (qmax - qmin))

The gradient of the weight passes unchanged.
"""

from __future__ import annotations

from torch import Tensor

from qat.qtensor import Fields
from qat.quantizers._ranges import fused_minmax, minmax_fields
from qat.quantizers.base import Quantizer
from qat.specs import QuantSpec


class Minmax(Quantizer):
    name = "minmax"
    identity_gradient = True
    for_activations = True
    zero_points = ("int", "float")

    def qparams(self, w_RK: Tensor) -> Fields:
        return minmax_fields(w_RK.detach(), self.live_spec)

    def fused(self, w_RK: Tensor, spec: QuantSpec, form: str) -> tuple[Tensor, Fields] | None:
        return fused_minmax(w_RK, spec, form)
