"""`Quantizer`: how scales are found and how gradients flow.

    forward(w)   fake-quantized weight, shape and dtype of w      final: rounds once, by the spec's grid (`qat.grids`)
    integers(w)  the same rounding as a QTensor                    final
    qparams(w)   what a subclass writes: the stored fields         small ordinary autograd
                 (where scales have two levels: those that its groups would like; `stored` makes the others of them)

so `quantizer(w) == quantizer.integers(w).dequantize()` holds bit for bit for quantizers that do not exist yet.

Latents of any float dtype are read in fp32 with autocast off; only the result is cast to `out_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from qat.errors import QATError
from qat.fake_quant_kernels import rowwise4
from qat.fake_quant_kernels.dispatch import no_grad, uses_triton
from qat.fake_quant_kernels.pack import HALVES, PLAIN, ROWS
from qat.grids import Gradients
from qat.layout import Layout
from qat.qtensor import Fields, QTensor
from qat.quantizers._gradients import Fixed, Ruled
from qat.quantizers._parts import number
from qat.scales import TwoLevel
from qat.specs import QuantSpec


class Quantizer(nn.Module):
    """One tensor's quantizer. A subclass lives in a file of its own, sets the flags and writes `qparams`."""

    name: str = ""
    # gradient of the weight where the grid clips: everywhere (dynamic scales) or only inside
    identity_gradient: bool = False
    for_weights: bool = True  # which tensors it serves
    for_activations: bool = False
    # the scale of an activation is kept, not computed from each input: per tensor only
    static_activations: bool = False
    # that of the tensor alone is kept, and those of its groups are computed from each input
    local_activations: bool = False
    # fields of a weight are kept: `qparams` does not look at it
    keeps_fields: bool = False
    percentiles: bool = False  # its ranges can hold a share of the numbers (`QuantSpec.percentile`)
    # zero point kinds it can produce
    zero_points: tuple[str, ...] = ("none",)

    def __init__(self, spec: QuantSpec, layout: Layout) -> None:
        super().__init__()
        self.spec = spec
        self._place = layout
        self.live_spec = spec  # with the bits of the current phase
        self.frozen = False  # scales stop learning and ranges stop moving
        # codes stay those of the fields that were stored, and the scale alone moves (EfficientQAT's E2E-QP)
        self.codes_fixed = False
        self.rewritten = False  # kept fields were searched or loaded, and belong to the weight as it is
        self.absent = False  # the last state dict that was loaded had nothing for this quantizer
        self.build()

    def build(self) -> None:
        """Create parameters and buffers eagerly: a late one would be an inference tensor, or in no optimizer."""

    def init_from(self, w: Tensor, importance: Tensor | None = None) -> None:
        """Choose the starting state from the weight (shape `layout.shape`); nothing to choose by default.

        importance: fp32 [K] or [R, K], by which the squared error of each number of the rows counts; a quantizer that
        searches nothing has no use for it.
        """

    def qparams(self, w_RK: Tensor) -> Fields:
        """Stored fields for fp32 rows [R, K] (or [T, I]); a subclass writes this."""
        raise TypeError(f"{type(self).__name__} has no qparams")

    def start_fields(self) -> Fields:
        """`qparams` where learned scales started: under these `codes_fixed` keeps the codes of a weight."""
        raise TypeError(f"{type(self).__name__} learns no scale, so its codes need not be fixed")

    def starts(self) -> tuple[Tensor, ...]:
        """Kept fields that grow with the weight, fp32 [R, G] or [1, 1] each; of a dynamic scale none."""
        return ()

    def start_from(self, grown: tuple[Tensor, ...]) -> None:
        """Keep these, as they can be stored, in the place of `starts`."""

    def fused(self, w_RK: Tensor, spec: QuantSpec, form: str) -> tuple[Tensor, Fields] | None:
        """Codes (in a form of `fake_quant_kernels.pack`) and fields of a dynamic scale in one pass over the data, the
        same numbers as `qparams` and `encode` give; a group that holds a NaN gets a scale of NaN. None: there is no
        such pass."""
        return None

    def differentiable(self, fields: Fields) -> Fields | None:
        """`fields`, which `qparams` gave for the parameters as they are, with their gradient: what spares finding them
        again for every micro-batch. None: `qparams` runs."""
        return None

    def vjp(
        self,
        spec: QuantSpec,
        grad: Tensor,
        w_RK: Tensor,
        fields: Fields,
        needs: tuple[bool, bool, bool, bool],
        spend: bool = False,
    ) -> Gradients:
        """Gradients of rows, scale, zero and minimum (where needed) from that of the fake-quantized rows, as
        `qat.grids.Grid.vjp` has them; a subclass with a gradient rule of its own writes this."""
        return spec.grid.vjp(grad, w_RK, *fields, self.identity_gradient, needs, spend)

    def coding(self, fields: Fields) -> Fields:
        """The fields by which codes are found, of those that decode them: `fields` itself, but for a quantizer of two
        scales."""
        return fields

    def largest(self, scale: Tensor) -> Tensor | None:
        """The largest scale, fp32 [1], under which two levels store those that the groups of an input would like; None:
        their own."""
        return None

    @torch.no_grad()
    def kept(self) -> Fields | None:
        """What of the fields of an input stays, and leaves training; None: nothing."""
        if not self.static_activations:
            return None
        return self.qparams(torch.zeros(1, 1, device=next(self.buffers()).device))

    def learned(self) -> tuple[nn.Parameter, ...]:
        """Parameters that the optimizer moves, in a fixed order."""
        return ()

    def observe(self, x_TI: Tensor) -> None:
        """Look at an activation in a training forward; only scratch may change here."""

    def commit(self) -> None:
        """Once per optimizer step: move scratch into buffers."""

    def forget(self) -> None:
        """Drop scratch that was not committed."""

    def restart(self) -> None:
        """Quantization begins now: a range that settles on its first input looks again."""

    def freeze(self) -> None:
        """Make the present scale the stored one for good; called once, with whole (gathered) parameters."""

    def thaw(self) -> None:
        """Let scales move again from where they are."""

    @classmethod
    def reasons(cls, spec: QuantSpec, *, activation: bool = False) -> list[str]:
        """Why this quantizer cannot serve `spec` (of an activation); empty means it can."""
        found = spec.reasons()
        if not (cls.for_activations if activation else cls.for_weights):
            found.append(f"quantizer={cls.name!r} is not for {'inputs' if activation else 'weights'}")
        if activation and cls.static_activations and not cls.local_activations and spec.granularity != "tensor":
            found.append(
                f"quantizer={cls.name!r} keeps one scale per input; use granularity=tensor, not {spec.granularity}"
            )
        two = spec.scale_grid
        if activation and isinstance(two, TwoLevel) and not (cls.local_activations and two.local):
            use = "; use quantizer=local" if two.local else ""
            found.append(f"scale={two.name!r} is for weights: its scale of scales would depend on the whole batch{use}")
        if activation and (spec.signed_scale or spec.desc_act):
            found.append(f"{'signed_scale' if spec.signed_scale else 'desc_act'}=true is for weights")
        if activation and spec.granularity == "channel":
            found.append("an input has no output channels; use granularity=token or tensor")
        if not activation and spec.granularity == "token":
            found.append("a weight has no tokens; use granularity=channel")
        if spec.percentile is not None and not cls.percentiles:
            found.append(f"quantizer={cls.name!r} has no percentile; use lsq, or ema for inputs")
        if spec.zero_point not in cls.zero_points:
            allowed = ", ".join(cls.zero_points)
            found.append(f"quantizer={cls.name!r} has zero_point {allowed}, not {spec.zero_point!r}")
        return found

    # ---- final ---------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """With the order of columns in which groups are formed, where one is kept (`qat.quantizers.mse.Stored`)."""
        order = self._buffers.get("order")
        return self._place if order is None else Layout(self._place.shape, self._place.kind, number(order))

    @final
    def fields(self, w_RK: Tensor) -> Fields:
        """The fields that decode rows in any float dtype."""
        looks = not self.keeps_fields or self.layout.kind == "tokens"
        return self.stored(self.qparams(w_RK.float() if looks else w_RK))

    @final
    def stored(self, wanted: Fields) -> Fields:
        """`wanted` as two levels of scales can hold them; others are stored as they are."""
        grid = self.live_spec.scale_grid
        if not isinstance(grid, TwoLevel):
            return wanted
        scale, minimum = grid.stored(wanted.scale, wanted.minimum, self.largest(wanted.scale))
        return Fields(scale, wanted.zero, minimum)

    def _held(self) -> Fields:
        return self.stored(self.start_fields())

    @final  # type: ignore[misc]
    def forward(self, w: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Fake-quantized `w`: same shape, `out_dtype` (default: dtype of w). Non-finite elements stay non-finite
        or clip; the scale stays finite."""
        layout = self.layout.of(w)
        with torch.autocast(device_type=w.device.type, enabled=False):
            rows = layout.to_rows(w).float()
            fields, spec = self.stored(self.qparams(rows)), self.live_spec
            if self.codes_fixed:
                codes = spec.grid.encode(rows.detach(), *self._held())
                fake = Fixed.apply(codes, spec, *fields)  # type: ignore[no-untyped-call]
            elif type(self).vjp is Quantizer.vjp:
                fake = spec.grid.fake_quantize(rows, *fields, self.identity_gradient)
            else:
                fake = Ruled.apply(rows, *fields, spec, self)  # type: ignore[no-untyped-call]
            return layout.from_rows(fake).to(out_dtype or w.dtype)

    @final
    def quantize(
        self, w_RK: Tensor, spec: QuantSpec, fields: Fields | None = None, *, form: str = PLAIN
    ) -> tuple[Tensor, Fields]:
        """What a layer computes with: codes [R, K], in a form of `fake_quant_kernels.pack`, and the fields that decode
        them.

        The numbers of `integers`, but a NaN in w shows: its scale is NaN, so that a run that diverged does not go on
        with zeros. `fields` are used where given (of a scale that stays).
        """
        with no_grad():
            return self._quantized(w_RK, spec, fields, form)

    def _quantized(self, w_RK: Tensor, spec: QuantSpec, fields: Fields | None, form: str) -> tuple[Tensor, Fields]:
        if fields is None:
            found: tuple[Tensor, Fields] | None = self._under(spec, lambda: self.fused(w_RK, spec, form))
            if found is not None:
                return found
            fields = self._under(spec, lambda: self.fields(w_RK))
        by = self._held() if self.codes_fixed else self.coding(fields)
        if by is not fields:
            codes, scale = spec.grid.encode_poisoning(w_RK, *by, form == HALVES)
            # NaN where the weight is; the difference is zero otherwise
            return codes, fields._replace(scale=fields.scale + (scale - by.scale))
        if form == ROWS:
            grid = spec.int_grid
            codes, scale = rowwise4.encode(w_RK, fields.scale, grid.qmin, grid.qmax)
        else:
            codes, scale = spec.grid.encode_poisoning(w_RK, *fields, form == HALVES)
        return codes, fields._replace(scale=scale)

    def _under(self, spec: QuantSpec, find: Callable[[], Any]) -> Any:
        """What is found while `spec` is the live one."""
        kept = self.live_spec
        # compiled code may not set an attribute here, and has no need to: it is compiled anew for each spec
        if kept is spec:
            return find()
        self.live_spec = spec
        try:
            return find()
        finally:
            self.live_spec = kept

    @final
    def direct(self, spec: QuantSpec, device: torch.device) -> bool:
        """Whether `rounded` is there and takes fewer passes than `quantize` and a decode. For a dynamic scale of a GPU
        one kernel finds scale and codes."""
        if self.codes_fixed or type(self).coding is not Quantizer.coding or not spec.grid.direct:
            return False
        return self.keeps_fields or not uses_triton(device)

    @final
    def rounded(
        self, w_RK: Tensor, spec: QuantSpec, dtype: torch.dtype, fields: Fields | None = None, again: bool = False
    ) -> Tensor:
        """The numbers [R, K] in `dtype` that the codes of `quantize` stand for; a NaN in w stays where it is. `fields`
        are used where given. again: see `fake_quant_kernels.affine.decode`."""
        with no_grad():
            scale, zero, minimum = self._under(spec, lambda: self.fields(w_RK)) if fields is None else fields
            return spec.int_grid.rounded(w_RK, scale, zero, minimum, dtype, again)

    @final
    @torch.no_grad()
    def integers(self, w: Tensor, out_dtype: torch.dtype | None = None) -> QTensor:
        """The codes and fields that `forward` used, as a QTensor. Raises QATError where w is not finite, or where the
        order of its inputs (`desc_act`) has come to harm."""
        if not bool(torch.isfinite(w).all()):
            count = int((~torch.isfinite(w)).sum())
            raise QATError(f"{count} of {w.numel()} numbers are not finite and have no code (did the run diverge?)")
        layout = self.layout.of(w)
        if not layout.is_permutation:
            raise QATError("the order of its inputs is no permutation (was it averaged in 16 bits, or never loaded?)")
        with torch.autocast(device_type=w.device.type, enabled=False):
            rows = layout.to_rows(w).float()
            spec = self.live_spec
            scale, zero, minimum = self.qparams(rows)
            parts = {}
            if isinstance(spec.scale_grid, TwoLevel):
                parts = spec.scale_grid.encode(scale, minimum, self.largest(scale))
                scale, minimum = spec.scale_grid.decode(parts)
            by = self._held() if self.codes_fixed else self.coding(Fields(scale, zero, minimum))
            codes = spec.grid.encode(rows, *by)
            zero = zero if spec.is_int else None
            stored = spec.scale_grid.dtype
            return QTensor(
                codes=codes,
                scale=scale.to(stored),
                zero_point=None if zero is None else zero.to(torch.int16),
                minimum=None if minimum is None else minimum.to(stored),
                spec=spec,
                layout=layout,
                out_dtype=out_dtype or w.dtype,
                parts=parts,
            )

    @final
    def set_bits(self, bits: int | None) -> None:
        """Train on `bits` for a phase (None: the deployed spec)."""
        self.live_spec = self.spec if bits is None else replace(self.spec, bits=bits)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A float checkpoint has no quantizer state: keep what was initialised instead of failing the strict load.
        # With some keys of this quantizer, or with a record (`qat.prepare`), the rest is missed as ever.
        self.absent = not any(key.startswith(prefix) for key in state_dict)
        self.rewritten |= not self.absent
        args = (*args[:2], [] if self.absent else args[2], *args[3:])
        super()._load_from_state_dict(state_dict, prefix, *args)
