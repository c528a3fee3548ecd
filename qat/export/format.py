"""`Format`: how a Bundle lies in a file. A format registers by living in `qat/export/formats/`.

check(plan or bundle)       why it cannot be written; empty means it can
pack / unpack               one QTensor to the tensors of the file, and our own inverse
write(stream, folder)       the files, tensor by tensor
read(folder)                (name, weight) as the consumer's own code computes it, and the ranges of static inputs
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qat.convert import Bundle, example
from qat.errors import ExportError
from qat.export.receipt import TensorRecord
from qat.layout import Layout
from qat.plan import Plan, PlanRow
from qat.qtensor import Fields, QTensor, tensor_sha256
from qat.scales import TwoLevel
from qat.specs import QuantSpec

_NAMED = 3
# rows, of which every format packs a multiple of 32 without a rest
_FEW = 128


class Stored(NamedTuple):
    """A parameter in a file: the weight as its consumer reads it, and what `Format.unpack` takes; None: it is float."""

    name: str
    weight: Tensor
    packed: dict[str, Tensor] | None


@dataclass(frozen=True)
class Entry:
    """A tensor that will come, before it is computed: `spec` None for a float one."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: QuantSpec | None


class TensorStream:
    """The tensors of a bundle in one fixed order, once, each with its record for the receipt.

    Quantized ones first, then the floats; the ranges of static inputs and caches get records but lie in `inputs` and
    `caches`. A parameter
    that the model itself ties to another (output head to embedding) is not listed twice. Every rank of a distributed
    run must go through it to the end: an access may be collective.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.records: list[TensorRecord] = []
        # layer -> (spec, fields of a static range or None)
        self.inputs = bundle.inputs
        # attention -> the same of its keys (k) and values (v)
        self.caches = bundle.caches
        self.entries = [*self._quantized(), *self._floats()]
        self._iterator = self._run()

    def __iter__(self) -> Iterator[tuple[Entry, QTensor | Tensor]]:
        return self._iterator

    def drain(self) -> None:
        """Go through what is left, for the ranks that do not write and for a writer that failed."""
        for _ in self._iterator:
            continue

    def _quantized(self) -> list[Entry]:
        shapes = self.bundle.shapes()
        entries = []
        for name, spec in self.bundle.specs().items():
            entries.append(Entry(name, shapes[name], self.bundle.dtypes(name)[1], spec))
        return entries

    def _floats(self) -> list[Entry]:
        tied = declared_ties(self.bundle.module)
        live = self.bundle.parameters
        return [
            Entry(name, tuple(live[name].shape), live[name].dtype, None)
            for name in self.bundle.floats
            if not (name in tied and tied[name] in live and live[tied[name]] is live[name])
        ]

    def _run(self) -> Iterator[tuple[Entry, QTensor | Tensor]]:
        floats = self.bundle.floats
        for entry in self.entries:
            value = self.bundle[entry.name] if entry.spec is not None else floats[entry.name].detach().cpu()
            weight = value.dequantize() if isinstance(value, QTensor) else value
            spec = None if entry.spec is None else entry.spec.to_dict()
            dtype = str(weight.dtype).removeprefix("torch.")
            self.records.append(TensorRecord(entry.name, spec, list(weight.shape), dtype, tensor_sha256(weight)))
            yield entry, value
        self.records += [
            TensorRecord(name, None, [1], str(value.dtype).removeprefix("torch."), tensor_sha256(value))
            for name, value in (static_ranges(self.inputs) | cache_scales(self.caches)).items()
        ]


def static_ranges(inputs: dict[str, tuple[QuantSpec, Fields | None]]) -> dict[str, Tensor]:
    """Static inputs as the receipt and `Format.read` name them; dynamic ones are left out.

    <layer>.input_scale        fp32 [1]
    <layer>.input_zero_point   int16 [1], counted on the signed grid of the input's bits
    <layer>.input_global_scale fp32 [1], alone, of nvfp4: `divisor`
    """
    found: dict[str, Tensor] = {}
    for layer, (spec, fields) in inputs.items():
        if fields is None:
            continue
        if isinstance(spec.scale_grid, TwoLevel):
            parts = spec.scale_grid.encode(fields.scale.detach().cpu(), None)
            found[f"{layer}.input_global_scale"] = divisor(spec, parts)
            continue
        found[f"{layer}.input_scale"] = fields.scale.detach().cpu().float().reshape(1)
        if fields.zero is not None:
            zero = fields.zero.detach().cpu().reshape(1) - spec.int_grid.qmin - (1 << (spec.bits - 1))
            found[f"{layer}.input_zero_point"] = zero.to(torch.int16)
    return found


def cache_scales(caches: dict[str, dict[str, tuple[QuantSpec, Fields | None]]]) -> dict[str, Tensor]:
    """Static scales of keys and values, fp32 [1], as the receipt and `Format.read` name them: `<attention>.k_scale` and
    `.v_scale`."""
    return {
        f"{layer}.{which}_scale": fields.scale.detach().cpu().float().reshape(1)
        for layer, given in caches.items()
        for which, (_, fields) in given.items()
        if fields is not None
    }


def divisor(spec: QuantSpec, parts: Mapping[str, Tensor]) -> Tensor:
    """The tensor's scale of nvfp4 as that by which the blocks' scales are divided, fp32 [1]."""
    return parts["tensor"] if spec.scale == "nvfp4_over" else 1.0 / parts["tensor"]


def declared_ties(module: nn.Module) -> dict[str, str]:
    """Parameter -> the one it is tied to, as a transformers model declares it; {} for any other module."""
    ties = getattr(module, "all_tied_weights_keys", None)
    return dict(ties) if isinstance(ties, dict) else {}


class Format(ABC):
    """One file format.

    needs       what it is made from: "tensors", or a "graph"
    bits        of its codes, in words, and `contents`: grids, groups, scales
    consumers   programs that load it, as `qat export --for` names them; a program belongs to one format
    desc_act    it says which inputs form a group
    """

    name: ClassVar[str] = ""
    needs: ClassVar[str] = "tensors"
    bits: ClassVar[str] = ""
    contents: ClassVar[str] = ""
    consumers: ClassVar[tuple[str, ...]] = ()
    desc_act: ClassVar[bool] = False

    def check(self, source: Plan | Bundle, tokenizer: Any = None) -> list[str]:
        """Why `source` cannot be written exactly, each reason naming layers and the fix; empty means it can.

        A plan is checked for its grids only (that is all that is known before training); a bundle for everything.
        """
        plan = source if isinstance(source, Plan) else source.plan
        found: dict[str, list[str]] = {}
        for row in plan.rows:
            lost = [] if row.output is None else [f"output {row.output}: {self.name} holds no grid of an output"]
            if row.norm and self.needs == "tensors":
                lost.append(
                    f"batch_norm.fold: {self.name} holds a layer's tensors, and its reader would run the norm once "
                    "more; use onnx or openvino, or fold: false"
                )
            if row.weight is not None and row.weight.desc_act and not self.desc_act:
                lost.append(f"desc_act: {self.name} has groups of consecutive inputs; use gptq, or desc_act: false")
            for why in [*lost, *(self.row_reasons(row) if row.cache is None else self.cache_reasons(row.cache))]:
                found.setdefault(why, []).append(row.name or "the model")
        reasons = [f"{_names(names)}: {why}" for why, names in found.items()]
        reasons += self.plan_reasons(plan)
        if isinstance(source, Bundle):
            lost = [row.name for row in plan.rows if not row.name.startswith(source.prefix)]
            if lost:
                reasons.append(f"{_names(lost)}: outside the transformers model, so not in the file; keep_float: true")
            reasons += self.model_reasons(source, tokenizer)
        return reasons

    @abstractmethod
    def row_reasons(self, row: PlanRow) -> list[str]:
        """Why this layer's grids do not fit."""

    def cache_reasons(self, spec: QuantSpec) -> list[str]:
        """Why attention's keys and values on this grid do not fit."""
        return [f"cache {spec}: {self.name} holds no scales of a cache; use compressed-tensors, or leave the rule out"]

    def plan_reasons(self, plan: Plan) -> list[str]:
        """Why the layers do not fit together."""
        return []

    @abstractmethod
    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        """Why this model (its architecture, dtype, tokenizer) does not fit."""

    def stored_bits(self, spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> float:
        """Bits of a weight in the file: its codes, and all that decodes them. Of many rows to within a word, without
        packing them all."""
        rows = layout.rows_shape[0]
        if rows <= _FEW:
            return _packed_bits(type(self), spec, layout, out_dtype)
        # some tensors grow with the rows, others do not
        few, more = (_packed_bits(type(self), spec, layout.of_rows(count), out_dtype) for count in (_FEW // 2, _FEW))
        return few + (more - few) * (rows - _FEW // 2) / (_FEW // 2)

    def counted(self, bundle: Bundle) -> list[str]:
        """Names of the quantized weights over which `bits_per_weight` goes."""
        return list(bundle)

    def bits_per_weight(self, bundle: Bundle) -> float:
        """Stored bits of a quantized weight, on the average over a model that the format holds; 0 if it has none."""
        specs, layouts, names = bundle.specs(), bundle.layouts(), self.counted(bundle)
        stored = sum(self.stored_bits(specs[name], layouts[name], bundle.dtypes(name)[1]) for name in names)
        return stored / max(1, sum(math.prod(layouts[name].shape) for name in names))

    @abstractmethod
    def pack(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """The tensors of the file for parameter `name`."""

    def in_file(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """`pack`, with what lies in the model's dtype in that of the weight."""
        return self.pack(name, weight)

    @abstractmethod
    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """Our own inverse of `pack`."""

    @abstractmethod
    def write(self, stream: TensorStream, folder: Path, tokenizer: Any) -> None:
        """All files but the receipt, from one pass over `stream`."""

    @abstractmethod
    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, weight) for every tensor in the files, by the consumer's own code where it is installed.

        Ranges of static inputs and caches come under the names of `static_ranges` and `cache_scales`, in the dtype of
        the file.
        Raises ExportError for a damaged file.
        """

    def entries(self, folder: Path) -> Iterator[Stored]:
        """What `read` gives, with what it was read from, for `qat.init.file`; any program may have written the folder.

        Raises ExportError for a damaged file, and for a format that cannot be started from.
        """
        raise ExportError(f"{folder}: training cannot start from {self.name} files")

    def knows(self, folder: Path) -> bool:
        """Whether `entries` reads this folder."""
        return False

    @abstractmethod
    def reader(self) -> str:
        """Whose code `read` uses: package and version, or "qat" for our own."""

    def versions(self) -> dict[str, str]:
        """Versions of the packages that write and read this format, for the receipt."""
        return {}


@functools.lru_cache(maxsize=4096)
def _packed_bits(fmt: type[Format], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> int:
    packed = fmt().in_file("weight", example(spec, layout, out_dtype))
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in packed.values())


def present(distribution: str, module: str) -> bool:
    """Whether a package is there; a folder of its name that Python would import is not."""
    return any(distributions(name=distribution)) and find_spec(module) is not None


def versions_of(packages: Mapping[str, str]) -> dict[str, str]:
    """Distribution -> version, of those (with their modules) that are there."""
    return {name: version(name) for name, module in packages.items() if present(name, module)}


def _names(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Row:
    """One tensor that was read back: equal to what was trained, or there is no row."""

    name: str
    spec: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    max_abs_diff: float
    reader: str


def read_back(fmt: Format, folder: Path, records: list[TensorRecord], bundle: Bundle | None = None) -> list[Row]:
    """Read every tensor with the consumer's own code and compare it with its record.

    Raises ExportError for a tensor that is missing, unknown or different (with the largest difference, if `bundle` is
    given to compare with).
    """
    wanted = {record.name: record for record in records}
    rows: list[Row] = []
    for name, weight in fmt.read(folder):
        record = wanted.pop(name, None)
        if record is None:
            raise ExportError(f"{folder}: tensor {name!r} is in the files but not in the receipt")
        if list(weight.shape) != record.shape:
            raise ExportError(f"{folder}: {name} has shape {list(weight.shape)}, the receipt says {record.shape}")
        seen = weight.to(record.torch_dtype)
        if tensor_sha256(seen) != record.sha256:
            by = _by(seen, name, bundle)
            what = "value" if _is_range(name) else "weight"
            raise ExportError(f"{folder}: {name} read back by {fmt.reader()} is not the trained {what}{by}")
        spec = "float" if record.spec is None else str(QuantSpec.from_dict(record.spec))
        rows.append(Row(name, spec, tuple(record.shape), record.dtype, record.sha256, 0.0, fmt.reader()))
    if wanted:
        first = next(iter(wanted))
        raise ExportError(f"{folder}: {len(wanted)} tensors of the receipt are not in the files, {first} for one")
    return rows


def _is_range(name: str) -> bool:
    return name.endswith((".input_scale", ".input_zero_point", ".input_global_scale", ".k_scale", ".v_scale"))


def _by(seen: Tensor, name: str, bundle: Bundle | None) -> str:
    if bundle is None:
        return ""
    if _is_range(name):
        trained = (static_ranges(bundle.inputs) | cache_scales(bundle.caches))[name]
    else:
        trained = bundle[name].dequantize() if name in bundle else bundle.floats[name]
    return f" (largest difference {(seen.double() - trained.detach().cpu().double()).abs().max().item():.3g})"
