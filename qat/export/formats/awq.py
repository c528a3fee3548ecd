"""AWQ, the GEMM layout of AutoAWQ: 4 bits in groups, read by GPTQModel, transformers and vLLM.

    qweight   int32 [I, ceil(O / 8)]   codes of 8 output columns in a word; bits 4i..4i+3 hold column
    qzeros    int32 [G, ceil(O / 8)]   8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]; zero points likewise, as they are
    scales    fp16 [G, O]
    bias      as in the model

One grid for all layers; those left in float are listed in `modules_to_not_convert` (transformers, vLLM) and `dynamic`
(GPTQModel). What AWQ does to weights before it rounds them is folded into the model: the file knows nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export.format import TensorStream
from qat.export.hf_format import KEEP, targets
from qat.export.packed_groups import (
    Grouped,
    PackedGroups,
    check_tensor,
    dtypes,
    exactly,
    group_of,
    head_of,
    left_in_float,
    number,
    restored,
    stored,
    undisturbed,
    unsigned_grid,
)
from qat.export.packing import pack_bits, unpack_bits
from qat.layout import Layout
from qat.qtensor import Fields, QTensor
from qat.specs import QuantSpec

BITS, WORD = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq(PackedGroups):
    """The format of AutoAWQ."""

    name = "awq"
    bits = "4"
    contents = "int by tensor, channel or group, with or without zero points; one group size for all layers"
    consumers = ("autoawq",)
    widths = (BITS,)
    groups = (16, 32, 64, 128)
    kinds = ("linear",)

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        found = super().model_reasons(bundle, tokenizer)
        odd = next(((name, shape[0]) for name, shape in bundle.shapes().items() if shape[0] % WORD), None)
        if odd is not None:
            found.append(f"{odd[0]} has {odd[1]} outputs, which awq packs by {WORD}; {KEEP}")
        sizes = {group_of(spec) for spec in bundle.specs().values()}
        if len(sizes) > 1:
            said = ", ".join("a whole row" if size < 0 else str(size) for size in sorted(sizes))
            found.append(f"groups of {said}: awq has one group size for all layers; use one, or the format gptq")
        if head_of(bundle) in {name.rpartition(".")[0] for name in bundle}:
            found.append(f"{head_of(bundle)}: transformers leaves the output head of awq models in float; {KEEP}")
        return found

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """Local names -> tensors."""
        codes, zero, scale = stored(name, weight)
        return {"qweight": _words(codes.T), "qzeros": _words(zero.T), "scales": scale.T.contiguous()}

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        rows = layout.rows_shape[0]
        codes, zero = (_columns(packed[key], rows).T.contiguous() for key in ("qweight", "qzeros"))
        return restored(Grouped(codes, zero, packed["scales"].T), spec, layout, out_dtype)

    # ---- the files -----------------------------------------------------------------------------------------------

    def layer_tensors(
        self, name: str, weight: QTensor, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return self.pack(name, weight)

    def quantization_config(self, stream: TensorStream) -> dict[str, Any]:
        floats = left_in_float(stream)
        found: dict[str, Any] = {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": group_of(next(iter(targets(stream).values()))),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": floats or None,
        }
        if floats:
            found["dynamic"] = {f"-:{exactly(layer)}": {} for layer in floats}
        return found

    def weight(self, layer: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
        settings = config["quantization_config"]
        bits, size = number(settings, "bits"), number(settings, "group_size")
        if bits != BITS or str(settings.get("version")).lower() != "gemm" or (size < 1 and size != -1):
            said = ", ".join(f"{key}={settings.get(key)!r}" for key in ("bits", "group_size", "version"))
            raise ExportError(f"config.json has {said}; awq is read with bits=4 and version='gemm'")
        inputs, outputs = (
            tensors[key].shape[axis] if key in tensors else 0 for key, axis in (("qweight", 0), ("scales", -1))
        )
        if size > 0 and inputs % size:
            raise ExportError(f"{layer} has {inputs} inputs, which are no whole groups of {size}")
        groups = inputs // size if size > 0 else 1
        check_tensor(layer, tensors, "scales", torch.float16, (groups, outputs))
        check_tensor(layer, tensors, "qweight", torch.int32, (inputs, -(-outputs // WORD)))
        check_tensor(layer, tensors, "qzeros", torch.int32, (groups, -(-outputs // WORD)))
        dtype, computed = dtypes(config)
        if self.installed():
            with undisturbed():
                from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
            parts = (tensors["qweight"], tensors["qzeros"], tensors["scales"].to(computed), BITS, inputs // groups)
            return dequantize_gemm(*parts).T.contiguous().to(dtype)  # type: ignore[no-any-return]
        spec = unsigned_grid(BITS, inputs // groups)
        return self.unpack(tensors, spec, Layout((outputs, inputs)), computed).dequantize().to(dtype)


def _words(numbers: Tensor) -> Tensor:
    """0..15 [R, O] -> int32 [R, ceil(O / 8)]."""
    rows, columns = numbers.shape
    padded = torch.zeros(rows, -(-columns // WORD) * WORD, dtype=torch.int16)
    padded[:, :columns] = numbers
    return pack_bits(padded.reshape(rows, -1, WORD)[..., _ORDER].reshape(rows, -1), BITS)


def _columns(words: Tensor, columns: int) -> Tensor:
    """The inverse of `_words`."""
    rows = words.shape[0]
    found = unpack_bits(words, BITS, words.shape[1] * WORD).reshape(rows, -1, WORD)
    natural = torch.empty_like(found)
    natural[..., _ORDER] = found
    return natural.reshape(rows, -1)[:, :columns]
