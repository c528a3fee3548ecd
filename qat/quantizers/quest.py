"""QuEST (Panferov et al. 2025): a scale fitted to the root mean square, and gradients that are trusted near the grid.

    s = project(2 c rms(w) / steps)        c: the clip of least squared error of 2^b levels for a normal distribution
    dw = g * (|w_hat - w| <= half a step)  the trust mask, with T = half a step

The mask reaches half a step beyond the outermost codes, where the clip of the other quantizers ends at these codes: a
weight that still rounds to them goes on learning, one that is farther away is left alone. No state, nothing learned.
The paper rounds after a Hadamard transform, which makes weights normal; here the rows are taken as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qat.grids import Gradients
from qat.qtensor import Fields
from qat.quantizers._ranges import grouped
from qat.quantizers.base import Quantizer
from qat.specs import QuantSpec

# levels -> c; between them along the logarithm
_CLIPS = {
    2: 0.79788,
    3: 1.22401,
    4: 1.49353,
    8: 2.05107,
    16: 2.51393,
    32: 2.91609,
    64: 3.27660,
    128: 3.60105,
    256: 3.88494,
}
# rounding of the difference itself
_SLACK = 1.0 + 2.0**-18


def clip_of(levels: int) -> float:
    """c for 2..256 levels."""
    below, above = max(n for n in _CLIPS if n <= levels), min(n for n in _CLIPS if n >= levels)
    if below == above:
        return _CLIPS[below]
    share = math.log(levels / below) / math.log(above / below)
    return _CLIPS[below] + share * (_CLIPS[above] - _CLIPS[below])


class Quest(Quantizer):
    name = "quest"

    @classmethod
    def reasons(cls, spec: QuantSpec, *, activation: bool = False) -> list[str]:
        found = super().reasons(spec, activation=activation)
        if not found and not (spec.kind == "seq" or (spec.is_int and spec.signed)):
            found.append(f"quantizer='quest' is for signed integers, ternary and seq, not {spec.grid.kind}")
        if spec.kind == "int" and spec.bits == 1:
            found.append("quantizer='quest' has its levels on both sides of 0, and a signed 1-bit grid has -1 and 0")
        if spec.signed_scale:
            found.append("quantizer='quest' finds positive scales; use quantizer=mse or lsq with signed_scale=true")
        return found

    def qparams(self, w_RK: Tensor) -> Fields:
        spec = self.live_spec
        # in double: the order in which a device adds up shows no more
        rms = grouped(w_RK.detach(), spec).double().square().mean(-1).sqrt()
        levels = 4 if spec.kind == "seq" else spec.int_grid.steps + 1
        step = 2.0 * clip_of(levels) * rms / (levels - 1)
        return Fields(spec.scale_grid.project((step / _step(spec)).float()))

    def vjp(
        self,
        spec: QuantSpec,
        grad: Tensor,
        w_RK: Tensor,
        fields: Fields,
        needs: tuple[bool, bool, bool, bool],
        spend: bool = False,
    ) -> Gradients:
        if not needs[0]:
            return None, None, None, None
        w = w_RK.float()
        off = grouped(spec.grid.fake_quantize(w, *fields) - w, spec).abs()
        trusted = off <= (0.5 * _SLACK * _step(spec)) * fields.scale.unsqueeze(-1)
        return torch.where(trusted.reshape(grad.shape), grad, 0.0), None, None, None


def _step(spec: QuantSpec) -> float:
    """Between two codes, in units of the scale."""
    return 0.5 if spec.kind == "seq" else 1.0
