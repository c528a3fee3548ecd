"""ggml's blocks with one level of scales as bytes: [R, K] codes and scales -> uint8 [R, K / run * size], and back.

    type      bytes / run   bits      layout                                                            u
    TQ1_0     54 / 256      1.6875    48 bytes and 4 bytes of base-3 digits | d                         code + 1
    TQ2_0     66 / 256      2.0625    qs: 64, two bits each, as those of Q2_K | d                       code + 1
    MXFP4     17 / 32       4.25      e: exponent, 1 byte | qs: 16                                      code of fp4
    Q4_0      18 / 32       4.5       d | qs: 16                                                        code + 8
    IQ4_NL    18 / 32       4.5       d | qs: 16                                                        code of iq4_nl
    NVFP4     36 / 64       4.5       four e4m3 | 4 times qs: 8                                         code of fp4
    Q4_1      20 / 32       5         d | m | qs: 16                                                    code
    Q5_0      22 / 32       5.5       d | qh: 4 | qs: 16                                                code + 16
    Q5_1      24 / 32       6         d | m | qh: 4 | qs: 16                                            code
    Q8_0      34 / 32       8.5       d | c0 .. c31, two's complement                                   code

    qs        byte j of a run of n numbers is u[j] + 16 * u[j + n / 2], of five bits the low four
    qh        bit j of 32 (little-endian) is the fifth bit of u[j]
    digits    byte m of the first 32 is made of u[m], u[m + 32], .., u[m + 128], the first the most significant of five;
              of the next 16 of u[160 + m], u[176 + m], ..; of the last 4 of u[240 + m], .. and a 0: v of 0..242 is
              stored as ceil(v * 256 / 243)

d and m are fp16. They decode to d * code + m in fp32: the product is exact, so there is one rounding, and none without
m. A grid whose groups are several runs repeats its scale in every block of a group; nothing is rounded.
Source: ggml's block_q4_0 .. block_nvfp4; the consumer's decoders are gguf.quants and llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import ExportError
from qat.export.ggml_kquants import four, quarters
from qat.specs import QuantSpec

BLOCK = 32
_HALF, _FP16 = torch.float16, ("portable", "fp16")


@dataclass(frozen=True)
class BlockType:
    """size: bytes of a block of `run` numbers; low, high: codes of integers; kind, scales: words of a spec that it can
    hold; span: numbers that share a scale; stored: dtype of a scale; offset: u - code."""

    size: int
    run: int
    low: int = 0
    high: int = 15
    kind: str = "int"
    scales: tuple[str, ...] = _FP16
    minimum: bool = False
    span: int = BLOCK
    stored: torch.dtype = _HALF

    @property
    def offset(self) -> int:
        return -self.low

    def reasons(self, spec: QuantSpec, columns: int) -> list[str]:
        """Why this type does not hold rows of `columns` numbers on this grid; empty means it does."""
        found = []
        if self.kind != ("int" if spec.is_int else spec.kind):
            found.append("grid")
        elif spec.is_int:
            low, high = spec.int_grid.qmin, spec.int_grid.qmax
            if not (self.low <= low and high <= self.high) and not self.mirrors(spec):
                found.append("codes")
        if spec.scale not in self.scales:
            found.append("scale")
        if spec.zero_point == "int" or (spec.zero_point == "float" and not self.minimum):
            found.append("zero point")
        if (spec.group_size or columns) % self.span or columns % self.run:
            found.append("groups")
        return found

    def mirrors(self, spec: QuantSpec) -> bool:
        """Whether codes and scales are stored with the other sign: -2..1 as -1..2."""
        if not spec.is_int or self.low + self.high == 0 or self.minimum:
            return False
        low, high = spec.int_grid.qmin, spec.int_grid.qmax
        return not (self.low <= low and high <= self.high) and -self.high <= low and high <= -self.low


# fewest bytes first: a grid goes into the first that holds it
TYPES = {
    "TQ1_0": BlockType(54, 256, -1, 1, span=256),
    "TQ2_0": BlockType(66, 256, -1, 2, span=256),
    "MXFP4": BlockType(17, 32, kind="fp4", scales=("e8m0",), stored=getattr(torch, "float8_e8m0fnu", torch.uint8)),
    "Q4_0": BlockType(18, 32, -8, 7),
    "IQ4_NL": BlockType(18, 32, kind="iq4_nl"),
    "NVFP4": BlockType(36, 64, kind="fp4", scales=("nvfp4",), span=16, stored=torch.float8_e4m3fn),
    "Q4_1": BlockType(20, 32, minimum=True),
    "Q5_0": BlockType(22, 32, -16, 15),
    "Q5_1": BlockType(24, 32, 0, 31, minimum=True),
    "Q8_0": BlockType(34, 32, -128, 127),
}


def smallest_type(spec: QuantSpec, columns: int) -> str | None:
    """The type with the fewest bytes that holds rows of `columns` numbers on this grid exactly, or None."""
    return next((name for name, kind in TYPES.items() if not kind.reasons(spec, columns)), None)


def encode_blocks(name: str, codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """Codes [R, K] (K % run == 0); scales and minima [R, G] or [1, 1] that the stored dtype holds exactly -> bytes."""
    kind, (rows, columns) = TYPES[name], codes.shape
    blocks = columns // kind.run
    head = _bytes_of(scale, kind, rows, columns)
    if kind.minimum:
        minimum = torch.zeros_like(scale) if minimum is None else minimum
        head = torch.cat([head, _bytes_of(minimum, kind, rows, columns)], -1)
    u = (codes.to(torch.int16) + kind.offset).reshape(rows, blocks, kind.run)
    if name == "TQ1_0":
        return torch.cat([_digits(u).to(torch.uint8), head], -1).reshape(rows, -1)
    if name == "TQ2_0":
        return torch.cat([quarters(u).to(torch.uint8), head], -1).reshape(rows, -1)
    if name == "Q8_0":
        body = codes.to(torch.int8).view(torch.uint8).reshape(rows, blocks, BLOCK)
    else:
        body = _nibbles(u & 15, kind.span)
        if name in ("Q5_0", "Q5_1"):
            fifth = (u >> 4).reshape(rows, blocks, 4, 8) << torch.arange(8)
            body = torch.cat([fifth.sum(-1), body], -1)
    return torch.cat([head, body.to(torch.uint8)], -1).reshape(rows, -1)


def decode_blocks(name: str, data: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse: uint8 [R, bytes] -> codes [R, K], int8 or (iq4_nl, fp4, with minima) uint8, and scales and minima
    [R, K / span] in the stored dtype. Raises ExportError if the rows are no whole number of blocks."""
    kind, rows = TYPES[name], data.shape[0]
    if data.shape[1] % kind.size:
        raise ExportError(f"rows of {data.shape[1]} bytes are no {name} blocks of {kind.size} bytes")
    blocks = data.reshape(rows, -1, kind.size)
    width = kind.stored.itemsize * (kind.run // kind.span)
    at = kind.size - width if name.startswith("TQ") else 0
    scale = _read(blocks[..., at : at + width], kind)
    minimum = _read(blocks[..., width : 2 * width], kind) if kind.minimum else None
    body = blocks[..., width * (1 + kind.minimum) :] if at == 0 else blocks[..., :at]
    if name == "Q8_0":
        return body.contiguous().view(torch.int8).reshape(rows, -1), scale, minimum
    if name == "TQ1_0":
        u = _undigits(body.to(torch.int16))
    elif name == "TQ2_0":
        u = four(body.to(torch.int16))
    else:
        half = kind.span // 2
        nibbles = body[..., -kind.run // 2 :].reshape(rows, -1, kind.run // kind.span, 1, half)
        u = torch.cat([nibbles & 15, nibbles >> 4], -2).to(torch.int16).flatten(2)
        if name in ("Q5_0", "Q5_1"):
            fifth = body[..., :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
            u = u | fifth.flatten(2).to(torch.int16) << 4
    signed = torch.int8 if kind.low < 0 else torch.uint8
    return (u - kind.offset).to(signed).reshape(rows, -1), scale, minimum


def _bytes_of(field: Tensor, kind: BlockType, rows: int, columns: int) -> Tensor:
    """[R, G] or [1, 1] -> its bytes, repeated for every run: [R, columns / run, bytes]."""
    field = field.to(kind.stored).contiguous()
    one = field.view(torch.uint8).reshape(*field.shape, -1).expand(rows, field.shape[1], kind.stored.itemsize)
    return one.repeat_interleave(columns // kind.span // field.shape[1], 1).reshape(rows, columns // kind.run, -1)


def _read(data: Tensor, kind: BlockType) -> Tensor:
    return data.contiguous().view(kind.stored).reshape(data.shape[0], -1)


def _nibbles(u: Tensor, span: int) -> Tensor:
    """[R, B, run] of 0..15 -> [R, B, run / 2], each span on its own."""
    pairs = u.reshape(*u.shape[:2], -1, 2, span // 2)
    return (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(2)


# first number, how many bytes, digits in each
_RUNS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))


def _digits(u: Tensor) -> Tensor:
    """[R, B, 256] of 0..2 -> [R, B, 52]."""
    found = []
    for start, width, count in _RUNS:
        digits = u[..., start : start + width * count].reshape(*u.shape[:2], count, width)
        v = sum(digits[..., n, :].int() * 3 ** (4 - n) for n in range(count))
        found.append((v * 256 + 242) // 243)
    return torch.cat(found, -1)


def _undigits(body: Tensor) -> Tensor:
    """The inverse of `_digits`."""
    found = []
    for (_, _, count), part in zip(_RUNS, torch.split(body, [32, 16, 4], -1), strict=True):
        found += [(part * 3**n & 255) * 3 >> 8 for n in range(count)]
    return torch.cat(found, -1)
