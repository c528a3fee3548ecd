"""Quantization-aware training that ends in real packed integer weights: you train on the grid you deploy on."""

from __future__ import annotations

from qat.bypass import rehearse
from qat.convert import Bundle, convert, load_from_checkpoint
from qat.errors import ExportError, QATError, RecipeError
from qat.plan import Plan
from qat.prepare import after_optimizer_step, apply_schedule, initialize, is_prepared, plan, prepare, unprepare
from qat.qtensor import QTensor
from qat.specs import QuantSpec

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "ExportError",
    "Plan",
    "QATError",
    "QTensor",
    "QuantSpec",
    "RecipeError",
    "after_optimizer_step",
    "apply_schedule",
    "convert",
    "initialize",
    "is_prepared",
    "load_from_checkpoint",
    "plan",
    "prepare",
    "rehearse",
    "unprepare",
]
