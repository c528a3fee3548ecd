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
from typing import Any

import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import hf_folder
from qat.export.format import TensorStream
from qat.export.hf_format import HOLDS, KEEP, HfFormat, layer_of, targets
from qat.export.packing import pack_bits, unpack_bits
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import Fields, QTensor
from qat.specs import QuantSpec

PACKED, INTEGER = "pack-quantized", "int-quantized"


class CompressedTensors(HfFormat):
    """The format of llm-compressor, read by transformers and vLLM."""

    name = "compressed-tensors"
    bits = "1 to 8"
    contents = "int and ternary by tensor, channel or group, with or without zero points; int8 inputs; mixed layers"
    consumers = ("vllm", "transformers", "sglang")
    consumer = ("compressed-tensors", "compressed_tensors")
    mark = "weight_scale"

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = []
        if set(row.kinds.values()) - {"linear"} or set(row.kinds) - {"weight"}:
            found.append(f"compressed-tensors holds quantized Linear layers, not {row.type}; {KEEP}")
        if row.weight is None:
            return [*found, "its input is quantized but not its weight; give its rule a weight too"]
        if not row.weight.is_int:
            found.append(f"grid {row.weight.kind}: this writer stores integers; nearest: grid: int, bits: 4")
        if row.weight.signed_scale:
            found.append("signed_scale=true: compressed-tensors has positive scales; nearest: signed_scale: false")
        if row.weight.scale not in HOLDS:
            found.append(f"scale={row.weight.scale}: this writer stores scales as floats; use scale: portable")
        if row.weight.zero_point == "float":
            found.append("zero_point=float: compressed-tensors has integer zero points; nearest: zero_point: int")
        if row.input is not None:
            found += _input_reasons(row.input)
        return found

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        found = super().model_reasons(bundle, tokenizer)
        if bundle.config is None:
            return found
        dtype = hf_folder.model_dtype(bundle.module)
        specs = bundle.specs()
        inputs = bundle.inputs
        static = {name: spec.scale for name, (spec, fields) in inputs.items() if fields is not None}
        layer = next((name for name, scale in static.items() if dtype not in HOLDS[scale]), None)
        if layer is not None:
            what = f"input scale={static[layer]} of {layer}"
            found.append(f"{what} does not fit a model in {dtype}, the dtype of stored scales; use portable")
        groups = {_scheme(spec, inputs.get(layer_of(name))) for name, spec in specs.items()}
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

    def layer_tensors(
        self, name: str, weight: QTensor, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        tensors = self.pack(name, weight, _container(weight.spec, given), dtype)
        return tensors | _static_input(layer_of(name), given, dtype)

    def quantization_config(self, stream: TensorStream) -> dict[str, Any]:
        """One group: every Linear but the ignored ones. Several: each lists its layers by name."""
        members: dict[str, list[str]] = {}
        quantized = targets(stream)
        for layer, spec in quantized.items():
            members.setdefault(_scheme(spec, stream.inputs.get(layer)), []).append(layer)
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
            "ignore": [name for name in stream.bundle.linears if name not in quantized],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def weight(self, layer: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
        scheme = _group(layer, config)
        if not self.installed():
            spec = _spec(scheme, tensors["weight_scale"])
            stored = tensors.get("weight_shape", tensors.get("weight"))
            shape = tuple(stored.tolist()) if "weight_shape" in tensors else tuple(stored.shape)  # type: ignore[union-attr]
            return self.unpack(tensors, spec, Layout(shape), tensors["weight_scale"].dtype).dequantize()
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        compressor = BaseCompressor.get_value_from_registry(scheme["format"])
        return compressor.decompress(tensors, QuantizationScheme(**scheme))["weight"]  # type: ignore[no-any-return]


# ---- grids and the configuration -------------------------------------------------------------------------------------


def _input_reasons(spec: QuantSpec) -> list[str]:
    found = []
    if not spec.is_int:
        found.append(f"input grid {spec.kind}: this writer stores integers; nearest: grid: int, bits: 8")
    if spec.granularity not in ("token", "tensor"):
        found.append(f"input granularity={spec.granularity}: compressed-tensors has token (dynamic) or tensor (static)")
    if spec.scale not in HOLDS:
        found.append(f"input scale={spec.scale}: compressed-tensors has float scales; use scale: portable")
    if (
        spec.zero_point == "float"
        or (spec.is_int and spec.int_grid.narrow)
        or (spec.zero_point == "none" and not spec.signed)
    ):
        nearest = "{bits: 8, granularity: token, zero_point: none, narrow: false, signed: true}"
        found.append(f"input grid {spec}: compressed-tensors takes the whole signed grid; nearest: {nearest}")
    return found


def _symmetric(spec: QuantSpec) -> bool:
    return spec.signed and spec.zero_point == "none"


def _offset(spec: QuantSpec) -> int:
    """What turns a code into the stored number, which counts from 0."""
    return 1 << (spec.bits - 1) if spec.signed else 0


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


def _group(layer: str, config: dict[str, Any]) -> dict[str, Any]:
    """The scheme of a layer, or of every Linear. Raises ExportError if config.json has none."""
    try:
        groups = config["quantization_config"]["config_groups"].values()
        found = {target: group for group in groups for target in group["targets"]}
    except (KeyError, TypeError, AttributeError):
        raise ExportError("config.json holds a quantization_config without config groups") from None
    if not (layer in found or "Linear" in found):
        raise ExportError(f"config.json names no config group for the quantized layer {layer}")
    return found.get(layer) or found["Linear"]  # type: ignore[no-any-return]


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
