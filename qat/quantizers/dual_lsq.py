"""Dual LSQ: the scale under which codes are found and the one that decodes them are both learned (NVIDIA's
Model-Optimizer, 2026, for NVFP4).

    w_hat = Q(w / s_pre) * s_post        s_post = stored(s0 * exp(k * theta)) as in `lsq`, s_pre = s1 * exp(k * phi)

s_pre is of training alone: any fp32 number, not stored in a file. It starts from s_post as it is stored, so that step 0
is that of `lsq`. With v = w / s_pre and `inside` the range of the grid:

    dw = g * inside * s_post / s_pre,  ds_post = sum g * Q(v),  ds_pre = -s_post / s_pre * sum g * inside * v

The layer's node carries s_pre in the place of the zero point, which these grids do not have.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.grids import Gradients
from qat.qtensor import Fields
from qat.quantizers._gradients import scale_gradient
from qat.quantizers._parts import joined, split
from qat.quantizers._ranges import grouped
from qat.quantizers.lsq import Lsq, known, learned_scale
from qat.scales import SCALE_GRIDS
from qat.specs import QuantSpec

# on which s_pre is
_GRID = SCALE_GRIDS["fp32"]


class DualLsq(Lsq):
    """start_pre [3, R, G] holds s1."""

    name = "dual_lsq"
    for_activations = False
    zero_points = ("none",)

    @classmethod
    def reasons(cls, spec: QuantSpec, *, activation: bool = False) -> list[str]:
        found = super().reasons(spec, activation=activation)
        if spec.is_int:
            found.append("quantizer='dual_lsq' is for grids of floats or levels, not for integers; use quantizer=lsq")
        if spec.signed_scale:
            found.append("quantizer='dual_lsq' finds positive scales; use quantizer=lsq with signed_scale=true")
        return found

    def build(self) -> None:
        super().build()
        self.phi = nn.Parameter(torch.zeros_like(self.theta))
        self.start_pre: Tensor
        self.register_buffer("start_pre", split(torch.ones_like(self.theta.data), _GRID.parts))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.phi)
        self.start_pre.zero_()[0].fill_(1.0)

    def init_from(self, w: Tensor, importance: Tensor | None = None) -> None:
        super().init_from(w, importance)
        with torch.no_grad():
            self.phi.zero_()

    @torch.no_grad()
    def store(self, found: Fields) -> None:
        super().store(found)
        self.start_pre.copy_(split(_GRID.project(self.stored(self.start_fields()).scale), _GRID.parts))

    def starts(self) -> tuple[Tensor, ...]:
        return *super().starts(), joined(self.start_pre)

    @torch.no_grad()
    def start_from(self, grown: tuple[Tensor, ...]) -> None:
        super().start_from(grown)
        self.start_pre.copy_(split(_GRID.project(grown[-1]), _GRID.parts))

    def learned(self) -> tuple[nn.Parameter, ...]:
        return self.theta, self.phi

    def coding(self, fields: Fields) -> Fields:
        assert fields.zero is not None
        return Fields(fields.zero)

    def _pre(self) -> Tensor:
        start = joined(self.start_pre)
        return start if self.frozen else _GRID.project(learned_scale(start, self.phi))

    def qparams(self, w_RK: Tensor) -> Fields:
        return super().qparams(w_RK)._replace(zero=self._pre())

    def differentiable(self, fields: Fields) -> Fields | None:
        found = super().differentiable(fields)
        if found is None or fields.zero is None:
            return None
        return found._replace(zero=known(joined(self.start_pre), self.phi, fields.zero))

    @torch.no_grad()
    def freeze(self) -> None:
        pre = self._pre()
        super().freeze()
        self.start_pre.copy_(split(pre, _GRID.parts))

    def vjp(
        self,
        spec: QuantSpec,
        grad: Tensor,
        w_RK: Tensor,
        fields: Fields,
        needs: tuple[bool, bool, bool, bool],
        spend: bool = False,
    ) -> Gradients:
        pre = self.coding(fields)
        ratio = fields.scale / pre.scale
        dw, whole, _, _ = spec.grid.vjp(grad, w_RK, *pre, False, (needs[0], needs[2], False, False))
        if dw is not None:
            dw = (grouped(dw, spec) * ratio.unsqueeze(-1)).reshape(dw.shape).to(grad.dtype)
        dpost = scale_gradient(grad, spec.grid.encode(w_RK, *pre), fields, spec) if needs[1] or needs[2] else None
        # of LSQ's sum the part of the codes is that of s_post
        dpre = None if whole is None or dpost is None else (whole - dpost) * ratio
        return dw, dpost if needs[1] else None, dpre, None
