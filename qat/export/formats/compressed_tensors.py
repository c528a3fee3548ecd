"""compressed-tensors: weights of any transformers model as integers or small floats, for transformers and vLLM.

    pack-quantized   weight only, or below 8 bits: codes of 1..8 bits as a dense stream along the row
                       weight_packed      int32 [O, ceil(I * bits / 32)]     code - smallest code
                       weight_scale       model dtype [O, I/g], [O, 1] or [1]
                       weight_zero_point  int32 [ceil(O * bits / 32), G], a stream down the rows (asymmetric only)
                       weight_shape       int64 [2]
    int-quantized    8-bit weights with quantized inputs: int8 `weight`, `weight_scale`, int8 `weight_zero_point`
    float-quantized  e4m3 `weight`, `weight_scale` [O, 1] or [1] in the model's dtype
    mxfp8-quantized  e4m3 `weight`, `weight_scale` uint8 [O, I/32], s = 2^(byte - 127)
    mxfp4-pack-quantized   weight_packed uint8 [O, I/2], e2m1 codes, the even column in the low half of a byte
                           weight_scale  uint8 [O, I/32]
    nvfp4-pack-quantized   weight_packed as above; weight_scale e4m3 f [O, I/16]; weight_global_scale fp32 G [1];
                           s = f / G in fp32

A static input adds `input_scale` [1] (and `input_zero_point`), one of nvfp4 `input_global_scale` fp32 [1]. A quantized
cache adds `k_scale` and `v_scale` [1] to each attention module, in the model's dtype, and `kv_cache_scheme`. Layers of
different grids become config groups, each with its format. `W = (q - z) * s` in the model's dtype t: with s exact in t,
both factors and (below fp32) the product need no rounding but the last, so it equals the fp32 product cast to t. 4-bit
floats are decoded in fp32 and cast to bf16 whatever the model is: nvfp4_over needs a model in bf16; with powers of two
(e8m0, and nvfp4_portable, whose scale for the tensor has an exact inverse) nothing is rounded. 1, 2, 4 and 8 bits are
laid out alike by all versions; 3, 5, 6 and 7 need compressed-tensors 0.18.

transformers loads symmetric files as they are, single- or mixed-group, and an asymmetric file, or small floats in a
model that is not in bf16, with `CompressedTensorsConfig(dequantize=True)`, which knows one group only: either of them
in several groups is refused. The same flag loads T5 and Mamba, whose own weight initialization trips over a packed
layer.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import hf_folder
from qat.export.ct_schemes import (
    DENSE,
    FLOAT,
    HOLDS_CACHE,
    IN_BF16,
    INTEGER,
    cache_reasons,
    cache_scheme,
    container_of,
    group_of,
    input_reasons,
    offset_of,
    scheme_of,
    spec_of_scheme,
    symmetric,
    weight_reasons,
)
from qat.export.format import TensorStream, cache_scales, divisor
from qat.export.hf_format import HOLDS, KEEP, HfFormat, layer_of, targets
from qat.export.packing import pack_bits, unpack_bits, words_per_row
from qat.layout import Layout
from qat.plan import Plan, PlanRow
from qat.qtensor import Fields, QTensor
from qat.scales import TwoLevel
from qat.specs import QuantSpec


class CompressedTensors(HfFormat):
    """The format of llm-compressor, read by transformers and vLLM."""

    name = "compressed-tensors"
    bits = "1 to 8"
    contents = "int, ternary, e4m3, MXFP8, MXFP4, NVFP4; inputs of 8 bits or NVFP4; caches of 8 bits; mixed layers"
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
        found += weight_reasons(row.weight)
        if row.input is not None:
            found += input_reasons(row.input, row.weight)
        return found

    def cache_reasons(self, spec: QuantSpec) -> list[str]:
        return cache_reasons(spec)

    def plan_reasons(self, plan: Plan) -> list[str]:
        caches = {row.cache.kind: row.name for row in plan.rows if row.cache is not None}
        if len(caches) < 2:
            return []
        return [f"{' and '.join(caches.values())} keep keys and values on different grids; compressed-tensors has one"]

    def holds(self, spec: QuantSpec) -> tuple[torch.dtype, ...]:
        return HOLDS["portable"] if container_of(spec, None) in IN_BF16 else super().holds(spec)

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        found = super().model_reasons(bundle, tokenizer)
        if bundle.config is None:
            return found
        dtype = hf_folder.model_dtype(bundle.module)
        specs = bundle.specs()
        inputs = bundle.inputs
        static = {name: spec.scale for name, (spec, fields) in inputs.items() if fields and spec.group_size is None}
        found += _cache_reasons(bundle, dtype)
        layer = next((name for name, scale in static.items() if dtype not in HOLDS[scale]), None)
        if layer is not None:
            what = f"input scale={static[layer]} of {layer}"
            found.append(f"{what} does not fit a model in {dtype}, the dtype of stored scales; use portable")
        groups = {scheme_of(spec, inputs.get(layer_of(name))) for name, spec in specs.items()}
        if len(groups) > 1 and any(not symmetric(spec) for spec in specs.values()):
            found.append(
                "grids with a zero point beside other grids: transformers loads such a file in no way; "
                "use zero_point: none, or one grid for all layers"
            )
        if dtype != torch.bfloat16 and any(container_of(spec, None) in IN_BF16 for spec in specs.values()):
            if len(groups) > 1:
                found.append(
                    f"scales of small floats beside other grids in a model in {dtype}: they are decoded to bfloat16, "
                    "and transformers would run the model in two dtypes; call model.to(torch.bfloat16) before training"
                )
            if any(spec.scale == "nvfp4_over" for spec in specs.values()):
                found.append(f"scale=nvfp4_over is decoded to bfloat16, not {dtype}; use nvfp4_portable")
        return found

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(
        self, name: str, weight: QTensor, container: str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Local names -> tensors; scales in `dtype` (default: out_dtype), which has to hold them exactly."""
        spec, bits = weight.spec, weight.spec.bits
        container = container or container_of(spec, None)
        if container in IN_BF16:
            return _small_floats(weight)
        offset = offset_of(spec)
        scale = weight.scale.to(dtype or weight.out_dtype)
        if not torch.equal(scale.float(), weight.scale.float()):
            raise ExportError(f"{name}: scales stored in {scale.dtype} would be rounded; use scale: portable")
        zero = weight.zero_point
        if not symmetric(spec):
            zero = torch.zeros_like(weight.scale, dtype=torch.int16) if zero is None else zero
            # zero points exist per row or group only: one for the tensor is repeated
            scale, zero = (t.expand(weight.codes.shape[0], t.shape[1]) for t in (scale, zero))
        elif spec.granularity == "tensor":
            scale = scale.reshape(1)
        found = {"weight_scale": scale.contiguous()}
        if container == FLOAT:
            return found | {"weight": weight.codes}
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
        """From any container, by `spec` and the names in `packed`."""
        if not spec.is_int:
            return _floats(packed, spec, layout, out_dtype)
        offset, half = offset_of(spec), 1 << (spec.bits - 1)
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
        tensors = self.pack(name, weight, container_of(weight.spec, given), dtype)
        return tensors | _static_input(layer_of(name), given, dtype)

    def extra_tensors(self, stream: TensorStream, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: scale.to(dtype) for name, scale in cache_scales(stream.caches).items()}

    def quantization_config(self, stream: TensorStream) -> dict[str, Any]:
        """One group: every Linear but the ignored ones. Several: each lists its layers by name."""
        members: dict[str, list[str]] = {}
        quantized = targets(stream)
        for layer, spec in quantized.items():
            members.setdefault(scheme_of(spec, stream.inputs.get(layer)), []).append(layer)
        groups = {
            f"group_{number}": {**json.loads(scheme), "targets": ["Linear"] if len(members) == 1 else sorted(layers)}
            for number, (scheme, layers) in enumerate(members.items())
        }
        containers = {group["format"] for group in groups.values()}
        caches = [spec for given in stream.caches.values() for spec, _ in given.values()]
        return {
            "quant_method": "compressed-tensors",
            "format": containers.pop() if len(containers) == 1 else "mixed-precision" if containers else DENSE,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [name for name in stream.bundle.linears if name not in quantized],
            "kv_cache_scheme": cache_scheme(caches),
            "global_compression_ratio": None,
        }

    def weight(self, layer: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
        scheme = group_of(layer, config)
        if "weight_shape" in tensors:
            _check_shape(tensors, scheme["weights"]["num_bits"])
        if not self.installed():
            scale = tensors["weight_scale"]
            if "weight_shape" in tensors:
                shape = tuple(tensors["weight_shape"].tolist())
            else:
                rows, columns = tensors.get("weight", tensors.get("weight_packed", scale)).shape
                shape = rows, columns * (1 + ("weight" not in tensors))
            # what has no dtype of the model in it is decoded to bf16
            dtype = scale.dtype if scale.dtype in HOLDS["portable"] else torch.bfloat16
            return self.unpack(tensors, spec_of_scheme(scheme, scale), Layout(shape), dtype).dequantize()
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        compressor = BaseCompressor.get_value_from_registry(scheme["format"])
        return compressor.decompress(tensors, QuantizationScheme(**scheme))["weight"]  # type: ignore[no-any-return]


def _cache_reasons(bundle: Bundle, dtype: torch.dtype) -> list[str]:
    """Why the caches of a model in this dtype do not fit: a `kv_cache_scheme` is that of each attention module."""
    caches = bundle.caches
    if not caches:
        return []
    found = []
    scales = {spec.scale: name for name, given in caches.items() for spec, _ in given.values()}
    odd = next((scale for scale in scales if dtype not in HOLDS_CACHE.get(scale, (dtype,))), None)
    if odd is not None:
        what = f"cache scale={odd} of {scales[odd]}"
        found.append(f"{what} does not fit a model in {dtype}, the dtype of stored scales; use portable")
    for name, module in bundle.attention.items():
        children = {*module._modules}
        if "kv_b_proj" in children:
            found.append(
                f"{name} caches latents, for which vLLM has one scale instead of two; leave the cache rule out"
            )
        elif not ({"k_proj", "v_proj"} <= children or "qkv_proj" in children):
            found.append(f"{name} has no k_proj and v_proj, by which compressed-tensors knows it; leave the rule out")
        elif name not in caches:
            found.append(f"{name} has no cache rule, and compressed-tensors gives its scheme to all attention; add one")
    return found


# ---- small floats ----------------------------------------------------------------------------------------------------


def _small_floats(weight: QTensor) -> dict[str, Tensor]:
    """Containers whose scales are not in the model's dtype."""
    found = {}
    if weight.spec.scale == "e8m0":
        found["weight_scale"] = weight.scale.view(torch.uint8)
    else:
        found["weight_global_scale"] = divisor(weight.spec, weight.parts)
        found["weight_scale"] = weight.parts["block"]
    if weight.spec.kind == "fp4":
        found["weight_packed"] = pack_bits(weight.codes, 4).view(torch.uint8)[:, : weight.codes.shape[1] // 2]
    else:
        found["weight"] = weight.codes
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _floats(packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
    rows, columns = layout.rows_shape
    codes, scale, parts = packed.get("weight"), packed["weight_scale"], {}
    if codes is None:
        words = torch.zeros(rows, words_per_row(columns, 4) * 4, dtype=torch.uint8)
        words[:, : columns // 2] = packed["weight_packed"]
        codes = unpack_bits(words.view(torch.int32), 4, columns).to(torch.uint8)
    if spec.scale == "e8m0":
        scale = scale.view(spec.scale_grid.dtype)
    elif isinstance(spec.scale_grid, TwoLevel):
        tensor = packed["weight_global_scale"]
        parts = {"block": scale, "tensor": tensor if spec.scale == "nvfp4_over" else 1.0 / tensor}
        scale = spec.scale_grid.decode(parts)[0]
    else:
        scale = scale.float().to(spec.scale_grid.dtype)
    return QTensor(codes, scale.reshape(-1, scale.shape[-1]), None, None, spec, layout, out_dtype, parts)


def _check_shape(tensors: dict[str, Tensor], bits: int) -> None:
    """The consumer takes what it finds. Raises ValueError if the stored shape is not that of the packed weight."""
    rows, columns = tensors["weight_shape"].tolist()
    packed = tuple(tensors["weight_packed"].shape)
    if packed != (rows, words_per_row(columns, bits)):
        raise ValueError(f"weight_shape says {[rows, columns]}, weight_packed is {list(packed)}")


def _static_input(layer: str, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """`input_scale` [1] and `input_zero_point` [1] of a static input, `input_global_scale` [1] of one of nvfp4; {} for
    a dynamic one.

    Raises ExportError if `dtype` does not hold the scale exactly.
    """
    spec, fields = given or (None, None)
    if spec is None or fields is None:
        return {}
    if isinstance(spec.scale_grid, TwoLevel):
        return {"input_global_scale": divisor(spec, spec.scale_grid.encode(fields.scale, None))}
    scale = fields.scale.reshape(1).to(dtype)
    if not torch.equal(scale.float(), fields.scale.reshape(1).float()):
        raise ExportError(f"{layer}: its input scale stored in {dtype} would be rounded; use scale: portable")
    found = {"input_scale": scale}
    if fields.zero is not None:
        half = 1 << (spec.bits - 1)
        found["input_zero_point"] = (fields.zero.reshape(1) + offset_of(spec) - half).to(torch.int8)
    return found
