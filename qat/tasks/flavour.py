"""Lightning comes under two names; tasks are built on the one that the program already uses, or that is installed."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from qat.errors import QATError

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def lightning() -> Any:
    """The module `lightning.pytorch` or `pytorch_lightning`: the imported one first, then the installed one."""
    for name in _NAMES:
        if name in sys.modules:
            return sys.modules[name]
    for name in _NAMES:
        if find_spec(name.partition(".")[0]) is not None:
            return import_module(name)
    raise QATError("neither lightning nor pytorch_lightning is installed; pip install pytorch-lightning")
