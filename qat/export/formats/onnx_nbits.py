"""ONNX with MatMulNBits, onnxruntime's own operator, for Linear layers of 2, 4 or 8 bits; everything else as in `onnx`.

    B            uint8 [N, K / block, block * bits / 8]       unsigned codes, low bits first
    scales       fp32 [N, K / block]
    zero_points  uint8 [N, ceil(K / block * bits / 8)]        absent where all are 2^(bits-1)

W = (u - zero) * scale. A signed code is stored as u = code + 2^(bits-1). Blocks are powers of two from 16 on: a larger
group, a row or a tensor becomes several blocks with equal scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import onnx_reader, onnx_tensors
from qat.export.formats.onnx import KEEP, Builder, Onnx
from qat.export.packing import pack_bits, unpack_bits
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor
from qat.specs import QuantSpec

_KINDS = ("linear", "transposed")
_SMALLEST, _LARGEST = 16, 256


class OnnxNBits(Onnx):
    """For onnxruntime alone."""

    name = "onnx-nbits"
    contents = "MatMulNBits of 2, 4 and 8 bits for Linear layers in groups; the rest as onnx"
    consumers = ("onnxruntime-genai",)

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = super().row_reasons(row)
        if row.weight is not None and set(row.kinds.values()) <= set(_KINDS):
            if not row.weight.is_int:
                found.append(f"grid {row.weight.kind}: MatMulNBits holds integers; nearest: grid: int, bits: 8")
            elif _block(row.weight, row.columns) < _SMALLEST:
                run = row.weight.group_size or row.columns
                found.append(
                    f"runs of {run} numbers: blocks of MatMulNBits are 16, 32, 64, 128 or 256; use group_size: 32, "
                    f"or {KEEP}"
                )
        return found

    def pack(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        if weight.layout.kind not in _KINDS:
            return super().pack(name, weight)
        spec, bits = weight.spec, onnx_tensors.width(weight.spec)
        rows, columns = weight.codes.shape
        blocks = columns // _block(spec, columns)
        half = 1 << (bits - 1)
        offset = half if spec.signed else 0
        codes = pack_bits(weight.codes.to(torch.int16) + offset, bits).view(torch.uint8)
        scale = _spread(weight.scale.float(), rows, blocks)
        found = {"B": codes.reshape(rows, blocks, -1).contiguous(), "scales": scale}
        zero = weight.zero_point
        zero = torch.zeros_like(weight.scale, dtype=torch.int16) if zero is None else zero
        zero = _spread(zero + offset, rows, blocks)
        if not bool((zero == half).all()):
            size = -(-blocks * bits // 8)
            found["zero_points"] = pack_bits(zero, bits).view(torch.uint8)[:, :size].contiguous()
        return found

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """Raises ExportError if the blocks of one group carry different scales."""
        if layout.kind not in _KINDS:
            return super().unpack(packed, spec, layout, out_dtype)
        bits = onnx_tensors.width(spec)
        rows, columns = layout.rows_shape
        half = 1 << (bits - 1)
        offset = half if spec.signed else 0
        words = packed["B"].reshape(rows, -1).view(torch.int32)
        codes = (unpack_bits(words, bits, columns) - offset).to(spec.grid.code_dtype)
        scale = _gathered(packed["scales"], spec, columns).to(spec.scale_grid.dtype)
        zero = None
        if spec.zero_point == "int":
            stored = torch.full_like(packed["scales"], half, dtype=torch.int16)
            if "zero_points" in packed:
                stream = packed["zero_points"]
                padded = torch.zeros(rows, -(-stream.shape[1] // 4) * 4, dtype=torch.uint8)
                padded[:, : stream.shape[1]] = stream
                stored = unpack_bits(padded.view(torch.int32), bits, stored.shape[1])
            zero = _gathered(stored - offset, spec, columns).to(torch.int16)
        return QTensor(codes, scale, zero, None, spec, layout, out_dtype)

    def multiplied(self, bundle: Bundle) -> frozenset[str]:
        # a weight that an embedding shares is read by both, so both dequantize it
        shared = set(bundle.tied.values())
        kinds = {name: layout.kind for name, layout in bundle.layouts().items()}
        return frozenset(name for name, kind in kinds.items() if kind in _KINDS and name not in shared)

    def place(self, build: Builder, name: str, weight: QTensor, reads: list[Any], multiplied: list[Any]) -> str:
        if not multiplied:
            return super().place(build, name, weight, reads, multiplied)
        packed = self.pack(name, weight)
        outputs, columns = weight.codes.shape
        words = {
            "K": columns,
            "N": outputs,
            "bits": onnx_tensors.width(weight.spec),
            "block_size": _block(weight.spec, columns),
        }
        inputs = [
            build.initializer(f"{name}_{key}", "FLOAT" if key == "scales" else "UINT8", tensor.shape, tensor)
            for key, tensor in packed.items()
        ]
        value = name
        for number, mark in enumerate(multiplied):
            value = f"{name}_product" + (f"_{number}" if number else "")
            out = build.node("MatMulNBits", [mark.inputs[0], *inputs], value, mark, "com.microsoft", **words)
            if weight.layout.kind == "transposed":
                out.producer().metadata_props[onnx_reader.TOLD] = "transposed"
            value = build.replace([mark], out)
        build.model.opset_imports["com.microsoft"] = 1
        return value


def _block(spec: QuantSpec, columns: int) -> int:
    """The largest power of two, up to 256, that divides a group, or a row where a row or the tensor has one scale."""
    run = spec.group_size or columns
    return min(run & -run, _LARGEST)


def _spread(fields: Tensor, rows: int, blocks: int) -> Tensor:
    """[R, G] or [1, 1] -> [rows, blocks]."""
    repeated = fields.repeat_interleave(blocks // fields.shape[1], 1)
    return repeated.expand(rows, blocks).contiguous()


def _gathered(blocks: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    groups = spec.groups(columns)
    flat = blocks.reshape(1, 1, -1) if spec.granularity == "tensor" else blocks.reshape(blocks.shape[0], groups, -1)
    if not torch.equal(flat, flat[..., :1].expand_as(flat)):
        raise ExportError("blocks of one group carry different scales; these bytes do not come from this grid")
    return flat[..., 0].contiguous()
