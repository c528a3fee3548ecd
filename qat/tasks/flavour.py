"""Lightning comes under two names; tasks are built on the one that the program already uses, or that is installed."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from qat.errors import QATError

_NAMES = ("lightning.pytorch", "pytorch_lightning")
_LOGGERS = (*_NAMES, "lightning.fabric", "lightning_fabric")


def lightning() -> Any:
    """The module `lightning.pytorch` or `pytorch_lightning`: the imported one first, then the installed one."""
    for name in _NAMES:
        if name in sys.modules:
            return sys.modules[name]
    for name in _NAMES:
        if find_spec(name.partition(".")[0]) is not None:
            return import_module(name)
    raise QATError("neither lightning nor pytorch_lightning is installed; pip install pytorch-lightning")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, no notices of the trainer about loggers, workers and devices, unless all logging is shown."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    if logging.getLogger().isEnabledFor(logging.INFO):
        yield
        return
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning|lightning_fabric|torch)\b")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
