"""Packed files from trained integers: written in one pass, read back by their consumer, renamed into place."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qat.convert import Bundle, convert
from qat.errors import IMPOSSIBLE_FORMATS, ExportError, QATError, refuse_if
from qat.export.atomic import refuse_target, replaced_folder
from qat.export.format import Format, Row, TensorStream, read_back
from qat.export.receipt import Receipt, file_records
from qat.qtensor import Fields
from qat.registry import discover, lookup
from qat.specs import QuantSpec

__all__ = ["Format", "Receipt", "Row", "all_formats", "export", "formats_for", "get_format", "rehearse_export"]

log = logging.getLogger(__name__)
_WEIGHTS = ("last", "best", "ema")


def all_formats() -> dict[str, type[Format]]:
    """Name -> class, of every format in `qat/export/formats/` and of every `qat.formats` entry point."""
    return dict(discover("qat.export.formats", Format, "qat.formats"))


def get_format(name: str) -> Format:
    """The format called `name`; raises QATError that lists the known names, or says why there is no such format."""
    if name in IMPOSSIBLE_FORMATS:
        raise QATError(f"format={name!r} is not possible: {IMPOSSIBLE_FORMATS[name]}")
    found = discover("qat.export.formats", Format, "qat.formats")
    return lookup(found, name, "format")()  # type: ignore[no-any-return]


def formats_for(formats: str | None, programs: str | None) -> list[str]:
    """Names of the formats that are asked for, by name or by the programs that will read them, both as "a,b"; [] if
    neither is given. Raises QATError for both at once and for an unknown name."""
    if formats is not None and programs is not None:
        raise QATError("--format and --for say the same in two ways; give one of them")
    if formats is not None:
        return list(dict.fromkeys(get_format(name.strip()).name for name in formats.split(",")))
    readers = {program: name for name, cls in sorted(all_formats().items()) for program in cls.consumers}
    wanted = [name.strip() for name in programs.split(",")] if programs is not None else []
    for name in wanted:
        if name not in readers:
            known = ", ".join(sorted(readers))
            raise QATError(f"--for {name!r} is no program that a format is written for; use {known}")
    return list(dict.fromkeys(readers[name] for name in wanted))


def export(
    model_or_bundle: nn.Module | Bundle,
    folder: str | PathLike[str],
    format: str = "gguf",
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    weights: str | None = None,
    example_inputs: Any = None,
) -> Receipt:
    """Write the trained integers of a prepared model to `folder` and prove that they are what the file holds.

    `tokenizer` is a transformers tokenizer or a folder that holds one. `weights` (last | best | ema) is only recorded.
    `example_inputs`, for formats that hold a graph (onnx, openvino, executorch), is what the deployed module is called
    with: a tensor, a tuple of arguments or a dict of keyword arguments. None: the module's `example_input_array`, or
    what a transformers config says. Batch sizes of two or more stay free in the graph; executorch plans its memory for
    the example's sizes, and takes smaller batches and shorter texts.
    The files are written beside `folder`, read back by the consumer's own code, compared, and renamed into place:
    on any error nothing is left. Under torch.distributed every rank calls this; rank 0 writes.

    Raises ExportError if the format cannot hold the model exactly (all reasons at once), if `folder` is in the way, or
    if anything read back differs from what was trained.
    """
    if weights is not None and weights not in _WEIGHTS:
        raise ExportError(f"weights={weights!r} is unknown; use one of {', '.join(_WEIGHTS)}")
    fmt = get_format(format)
    bundle = model_or_bundle if isinstance(model_or_bundle, Bundle) else convert(model_or_bundle)
    bundle.weights = weights or bundle.weights
    if example_inputs is not None:
        bundle.example_inputs = example_inputs
    target = Path(folder).absolute()
    if _world() == 1:
        refuse_target(target, overwrite)
    refuse_if(fmt.check(bundle, tokenizer), f"{format} cannot hold this model", ExportError)

    def write(stream: TensorStream) -> Receipt:
        refuse_target(target, overwrite)
        with replaced_folder(target) as fresh:
            return _write(fmt, stream, fresh, tokenizer)

    receipt = _together(write, TensorStream(bundle))
    log.info("%s: %d tensors, %d bytes, read back by %s", target, len(receipt.tensors), receipt.bytes, receipt.reader)
    return receipt


def rehearse_export(bundle: Bundle, format: str, tokenizer: Any = None, example_inputs: Any = None) -> Receipt:
    """Export into a temporary folder, read back, compare, delete: what step 0 should prove. Raises as `export` does."""
    fmt = get_format(format)
    if example_inputs is not None:
        bundle.example_inputs = example_inputs
    refuse_if(fmt.check(bundle, tokenizer), f"{format} cannot hold this model", ExportError)

    def write(stream: TensorStream) -> Receipt:
        with tempfile.TemporaryDirectory(prefix="qat-rehearsal-") as folder:
            return _write(fmt, stream, Path(folder), tokenizer)

    return _together(write, TensorStream(bundle))


def _write(fmt: Format, stream: TensorStream, folder: Path, tokenizer: Any) -> Receipt:
    bundle = stream.bundle
    fmt.write(stream, folder, tokenizer)
    read_back(fmt, folder, stream.records, None if _world() > 1 else bundle)
    receipt = Receipt(
        format=fmt.name,
        weights=bundle.weights,
        step=bundle.step,
        recipe=bundle.recipe,
        tensors=stream.records,
        files=file_records(folder),
        inputs={layer: _input(*given) for layer, given in stream.inputs.items()},
        caches={layer: {which: _input(*one) for which, one in given.items()} for layer, given in stream.caches.items()},
        reader=fmt.reader(),
        versions={"torch": torch.__version__, "qat": _version(), **fmt.versions()},
    )
    receipt.save(folder)
    return receipt


def _input(spec: QuantSpec, fields: Fields | None) -> dict[str, Any]:
    if fields is None:
        return {"spec": spec.to_dict()}
    zero = None if fields.zero is None else int(fields.zero.item())
    return {"spec": spec.to_dict(), "scale": fields.scale.item(), "zero_point": zero}


def _together(write: Callable[[TensorStream], Receipt], stream: TensorStream) -> Receipt:
    """`write(stream)` on rank 0 while the others go through the same stream; all return its receipt or all raise."""
    if _world() == 1:
        return write(stream)
    outcome: list[Any] = [None]
    problem: BaseException | None = None
    if _rank() == 0:
        try:
            outcome[0] = write(stream)
        except Exception as raised:  # handed to every rank below, so that none waits for ever
            problem = raised
            outcome[0] = ExportError(str(raised))
    stream.drain()
    dist.broadcast_object_list(outcome, src=0)
    if problem is not None:
        raise problem
    if isinstance(outcome[0], ExportError):
        raise outcome[0]
    return outcome[0]  # type: ignore[no-any-return]


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lightning-qat")
    except PackageNotFoundError:
        return "not installed"
