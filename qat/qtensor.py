"""`QTensor`: the only thing that leaves training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from qat.layout import Layout
from qat.specs import QuantSpec


class Fields(NamedTuple):
    """What is stored beside the codes: fp32 on the scale grid, [R, G] or [1, 1]; zero integral within the codes.

    Grids that have no zero point pass `zero` by: what a quantizer keeps there is of training alone, and leaves it not.
    """

    scale: Tensor
    zero: Tensor | None = None
    minimum: Tensor | None = None


@dataclass(frozen=True)
class QTensor:
    """Codes and what turns them back into numbers.

        w_RK = (codes_RK - zero_point_RG) * scale_RG        zero_point none or int
        w_RK = codes_RK * scale_RG + minimum_RG             zero_point float
        w_RK = number[codes_RK] * scale_RG                  a grid of levels or of floats (`qat.grids`)

    R rows (output channels), K numbers in a row in the order of `layout`, G scales in a row (K % G == 0); per tensor
    both R and G are 1.

    codes        [R, K] in spec.grid.code_dtype: int8 (signed integers), uint8, or a dtype of small floats
    scale        the stored dtype of spec.scale (fp32 if it has two levels), [R, G] or [1, 1], finite, positive but for
                 spec.signed_scale
    zero_point   int16 within the grid's codes, the shape of scale, or None
    minimum      the stored dtype of spec.scale, the shape of scale, or None
    layout       where the rows lie in the parameter
    out_dtype    dtype of the weight that the training forward used
    parts        of scales of two levels (`qat.scales`): what a file holds, of which `scale` and `minimum` are decoded
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    minimum: Tensor | None
    spec: QuantSpec
    layout: Layout
    out_dtype: torch.dtype
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, shape `layout.shape`, computed in fp32 and cast once to `dtype` (default: `out_dtype`)."""
        zero = None if self.zero_point is None else self.zero_point.float()
        minimum = None if self.minimum is None else self.minimum.float()
        rows = self.spec.grid.decode(self.codes, self.scale.float(), zero, minimum)
        return self.layout.from_rows(rows).to(dtype or self.out_dtype)

    def sha256(self) -> str:
        """Of the dequantized weight in `out_dtype`, row-major: equal numbers have equal hashes."""
        return tensor_sha256(self.dequantize())


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of the bytes of `tensor`, row-major, with -0.0 counted as 0.0 (they are equal numbers)."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point():
        tensor = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"").hexdigest()
