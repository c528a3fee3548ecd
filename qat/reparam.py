"""What stands between parameters and the weight that is quantized.

    w_hat = quantizer(W0 + s * B A)          `Lora`, of a low-rank adapter (L4Q, Jeon et al. 2024, arXiv 2402.04902)

The adapter is inside the rounding, so nothing has to be merged afterwards: the codes of the sum are what was trained.
A layer gives its node W0, B and A; the sum is made where it is looked at and dropped again, and the gradient of the
weight becomes those of B and A as soon as it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Numbers of the sum that are made at a time: what fits into a cache, of a CPU and of anything else.
_CHUNK_CPU = 1 << 17
_CHUNK = 1 << 21


@dataclass(frozen=True, eq=False)
class Lora:
    """The adapter of one weight: `a` holds A [r, I], `b` holds B [O, r] as their `weight`.

    scaling      s, lora_alpha / r for one
    transposed   the weight lies as [I, O] (Conv1D of GPT-2)
    """

    a: nn.Module
    b: nn.Module
    scaling: float
    transposed: bool = False

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) as they are now."""
        return self.a.weight, self.b.weight  # type: ignore[return-value]

    @torch.no_grad()
    def weight(self, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """W0 + s * B A in fp32, in the layout of w.

        The same bits on every device and compiled or not: a product of two fp32 numbers is exact in fp64, so a fused
        multiply-add changes nothing, and the r products are added one after the other.
        """
        left_Or, right_rI = (b.float() * self.scaling).double(), a.double()
        if self.transposed:
            left_Or, right_rI = right_rI.t(), left_Or.t()
        rows = w.shape[0]
        if not torch.compiler.is_compiling():
            rows = max(1, (_CHUNK_CPU if w.device.type == "cpu" else _CHUNK) // w.shape[1])
        found = []
        for w_rows, left in zip(torch.split(w, rows), torch.split(left_Or, rows), strict=True):
            total = w_rows.to(torch.float64, copy=True)
            for k in range(right_rI.shape[0]):
                total = total.addcmul_(left[:, k : k + 1], right_rI[k])
            found.append(total.float())
        return found[0] if len(found) == 1 else torch.cat(found)

    def pull(
        self, dw: Tensor, factors: tuple[Tensor, Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of A and B, where needed, from that of the weight."""
        a, b = factors
        dw_OI = dw.t() if self.transposed else dw
        da = (torch.mm(b.to(dw.dtype).t(), dw_OI) * self.scaling).to(a.dtype) if needs[0] else None
        db = (torch.mm(dw_OI, a.to(dw.dtype).t()) * self.scaling).to(b.dtype) if needs[1] else None
        return da, db
