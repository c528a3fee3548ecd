"""EWGS: element-wise gradient scaling (Lee et al. 2021, equation 5) with LSQ's learned scale.

    dw = g * (1 + DELTA * sign(g) * (v - rint(v))) inside the grid, with v = w / s

A gradient that pushes a weight on towards the code it already left behind counts more, one that pushes it back to the
code it rounds to counts less. The gradient of the scale is LSQ's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.grids import Gradients
from qat.qtensor import Fields
from qat.quantizers._ranges import grouped
from qat.quantizers.lsq import Lsq
from qat.specs import QuantSpec

# of a step; the paper's 1e-3 is a share of the whole range, and its traces of Hessians reach such values
DELTA = 0.2


class Ewgs(Lsq):
    name = "ewgs"
    for_activations = False

    @classmethod
    def reasons(cls, spec: QuantSpec, *, activation: bool = False) -> list[str]:
        found = super().reasons(spec, activation=activation)
        if not found and not spec.is_int:
            found.append(f"quantizer='ewgs' is for integers, not {spec.grid.kind}; use quantizer=lsq")
        return found

    def vjp(
        self,
        spec: QuantSpec,
        grad: Tensor,
        w_RK: Tensor,
        fields: Fields,
        needs: tuple[bool, bool, bool, bool],
        spend: bool = False,
    ) -> Gradients:
        dw, dscale, dzero, dminimum = super().vjp(spec, grad, w_RK, fields, needs)
        if dw is None:
            return None, dscale, dzero, dminimum
        w = w_RK.float()
        # w - w_hat in steps; outside the grid dw is 0 already
        off = grouped(w - spec.grid.fake_quantize(w, *fields), spec) / fields.scale.unsqueeze(-1)
        dw = dw * (1.0 + DELTA * torch.sign(dw) * off.reshape(dw.shape)).to(dw.dtype)
        return dw, dscale, dzero, dminimum
