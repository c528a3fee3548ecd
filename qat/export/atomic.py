"""All of a folder, or nothing: write beside the target, flush to the disk, rename."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.errors import ExportError

RECEIPT = "qat_receipt.json"
# the disk or the quota is full, or read-only
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def refuse_target(folder: Path, overwrite: bool) -> None:
    """Raise ExportError if `folder` is in the way; a folder is only ever replaced if an export wrote it."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file; name a folder to export to")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ExportError(f"{folder} is not empty; name another folder, or overwrite=True to replace an earlier export")
    if not (folder / RECEIPT).is_file():
        raise ExportError(f"{folder} is not empty and holds no {RECEIPT}: no export wrote it, so it is not overwritten")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` that takes its place when the block ends, and vanishes if the block raises.

    A link stays: the folder that it points to is replaced. Raises ExportError if the disk does not take it; any other
    exception of the block, an OSError about something else included, comes out as it is.
    """
    folder = _resolved(folder)
    created = _make_parents(folder.parent)
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    fresh, old = folder.parent / f".{folder.name}.{mark}.part", folder.parent / f".{folder.name}.{mark}.old"
    done = False
    try:
        with _explained(folder):
            fresh.mkdir()
        try:
            yield fresh
        except OSError as problem:
            if problem.errno in _FULL or _is_inside(problem.filename, fresh):
                raise _unwritable(folder, problem) from problem
            raise
        with _explained(folder):
            _flush(fresh)
            _swap(fresh, folder, old, [p.parent for p in created])
        done = True
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if done:
            shutil.rmtree(old, ignore_errors=True)
        else:
            for parent in created:
                _remove_empty(parent)


def _swap(fresh: Path, folder: Path, old: Path, parents: list[Path]) -> None:
    """`fresh` becomes `folder`, on the disk too; on any exception, an interrupt included, all is as it was."""
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        for parent in (folder.parent, *parents):
            _fsync(parent)
    except BaseException:
        if folder.exists() and not fresh.exists():
            os.replace(folder, fresh)
        if old.exists():
            os.replace(old, folder)
        raise


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise _unwritable(folder, problem) from problem


def _unwritable(folder: Path, problem: OSError) -> ExportError:
    return ExportError(f"{folder} cannot be written: {problem.strerror or problem}")


def _is_inside(name: object, folder: Path) -> bool:
    return isinstance(name, (str, os.PathLike)) and Path(name).is_relative_to(folder)


def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as problem:  # RuntimeError: a loop of links, before Python 3.13
        raise ExportError(f"{folder} cannot be resolved: {problem}") from problem


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; returns the new ones, innermost first."""
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ExportError(f"{parent} cannot be made: {problem.strerror or problem}") from problem
    return missing


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _flush(folder: Path) -> None:
    """Every file, then every folder, onto the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            _fsync(path)
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
