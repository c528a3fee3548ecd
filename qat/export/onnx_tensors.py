"""How a weight lies in an ONNX file: the initializers of one DequantizeLinear, and what that node makes of them.

    W = (codes - zero_point) * scale        in fp32, one subtraction and one product as in `qat.qtensor.QTensor`

    codes        INT8 / UINT8, or 4 or 2 bits: the row-major codes as a dense stream, least significant bits first; the
                 smallest type that holds the grid. FLOAT8E4M3FN, FLOAT8E5M2: the bytes
    scale        fp32: [] for the tensor, [O] along `axis`, or, in blocks along `axis`, the shape of the codes with
                 that dimension divided
    zero_point   in the type of the codes, the shape of scale; absent where the grid has none

    parameter                       in the file                            scale by channel     by group
    linear [O, I], embedding        as it is                               axis 0               blocks along axis 1
    transposed [I, O] (Conv1D)      as it is                               axis 1               blocks along axis 0
    conv [O, I/g, *k]               as it is; by group: [O, I/g * k]       axis 0               blocks along axis 1
    deconv [I, O/g, *k]             as it is                               axis 1               -

A convolution by group is a matrix that a Reshape turns into the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import ExportError
from qat.export.packing import pack_bits, unpack_bits
from qat.layout import Layout
from qat.qtensor import QTensor
from qat.specs import QuantSpec

CODES, SCALE, ZERO = "quantized", "scale", "zero_point"
FLOATS = {"e4m3": "FLOAT8E4M3FN", "e5m2": "FLOAT8E5M2"}
# codes of a table, which ONNX has no type for: their places in the table
LEVELS = ("nf4",)
# the kinds of `qat.layout` that have a place here -> the dimension of output channels
CHANNEL = {"linear": 0, "embedding": 0, "transposed": 1, "conv": 0, "deconv": 1}


@dataclass(frozen=True)
class Place:
    """Shape of the codes, and along which dimension scales run; block 0: one scale per channel, or for the tensor."""

    shape: tuple[int, ...]
    axis: int
    block: int

    @property
    def scales(self) -> tuple[int, ...]:
        """Shape of the scales of blocks."""
        return tuple(size // self.block if dim == self.axis else size for dim, size in enumerate(self.shape))


def width(spec: QuantSpec, least: int = 2) -> int:
    """Bits of a stored code: 2, 4 or 8, `least` at least."""
    return next(bits for bits in (2, 4, 8) if bits >= max(spec.bits, least))


def element(spec: QuantSpec, least: int = 2) -> str:
    """The ONNX type of the codes."""
    signed = spec.signed and spec.kind not in LEVELS
    return FLOATS.get(spec.kind) or f"{'' if signed else 'U'}INT{width(spec, least)}"


def place_of(spec: QuantSpec, layout: Layout) -> Place:
    axis = CHANNEL[layout.kind]
    if spec.granularity != "group":
        return Place(tuple(layout.shape), axis, 0)
    shape = layout.rows_shape if layout.kind == "conv" else tuple(layout.shape)
    return Place(shape, 1 - axis, spec.group_size or 1)


def pack(weight: QTensor, least: int = 2) -> dict[str, Tensor]:
    """codes uint8, int8 or a float of 8 bits in the stored shape, below 8 bits uint8 [bytes]; scale; zero_point."""
    spec, layout = weight.spec, weight.layout
    place = place_of(spec, layout)
    codes = layout.from_rows(weight.codes) if place.shape == tuple(layout.shape) else weight.codes
    found = {CODES: _stream(codes.contiguous(), spec, least), SCALE: _stored(weight.scale.float(), spec, layout, place)}
    if weight.zero_point is not None:
        zero = _stored(weight.zero_point, spec, layout, place)
        found[ZERO] = _stream(zero.to(spec.grid.code_dtype), spec, least)
    return found


def unpack(
    packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype, least: int = 2
) -> QTensor:
    """The inverse of `pack`."""
    place = place_of(spec, layout)
    codes = _codes(packed[CODES], spec, place.shape, least)
    codes = layout.to_rows(codes) if place.shape == tuple(layout.shape) else codes
    scale = _fields(packed[SCALE], spec, layout, place)
    zero = None
    if ZERO in packed:
        stored = _codes(packed[ZERO], spec, tuple(packed[SCALE].shape), least)
        zero = _fields(stored, spec, layout, place).to(torch.int16)
    codes = codes.contiguous().to(spec.grid.code_dtype)
    return QTensor(codes, scale.to(spec.scale_grid.dtype), zero, None, spec, layout, out_dtype)


def _stored(fields: Tensor, spec: QuantSpec, layout: Layout, place: Place) -> Tensor:
    """Fields [R, G] or [1, 1] in the shape of the file."""
    if spec.granularity == "tensor":
        return fields.reshape(())
    if not place.block:
        return fields.reshape(-1)
    return (fields.t() if layout.kind == "transposed" else fields).contiguous()


def _fields(stored: Tensor, spec: QuantSpec, layout: Layout, place: Place) -> Tensor:
    if spec.granularity == "tensor":
        return stored.reshape(1, 1)
    if not place.block:
        return stored.reshape(-1, 1)
    return (stored.t() if layout.kind == "transposed" else stored).contiguous()


def _stream(codes: Tensor, spec: QuantSpec, least: int) -> Tensor:
    bits = width(spec, least)
    if spec.kind in FLOATS or bits == 8:
        return codes
    flat = codes.reshape(1, -1).to(torch.int16) & ((1 << bits) - 1)
    return pack_bits(flat, bits).view(torch.uint8).reshape(-1)[: math.ceil(codes.numel() * bits / 8)]


def _codes(stream: Tensor, spec: QuantSpec, shape: tuple[int, ...], least: int) -> Tensor:
    bits, count = width(spec, least), math.prod(shape)
    if spec.kind in FLOATS or bits == 8:
        return stream.reshape(shape)
    if stream.numel() * 8 < count * bits:
        raise ExportError(f"{stream.numel()} bytes do not hold {count} codes of {bits} bits")
    padded = torch.zeros(1, -(-stream.numel() // 4) * 4, dtype=torch.uint8)
    padded[0, : stream.numel()] = stream
    codes = unpack_bits(padded.view(torch.int32), bits, count).reshape(shape)
    half = 1 << (bits - 1)
    return torch.where(codes >= half, codes - 2 * half, codes) if spec.signed and spec.kind not in LEVELS else codes
