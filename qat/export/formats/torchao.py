"""torchao: weights of a transformers folder as torchao's tensors, read by transformers and by torchao itself.

    IntxUnpackedToInt8Tensor   integers of 1 to 8 bits, by group or row, with zero points
        _weight_qdata       int8 [O, I]               codes, counted from -2^(bits - 1) for unsigned grids too
        _weight_scale       model's dtype t [O, G]
        _weight_zero_point  int8 [O, G]
    Int8Tensor                 8 bits by row without zero points: _weight_qdata int8 [O, I], _weight_scale t [O, 1]
    Float8Tensor               e4m3 or e5m2 by row: _weight_qdata [O, I], _weight_scale t [O, 1]

    W = (q - z) * s     both factors are numbers of t, and the product is rounded once, to t

Which of them a weight is, with its bits and groups, stands in the metadata of every safetensors file, where
transformers looks it up; `quant_type` of config.json says the same once more, and `modules_to_not_convert` names the
layers in float, which transformers would quantize otherwise. A scale for the whole tensor is repeated for each row. A
head that is tied to a quantized embedding has no tensors of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import hf_folder
from qat.export.format import TensorStream, declared_ties
from qat.export.hf_format import HOLDS, KEEP, HfFormat, expect, layer_of, targets
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import Fields, QTensor
from qat.specs import QuantSpec

INTX, INT8, FLOAT8 = "IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor"
_FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_DTYPES = {str(dtype)[6:]: dtype for dtype in HOLDS["portable"]}
_ATTRIBUTES = {
    INTX: {"target_dtype", "activation_quantization"},
    INT8: {"act_quant_kwargs", "reduce_range"},
    FLOAT8: {"mm_config", "act_quant_kwargs", "kernel_preference"},
}
_NEAREST = "nearest: grid: int, bits: 4, granularity: group, group_size: 32"


class Stored(NamedTuple):
    """How the metadata describes a weight: class, code dtype, numbers of a scale along a row, dtype when decoded."""

    kind: str
    codes: str
    block: int
    dtype: torch.dtype


class TorchAo(HfFormat):
    """The format of torchao in transformers."""

    name = "torchao"
    bits = "1 to 8"
    contents = "int and ternary by tensor, channel or group, with or without zero points; e4m3, e5m2; mixed layers"
    consumers = ("torchao",)
    packages: ClassVar[tuple[str, ...]] = ("transformers", "safetensors")
    consumer = ("torchao", "torchao")
    mark = "_weight_qdata"

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = []
        if set(row.kinds.values()) - {"linear", "embedding"} or set(row.kinds) - {"weight"}:
            found.append(f"torchao holds quantized Linear and Embedding layers, not {row.type}; {KEEP}")
        if row.input is not None:
            found.append("this export to torchao is of weights only; set input: null in its rule")
        spec = row.weight
        if spec is None:
            return found
        if not spec.is_int and spec.kind not in _FLOATS:
            return [*found, f"grid {spec.kind}: torchao stores integers, e4m3 and e5m2; {_NEAREST}"]
        if spec.zero_point == "float":
            found.append("zero_point=float: torchao subtracts integer zero points; nearest: zero_point: int")
        if spec.kind in _FLOATS and spec.granularity == "group":
            found.append(f"grid {spec.kind} in groups: torchao has a scale per row for it; use granularity: channel")
        if not self.holds(spec):
            found.append(f"scale={spec.scale}: torchao stores scales in the model's dtype; use scale: portable")
        return found

    def holds(self, spec: QuantSpec) -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.bfloat16) if spec.scale == "e8m0" else super().holds(spec)

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        found = super().model_reasons(bundle, tokenizer)
        layouts = bundle.layouts()
        for name in bundle:
            aliases = self.aliases(bundle, name)
            if aliases and layouts[name].kind == "embedding":
                found.append(f"{aliases[0]} shares {name} in a way that transformers does not know of; untie them")
        return found

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Local names -> tensors; scales in `dtype` (default: out_dtype). Raises ExportError if that rounds them."""
        spec, rows = weight.spec, weight.codes.shape[0]
        scale = weight.scale.float().to(dtype or weight.out_dtype)
        if not torch.equal(scale.float(), weight.scale.float()):
            raise ExportError(f"{name}: scales stored in {scale.dtype} would be rounded; use scale: portable")
        scale = scale.expand(rows, -1).contiguous()
        found = {"_weight_qdata": weight.codes, "_weight_scale": scale}
        if spec.is_int:
            offset = offset_of(spec)
            found["_weight_qdata"] = (weight.codes.to(torch.int16) - offset).to(torch.int8)
            if kind_of(spec) == INTX:
                zero = torch.zeros_like(scale) if weight.zero_point is None else weight.zero_point.expand(rows, -1)
                found["_weight_zero_point"] = (zero.to(torch.int16) - offset).to(torch.int8)
        return found

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """Raises ValueError for tensors that are not those of such a weight."""
        rows, columns = layout.rows_shape
        stored = stored_as(spec, columns, packed["_weight_scale"].dtype)
        _check(packed, stored, (rows, columns))
        one = 1 if spec.granularity == "tensor" else rows
        scale = packed["_weight_scale"]
        codes, zero = packed["_weight_qdata"], packed.get("_weight_zero_point")
        if any(t is not None and not torch.equal(t[:one].expand(rows, -1), t) for t in (scale, zero)):
            raise ValueError(f"scales that differ between rows, of which {spec} has one")
        if spec.is_int:
            offset = offset_of(spec)
            codes = (codes.to(torch.int16) + offset).to(spec.grid.code_dtype)
            zero = torch.zeros_like(scale, dtype=torch.int16) if zero is None else zero.to(torch.int16) + offset
            low, high = spec.int_grid.qmin, spec.int_grid.qmax
            if int(codes.min()) < low or int(codes.max()) > high or int(zero.min()) < low or int(zero.max()) > high:
                raise ValueError(f"codes or zero points outside {low}..{high}")
            if spec.zero_point == "none" and bool(zero.any()):
                raise ValueError("zero points, which the grid lacks")
            zero = zero[:one].contiguous() if spec.zero_point == "int" else None
        scale = scale[:one].float().to(spec.scale_grid.dtype).contiguous()
        return QTensor(codes, scale, zero, None, spec, layout, out_dtype)

    # ---- the files -----------------------------------------------------------------------------------------------

    def aliases(self, bundle: Bundle, name: str) -> list[str]:
        ties = declared_ties(bundle.module)
        return [alias for alias in super().aliases(bundle, name) if alias not in ties]

    def layer_tensors(
        self, name: str, weight: QTensor, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return self.pack(name, weight, dtype)

    def metadata(self, stream: TensorStream) -> dict[str, str]:
        """Of every file the whole: transformers takes the list of names from the last one that it opens."""
        said = {name: json.dumps(_described(stored)) for name, (_, stored) in self._weights(stream).items()}
        for entry in stream.entries:
            said.setdefault(entry.name, json.dumps({"_type": "Tensor"}))
        return said | {"tensor_names": json.dumps(list(said))}

    def quantization_config(self, stream: TensorStream) -> dict[str, Any]:
        weights = self._weights(stream)
        configs = {layer_of(name): _config(spec, stored) for name, (spec, stored) in weights.items()}
        different = {json.dumps(config) for config in configs.values()}
        one = next(iter(configs.values())) if len(different) == 1 else None
        layouts = stream.bundle.layouts()
        return {
            "quant_method": "torchao",
            "quant_type": {"default": one or _typed("FqnToConfig", 1, {"fqn_to_config": configs})},
            "modules_to_not_convert": [name for name in stream.bundle.linears if name not in targets(stream)],
            "include_input_output_embeddings": any(layout.kind == "embedding" for layout in layouts.values()),
            "untie_embedding_weights": False,
        }

    def _weights(self, stream: TensorStream) -> dict[str, tuple[QuantSpec, Stored]]:
        """Quantized parameter -> what it is stored as."""
        bundle, found = stream.bundle, {}
        dtype, layouts = hf_folder.model_dtype(bundle.module), bundle.layouts()
        for entry in stream.entries:
            if entry.spec is not None:
                stored = stored_as(entry.spec, layouts[entry.name].rows_shape[1], dtype)
                for name in (entry.name, *self.aliases(bundle, entry.name)):
                    found[name] = entry.spec, stored
        return found

    def config(self, folder: Path) -> dict[str, Any]:
        """config.json, and under "metadata" that of all files."""
        return {**super().config(folder), "metadata": dict(_metadata(folder))}

    def of_weight(self, key: str) -> bool:
        return key.startswith("_weight_")

    def weight(self, layer: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
        name, metadata = f"{layer}.weight", config["metadata"]
        stored = _read(metadata.get(name), name)
        codes, scale = tensors["_weight_qdata"], tensors["_weight_scale"]
        # our own checks come first: torchao takes shapes and codes as they are
        _check(tensors, stored, tuple(codes.shape))
        if name not in json.loads(metadata.get("tensor_names", "[]")):
            raise ValueError("not among the tensor_names of the file's metadata")
        if self.installed():
            from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

            given = {f"{layer}.{key}": tensor for key, tensor in tensors.items() if self.of_weight(key)}
            only = {name: metadata[name], "tensor_names": json.dumps([name])}
            found: Tensor = unflatten_tensor_state_dict(given, only)[0][name].dequantize()
            return found
        scale = scale.repeat_interleave(stored.block, 1)
        if stored.kind == FLOAT8:
            return (codes.float() * scale).to(stored.dtype)
        numbers = codes.to(stored.dtype)
        if "_weight_zero_point" in tensors:
            numbers = numbers - tensors["_weight_zero_point"].to(stored.dtype).repeat_interleave(stored.block, 1)
        return (numbers * scale).to(stored.dtype)


# ---- grids -----------------------------------------------------------------------------------------------------------


def offset_of(spec: QuantSpec) -> int:
    """What lies between codes and stored codes, which are signed."""
    return 0 if spec.signed else 1 << (spec.bits - 1)


def kind_of(spec: QuantSpec) -> str:
    """The class of torchao: Int8Tensor computes with the codes themselves, but loses zero points on the way."""
    if spec.kind in _FLOATS:
        return FLOAT8
    plain = spec.bits == 8 and spec.signed and spec.zero_point == "none" and spec.granularity != "group"
    return INT8 if plain else INTX


def stored_as(spec: QuantSpec, columns: int, dtype: torch.dtype) -> Stored:
    """Of a weight with rows of `columns` numbers in a model in `dtype`."""
    codes = str(_FLOATS[spec.kind])[6:] if spec.kind in _FLOATS else f"int{spec.bits}"
    return Stored(kind_of(spec), codes, spec.group_size or columns, dtype)


# ---- metadata --------------------------------------------------------------------------------------------------------


def _typed(kind: str, version: int, data: dict[str, Any]) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def _dtype(name: str) -> dict[str, Any]:
    return {"_type": "torch.dtype", "_data": name}


def _described(stored: Stored) -> dict[str, Any]:
    """A weight as torchao's own writer describes it."""
    data: dict[str, Any] = {"block_size": [1, stored.block], "dtype": _dtype(str(stored.dtype)[6:])}
    names = ["qdata", "scale"]
    if stored.kind == INTX:
        data |= {"target_dtype": _dtype(stored.codes), "activation_quantization": None}
        names.append("zero_point")
    elif stored.kind == INT8:
        data |= {"act_quant_kwargs": None, "reduce_range": False}
    else:
        preference = {"_type": "KernelPreference", "_data": "AUTO"}
        data |= {"mm_config": None, "act_quant_kwargs": None, "kernel_preference": preference}
    return {"_type": stored.kind, "_data": data, "_tensor_data_names": names}


def _config(spec: QuantSpec, stored: Stored) -> dict[str, Any]:
    """What `quant_type` of config.json says of such a weight."""
    row = _typed("PerRow", 1, {"dim": -1})
    if stored.kind == INT8:
        return _typed("Int8WeightOnlyConfig", 2, {"group_size": None, "granularity": row, "set_inductor_config": True})
    if stored.kind == FLOAT8:
        dtype = _dtype(stored.codes)
        return _typed(
            "Float8WeightOnlyConfig", 2, {"weight_dtype": dtype, "set_inductor_config": True, "granularity": row}
        )
    where = _typed("PerGroup", 1, {"group_size": spec.group_size}) if spec.group_size else None
    mapping = "SYMMETRIC" if spec.signed and spec.zero_point == "none" else "ASYMMETRIC"
    return _typed(
        "IntxWeightOnlyConfig",
        2,
        {
            "weight_dtype": _dtype(stored.codes),
            "granularity": where or _typed("PerAxis", 1, {"axis": 0}),
            "mapping_type": {"_type": "MappingType", "_data": mapping},
            "scale_dtype": None,
            "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
            "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
        },
    )


def _metadata(folder: Path) -> Iterator[tuple[str, str]]:
    """Raises ExportError for a file that cannot be read."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                yield from (file.metadata() or {}).items()
        except (SafetensorError, OSError) as problem:
            raise ExportError(f"{path} is not a safetensors file that can be read ({problem})") from None


def _read(text: str | None, name: str) -> Stored:
    """What the metadata says of a weight. Raises ExportError if that is none that we read."""
    try:
        said = json.loads(text or "null")
        data, kind = said["_data"], said["_type"]
        names = set(said["_tensor_data_names"])
        one, block = data["block_size"]
        dtype = _DTYPES[data["dtype"]["_data"]]
        codes = "int8" if kind == INT8 else data["target_dtype"]["_data"] if kind == INTX else ""
        wanted = {"qdata", "scale"} | ({"zero_point"} if "zero_point" in names or kind == INTX else set())
        known = {"block_size", "dtype"} | _ATTRIBUTES.get(kind, set())
        inputs = data.get("activation_quantization"), data.get("act_quant_kwargs"), data.get("reduce_range")
        if one != 1 or type(block) is not int or block < 1 or names != wanted or set(data) != known:
            raise ValueError(said)
        if kind == INTX and codes not in [f"int{bits}" for bits in range(1, 9)]:
            raise ValueError(codes)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExportError(f"{name} has no description in the file's metadata that can be read") from None
    if any(inputs):
        raise ExportError(f"{name} quantizes its inputs too, which is not read")
    return Stored(kind, codes, block, dtype)


def _check(tensors: dict[str, Tensor], stored: Stored, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless these are the tensors of a weight of this shape."""
    codes, scale = tensors["_weight_qdata"], tensors["_weight_scale"]
    if len(shape) != 2 or shape[1] % stored.block:
        raise ValueError(f"qdata is {list(shape)}, no rows of whole groups of {stored.block}")
    fields = (shape[0], shape[1] // stored.block)
    if stored.kind == FLOAT8:
        if codes.dtype not in _FLOATS.values():
            raise ValueError(f"qdata is {codes.dtype}")
        expect("qdata", codes, codes.dtype, shape)
    else:
        expect("qdata", codes, torch.int8, shape)
        half = 1 << (int(stored.codes[3:]) - 1)
        if codes.numel() and not -half <= int(codes.min()) <= int(codes.max()) < half:
            raise ValueError(f"codes outside those of {stored.codes}")
    # Int8Tensor and Float8Tensor of torchao's own making have fp32 scales
    expect("scale", scale, scale.dtype if scale.dtype in _DTYPES.values() else stored.dtype, fields)
    if "_weight_zero_point" in tensors:
        expect("zero_point", tensors["_weight_zero_point"], torch.int8, fields)
    elif stored.kind == INTX:
        raise ValueError("no zero points")
