"""Dynamic ternary scale of BitNet b1.58 (Ma et al. 2024, equations 1-3): the mean magnitude of each group.

    s = project(mean |w|),  w_hat = s * rint(clamp(w / s, -1, 1))

BitNet has one scale for a tensor (granularity tensor). The gradient of the weight passes unchanged. Made for training
from scratch or nearly so: where a float model is there, a searched and learned scale (`lsq`) starts much closer to it.
"""

from __future__ import annotations

from torch import Tensor

from qat.qtensor import Fields
from qat.quantizers._ranges import grouped
from qat.quantizers.base import Quantizer
from qat.specs import QuantSpec


class Absmean(Quantizer):
    name = "absmean"
    identity_gradient = True

    @classmethod
    def reasons(cls, spec: QuantSpec, *, activation: bool = False) -> list[str]:
        found = super().reasons(spec, activation=activation)
        if spec.kind != "ternary":
            found.append(f"quantizer='absmean' is for ternary codes, not kind={spec.kind!r}")
        if spec.signed_scale:
            found.append("quantizer='absmean' finds positive scales; use quantizer=mse or lsq with signed_scale=true")
        return found

    def qparams(self, w_RK: Tensor) -> Fields:
        # in double: the order in which a device adds up shows no more
        mean = grouped(w_RK.detach(), self.live_spec).double().abs().mean(-1).float()
        return Fields(self.live_spec.scale_grid.project(mean))
