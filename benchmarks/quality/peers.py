"""Other libraries' quantization-aware training at a width, one scale per output channel.

Each function takes the width and returns a builder of `benchmarks.peers`; it raises Missing where the library has no
such grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.common import Missing
from benchmarks.peers import Builder, brevitas_builder, modelopt_builder, torchao_builder

if TYPE_CHECKING:
    from benchmarks.quality.methods import Width


def torchao(width: Width, learned_scales: bool = False) -> Builder:
    """Dynamic absmax scales, or learned ones that start there."""
    if width.narrow:
        raise Missing("torchao's integer grids have 2 to the power of their bits codes: none has three")
    return torchao_builder(None, (getattr(torch, f"int{width.bits}"), "per_channel", True), learned_scales)


def torchao_learned(width: Width) -> Builder:
    return torchao(width, learned_scales=True)


def modelopt(width: Width, algorithm: str = "max") -> Builder:
    """Scales calibrated once and then frozen, as its guide to quantization-aware training says."""
    weight = {"num_bits": width.bits, "axis": 0, "narrow_range": width.narrow}
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weight},
        {"quantizer_name": "*lm_head*", "enable": False},
        {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False},
    ]
    return modelopt_builder({"quant_cfg": rules, "algorithm": algorithm})


def modelopt_mse(width: Width) -> Builder:
    return modelopt(width, "mse")


def brevitas(width: Width, weight_quant: str = "Int8WeightPerChannelFloat") -> Builder:
    """Dynamic absmax scales."""
    return brevitas_builder(weight_quant=weight_quant, weight_bit_width=width.bits, weight_narrow_range=width.narrow)


def brevitas_mse(width: Width) -> Builder:
    """Learned scales that start from a search for least squared error."""
    return brevitas(width, "Int8WeightPerChannelFloatMSE")
