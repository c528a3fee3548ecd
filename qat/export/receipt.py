"""`qat_receipt.json`: what was trained, what was packed, and the hashes that tie the two together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qat.errors import ExportError
from qat.export.atomic import RECEIPT

VERSION = 1
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the file.

    name           parameter name in the deployed module, or as `static_ranges` or `cache_scales` of `qat.export.format`
                   calls a range
    spec           the QuantSpec as plain data; None: a tensor that is not quantized
    shape, dtype   of the weight that the training forward used
    sha256         of that weight's bytes, row-major (-0.0 counted as 0.0)
    max_abs_diff   between it and what the consumer's own code reads from the file: always 0, or there is no receipt
    """

    name: str
    spec: dict[str, Any] | None
    shape: list[int]
    dtype: str
    sha256: str
    max_abs_diff: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FileRecord:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """All that `qat.verify` needs, and all that a reader wants to know.

    weights   last, best or ema: which weights of the run these are
    inputs    layer -> spec and, for a static range, scale and zero point of its quantized input
    caches    attention -> the same of its keys (k) and values (v)
    reader    whose code read the file back when the receipt was written
    """

    format: str
    weights: str
    step: int
    recipe: dict[str, Any]
    tensors: list[TensorRecord]
    files: list[FileRecord]
    inputs: dict[str, Any] = field(default_factory=dict)
    caches: dict[str, Any] = field(default_factory=dict)
    reader: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def bytes(self) -> int:
        """Size of all files, the receipt excluded."""
        return sum(file.bytes for file in self.files)

    @property
    def max_abs_diff(self) -> float:
        return max((tensor.max_abs_diff for tensor in self.tensors), default=0.0)

    def save(self, folder: Path) -> None:
        (folder / RECEIPT).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Receipt:
        """Raises ExportError if there is no receipt or it cannot be read."""
        path = folder / RECEIPT
        if not path.is_file():
            raise ExportError(f"{folder} holds no {RECEIPT}; only folders written by qat can be verified")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise ExportError(f"{path} has version {data['version']}, this program reads {VERSION}; update qat")
            tensors = [TensorRecord(**entry) for entry in data.pop("tensors")]
            files = [FileRecord(**entry) for entry in data.pop("files")]
            for tensor in tensors:
                if not isinstance(tensor.torch_dtype, torch.dtype):
                    raise TypeError(f"{tensor.dtype!r} is not a dtype")
            return cls(tensors=tensors, files=files, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            what = f"{type(problem).__name__}: {problem}"
            raise ExportError(f"{path} is not a receipt that can be read ({what}); export again") from None


def file_records(folder: Path) -> list[FileRecord]:
    """Every file below `folder` but the receipt."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != RECEIPT)
    return [FileRecord(p.relative_to(folder).as_posix(), p.stat().st_size, file_sha256(p)) for p in paths]


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_files(folder: Path, receipt: Receipt) -> None:
    """Raise ExportError for the first file that is missing, cut short, longer or changed."""
    for record in receipt.files:
        path = folder / record.name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ExportError(f"the receipt of {folder} names {record.name!r}, outside it; it was tampered with")
        if not path.is_file():
            raise ExportError(f"{path} is missing; the receipt lists it with {record.bytes:,} bytes")
        size = path.stat().st_size
        if size != record.bytes:
            raise ExportError(f"{path} has {size:,} bytes, the receipt says {record.bytes:,}; export or copy it again")
        if file_sha256(path) != record.sha256:
            raise ExportError(f"{path} is not the file that was exported: its sha256 differs from the receipt's")
