"""Keeping what other packages do to a process, which may be one that trains, away from it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Notices stay inside; what goes wrong is an exception."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Undo what importing a package does: variables of the environment, the root logger; and it prints nothing."""
    environment, root = dict(os.environ), logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for key in set(os.environ) - set(environment):
            del os.environ[key]
        os.environ.update(environment)
        root.setLevel(level)
        root.handlers[:] = handlers


@contextlib.contextmanager
def heard() -> Iterator[Callable[[], str]]:
    """What native code writes to standard error stays inside, where the function that is given reads it."""
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)

            def words() -> str:
                file.seek(0)
                return file.read().decode(errors="replace")

            yield words
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
