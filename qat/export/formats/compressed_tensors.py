"""compressed-tensors: integer weights of any transformers model, for transformers and vLLM.

    pack-quantized   weight only, or below 8 bits: codes of 1..8 bits as a dense stream along the row
                       weight_packed      int32 [O, ceil(I * bits / 32)]     code - smallest code
                       weight_scale       model dtype [O, I/g], [O, 1] or [1]
                       weight_zero_point  int32 [ceil(O * bits / 32), G], a stream down the rows (asymmetric only)
                       weight_shape       int64 [2]
    int-quantized    8-bit weights with quantized inputs: int8 `weight`, `weight_scale`, int8 `weight_zero_point`;
                       a static input adds `input_scale` [1] (and `input_zero_point`)

Layers of different grids become config groups, each with its format. `W = (q - z) * s` in the model's dtype t: with s
exact in t, both factors and (below fp32) the product need no rounding but the last, so it equals the fp32 product cast
to t. 1, 2, 4 and 8 bits are laid out alike by all versions; 3, 5, 6 and 7 need compressed-tensors 0.18.

transformers loads symmetric files as they are, single- or mixed-group, and an asymmetric file with
`CompressedTensorsConfig(dequantize=True)`, which knows one group only: asymmetric grids in several groups are refused.
The same flag loads T5 and Mamba, whose own weight initialization trips over a packed layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import hf_folder
from qat.export.format import Format, TensorStream
from qat.export.packing import pack_bits, unpack_bits
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import Fields, QTensor
from qat.specs import QuantSpec

PACKED, INTEGER = "pack-quantized", "int-quantized"
_KEEP = "add a rule {match: [its name], keep_float: true}"
# dtypes that hold every scale of a grid exactly
_HOLDS = {
    "portable": (torch.float32, torch.bfloat16, torch.float16),
    "bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float32, torch.float16),
    "fp32": (torch.float32,),
}


class CompressedTensors(Format):
    """The format of llm-compressor, read by transformers and vLLM."""

    name = "compressed-tensors"
    shard_bytes: ClassVar[int] = 1 << 30

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = []
        if set(row.kinds.values()) - {"linear"} or set(row.kinds) - {"weight"}:
            found.append(f"compressed-tensors holds quantized Linear layers, not {row.type}; {_KEEP}")
        if row.weight is None:
            return [*found, "its input is quantized but not its weight; give its rule a weight too"]
        if not row.weight.is_int:
            found.append(f"grid {row.weight.kind}: this writer stores integers; nearest: grid: int, bits: 4")
        if row.weight.signed_scale:
            found.append("signed_scale=true: compressed-tensors has positive scales; nearest: signed_scale: false")
        if row.weight.scale not in _HOLDS:
            found.append(f"scale={row.weight.scale}: this writer stores scales as floats; use scale: portable")
        if row.weight.zero_point == "float":
            found.append("zero_point=float: compressed-tensors has integer zero points; nearest: zero_point: int")
        if row.input is not None:
            found += _input_reasons(row.input)
        return found

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        if bundle.config is None:
            return ["the model has no transformers config; compressed-tensors needs it as config.json"]
        dtype = hf_folder.model_dtype(bundle.module)
        found = _mixed_reasons(bundle)
        if dtype not in _HOLDS["portable"]:
            found.append(f"the model's dtype is {dtype}; cast it to float32, bfloat16 or float16")
        specs = bundle.specs()
        odd = sorted({spec.scale for spec in specs.values() if dtype not in _HOLDS[spec.scale]})
        if odd:
            found.append(f"scale={odd[0]} does not fit a model in {dtype}, the dtype of stored scales; use portable")
        inputs = bundle.inputs
        static = {name: spec.scale for name, (spec, fields) in inputs.items() if fields is not None}
        layer = next((name for name, scale in static.items() if dtype not in _HOLDS[scale]), None)
        if layer is not None:
            what = f"input scale={static[layer]} of {layer}"
            found.append(f"{what} does not fit a model in {dtype}, the dtype of stored scales; use portable")
        groups = {_scheme(spec, inputs.get(_layer(name))) for name, spec in specs.items()}
        if len(groups) > 1 and any(not _symmetric(spec) for spec in specs.values()):
            found.append(
                "grids with a zero point beside other grids: transformers loads such a file in no way; "
                "use zero_point: none, or one grid for all layers"
            )
        return found

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(
        self, name: str, weight: QTensor, container: str = PACKED, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Local names -> tensors; scales in `dtype` (default: out_dtype), which has to hold them exactly."""
        spec, bits = weight.spec, weight.spec.bits
        offset = _offset(spec)
        scale = weight.scale.to(dtype or weight.out_dtype)
        if not torch.equal(scale.float(), weight.scale.float()):
            raise ExportError(f"{name}: scales stored in {scale.dtype} would be rounded; use scale: portable")
        zero = weight.zero_point
        if not _symmetric(spec):
            zero = torch.zeros_like(weight.scale, dtype=torch.int16) if zero is None else zero
            # zero points exist per row or group only: one for the tensor is repeated
            scale, zero = (t.expand(weight.codes.shape[0], t.shape[1]) for t in (scale, zero))
        elif spec.granularity == "tensor":
            scale = scale.reshape(1)
        found = {"weight_scale": scale.contiguous()}
        stored = weight.codes.to(torch.int16) + offset
        if container == INTEGER:
            found["weight"] = (stored - (1 << (bits - 1))).to(torch.int8)
            if zero is not None:
                found["weight_zero_point"] = (zero + offset - (1 << (bits - 1))).to(torch.int8)
            return found
        found["weight_packed"] = pack_bits(stored, bits)
        found["weight_shape"] = torch.tensor(weight.codes.shape)
        if zero is not None:
            found["weight_zero_point"] = pack_bits((zero + offset).T.contiguous(), bits).T.contiguous()
        return found

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """From either container, by the names in `packed`."""
        offset, half = _offset(spec), 1 << (spec.bits - 1)
        rows, columns = layout.rows_shape
        scale = packed["weight_scale"].float().to(spec.scale_grid.dtype)
        zero = packed.get("weight_zero_point")
        if "weight" in packed:
            codes = packed["weight"].to(torch.int16) + half
            zero = None if zero is None else zero.to(torch.int16) + half
        else:
            codes = unpack_bits(packed["weight_packed"], spec.bits, columns)
            zero = None if zero is None else unpack_bits(zero.T, spec.bits, rows).T
        if spec.granularity == "tensor":
            scale = scale.reshape(-1)[:1].reshape(1, 1)
            zero = None if zero is None else zero[:1, :1]
        zero = None if zero is None or spec.zero_point == "none" else (zero - offset).to(torch.int16).contiguous()
        return QTensor((codes - offset).to(spec.grid.code_dtype), scale, zero, None, spec, layout, out_dtype)

    # ---- the files -----------------------------------------------------------------------------------------------

    def write(self, stream: TensorStream, folder: Path, tokenizer: Any) -> None:
        bundle = stream.bundle
        dtype = hf_folder.model_dtype(bundle.module)
        shards = hf_folder.ShardWriter(folder, self.shard_bytes)
        for entry, value in stream:
            if not isinstance(value, QTensor):
                shards.add({entry.name: value})
                continue
            for name in (entry.name, *(alias for alias, owner in bundle.tied.items() if owner == entry.name)):
                layer = _layer(name)
                given = stream.inputs.get(layer)
                tensors = self.pack(name, value, _container(value.spec, given), dtype)
                tensors |= _static_input(layer, given, dtype)
                shards.add({f"{layer}.{key}": tensor for key, tensor in tensors.items()})
        shards.close()
        hf_folder.write_config(folder, bundle.module, _quantization_config(stream))
        if tokenizer is not None:
            hf_folder.load_tokenizer(tokenizer).save_pretrained(str(folder))

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        groups = _groups(folder)
        for layer, tensors in hf_folder.read_layers(folder):
            if "weight_scale" in tensors:
                yield f"{layer}.weight", self._weight(folder, layer, tensors, groups)
                tensors = {key: t for key, t in tensors.items() if not key.startswith("weight")}
            for key, tensor in tensors.items():
                yield f"{layer}.{key}" if layer else key, tensor

    def _weight(self, folder: Path, layer: str, tensors: dict[str, Tensor], groups: dict[str, Any]) -> Tensor:
        scheme = groups.get(layer) or groups.get("Linear")
        if scheme is None:
            raise ExportError(f"{folder / 'config.json'} names no config group for the quantized layer {layer}")
        try:
            if not _installed():
                spec = _spec(scheme, tensors["weight_scale"])
                stored = tensors.get("weight_shape", tensors.get("weight"))
                shape = tuple(stored.tolist()) if "weight_shape" in tensors else tuple(stored.shape)  # type: ignore[union-attr]
                return self.unpack(tensors, spec, Layout(shape), tensors["weight_scale"].dtype).dequantize()
            from compressed_tensors.compressors import BaseCompressor
            from compressed_tensors.quantization import QuantizationScheme

            compressor = BaseCompressor.get_value_from_registry(scheme["format"])
            return compressor.decompress(tensors, QuantizationScheme(**scheme))["weight"]  # type: ignore[no-any-return]
        except (KeyError, ValueError, TypeError, RuntimeError, AssertionError) as problem:
            what = " ".join(str(problem).split())[:200]
            raise ExportError(f"{folder}: {layer} cannot be decoded ({type(problem).__name__}: {what})") from None

    def reader(self) -> str:
        return f"compressed-tensors {_version('compressed-tensors')}" if _installed() else "qat"

    def versions(self) -> dict[str, str]:
        packages = ("compressed-tensors", "transformers", "safetensors")
        return {name: _version(name) for name in packages if find_spec(name.replace("-", "_")) is not None}


# ---- grids and the configuration -------------------------------------------------------------------------------------


def _input_reasons(spec: QuantSpec) -> list[str]:
    found = []
    if not spec.is_int:
        found.append(f"input grid {spec.kind}: this writer stores integers; nearest: grid: int, bits: 8")
    if spec.granularity not in ("token", "tensor"):
        found.append(f"input granularity={spec.granularity}: compressed-tensors has token (dynamic) or tensor (static)")
    if spec.scale not in _HOLDS:
        found.append(f"input scale={spec.scale}: compressed-tensors has float scales; use scale: portable")
    if (
        spec.zero_point == "float"
        or (spec.is_int and spec.int_grid.narrow)
        or (spec.zero_point == "none" and not spec.signed)
    ):
        nearest = "{bits: 8, granularity: token, zero_point: none, narrow: false, signed: true}"
        found.append(f"input grid {spec}: compressed-tensors takes the whole signed grid; nearest: {nearest}")
    return found


def _mixed_reasons(bundle: Bundle) -> list[str]:
    """Why a model in several float dtypes does not fit: config.json has one, and transformers casts all to it.

    The parameter of a quantized layer may differ if its weight in the forward did not (fp32 masters of a bf16 model).
    """
    model = hf_folder.model_dtype(bundle.module)
    live = bundle.parameters
    dtypes = {name: live[name].dtype for name in bundle.floats if live[name].is_floating_point()}
    first = next(((name, dtype) for name, dtype in dtypes.items() if dtype == model), None)
    for name in bundle:
        dtypes[name] = model if bundle.dtypes(name)[1] == model else live[name].dtype
        first = first or (name, model)
    odd = next(((name, dtype) for name, dtype in dtypes.items() if dtype != model), None)
    if odd is None or first is None:
        return []
    return [
        f"{first[0]} is {first[1]} but {odd[0]} is {odd[1]}: transformers loads a model in one dtype and would cast; "
        f"call model.to({model}) before training"
    ]


def _symmetric(spec: QuantSpec) -> bool:
    return spec.signed and spec.zero_point == "none"


def _offset(spec: QuantSpec) -> int:
    """What turns a code into the stored number, which counts from 0."""
    return 1 << (spec.bits - 1) if spec.signed else 0


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _container(spec: QuantSpec, given: tuple[QuantSpec, Fields | None] | None) -> str:
    return INTEGER if given is not None and spec.bits == 8 else PACKED


def _scheme(spec: QuantSpec, given: tuple[QuantSpec, Fields | None] | None) -> str:
    """One config group without its targets, as JSON: layers with the same text share a group."""
    strategy = spec.granularity
    if strategy == "tensor" and not _symmetric(spec):
        strategy = "channel"
    group: dict[str, Any] = {
        "format": _container(spec, given),
        "weights": {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": _symmetric(spec),
            "strategy": strategy,
            "group_size": spec.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }
    if given is not None:
        static = given[1] is not None
        group["input_activations"] = {
            "num_bits": given[0].bits,
            "type": "int",
            "symmetric": given[0].zero_point == "none",
            "strategy": given[0].granularity,
            "group_size": None,
            "dynamic": not static,
        }
    return json.dumps(group, sort_keys=True)


def _quantization_config(stream: TensorStream) -> dict[str, Any]:
    """One group: every Linear but the ignored ones. Several: each lists its layers by name."""
    bundle = stream.bundle
    members: dict[str, list[str]] = {}
    names = [(entry.name, entry.spec) for entry in stream.entries if entry.spec is not None]
    names += [(alias, dict(names)[owner]) for alias, owner in bundle.tied.items()]
    for name, spec in names:
        members.setdefault(_scheme(spec, stream.inputs.get(_layer(name))), []).append(_layer(name))
    quantized = {layer for layers in members.values() for layer in layers}
    groups = {
        f"group_{number}": {**json.loads(scheme), "targets": ["Linear"] if len(members) == 1 else sorted(layers)}
        for number, (scheme, layers) in enumerate(members.items())
    }
    containers = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": containers.pop() if len(containers) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in bundle.linears if name not in quantized],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _static_input(layer: str, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """`input_scale` [1] and `input_zero_point` [1] of a static input; {} for a dynamic one.

    Raises ExportError if `dtype` does not hold the scale exactly.
    """
    spec, fields = given or (None, None)
    if spec is None or fields is None:
        return {}
    scale = fields.scale.reshape(1).to(dtype)
    if not torch.equal(scale.float(), fields.scale.reshape(1).float()):
        raise ExportError(f"{layer}: its input scale stored in {dtype} would be rounded; use scale: portable")
    found = {"input_scale": scale}
    if fields.zero is not None:
        half = 1 << (spec.bits - 1)
        found["input_zero_point"] = (fields.zero.reshape(1) + _offset(spec) - half).to(torch.int8)
    return found


def _groups(folder: Path) -> dict[str, Any]:
    """Target (layer name, or "Linear") -> scheme, from config.json. Raises ExportError if it is not there."""
    config = hf_folder.read_config(folder)
    try:
        groups = config["quantization_config"]["config_groups"].values()
        return {target: group for group in groups for target in group["targets"]}
    except (KeyError, TypeError, AttributeError):
        raise ExportError(f"{folder / 'config.json'} holds no quantization_config with config groups") from None


def _spec(scheme: dict[str, Any], scale: Tensor) -> QuantSpec:
    """The grid that a scheme and the dtype of its scale describe."""
    weights = scheme["weights"]
    symmetric = weights["symmetric"]
    return QuantSpec(
        bits=weights["num_bits"],
        signed=symmetric,
        granularity=weights["strategy"],
        group_size=weights["group_size"] or None,
        zero_point="none" if symmetric else "int",
        scale={torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[scale.dtype],
    )


def _installed() -> bool:
    return find_spec("compressed_tensors") is not None


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
