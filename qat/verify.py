"""Check an exported folder again, later: files by hash, tensors by the consumer's own code."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from qat.errors import ExportError
from qat.export import get_format
from qat.export.format import Row, read_back
from qat.export.receipt import Receipt, check_files


def verify(folder: str | PathLike[str]) -> list[Row]:
    """One row per tensor of the receipt, each equal bit for bit to the weight that was trained.

    `Row.reader` says whose code read the file: the consumer's where it is installed, otherwise our own unpacking.
    Raises ExportError, one sentence, for anything missing, cut short, changed or unreadable.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ExportError(f"there is no folder {path}")
    receipt = Receipt.load(path)
    check_files(path, receipt)
    return read_back(get_format(receipt.format), path, receipt.tensors)
