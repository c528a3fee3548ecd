"""Dynamic symmetric scale: absmax of each group, recomputed in every forward; no state.

    s = project(absmax / ((qmax - qmin) / 2))

The gradient of the weight passes unchanged, also where the grid clips (the scale follows the weight, so a clipped
weight is not stuck). For activations the granularity `token` is what W8A8 servers compute at run time.
"""

from __future__ import annotations

from torch import Tensor

from qat.qtensor import Fields
from qat.quantizers._ranges import absmax_fields, fused_absmax
from qat.quantizers.base import Quantizer
from qat.specs import QuantSpec


class Absmax(Quantizer):
    name = "absmax"
    identity_gradient = True
    for_activations = True

    @classmethod
    def reasons(cls, spec: QuantSpec, *, activation: bool = False) -> list[str]:
        found = super().reasons(spec, activation=activation)
        if spec.kind == "int" and spec.bits == 1 and spec.signed:
            # absmax / 0.5 puts the largest weight half a step from 0, and half rounds to even
            found.append(
                "a signed 1-bit grid has the codes -1 and 0, and absmax maps all to 0; use quantizer=mse or lsq"
            )
        if spec.kind == "binary":
            found.append("absmax puts both levels of a binary grid at the largest weight; use quantizer=mse or lsq")
        if spec.signed_scale:
            found.append("quantizer='absmax' finds positive scales; use quantizer=mse or lsq with signed_scale=true")
        return found

    def qparams(self, w_RK: Tensor) -> Fields:
        return absmax_fields(w_RK.detach(), self.live_spec)

    def fused(self, w_RK: Tensor, spec: QuantSpec, form: str) -> tuple[Tensor, Fields] | None:
        return fused_absmax(w_RK, spec, form)
