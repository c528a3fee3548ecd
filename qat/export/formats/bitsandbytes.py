"""bitsandbytes: 4-bit tables and 8-bit integers in a transformers folder, for `load_in_4bit` and `load_in_8bit`.

    4 bits, nf4 or bnb_fp4 in blocks of B along the row, two codes to a byte, the first in the high half
        weight                uint8 [O * I / 2, 1]
        weight.absmax         fp32 [O * I / B]; with double quantization uint8, codes of nested_quant_map
        weight.quant_map      fp32 [16], the table
        weight.quant_state.bitsandbytes__nf4 (or __fp4)     uint8, JSON: quant_type, blocksize, dtype, shape
        weight.nested_absmax  fp32 [ceil(O * I / B / 256)], weight.nested_quant_map fp32 [256]; JSON: nested_blocksize,
                              nested_dtype, nested_offset                            (double quantization only)
        W = table[code] * absmax in fp32, cast to the dtype in the JSON

    8 bits, integers with one scale per row
        weight int8 [O, I], SCB fp32 [O] = 127 * scale, weight_format uint8 [] = 0
        W = (code * SCB) * c in fp32, c = fp32(1 / 127) = (1 - 2^-28) / 127

For a scale of up to 10 significant bits code * SCB is exact, and the missing 2^-28 is rounded away: W = code * scale,
bit for bit. portable, bf16 and e8m0 have at most 8 bits; with the 11 of fp16 4 % of the weights would be others, with
the 24 of fp32 a third. 4-bit blocks lie in the flattened weight: they must not cross rows, so B has to divide the row.
bitsandbytes multiplies 8-bit weights with inputs that it rounds to 8 bits itself, in tokens; a recipe may train with
that.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from qat.convert import Bundle
from qat.export import hf_folder
from qat.export.format import TensorStream
from qat.export.hf_format import HOLDS, KEEP, HfFormat, expect, targets
from qat.export.packing import pack_bits, unpack_bits, words_per_row
from qat.fake_quant_kernels.codebook import BNB_FP4, NF4
from qat.fake_quant_kernels.two_level import SUPER, dynamic_map
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import Fields, QTensor
from qat.scales import SCALE_GRIDS, TwoLevel
from qat.specs import QuantSpec

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# grid -> (its name in bitsandbytes, the place of each of our ascending codes in the table there)
_FOUR = {
    "nf4": ("nf4", tuple(range(16))),
    "bnb_fp4": ("fp4", (11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3)),
}
_STATE = "weight.quant_state.bitsandbytes__"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in HOLDS["portable"]}
_NEAREST = (
    "nearest: {grid: nf4, granularity: group, group_size: 64, scale: bnb_nested} or {bits: 8, granularity: channel}"
)


class BitsAndBytes(HfFormat):
    """The format of transformers' BitsAndBytesConfig."""

    name = "bitsandbytes"
    bits = "4, 8"
    contents = "nf4 and bnb_fp4 in groups (also scale: bnb_nested), int8 by channel"
    consumers = ("bitsandbytes",)
    consumer = ("bitsandbytes", "bitsandbytes")

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = []
        if set(row.kinds.values()) - {"linear"} or set(row.kinds) - {"weight"}:
            found.append(f"bitsandbytes holds quantized Linear layers, not {row.type}; {KEEP}")
        if row.weight is None:
            return [*found, "its input is quantized but not its weight; give its rule a weight too"]
        four = row.weight.kind in _FOUR
        found += _four_reasons(row.weight) if four else _eight_reasons(row.weight)
        if row.input is not None and (four or not _as_served(row.input)):
            served = "{bits: 8, granularity: token, narrow: true, quantizer: absmax}"
            what = "float inputs" if four else f"8-bit inputs of its own: {served}, or none"
            found.append(f"input {row.input}: bitsandbytes multiplies these weights with {what}")
        return found

    def holds(self, spec: QuantSpec) -> tuple[torch.dtype, ...]:
        return HOLDS["portable"]  # scales are fp32 in any model

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        found = super().model_reasons(bundle, tokenizer)
        specs = {name.rpartition(".")[0]: spec for name, spec in bundle.specs().items()}
        if len({spec.bits for spec in specs.values()}) > 1:
            found.append("4-bit beside 8-bit layers: bitsandbytes has one of them per folder; use one, or keep_float")
        same = [(layer, name) for layer in specs for name in _skipped(bundle, specs) if layer.endswith(name)]
        if same:
            layer, name = same[0]
            found.append(f"{name} is float, and transformers would skip {layer} with it, whose name ends the same")
        return found

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Local names -> tensors; decoded to `dtype` (default: out_dtype)."""
        if weight.spec.kind not in _FOUR:
            scale = weight.scale.float().reshape(-1)
            return {"weight": weight.codes, "SCB": scale * 127.0, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        kind, order = _FOUR[weight.spec.kind]
        places = torch.tensor(order, dtype=torch.uint8)[weight.codes.int()]
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": weight.spec.group_size,
            "dtype": str(dtype or weight.out_dtype).removeprefix("torch."),
            "shape": list(weight.codes.shape),
        }
        found = {
            "weight": pack_bits(_swapped(places), 4).view(torch.uint8)[:, : places.shape[1] // 2].reshape(-1, 1),
            "weight.quant_map": _table(kind),
        }
        if weight.parts:
            found["weight.absmax"] = weight.parts["absmax"].reshape(-1)
            found["weight.nested_absmax"] = weight.parts["nested"]
            found["weight.nested_quant_map"] = dynamic_map()
            state |= {"nested_blocksize": SUPER, "nested_dtype": "float32"}
            state["nested_offset"] = weight.parts["offset"].item()
        else:
            found["weight.absmax"] = weight.scale.float().reshape(-1)
        text = json.dumps(state).encode()
        return found | {_STATE + kind: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """Raises ValueError for tensors that are not those of such a weight."""
        rows, columns = layout.rows_shape
        if spec.kind not in _FOUR:
            expect("weight", packed["weight"], torch.int8, (rows, columns))
            expect("SCB", packed["SCB"], torch.float32, (rows,))
            scale = (packed["SCB"] * (1.0 / 127.0)).reshape(-1, 1).to(spec.scale_grid.dtype)
            return QTensor(packed["weight"], scale, None, None, spec, layout, out_dtype)
        kind, order = _FOUR[spec.kind]
        groups = columns // (spec.group_size or columns)
        expect("weight", packed["weight"], torch.uint8, (rows * columns // 2, 1))
        if not torch.equal(packed["weight.quant_map"], _table(kind)):
            raise ValueError(f"quant_map is not the table of {kind}")
        words = torch.zeros(rows, words_per_row(columns, 4) * 4, dtype=torch.uint8)
        words[:, : columns // 2] = packed["weight"].reshape(rows, -1)
        places = _swapped(unpack_bits(words.view(torch.int32), 4, columns))
        # both zeros of fp4 are ours
        codes = torch.full((16,), order.index(0), dtype=torch.uint8)
        codes[torch.tensor(order)] = torch.arange(len(order), dtype=torch.uint8)
        nested = SCALE_GRIDS["bnb_nested"]
        assert isinstance(nested, TwoLevel)
        parts = {}
        if "weight.nested_absmax" in packed:
            expect("absmax", packed["weight.absmax"], torch.uint8, (rows * groups,))
            expect("nested_absmax", packed["weight.nested_absmax"], torch.float32, (-(-rows * groups // SUPER),))
            if not torch.equal(packed["weight.nested_quant_map"], dynamic_map()):
                raise ValueError("nested_quant_map is not the dynamic map of 8 bits")
            state = _state(packed)
            if state["nested_blocksize"] != SUPER:
                raise ValueError(f"nested_blocksize is {state['nested_blocksize']!r}, not {SUPER}")
            offset = torch.tensor([float(state["nested_offset"])])
            absmax = packed["weight.absmax"].reshape(rows, groups)
            parts = {"absmax": absmax, "nested": packed["weight.nested_absmax"], "offset": offset}
            scale = nested.decode(parts)[0]
        else:
            expect("absmax", packed["weight.absmax"], torch.float32, (rows * groups,))
            scale = packed["weight.absmax"].reshape(rows, groups)
        if spec.scale_grid is not nested:
            # a training that starts from a file with nested scales may go on with plain ones
            scale, parts = scale.to(spec.scale_grid.dtype), {}
        elif not parts:
            raise ValueError("absmax is not quantized again")
        return QTensor(codes[places.int()], scale, None, None, spec, layout, out_dtype, parts)

    # ---- the files -----------------------------------------------------------------------------------------------

    def layer_tensors(
        self, name: str, weight: QTensor, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return self.pack(name, weight, dtype)

    def quantization_config(self, stream: TensorStream) -> dict[str, Any]:
        """Which bits and which layers; tables, blocks and double quantization are said in each layer's own state."""
        quantized = targets(stream)
        specs = list(quantized.values())
        four = bool(specs) and specs[0].bits == 4
        found: dict[str, Any] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "llm_int8_skip_modules": _skipped(stream.bundle, quantized),
        }
        if not four:
            # inputs above the threshold are multiplied in float; 0: none, as a recipe with 8-bit inputs trains
            return found | {"llm_int8_threshold": 0.0 if stream.inputs else 6.0}
        return found | {
            "bnb_4bit_quant_type": _FOUR[specs[0].kind][0],
            "bnb_4bit_use_double_quant": any(spec.scale == "bnb_nested" for spec in specs),
            "bnb_4bit_compute_dtype": str(hf_folder.model_dtype(stream.bundle.module)).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }

    def quantized(self, tensors: dict[str, Tensor]) -> bool:
        return "SCB" in tensors or any(key.startswith("weight.") for key in tensors)

    def of_weight(self, key: str) -> bool:
        return key.startswith("weight") or key == "SCB"

    def weight(self, layer: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
        # our own reading comes first: the consumer's kernels would read behind the end of a tensor that is too short
        if "SCB" in tensors:
            rows, columns = tensors["weight"].shape
            spec, dtype = QuantSpec(bits=8, narrow=True, scale="fp32"), _DTYPES[config["dtype"]]
        else:
            state = _state(tensors)
            rows, columns = _shape(state)
            kind = next(ours for ours, (theirs, _) in _FOUR.items() if theirs == state["quant_type"])
            spec = QuantSpec(4, kind=kind, granularity="group", group_size=state["blocksize"], scale="fp32")
            dtype = _DTYPES[state["dtype"]]
        found = self.unpack(tensors, spec, Layout((rows, columns)), dtype)
        if not self.installed():
            if "SCB" not in tensors:
                return found.dequantize()
            # as it computes, also for a file whose scales would be others here
            return (tensors["weight"] * tensors["SCB"].reshape(-1, 1) * (1.0 / 127.0)).to(dtype)
        from bitsandbytes import functional

        if "SCB" in tensors:
            eight: Tensor = functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
            return eight.to(dtype)
        stats = {key.removeprefix("weight."): tensor for key, tensor in tensors.items() if key.startswith("weight.")}
        quant_state = functional.QuantState.from_dict(stats, torch.device("cpu"))
        four: Tensor = functional.dequantize_4bit(tensors["weight"], quant_state)
        return four


# ---- grids and states ------------------------------------------------------------------------------------------------


def _four_reasons(spec: QuantSpec) -> list[str]:
    if spec.granularity == "group" and spec.group_size in BLOCKS:
        return []
    where = f"granularity={spec.granularity}" if spec.group_size is None else f"group_size={spec.group_size}"
    sizes = ", ".join(map(str, BLOCKS))
    return [f"{where}: bitsandbytes has blocks of {sizes}; nearest: granularity: group, group_size: 64"]


def _eight_reasons(spec: QuantSpec) -> list[str]:
    found = []
    if spec.kind == "fp4":
        return ["grid fp4: the 4-bit float of bitsandbytes is another one; nearest: grid: bnb_fp4, group_size: 64"]
    if spec.kind != "int" or spec.bits != 8 or not spec.signed or spec.zero_point != "none" or spec.signed_scale:
        return [f"grid {spec}: bitsandbytes has nf4, bnb_fp4 and signed 8-bit integers; {_NEAREST}"]
    if spec.granularity != "channel":
        found.append(f"granularity={spec.granularity}: 8-bit weights have one scale per row; use granularity: channel")
    if spec.scale not in ("portable", "bf16", "e8m0"):
        found.append(
            f"scale={spec.scale}: bitsandbytes stores 127 times an 8-bit scale and divides again, exact for up to 10 "
            "significant bits; use scale: portable"
        )
    return found


def _as_served(spec: QuantSpec) -> bool:
    """Whether an input is rounded as bitsandbytes rounds it."""
    int8 = spec.kind == "int" and spec.bits == 8 and spec.signed and spec.int_grid.narrow and spec.zero_point == "none"
    return int8 and spec.granularity == "token" and spec.quantizer == "absmax"


def _skipped(bundle: Bundle, quantized: dict[str, QuantSpec]) -> list[str]:
    """Layers that transformers would replace if they were not named."""
    return [name for name in bundle.linears if name not in quantized]


def _swapped(codes: Tensor) -> Tensor:
    """Pairs of columns exchanged: our stream starts in the low half of a byte, this file in the high one."""
    return codes.reshape(codes.shape[0], -1, 2).flip(-1).reshape(codes.shape)


def _table(kind: str) -> Tensor:
    """The 16 numbers of nf4 or fp4, fp32, in the order of the file's codes."""
    levels, (_, order) = (NF4, _FOUR["nf4"]) if kind == "nf4" else (BNB_FP4, _FOUR["bnb_fp4"])
    table = torch.zeros(16)
    table[torch.tensor(order)] = torch.tensor(levels)
    return table


def _state(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The JSON of a layer; raises ValueError if there is none that can be read."""
    keys = [key for key in tensors if key.startswith(_STATE)]
    if len(keys) != 1:
        raise ValueError(f"{len(keys)} tensors {_STATE}*, not one")
    state = json.loads(bytes(tensors[keys[0]].numpy()).decode())
    if not isinstance(state, dict) or keys[0] != f"{_STATE}{state.get('quant_type')}":
        raise ValueError(f"{keys[0]} is not the state of such a weight")
    if state["blocksize"] not in BLOCKS or isinstance(state["blocksize"], bool):
        raise ValueError(f"blocksize is {state['blocksize']!r}")
    return state


def _shape(state: dict[str, Any]) -> tuple[int, int]:
    rows, columns = state["shape"]
    if not all(type(size) is int and size > 0 for size in (rows, columns)) or columns % state["blocksize"]:
        raise ValueError(f"shape {state['shape']} is not one of rows of whole blocks")
    return rows, columns
