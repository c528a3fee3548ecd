"""LSQ: learned step size (Esser et al. 2020), with the scale as s = project(s0 * exp(k * theta)).

theta starts at 0, so step 0 is the searched scale s0; the scale can never turn negative, weight decay only pulls
towards s0, and theta lives in the user's own parameter group. k is the learning-rate factor under Adam, whose step
is about lr whatever the gradient: the scale moves by about k * lr per step, relatively. k = 10 keeps the scale's
relative step ten times the weight's absolute one, the ratio that NVIDIA's scale learning and EfficientQAT use.

Gradients (`fake_quant_kernels.affine`): dw inside the grid; ds = sum g * (rint(v) - v) inside, g * qmin or g * qmax
outside. LSQ's 1/sqrt(N * qmax) factor is left out: it does nothing under Adam but push ds below Adam's epsilon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.qtensor import Fields
from qat.quantizers._parts import joined
from qat.quantizers._ranges import fields_of_range, range_of_fields
from qat.quantizers.mse import Stored, search

RATE = 10.0


def _scale(start: Tensor, theta: Tensor) -> Tensor:
    """s0 * exp(k * theta), in double so that devices whose fp32 exp differs in the last bit agree."""
    return start * torch.exp(RATE * theta.double()).float()


class _Step(torch.autograd.Function):
    """The scale; it saves only that."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, theta: Tensor) -> Tensor:
        scale = _scale(start, theta)
        ctx.save_for_backward(scale)
        ctx.dtype = theta.dtype
        return scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (scale,) = ctx.saved_tensors
        return None, (grads[0] * scale * RATE).to(ctx.dtype)


class _Again(torch.autograd.Function):
    """A stored scale that is known already, with the gradient of theta."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, theta: Tensor, stored: Tensor) -> Tensor:
        ctx.save_for_backward(start, theta)
        return stored

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        start, theta = ctx.saved_tensors
        return None, (grads[0] * _scale(start, theta) * RATE).to(theta.dtype), None


def learned_scale(start: Tensor, theta: Tensor) -> Tensor:
    """start * exp(k * theta), differentiable in theta."""
    return _Step.apply(start, theta)  # type: ignore[no-any-return, no-untyped-call]


def known(start: Tensor, theta: Tensor, stored: Tensor) -> Tensor:
    """`stored`, which `learned_scale` gave, with the gradient of theta."""
    return _Again.apply(start, theta, stored)  # type: ignore[no-any-return, no-untyped-call]


class Lsq(Stored):
    """theta [R, G] has the latent's dtype (FSDP2 wants one dtype per unit) and is read in fp32.

    For an activation (static, per tensor) the range is the searched one of the first optimizer step's batches, the
    widest of them; theta then moves its scale.
    """

    name = "lsq"
    percentiles = True
    for_activations = True
    static_activations = True

    def build(self) -> None:
        super().build()
        self.theta = nn.Parameter(torch.zeros(self.start_scale.shape[1:]))
        self._settled = False
        if self.layout.kind == "tokens":
            self.seen: Tensor
            self.scratch: Tensor
            self.register_buffer("seen", torch.zeros(1))
            # (-low, high) of the searched ranges, so that the maximum is what ranks and micro-batches agree on
            self.register_buffer("scratch", torch.full((2,), -torch.inf), persistent=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.theta)
        if self.layout.kind == "tokens":
            self.restart()
            self.forget()

    def init_from(self, w: Tensor, importance: Tensor | None = None) -> None:
        super().init_from(w, importance)
        with torch.no_grad():
            self.theta.zero_()

    def learned(self) -> tuple[nn.Parameter, ...]:
        return (self.theta,)

    def qparams(self, w_RK: Tensor) -> Fields:
        scale, zero, minimum = self.start()
        if self.layout.kind == "tokens" and not self._settled:
            now, seen = search(w_RK.detach(), self.live_spec), self.seen.float() > 0
            scale = torch.where(seen, scale, now.scale)
            zero = None if zero is None or now.zero is None else torch.where(seen, zero, now.zero)
            minimum = None if minimum is None or now.minimum is None else torch.where(seen, minimum, now.minimum)
        if not self.frozen:
            scale = learned_scale(scale, self.theta)
        return Fields(self.spec.scale_grid.project(scale, self.spec.signed_scale), zero, minimum)

    def differentiable(self, fields: Fields) -> Fields | None:
        if self.frozen or self.layout.kind == "tokens":
            return None
        return fields._replace(scale=known(self.start().scale, self.theta, fields.scale))

    @torch.no_grad()
    def freeze(self) -> None:
        """s0 takes the value of s; theta is read no more (an optimizer's momentum may still move it)."""
        scale = learned_scale(joined(self.start_scale), self.theta)
        self.store(Fields(self.spec.scale_grid.project(scale, self.spec.signed_scale)))

    @torch.no_grad()
    def observe(self, x_TI: Tensor) -> None:
        if not self._settled:
            low, high = range_of_fields(search(x_TI.float(), self.spec), self.spec)
            found = torch.cat([-low.reshape(1), high.reshape(1)])
            self.scratch.copy_(torch.maximum(self.scratch, found.to(self.scratch.dtype)))

    @torch.no_grad()
    def commit(self) -> None:
        if self.layout.kind != "tokens" or self._settled:
            return
        if float(self.seen) == 0 and bool(torch.isfinite(self.scratch).all()):
            low, high = self.scratch.float().reshape(2, 1, 1).unbind(0)
            self.store(fields_of_range(-low, high, self.spec))
            self.seen.fill_(1.0)
        self._settled = float(self.seen) > 0
        self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        if self.layout.kind == "tokens":
            self.scratch.fill_(-torch.inf)

    @torch.no_grad()
    def restart(self) -> None:
        if self.layout.kind == "tokens":
            self.seen.zero_()
            self._settled = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # whether an input was seen is said by the buffer that was loaded
        self._settled = self.layout.kind == "tokens" and not self.seen.is_meta and bool(self.seen)
