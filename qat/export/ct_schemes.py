"""Schemes of compressed-tensors: which grids it has, and what its configuration says of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from qat.errors import ExportError
from qat.export.hf_format import HOLDS
from qat.qtensor import Fields
from qat.specs import QuantSpec

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
# no weight is packed
DENSE = "dense"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
# decoded to bf16, whatever the dtype of the model
IN_BF16 = (NVFP4, MXFP4, MXFP8)
# dtypes that hold every static scale of a cache
HOLDS_CACHE = {**HOLDS, "e8m0": HOLDS["bf16"]}
_MX = 32
_NVFP4 = ("nvfp4_over", "nvfp4_portable")
_SCALE_DTYPES = {NVFP4: "torch.float8_e4m3fn", MXFP4: "torch.uint8", MXFP8: "torch.uint8"}
_STORED = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def weight_reasons(spec: QuantSpec) -> list[str]:
    """Why no container holds weights on this grid."""
    if spec.kind in ("fp4", "e4m3"):
        return _float_reasons(spec)
    found = []
    if not spec.is_int:
        found.append(f"grid {spec.kind}: compressed-tensors has integers, e4m3 and fp4; nearest: grid: int, bits: 4")
    if spec.signed_scale:
        found.append("signed_scale=true: compressed-tensors has positive scales; nearest: signed_scale: false")
    if spec.scale not in HOLDS:
        found.append(f"scale={spec.scale}: compressed-tensors stores scales of integers as floats; use scale: portable")
    if spec.zero_point == "float":
        found.append("zero_point=float: compressed-tensors has integer zero points; nearest: zero_point: int")
    return found


def _float_reasons(spec: QuantSpec) -> list[str]:
    if (spec.scale == "e8m0" and spec.group_size == _MX) or (spec.kind == "fp4" and spec.scale in _NVFP4):
        return []
    if spec.scale == "nvfp4":
        return ["scale=nvfp4 is multiplied with the tensor's scale, compressed-tensors divides; use nvfp4_portable"]
    if spec.kind == "e4m3" and spec.scale in HOLDS and spec.granularity in ("tensor", "channel"):
        return []
    where = f"granularity={spec.granularity}" if spec.group_size is None else f"group_size={spec.group_size}"
    nearest = "granularity: channel, scale: portable"
    if spec.kind == "fp4":
        nearest = "granularity: group, group_size: 16, scale: nvfp4_portable"
    return [
        f"grid {spec.kind} with {where}, scale={spec.scale}: not among those of compressed-tensors; "
        f"nearest: {nearest} (or group_size: 32, scale: e8m0)"
    ]


def input_reasons(spec: QuantSpec, weight: QuantSpec) -> list[str]:
    """Why an input's grid has no place in a scheme with these weights."""
    if spec.scale in _NVFP4:
        if weight.scale in _NVFP4:
            return []
        return [f"input scale={spec.scale} goes with weights of nvfp4; give the weight grid: fp4, scale: {spec.scale}"]
    found = []
    if not spec.is_int and spec.kind != "e4m3":
        found.append(f"input grid {spec.kind}: this writer has integers and e4m3; nearest: grid: int, bits: 8")
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


def cache_reasons(spec: QuantSpec) -> list[str]:
    """Why keys and values on this grid are none of a `kv_cache_scheme`: its readers have 8 bits, signed, and one scale
    for the keys of a layer and one for its values."""
    whole = spec.is_int and spec.bits == 8 and spec.signed and not spec.int_grid.narrow
    fits = (spec.kind == "e4m3" or whole) and spec.zero_point == "none" and spec.granularity == "tensor"
    if fits and spec.scale in HOLDS_CACHE:
        return []
    nearest = "{grid: e4m3 (or int, bits: 8), granularity: tensor, quantizer: ema, scale: e8m0 (or portable)}"
    return [f"cache {spec}: compressed-tensors has 8 bits and one scale per layer; nearest: {nearest}"]


def cache_scheme(specs: Collection[QuantSpec]) -> dict[str, Any] | None:
    """`kv_cache_scheme` of caches that all have one grid; None: there are none."""
    if not specs:
        return None
    spec = next(iter(specs))
    return {
        "num_bits": spec.bits,
        "type": "int" if spec.is_int else "float",
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
    }


def symmetric(spec: QuantSpec) -> bool:
    """Whether no zero points are stored."""
    return spec.signed and spec.zero_point == "none"


def offset_of(spec: QuantSpec) -> int:
    """What turns a code into the stored number, which counts from 0."""
    return 1 << (spec.bits - 1) if spec.signed else 0


def container_of(spec: QuantSpec, given: tuple[QuantSpec, Fields | None] | None) -> str:
    """The `format` of a layer with these weights and this quantized input."""
    if spec.is_int:
        return INTEGER if given is not None and spec.bits == 8 else PACKED
    if spec.kind == "fp4":
        return MXFP4 if spec.scale == "e8m0" else NVFP4
    return MXFP8 if spec.scale == "e8m0" else FLOAT


def scheme_of(spec: QuantSpec, given: tuple[QuantSpec, Fields | None] | None) -> str:
    """One config group without its targets, as JSON: layers with the same text share a group."""
    strategy = spec.granularity
    if strategy == "tensor" and not symmetric(spec):
        strategy = "channel"
    container = container_of(spec, given)
    weights = {
        "num_bits": spec.bits,
        "type": "int" if spec.is_int else "float",
        "symmetric": symmetric(spec),
        "strategy": "tensor_group" if container == NVFP4 else strategy,
        "group_size": spec.group_size,
        "dynamic": False,
    }
    if container in _SCALE_DTYPES:
        weights["scale_dtype"] = _SCALE_DTYPES[container]
    group: dict[str, Any] = {
        "format": container,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    if given is not None:
        local = given[0].scale in _NVFP4
        group["input_activations"] = {
            "num_bits": given[0].bits,
            "type": "int" if given[0].is_int else "float",
            "symmetric": given[0].zero_point == "none",
            "strategy": "tensor_group" if local else given[0].granularity,
            "group_size": given[0].group_size,
            "dynamic": "local" if local else given[1] is None,
        }
        if local:
            group["input_activations"]["scale_dtype"] = _SCALE_DTYPES[NVFP4]
    return json.dumps(group, sort_keys=True)


def group_of(layer: str, config: dict[str, Any]) -> dict[str, Any]:
    """The scheme of a layer, or of every Linear. Raises ExportError if config.json has none."""
    try:
        groups = config["quantization_config"]["config_groups"].values()
        found = {target: group for group in groups for target in group["targets"]}
    except (KeyError, TypeError, AttributeError):
        raise ExportError("config.json holds a quantization_config without config groups") from None
    if not (layer in found or "Linear" in found):
        raise ExportError(f"config.json names no config group for the quantized layer {layer}")
    return found.get(layer) or found["Linear"]  # type: ignore[no-any-return]


def spec_of_scheme(scheme: dict[str, Any], scale: Tensor) -> QuantSpec:
    """The grid that a scheme and the dtype of its scale describe."""
    weights = scheme["weights"]
    symmetric = weights["symmetric"]
    if weights["type"] == "float":
        return QuantSpec(
            bits=weights["num_bits"],
            kind={4: "fp4", 8: "e4m3"}[weights["num_bits"]],
            granularity=weights["strategy"].removeprefix("tensor_") if weights["group_size"] else weights["strategy"],
            group_size=weights["group_size"],
            scale="e8m0" if scale.dtype == torch.uint8 else _STORED.get(scale.dtype, "nvfp4_over"),
        )
    return QuantSpec(
        bits=weights["num_bits"],
        signed=symmetric,
        granularity=weights["strategy"],
        group_size=weights["group_size"] or None,
        zero_point="none" if symmetric else "int",
        scale=_STORED[scale.dtype],
    )
