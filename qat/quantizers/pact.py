"""PACT (Choi et al. 2018, equation 3): the end of an activation's range learns from what it clips, and from that alone.

    s = alpha / qmax,  dalpha = sum of g over the clipped inputs

LSQ's term for the rounding inside the range is left out. The range is searched on the first step's batches and learned
as `qat.quantizers.lsq` has it; where the paper adds a penalty on alpha that pulls it to 0, weight decay here pulls it
to where it started.
"""

from __future__ import annotations

from torch import Tensor

from qat.grids import Gradients
from qat.qtensor import Fields
from qat.quantizers.lsq import Lsq
from qat.specs import QuantSpec


class Pact(Lsq):
    name = "pact"
    percentiles = False
    for_weights = False
    zero_points = ("none",)

    def vjp(
        self,
        spec: QuantSpec,
        grad: Tensor,
        w_RK: Tensor,
        fields: Fields,
        needs: tuple[bool, bool, bool, bool],
        spend: bool = False,
    ) -> Gradients:
        inside, *_ = super().vjp(spec, grad, w_RK, fields, (True, False, False, False))
        assert inside is not None
        clipped = grad - inside
        _, dscale, dzero, dminimum = super().vjp(spec, clipped, w_RK, fields, (False, *needs[1:]))
        return inside if needs[0] else None, dscale, dzero, dminimum
