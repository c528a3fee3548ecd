"""What stands between parameters and the weight that is quantized.

    w_hat = quantizer(W0 + s * B A)                         `Lora`, of a low-rank adapter (L4Q, Jeon et al. 2024,
                                                            arXiv 2402.04902)
    w_hat = quantizer(W0 * gamma / sqrt(variance + eps))    `qat.norm_fold.BatchNormFold`

They are inside the rounding, so nothing has to be merged afterwards: the codes of the result are what was trained. A
layer gives its node W0 and two factors; the weight is made where it is looked at and dropped again, and its gradient
becomes theirs as soon as it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Numbers of the sum that are made at a time: what fits into a cache, of a CPU and of anything else.
_CHUNK_CPU = 1 << 17
_CHUNK = 1 << 21


class Reparam:
    """What a layer, its node and its cache ask for."""

    # what an adapter is multiplied with, for the record
    scaling: float | None = None
    # the node takes the factors out of the rounded weight again
    undoes: bool = False

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """What the weight is made of beside W0, as it is now."""
        raise TypeError(f"{type(self).__name__} has no factors")

    def trained(self, w: Tensor) -> dict[str, Tensor]:
        """What an optimizer moves of the weight, by what is added to its name."""
        return {"": w}

    def weight(self, w: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """What is rounded, fp32 in the layout of w, from w and the factors."""
        raise TypeError(f"{type(self).__name__} has no weight")

    def pull(self, dw: Tensor, latents: tuple[Tensor, ...], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Gradients of W0 and the factors, where needed, from that of the weight."""
        raise TypeError(f"{type(self).__name__} has no gradients")

    def undo(self, t: Tensor, latents: tuple[Tensor, ...]) -> Tensor:
        """The rounded weight without the factors, or the gradient through that."""
        raise TypeError(f"{type(self).__name__} cannot be undone")

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias that goes with the weight."""
        return bias

    def follow(self) -> None:
        """What goes into the weight beside its factors is what it is now."""

    def gave(self, y: Tensor) -> None:
        """The layer returns y."""


@dataclass(frozen=True, eq=False)
class Lora(Reparam):
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

    def trained(self, w: Tensor) -> dict[str, Tensor]:
        return {" (A)": self.factors[0], " (B)": self.factors[1]}

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

    def pull(self, dw: Tensor, latents: tuple[Tensor, ...], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        _, a, b = latents
        dw_OI = dw.t() if self.transposed else dw
        da = (torch.mm(b.to(dw.dtype).t(), dw_OI) * self.scaling).to(a.dtype) if needs[1] else None
        db = (torch.mm(dw_OI, a.to(dw.dtype).t()) * self.scaling).to(b.dtype) if needs[2] else None
        return dw if needs[0] else None, da, db
