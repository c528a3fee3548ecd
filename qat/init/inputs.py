"""What a layer's rows are multiplied with, its second moments, and the diagonal of these.

Every listed op is linear in its weight, so the columns that a row [K] meets are what the op gives for K output channels
whose weights are the rows of the identity: no second description of strides, paddings and dilations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qat.init.obs import wide
from qat.layers import QATLayer, input_quantizer
from qat.node import no_autocast
from qat.ops import ConvOp, LinearOp

# numbers that the columns of a convolution may take at a time, 128 MiB in fp64
_AT_ONCE = 1 << 24


class Moments:
    """Mean of x x^T over the columns x that the rows of a weight met, fp64 [C, K, K].

    C = 1, but the rows of a grouped convolution fall into C equal runs that see different channels. Each row of a
    grouped transposed convolution sees all channels, in C groups that are apart: C = 1 and the matrix has blocks.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    @torch.no_grad()
    def add(self, layer: QATLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One call of the layer; its input is taken as the layer computes with it, quantized if it is."""
        op = layer._qat.op
        x, _, *rest = op.inputs(layer, args, kwargs)
        assert x is not None
        quantizer = input_quantizer(layer)
        if quantizer is not None:
            x = quantizer(x)
        # the hook that calls this runs within the model's autocast
        with no_autocast(x.device.type):
            if isinstance(op, ConvOp):
                single = x.dim() != op.dims + 2
                samples = x.unsqueeze(0) if single else x
                kernel: Any = layer.kernel_size
                step = max(1, _AT_ONCE // max(1, samples[0].numel() * math.prod(kernel)))
                for some in samples.split(step):
                    self._count(_conv_columns(op, layer, some, rest))
            else:
                assert isinstance(op, LinearOp)
                self._count(x.reshape(1, -1, x.shape[-1]))

    def _count(self, x_CNK: Tensor) -> None:
        # products of a batch in fp32, sums over batches in fp64
        x_CNK = x_CNK.float()
        found = (x_CNK.mT @ x_CNK).to(wide(x_CNK.device))
        self.total = found if self.total is None else self.total.add_(found)
        self.count += x_CNK.shape[1]

    def mean(self, layer: QATLayer) -> Tensor:
        """[C, K, K] as the rows of the layer's weight fall."""
        assert self.total is not None
        found = self.total / max(1, self.count)
        op = layer._qat.op
        if isinstance(op, ConvOp) and op.transposed:
            blocks: Tensor = torch.block_diag(*found)  # type: ignore[no-untyped-call]
            return blocks.unsqueeze(0)
        return found


class Squares(Moments):
    """Mean of x^2 alone, the diagonal of the moments: fp64 [C, K]."""

    def _count(self, x_CNK: Tensor) -> None:
        found = x_CNK.float().square().sum(1).to(wide(x_CNK.device))
        self.total = found if self.total is None else self.total.add_(found)
        self.count += x_CNK.shape[1]

    def mean(self, layer: QATLayer) -> Tensor:
        assert self.total is not None
        found = self.total / max(1, self.count)
        op = layer._qat.op
        return found.reshape(1, -1) if isinstance(op, ConvOp) and op.transposed else found


def importance(squares_CK: Tensor, rows: int) -> Tensor:
    """Mean squares of inputs -> fp32 [rows, K], 1 in the mean, by which the squared error of each weight counts."""
    squares = squares_CK / squares_CK.mean().clamp_min(1e-30)
    return squares.float().repeat_interleave(rows // squares.shape[0], 0)


def _conv_columns(op: ConvOp, layer: Any, x: Tensor, rest: list[Tensor | None]) -> Tensor:
    """x [B, I, *size] -> columns [C, B * positions, K] with C = groups, K = I / C * prod(kernel size)."""
    groups, kernel = layer.groups, tuple(layer.kernel_size)
    channels = layer.in_channels // groups
    count = channels * math.prod(kernel)
    # fp64: products with 1 and 0 are exact there, also where fp32 convolutions are allowed to round their inputs
    dtype = wide(x.device)
    one_hot = torch.eye(count, dtype=dtype, device=x.device).view(count, channels, *kernel)
    if op.transposed:
        one_hot = one_hot.transpose(0, 1)
    weight = one_hot.repeat(groups, *(1 for _ in range(op.dims + 1)))
    y = op.forward(layer, (x.to(dtype), None, *rest), (weight,))
    return y.reshape(y.shape[0], groups, count, -1).permute(1, 0, 3, 2).reshape(groups, -1, count)
