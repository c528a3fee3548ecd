"""How one tensor of a call is quantized, in forward and in backward (`qat.node`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels import rowwise4
from qat.fake_quant_kernels.dispatch import uses_triton
from qat.fake_quant_kernels.pack import HALVES, PLAIN, ROWS
from qat.fake_quant_kernels.storage import through
from qat.layout import Layout
from qat.qtensor import Fields
from qat.quantizers import Quantizer
from qat.quantizers._gradients import scale_gradient
from qat.reparam import Reparam
from qat.specs import QuantSpec

# what a weight is made of: the weight itself, or it and the factors of its `Reparam`
Latents = Tensor | tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Slot:
    """How one tensor of a call is quantized: what the forward saw, without tensors."""

    quantizer: Quantizer
    spec: QuantSpec
    layout: Layout
    # how the codes lie (`qat.fake_quant_kernels.pack`)
    form: str = PLAIN
    # codes are saved for backward
    keep: bool = True
    # what makes the weight of W0 and more; None: W0 is the weight
    reparam: Reparam | None = None
    # its factors are taken out again after the rounding
    undo: bool = False
    # there are no codes: numbers are rounded where they are used
    direct: bool = False

    def like(self, quantizer: Quantizer, spec: QuantSpec, form: str, keep: bool, direct: bool) -> bool:
        """Whether this is the slot of a weight that is quantized so."""
        # an order of columns is read anew each time
        same = self.quantizer is quantizer and self.spec is spec and self.layout.order is None
        return same and self.form == form and self.keep == keep and self.direct == direct

    def latents(self, t: Latents) -> Tensor:
        """What is quantized."""
        return self.reparam.weight(*t) if self.reparam is not None else t  # type: ignore[return-value]

    def undone(self, t: Tensor, latents: Latents) -> Tensor:
        """The rounded weight, or a gradient on its way back, with or without the factors."""
        return self.reparam.undo(t, latents) if self.reparam is not None and self.undo else t  # type: ignore[arg-type]

    def rows(self, t: Tensor) -> Tensor:
        return self.layout.to_rows(t)

    def hat(
        self,
        t: Latents,
        quantized: Sequence[Tensor | None],
        blend: Tensor | None,
        dtype: torch.dtype,
        again: bool = False,
    ) -> Tensor:
        """The fake-quantized tensor in `dtype`; between strengths 0 and 1 on the way there. again: in backward."""
        lookup = self.layout.kind == "embedding" and dtype.itemsize == 2 and torch.compiler.is_compiling()
        if lookup and not uses_triton(t.device):  # type: ignore[union-attr]
            # a compiler that sees into the decode leaves this cast out where what is looked up is cast back at once
            return through(self.hat(t, quantized, blend, torch.float32, again), dtype).to(dtype)
        if self.form == ROWS:
            codes = quantized[0]
            rows = rowwise4.decode(codes, dtype, again)  # type: ignore[arg-type]
            # as rows only where their columns lie in another order
            rows = rows if self.layout.order is None else rows.view(self.layout.rows_shape)
        elif self.direct:
            w_RK = self.rows(self.latents(t).detach())
            rows = self.quantizer.rounded(w_RK, self.spec, dtype, self._given(quantized), again)
        else:
            packed = self.form == HALVES and quantized[0] is not None
            codes, scale, zero, minimum = quantized if packed else self.quantized(t, quantized)
            rows = self.spec.grid.decode(codes, scale, zero, minimum, dtype, packed, again)  # type: ignore[arg-type]
        fake = self.layout.from_rows(rows)
        return fake if blend is None else torch.lerp(self.latents(t).to(dtype), fake, blend.to(dtype))

    @staticmethod
    def _given(quantized: Sequence[Tensor | None]) -> Fields | None:
        """The fields, where they were saved."""
        return None if quantized[1] is None else Fields(*quantized[1:])  # type: ignore[arg-type]

    def quantized(self, t: Latents, quantized: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Codes [R, K], one in a byte, and fields: those given, or found again from t where there are no such codes."""
        codes, *fields = quantized
        if codes is None or self.form != PLAIN:
            given = None if self.quantizer.identity_gradient else Fields(*fields)  # type: ignore[arg-type]
            codes, fields = self.quantizer.quantize(self.rows(self.latents(t).detach()), self.spec, given)  # type: ignore[assignment]
        return codes, *fields

    def pull(
        self,
        grad: Tensor,
        t: Latents | None,
        quantized: Sequence[Tensor | None],
        blend: Tensor | None,
        needs: Sequence[bool],
        like: torch.dtype,
        fresh: bool,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the tensor itself (in dtype `like`) and of scale, zero and minimum, from that of `hat`; fresh:
        nobody else holds `grad`, and it may be overwritten."""
        scale, zero, minimum = quantized[1:]
        if self.quantizer.identity_gradient and not any(needs[1:]):
            return grad.to(like) if needs[0] else None, None, None, None
        assert t is not None and scale is not None
        passed = grad if blend is None else grad * blend.to(grad.dtype)
        if self.quantizer.codes_fixed:
            codes, *fields = self.quantized(t, quantized)
            return None, scale_gradient(self.rows(passed), codes, Fields(*fields), self.spec), None, None
        dt, *dfields = self.quantizer.vjp(
            self.spec,
            self.rows(passed),
            self.rows(self.latents(t).detach()),
            Fields(scale, zero, minimum),
            tuple(needs),  # type: ignore[arg-type]
            fresh and blend is None,
        )
        if dt is not None:
            dt = self.layout.from_rows(dt)
            dt = (dt if blend is None else dt + (grad - passed)).to(like)
        return dt, *dfields

    def pulled(
        self, grad: Tensor, t: Latents, quantized: Sequence[Tensor | None], needs: Sequence[bool], dtype: torch.dtype
    ) -> tuple[tuple[Tensor | None, ...], Tensor] | None:
        """(`pull` of a gradient that nobody else holds, `hat`) in one pass over the weight; None: there is none."""
        plain = self.direct and not self.quantizer.identity_gradient and type(self.quantizer).vjp is Quantizer.vjp
        if not plain:
            return None
        w_RK, fields = self.rows(t.detach()), self._given(quantized)  # type: ignore[union-attr]
        assert fields is not None
        found = self.spec.int_grid.vjp_rounded(self.rows(grad), w_RK, fields, tuple(needs), dtype)  # type: ignore[arg-type]
        if found is None:
            return None
        (dt, *dfields), hat = found
        dt = None if dt is None else self.layout.from_rows(dt).to(t.dtype)  # type: ignore[union-attr]
        return (dt, *dfields), self.layout.from_rows(hat)
