"""Quantization-aware training that ends in real packed integer weights: you train on the grid you deploy on.

Names are loaded when they are first used, so that `qat --help` and `import qat.recipes` do without torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat import fold
    from qat.allocate import allocate
    from qat.batch_norm import reestimate_batch_norm
    from qat.bypass import rehearse
    from qat.convert import Bundle, convert, load_from_checkpoint
    from qat.distill import distill_loss
    from qat.errors import ExportError, QATError, RecipeError
    from qat.export import Receipt, export, rehearse_export
    from qat.oscillation import dampening
    from qat.plan import Plan
    from qat.prepare import is_prepared, plan, prepare, unprepare
    from qat.qtensor import QTensor
    from qat.specs import QuantSpec
    from qat.steps import after_optimizer_step, apply_schedule, initialize, weights_changed
    from qat.verify import verify

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "ExportError",
    "Plan",
    "QATError",
    "QTensor",
    "QuantSpec",
    "Receipt",
    "RecipeError",
    "after_optimizer_step",
    "allocate",
    "apply_schedule",
    "convert",
    "dampening",
    "distill_loss",
    "export",
    "fold",
    "initialize",
    "is_prepared",
    "load_from_checkpoint",
    "plan",
    "prepare",
    "reestimate_batch_norm",
    "rehearse",
    "rehearse_export",
    "unprepare",
    "verify",
    "weights_changed",
]

_HOMES = {
    "qat.allocate": ("allocate",),
    "qat.batch_norm": ("reestimate_batch_norm",),
    "qat.bypass": ("rehearse",),
    "qat.convert": ("Bundle", "convert", "load_from_checkpoint"),
    "qat.distill": ("distill_loss",),
    "qat.errors": ("ExportError", "QATError", "RecipeError"),
    "qat.export": ("Receipt", "export", "rehearse_export"),
    "qat.oscillation": ("dampening",),
    "qat.plan": ("Plan",),
    "qat.prepare": ("is_prepared", "plan", "prepare", "unprepare"),
    "qat.qtensor": ("QTensor",),
    "qat.specs": ("QuantSpec",),
    "qat.steps": ("after_optimizer_step", "apply_schedule", "initialize", "weights_changed"),
    "qat.verify": ("verify",),
}
# modules whose verbs are called by their full name: `qat.fold.rotate(model)`
_MODULES = ("fold",)
_HOME = {name: module for module, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """Some verbs (`qat.plan`, `qat.export`) share a name with the module that they live in; the verb wins."""

    def __getattr__(self, name: str) -> Any:
        if name in _MODULES:
            return import_module(f"qat.{name}")
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # importing qat.plan binds the module to this name; the verb keeps its place
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *_HOME, *_MODULES})


sys.modules[__name__].__class__ = _Package
