"""How scales are found: one file per quantizer. A new file in this folder is a new quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from qat.layout import Layout
from qat.qtensor import Fields
from qat.quantizers.base import Quantizer
from qat.registry import discover, lookup
from qat.specs import QuantSpec

__all__ = ["Fields", "Quantizer", "make_quantizer", "quantizer_class", "quantizers"]


def quantizers() -> Mapping[str, type[Quantizer]]:
    """Every quantizer by name: this folder's and those of the entry point group `qat.quantizers`."""
    return discover("qat.quantizers", Quantizer, "qat.quantizers")


def quantizer_class(name: str) -> type[Quantizer]:
    """Raises QATError listing the known names."""
    return cast("type[Quantizer]", lookup(discover("qat.quantizers", Quantizer, "qat.quantizers"), name, "quantizer"))


def make_quantizer(spec: QuantSpec, layout: Layout) -> Quantizer:
    """The quantizer that `spec` names, on parameters laid out as `layout` (kind "tokens": activations)."""
    return quantizer_class(spec.quantizer)(spec, layout)
