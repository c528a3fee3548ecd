"""exl2: a transformers folder for exllamav2, integers in groups whose scales all output channels share. Engine not run.

A matrix lies as [in, out]; rows below are inputs, in the order of packing, R_h is rounding to fp16.

    q_weight      int32 [sum of rows * bits / 32, O]   u = code + 2^(bits-1), a dense stream down the rows: value r of a
                  group is bits r * bits .. of it, least significant first; 32 values are `bits` words
    q_scale       int32 [G, O / 8]     k - 1 of column 8c + j in bits 4j .. 4j+3 of word c, k = 1..16
    q_scale_max   fp16 [G]             M
    q_groups      int16 [2 * G]        (bits, first row of q_weight) of each group; bits never rise
    q_invperm     int32 [I]            input i is packed row q_invperm[i]; here each one stays where it is
    bias          as in the model, fp16

    s = R_h(k^2 * R_h(M / 256)),  W = R_h((u - 2^(bits-1)) * s),  with bits of 2, 3, 4, 5, 6 or 8

A tensor has the bits of its rule; layers may differ. Older files hold q_perm too, the inverse of q_invperm, which
exllamav2 makes anew. It moves the bits of q_weight around when it has loaded them: that is not in the file.

Source: exllamav2 0.3.2, conversion/adaptivegptq.py (pack), module.py and ext.py (what is loaded), cuda/q_matrix.cu and
cuda/quant/qdq_util.cuh (arithmetic). It needs CUDA, so `read` decodes with ours, `dequantized`, which shares no code
with `pack`.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import hf_folder
from qat.export.format import TensorStream
from qat.export.hf_format import HOLDS, KEEP, HfFormat, layer_of, targets
from qat.export.packed_groups import check_tensor, head_of
from qat.export.packing import pack_bits, unpack_bits
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import Fields, QTensor
from qat.scales import SCALE_GRIDS, TwoLevel
from qat.specs import QuantSpec

VERSION = "0.3.2"
BITS = (2, 3, 4, 5, 6, 8)
# rows of a group come by this many, and output channels; files of exllamav2 have groups of 16 rows at 2 bits as well
RUN = 32
_STEP = {bits: RUN // 2 if bits == 2 else RUN for bits in BITS}
_NEAREST = "nearest: granularity: group, group_size: 32, scale: exl2"
# exllamav2 counts inputs in uint16
MOST = 1 << 16
# several matrices in one, which exllamav2 cuts and therefore loads in float only
FUSED = ("qkv_proj", "Wqkv", "wqkv", "c_attn", "qkv", "gate_up_proj", "w12")
# layers of one module that exllamav2 takes quantized together or in float together
_MLPS = (("gate_proj", "up_proj", "down_proj"), ("c_fc", "c_proj"))
# what exllamav2 multiplies into scales before it rounds them if config.json has it, and what would change nothing
_HEAD: dict[str, object] = {"logit_scale": 1, "logits_scaling": 1, "dim_model_base": None}
_RESIDUAL: dict[str, object] = {"residual_multiplier": 1, "scale_depth": None}


class Exl2(HfFormat):
    """The format of exllamav2."""

    name = "exl2"
    bits = "2 to 6 or 8"
    contents = "int in groups of a multiple of 32 with scale: exl2; mixed layers; the engine was never run"
    consumers = ("exllamav2",)
    consumer = ("exllamav2", "exllamav2")
    mark = "q_weight"

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = []
        if set(row.kinds.values()) - {"linear"} or set(row.kinds) - {"weight"}:
            found.append(f"exl2 holds quantized Linear layers, not {row.type}; {KEEP}")
        if _leaf(row.name) in FUSED:
            found.append(
                f"exllamav2 cuts {_leaf(row.name)} into matrices, which it cannot where it is quantized; {KEEP}"
            )
        if row.input is not None:
            found.append("exl2 holds no input quantization; set input: null in its rule")
        spec = row.weight
        if spec is None:
            return found
        if spec.scale != "exl2":
            grid = "" if spec.is_int else f"grid {spec.kind} with "
            return [*found, f"{grid}scale={spec.scale}: exl2 has scales of its own, shared by all rows; {_NEAREST}"]
        if spec.bits not in BITS:
            nearest = min(bits for bits in BITS if bits >= spec.bits)
            found.append(f"bits={spec.bits}: exl2 has {', '.join(map(str, BITS))}; nearest: bits: {nearest}")
        if (spec.group_size or 0) % RUN:
            found.append(f"group_size={spec.group_size}: exl2 has groups of a multiple of {RUN}; {_NEAREST}")
        if row.columns > MOST:
            found.append(f"{row.columns} inputs: exllamav2 counts up to {MOST}; {KEEP}")
        return found

    def holds(self, spec: QuantSpec) -> tuple[torch.dtype, ...]:
        return HOLDS["portable"]  # scales are fp16 in any model

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        found = super().model_reasons(bundle, tokenizer)
        odd = next(((name, shape[0]) for name, shape in bundle.shapes().items() if shape[0] % RUN), None)
        if odd is not None:
            found.append(f"{odd[0]} has {odd[1]} outputs, which exl2 packs by {RUN}; {KEEP}")
        biases = (f"{layer_of(name)}.bias" for name in bundle)
        bias = next((name for name in biases if name in bundle.floats), None)
        if bias is not None and hf_folder.model_dtype(bundle.module) != torch.float16:
            found.append(
                f"{bias}: exllamav2 takes biases of quantized layers in fp16 only, which would round it; call "
                f"model.to(torch.float16) before training, or {KEEP}"
            )
        # of the models that exllamav2 knows nothing else has three dimensions
        first = next((layer_of(name) for name, value in bundle.parameters.items() if value.dim() == 3), None)
        if first is not None:
            found.append(
                f"{first} has all experts in one tensor: exllamav2 loads a matrix for each; use another format"
            )
        quantized = {layer_of(name) for name in (*bundle, *bundle.tied)}
        return [*found, *_block_reasons(bundle.linears, quantized), *_prescale_reasons(bundle, quantized)]

    def stored_bits(self, spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> float:
        """Codes, k, M, q_groups and q_invperm; whatever the dtype."""
        outputs, inputs = layout.rows_shape
        groups = spec.groups(inputs)
        return outputs * inputs * spec.bits + groups * (outputs * 4 + 16 + 32) + inputs * 32

    def counted(self, bundle: Bundle) -> list[str]:
        """All but the output head: exllamav2 counts so."""
        head = head_of(bundle)
        return [name for name in bundle if layer_of(name) != head] or list(bundle)

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """Local names -> tensors."""
        bits, inputs = weight.spec.bits, weight.codes.shape[1]
        return {
            "q_weight": pack_bits(weight.codes.to(torch.int16) + (1 << (bits - 1)), bits).T.contiguous(),
            "q_scale": pack_bits((weight.parts["k"].T - 1).contiguous(), 4),
            "q_scale_max": weight.parts["largest"],
            "q_groups": _q_groups(bits, weight.scale.shape[1], inputs),
            "q_invperm": torch.arange(inputs, dtype=torch.int32),
        }

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """Raises ValueError for a tensor of several bits, of other groups, or whose inputs are in another order."""
        outputs, inputs = layout.rows_shape
        bits, groups = spec.bits, inputs // (spec.group_size or inputs)
        if not torch.equal(packed["q_invperm"], torch.arange(inputs, dtype=torch.int32)):
            raise ValueError("q_invperm puts the inputs in another order")
        if not torch.equal(packed["q_groups"], _q_groups(bits, groups, inputs)):
            raise ValueError(f"q_groups are not groups of {inputs // groups} with {bits} bits")
        u = unpack_bits(packed["q_weight"].T.contiguous(), bits, inputs)
        codes = (u - (1 << (bits - 1))).to(spec.grid.code_dtype)
        k = unpack_bits(packed["q_scale"], 4, outputs).T + 1
        parts = {"k": k.to(torch.uint8).contiguous(), "largest": packed["q_scale_max"]}
        stored = SCALE_GRIDS["exl2"]
        assert isinstance(stored, TwoLevel)
        scale = stored.decode(parts)[0].to(spec.scale_grid.dtype)
        kept = parts if spec.scale_grid is stored else {}
        return QTensor(codes, scale, None, None, spec, layout, out_dtype, kept)

    # ---- the files -----------------------------------------------------------------------------------------------

    def layer_tensors(
        self, name: str, weight: QTensor, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return self.pack(name, weight)

    def quantization_config(self, stream: TensorStream) -> dict[str, Any]:
        head, heads = head_of(stream.bundle), targets(stream)
        found: dict[str, Any] = {"quant_method": "exl2", "version": VERSION}
        found["bits"] = round(self.bits_per_weight(stream.bundle), 3)
        found["head_bits"] = heads[head].bits if head is not None and head in heads else 16
        return found

    def weight(self, layer: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
        inputs = tensors["q_invperm"].shape[0] if "q_invperm" in tensors else 0
        outputs = tensors["q_weight"].shape[-1]
        groups = tensors["q_scale_max"].shape[0] if "q_scale_max" in tensors else 0
        words = tensors["q_weight"].shape[0]
        check_tensor(layer, tensors, "q_invperm", torch.int32, (inputs,))
        check_tensor(layer, tensors, "q_scale_max", torch.float16, (groups,))
        check_tensor(layer, tensors, "q_weight", torch.int32, (words, outputs))
        check_tensor(layer, tensors, "q_scale", torch.int32, (groups, outputs // 8))
        check_tensor(layer, tensors, "q_groups", torch.int16, (2 * groups,))
        if outputs % RUN or not groups:
            raise ExportError(f"{layer} has {outputs} outputs in {groups} groups; exllamav2 reads them by {RUN}")
        return torch.from_numpy(dequantized(layer, {key: tensors[key].numpy() for key in _NAMES}).T.copy())

    def of_weight(self, key: str) -> bool:
        return key in (*_NAMES, "q_perm")

    def reader(self) -> str:
        return "qat (exllamav2 not run)"


_NAMES = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _block_reasons(linears: list[str], quantized: set[str]) -> list[str]:
    """Why exllamav2 cannot load or run a block of which some layers are quantized; the first such block.

    With q_proj in float it computes attention layer by layer, and any of them may be quantized.
    """
    blocks: dict[str, dict[str, bool]] = {}
    for layer in linears:
        blocks.setdefault(layer_of(layer), {})[_leaf(layer)] = layer in quantized
    found = []
    for block, layers in blocks.items():
        parts = [{key: layers[key] for key in keys if key in layers} for keys in _MLPS]
        if layers.get("q_proj"):
            parts.append({key: layers[key] for key in ("q_proj", "k_proj", "v_proj", "o_proj") if key in layers})
        for part in parts:
            yes, no = ([key for key, each in part.items() if each is which] for which in (True, False))
            if yes and no:
                found.append(
                    f"{block} has {', '.join(yes)} quantized and {', '.join(no)} in float, which exllamav2 cannot "
                    "load; keep the whole block float, or quantize it whole"
                )
    return found[:1]


def _prescale_reasons(bundle: Bundle, quantized: set[str]) -> list[str]:
    """Why exllamav2 would round other scales than the trained ones."""
    residual = any(_leaf(layer) in ("o_proj", "down_proj") for layer in quantized)
    head = head_of(bundle) in quantized
    found = []
    for reached, neutral, what in ((head, _HEAD, "its head"), (residual, _RESIDUAL, "o_proj and down_proj")):
        said = {key: getattr(bundle.config, key, None) for key in neutral}
        scaled = next((f"{key}={value}" for key, value in said.items() if value not in (None, neutral[key])), None)
        if reached and scaled is not None:
            found.append(
                f"the model's config has {scaled}, which exllamav2 multiplies into the scales of {what} before it "
                "rounds them: those weights would not be the trained ones; keep these layers in float"
            )
    return found


def _q_groups(bits: int, groups: int, inputs: int) -> Tensor:
    """int16 [2 * G] of equal groups."""
    first = torch.arange(groups) * (inputs // groups * bits // 32)
    return torch.stack((torch.full_like(first, bits), first), 1).flatten().to(torch.int16)


def dequantized(layer: str, file: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float16]:
    """Tensors of the shapes above -> W fp16 [I, O], as exllamav2's kernels compute it.

    Raises ExportError if they are not those of one matrix.
    """
    words, order = file["q_weight"].view(np.uint32), file["q_invperm"]
    inputs, outputs = order.shape[0], words.shape[1]
    if not np.array_equal(np.sort(order), np.arange(inputs)):
        raise ExportError(f"{layer}.q_invperm is no permutation of {inputs} inputs")
    groups = _groups(layer, file["q_groups"].reshape(-1, 2).tolist(), words.shape[0], inputs)
    codes = np.empty((inputs, outputs), dtype=np.float16)
    word = row = 0
    for bits, run in groupby(groups, key=lambda group: group[0]):
        rows, at_once = sum(size for _, size in run), _STEP[bits]
        stream = words[word : word + rows * bits // 32].reshape(-1, at_once * bits // 32, outputs)
        here = codes[row : row + rows].reshape(-1, at_once, outputs)
        for r in range(at_once):
            n, shift = divmod(r * bits, 32)
            u = stream[:, n] >> np.uint32(shift)
            if shift + bits > 32:
                u = u | stream[:, n + 1] << np.uint32(32 - shift)
            here[:, r] = (u & np.uint32((1 << bits) - 1)).astype(np.float16) - np.float16(1 << (bits - 1))
        word, row = word + rows * bits // 32, row + rows
    nibbles = file["q_scale"].view(np.uint32)[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)
    k = nibbles.reshape(len(groups), outputs).astype(np.int32) + 1
    with np.errstate(over="ignore", invalid="ignore"):
        # numpy rounds each product of two fp16 numbers to fp16
        scale = (k * k).astype(np.float16) * (file["q_scale_max"] * np.float16(1 / 256))[:, None]
        codes *= scale[np.repeat(np.arange(len(groups)), [rows for _, rows in groups])]
    found: npt.NDArray[np.float16] = codes[order]
    return found


def _groups(layer: str, pairs: list[list[int]], words: int, inputs: int) -> list[tuple[int, int]]:
    """(bits, rows) of each group. Raises ExportError unless they cut all words and all inputs."""
    ends = [*(first for _, first in pairs[1:]), words]
    cut = zip(pairs, ends, strict=True)
    groups = [(bits, (end - first) * 32 // bits if bits in _STEP else 0) for (bits, first), end in cut]
    falling = all(one[0] >= other[0] for one, other in pairwise(groups))
    whole = all(rows > 0 and rows % _STEP[bits] == 0 for bits, rows in groups)
    if pairs[0][1] != 0 or not falling or not whole or sum(rows for _, rows in groups) != inputs:
        raise ExportError(f"{layer}.q_groups do not cut {words} words and {inputs} inputs into groups of falling bits")
    return groups
