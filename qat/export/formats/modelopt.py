"""modelopt: the unified checkpoint of NVIDIA's Model-Optimizer, for TensorRT-LLM, vLLM and SGLang. Engine not run.

A transformers folder with hf_quant_config.json beside config.json. Scales are fp32, W = code * scale in fp32.

    quant_algo                   weight              weight_scale      further
    FP8                          e4m3 [O, I]         fp32 []           input_scale fp32 []: e4m3 inputs by tensor
    FP8_PER_CHANNEL_PER_TOKEN    e4m3 [O, I]         fp32 [O]          e4m3 inputs by token
    W8A16                        int8 [O, I]         fp32 [O]
    W4A16_AWQ                    uint8 [O / 2, I]    fp32 [O, I / g]   even rows in the low halves of bytes, code & 15
    W4A16_NVFP4                  uint8 [O, I / 2]    e4m3 [O, I / 16]  even columns in the low halves; the scale is e4m3
                                                                       times weight_scale_2, fp32 []

Layers of several kinds make a MIXED_PRECISION checkpoint, which lists them by name. Scales that AWQ or SmoothQuant put
before a layer (pre_quant_scale) are never stored: `fold` moves them into the layer before it.

The layout and its arithmetic are those that nvidia-modelopt 0.47 exports. It has no reader of its own for such a
folder, so `read` decodes it with ours; its packers and its tensor classes agree bit for bit (tests).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.convert import Bundle
from qat.export.format import TensorStream
from qat.export.hf_format import HOLDS, KEEP, HfFormat, expect, targets
from qat.export.packing import pack_bits, unpack_bits, words_per_row
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import Fields, QTensor
from qat.specs import QuantSpec

# whose layout this is
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_NVFP4 = ("nvfp4", "nvfp4_portable")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in HOLDS["portable"]}
_HAS = (
    "modelopt has e4m3 by tensor with static e4m3 inputs, e4m3 by channel with e4m3 inputs by token, and with float "
    "inputs int8 by channel, int4 in groups, fp4 in groups of 16 with scale: nvfp4 or nvfp4_portable"
)


class ModelOpt(HfFormat):
    """The format of Model-Optimizer's export_hf_checkpoint."""

    name = "modelopt"
    bits = "4, 8"
    contents = "e4m3, int8 by channel, int4 in groups, NVFP4; the engine was never run"
    consumers = ("tensorrt-llm",)
    consumer = ("nvidia-modelopt", "modelopt")
    mark = "weight_scale"

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = []
        if set(row.kinds.values()) - {"linear"} or set(row.kinds) - {"weight"}:
            found.append(f"modelopt holds quantized Linear layers, not {row.type}; {KEEP}")
        if row.weight is None:
            return [*found, "its input is quantized but not its weight; give its rule a weight too"]
        algo = _algo(row.weight, row.input)
        if algo is None:
            given = "float inputs" if row.input is None else f"inputs {row.input}"
            return [*found, f"grid {row.weight} with {given}: {_HAS}"]
        if algo == "W4A16_AWQ" and row.columns and (row.params // row.columns) % 2:
            found.append("modelopt packs two output channels of int4 into a byte, and their number is odd; keep_float")
        return found

    def holds(self, spec: QuantSpec) -> tuple[torch.dtype, ...]:
        return HOLDS["portable"]  # scales are fp32 in any model

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        found = super().model_reasons(bundle, tokenizer)
        moving = [
            layer for layer, (spec, fields) in bundle.inputs.items() if spec.granularity == "tensor" and not fields
        ]
        if moving:
            found.append(f"the input of {moving[0]} is scaled anew each time; FP8 has static scales: quantizer: ema")
        return found

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """Local names -> tensors."""
        spec, codes = weight.spec, weight.codes
        if spec.kind == "fp4":
            packed = pack_bits(codes, 4).view(torch.uint8)[:, : codes.shape[1] // 2].contiguous()
            second = weight.parts["tensor"].reshape(())
            return {"weight": packed, "weight_scale": weight.parts["block"], "weight_scale_2": second}
        scale = weight.scale.float()
        if spec.bits == 4:
            low = codes.view(torch.uint8) & 15
            return {"weight": low[0::2] | (low[1::2] << 4), "weight_scale": scale}
        return {"weight": codes, "weight_scale": scale.reshape(() if spec.granularity == "tensor" else -1)}

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """Raises ValueError for tensors that are not those of such a weight."""
        rows, columns = layout.rows_shape
        codes, scale, parts = packed["weight"], packed["weight_scale"], {}
        if spec.kind == "fp4":
            expect("weight", codes, torch.uint8, (rows, columns // 2))
            expect("weight_scale", scale, torch.float8_e4m3fn, (rows, columns // 16))
            expect("weight_scale_2", packed["weight_scale_2"], torch.float32, ())
            words = torch.zeros(rows, words_per_row(columns, 4) * 4, dtype=torch.uint8)
            words[:, : columns // 2] = codes
            codes = unpack_bits(words.view(torch.int32), 4, columns).to(torch.uint8)
            parts = {"block": scale, "tensor": packed["weight_scale_2"].reshape(1)}
            found: Tensor = spec.scale_grid.decode(parts)[0]  # type: ignore[attr-defined]
            return QTensor(codes, found, None, None, spec, layout, out_dtype, parts)
        if spec.bits == 4:
            expect("weight", codes, torch.uint8, (rows // 2, columns))
            expect("weight_scale", scale, torch.float32, (rows, spec.groups(columns)))
            halves = torch.stack((codes & 15, codes >> 4), 1).reshape(rows, columns).to(torch.int8)
            codes = torch.where(halves > 7, halves - 16, halves)
        else:
            expect("weight", codes, spec.grid.code_dtype, (rows, columns))
            expect("weight_scale", scale, torch.float32, () if spec.granularity == "tensor" else (rows,))
            scale = scale.reshape(-1, 1)
        return QTensor(codes, scale.to(spec.scale_grid.dtype), None, None, spec, layout, out_dtype)

    # ---- the files -----------------------------------------------------------------------------------------------

    def layer_tensors(
        self, name: str, weight: QTensor, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        tensors = self.pack(name, weight)
        if given is not None and given[1] is not None:
            tensors["input_scale"] = given[1].scale.float().reshape(())
        return tensors

    def quantization_config(self, stream: TensorStream) -> dict[str, Any]:
        details = _details(stream)
        groups: dict[str, dict[str, Any]] = {}
        for layer, words in _layers(stream).items():
            key = json.dumps(words, sort_keys=True)
            groups.setdefault(key, {**_group(words), "targets": []})["targets"].append(layer)
        if len(groups) == 1:
            next(iter(groups.values()))["targets"] = ["Linear"]
        found: dict[str, Any] = {
            "quant_method": "modelopt",
            "quant_algo": details["quant_algo"],
            "producer": _PRODUCER,
            "ignore": details["exclude_modules"],
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups.values())},
        }
        if "quantized_layers" in details:
            found["quantized_layers"] = details["quantized_layers"]
        return found

    def extra_files(self, stream: TensorStream, folder: Path) -> None:
        data = {"producer": _PRODUCER, "quantization": _details(stream)}
        (folder / "hf_quant_config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def weight(self, layer: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
        packed, scale = tensors["weight"], tensors["weight_scale"]
        rows, columns = packed.shape
        if "weight_scale_2" in tensors:
            columns *= 2
            spec = QuantSpec(4, kind="fp4", granularity="group", group_size=16, scale="nvfp4")
        elif packed.dtype == torch.uint8:
            rows *= 2
            if scale.dim() != 2 or not scale.shape[1] or columns % scale.shape[1]:
                raise ValueError(f"weight_scale {list(scale.shape)} does not cut {columns} columns into groups")
            spec = QuantSpec(4, granularity="group", group_size=columns // scale.shape[1], scale="fp32")
        else:
            kind = "e4m3" if packed.dtype == torch.float8_e4m3fn else "int"
            spec = QuantSpec(8, kind=kind, granularity="channel" if scale.dim() else "tensor", scale="fp32")
        return self.unpack(tensors, spec, Layout((rows, columns)), _DTYPES[config["dtype"]]).dequantize()

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().read(folder):
            yield name, tensor.reshape(-1) if name.endswith(".input_scale") else tensor

    def reader(self) -> str:
        return "qat"


# ---- grids and the configuration -------------------------------------------------------------------------------------


def _algo(spec: QuantSpec, given: QuantSpec | None) -> str | None:
    """What Model-Optimizer calls this pair of grids; None if it has none."""
    if spec.zero_point != "none" or not spec.signed or spec.signed_scale:
        return None
    eight = given is not None and given.kind == "e4m3" and given.scale in HOLDS
    if spec.kind == "fp4" and spec.scale in _NVFP4 and given is None:
        return "W4A16_NVFP4"
    if spec.scale not in (*HOLDS, "e8m0"):
        return None
    if spec.kind == "e4m3" and eight and given is not None:
        pairs = {("tensor", "tensor"): "FP8", ("channel", "token"): "FP8_PER_CHANNEL_PER_TOKEN"}
        return pairs.get((spec.granularity, given.granularity))
    if spec.kind == "int" and given is None:
        return {(4, "group"): "W4A16_AWQ", (8, "channel"): "W8A16"}.get((spec.bits, spec.granularity))
    return None


def _layers(stream: TensorStream) -> dict[str, dict[str, Any]]:
    """Quantized layer -> its entry in a mixed checkpoint."""
    found = {}
    for layer, spec in targets(stream).items():
        given = stream.inputs.get(layer)
        words: dict[str, Any] = {"quant_algo": _algo(spec, None if given is None else given[0])}
        if spec.group_size:
            words["group_size"] = spec.group_size
        if words["quant_algo"] == "W4A16_AWQ":
            words |= {"has_zero_point": False, "pre_quant_scale": False}
        found[layer] = words
    return found


def _details(stream: TensorStream) -> dict[str, Any]:
    """`quantization` of hf_quant_config.json."""
    layers = _layers(stream)
    kinds = list({json.dumps(words, sort_keys=True): words for words in layers.values()}.values())
    found: dict[str, Any] = {"kv_cache_quant_algo": None}
    found |= kinds[0] if len(kinds) == 1 else {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return found | {"exclude_modules": [name for name in stream.bundle.linears if name not in layers]}


def _group(words: dict[str, Any]) -> dict[str, Any]:
    """The same in the words of config.json."""
    algo = words["quant_algo"]
    weights: dict[str, Any] = {"num_bits": 4 if algo.startswith("W4") else 8, "dynamic": False}
    weights["type"] = "int" if algo in ("W4A16_AWQ", "W8A16") else "float"
    weights |= {key: words[key] for key in ("group_size",) if key in words}
    group: dict[str, Any] = {"weights": weights}
    if algo.startswith("FP8"):
        group["input_activations"] = {"num_bits": 8, "dynamic": algo != "FP8", "type": "float"}
    return group
