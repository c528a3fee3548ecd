"""Integer codes of 1..8 bits in as few bytes: a bit stream for storage in general, planar halves for caches.

Stream: code j of a row occupies the bits j * b .. j * b + b - 1 of that row, bit 0 being the lowest of byte 0; a row
starts at a byte and takes ceil(K * b / 8) of them. A negative code is its two's complement in b bits.

    byte i, bit k   =   bit (8 i + k) mod b  of code  (8 i + k) // b

Halves (4 bits, K even): byte j holds code j in its low and code j + K/2 in its high nibble, so that both halves of a
row are read and written as runs of neighbours, by vectors of a CPU and by threads of a GPU alike.

    byte j   =   (code[j] mod 16) + 16 * (code[j + K/2] mod 16)

Eight codes are one 64-bit word of bytes. Their b bits each move together in three steps, and apart by the same steps
backwards: neighbouring bytes into 2 b bits, neighbouring pairs into 4 b bits, the two halves of the word into 8 b bits,

    x  <-  x[low fields]  |  x[high fields] >> (h - w)        (h, w) = (8, b), (16, 2 b), (32, 4 b)

which are the b bytes that the eight codes take in the stream. (Bytes are in little-endian order, as on every machine
that runs the kernels.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels.dispatch import AotCase, Device, Kernel, Op, tl

# how codes lie: int8 or uint8 [R, K]; planar halves, two in a byte; two in a byte with their scale (`rowwise4`)
PLAIN, HALVES, ROWS = "plain", "halves", "rows"
# codes of a chunk of rows that is packed at a time: halves take two passes, the stream many over 64-bit words
# (measured on one core of an x86 server: both are slower with a quarter and with four times as many)
_CHUNK, _STREAM_CHUNK = 1 << 22, 1 << 18


def pack_halves(codes: Tensor) -> Tensor:
    """int8 (-8..7) or uint8 (0..15) codes [R, K], K even -> uint8 [R, K/2]. Raises QATError for an odd K."""
    rows, columns = codes.shape
    if columns % 2:
        raise QATError(f"4-bit halves need an even number of columns, not {columns}; keep these codes as bytes")
    half, wide = columns // 2, codes.view(torch.uint8)
    if torch.compiler.is_compiling():
        return (wide[:, :half] & 15) + wide[:, half:] * 16
    packed = torch.empty(rows, half, dtype=torch.uint8, device=codes.device)
    for part, whole in _chunks(packed, wide, _CHUNK):
        torch.bitwise_and(whole[:, :half], 15, out=part)
        # modulo 256: the product drops the sign bits of the upper nibble
        part.add_(whole[:, half:], alpha=16)
    return packed


def unpack_halves(packed: Tensor, signed: bool) -> Tensor:
    """uint8 [R, K/2] -> codes [R, K]: int8 -8..7 if signed, else uint8 0..15."""
    rows, half = packed.shape
    dtype = torch.int8 if signed else torch.uint8
    both = packed.view(dtype)
    if torch.compiler.is_compiling():
        low = ((both & 15) ^ 8) - 8 if signed else both & 15
        return torch.cat((low, both >> 4), 1)
    codes = torch.empty(rows, 2 * half, dtype=dtype, device=packed.device)
    for whole, part in _chunks(codes, both, _CHUNK):
        low = torch.bitwise_and(part, 15, out=whole[:, :half])
        if signed:
            low.bitwise_xor_(8).sub_(8)
        # arithmetic for int8: the sign comes along
        torch.bitwise_right_shift(part, 4, out=whole[:, half:])
    return codes


def _chunks(out: Tensor, source: Tensor, codes: int) -> list[tuple[Tensor, Tensor]]:
    """Views of the same rows of both, of at most `codes` codes where that is a row."""
    if out.device.type != "cpu":
        return [(out, source)]
    rows = max(1, codes // max(1, out.shape[1], source.shape[1]))
    return list(zip(torch.split(out, rows), torch.split(source, rows), strict=True))


# ---- the stream, in plain torch --------------------------------------------------------------------------------------

# (h, w / b, how often a field of 2 h bits fits into a word, as a number to multiply masks by)
_STEPS = ((8, 1, 0x0001000100010001), (16, 2, 0x0000000100000001), (32, 4, 1))
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _row_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row. Raises QATError for other than 1..8 bits."""
    if not 1 <= bits <= 8:
        raise QATError(f"codes of {bits} bits: 1 to 8 can be packed")
    return -(-columns * bits // 8)


def _together(x: Tensor, bits: int) -> Tensor:
    """int64 words of eight bytes, newly allocated -> words of 8 * bits bits, in place."""
    if bits < 8:
        for half, times, repeat in _STEPS:
            width = times * bits
            low = ((1 << width) - 1) * repeat
            high = (x >> (half - width)).bitwise_and_(low << width)
            x.bitwise_and_(low).bitwise_or_(high)
    return x


def _apart(x: Tensor, bits: int) -> Tensor:
    """The inverse of `_together`, in place; what is above 8 * bits bits is dropped."""
    if bits < 8:
        for half, times, repeat in reversed(_STEPS):
            width = times * bits
            low = ((1 << width) - 1) * repeat
            high = (x & (low << width)).bitwise_left_shift_(half - width)
            x.bitwise_and_(low).bitwise_or_(high)
    return x


def _pack(codes: Tensor, bits: int) -> Tensor:
    """int8 or uint8 codes [R, K] -> uint8 [R, ceil(K * bits / 8)]; the bits above `bits` are dropped."""
    rows, columns = codes.shape
    packed = torch.empty(rows, _row_bytes(columns, bits), dtype=torch.uint8, device=codes.device)
    words = -(-columns // 8)
    if not packed.numel():
        return packed
    for out, part in _chunks(packed, codes.view(torch.uint8), _STREAM_CHUNK):
        wide = torch.zeros(part.shape[0], 8 * words, dtype=torch.uint8, device=codes.device)
        wide[:, :columns] = part
        x = _together(wide.view(torch.int64), bits)
        if bits in _WHOLE:
            stream = x.to(_WHOLE[bits]).view(torch.uint8)
        else:
            stream = x.view(torch.uint8).view(-1, words, 8)[:, :, :bits].reshape(-1, words * bits)
        out.copy_(stream[:, : packed.shape[1]])
    return packed


def _unpack(packed: Tensor, bits: int, columns: int, signed: bool) -> Tensor:
    """uint8 [R, ceil(K * bits / 8)] -> codes [R, K], K = columns: int8 (two's complement) if signed, else uint8.

    Raises QATError where the bytes of a row are not those of `columns` codes.
    """
    codes = _codes(packed, bits, columns, signed)
    words = -(-columns // 8)
    if not codes.numel():
        return codes
    for out, part in _chunks(codes, packed, _STREAM_CHUNK):
        stream = torch.zeros(part.shape[0], words * bits, dtype=torch.uint8, device=packed.device)
        stream[:, : part.shape[1]] = part
        if bits in _WHOLE:
            x = stream.view(_WHOLE[bits]).to(torch.int64)
        else:
            wide = torch.zeros(part.shape[0], words, 8, dtype=torch.uint8, device=packed.device)
            wide[:, :, :bits] = stream.view(-1, words, bits)
            x = wide.view(torch.int64).view(-1, words)
        out.copy_(_apart(x, bits).view(codes.dtype)[:, :columns])
        if signed and bits < 8:
            sign = 1 << (bits - 1)
            out.bitwise_xor_(sign).sub_(sign)
    return codes


def _codes(packed: Tensor, bits: int, columns: int, signed: bool) -> Tensor:
    """Uninitialised results of `unpack`."""
    taken = _row_bytes(columns, bits)
    if packed.shape[1] != taken:
        raise QATError(f"{columns} codes of {bits} bits take {taken} bytes of a row, not {packed.shape[1]}")
    return packed.new_empty((packed.shape[0], columns), dtype=torch.int8 if signed else torch.uint8)


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((codes.shape[0], _row_bytes(codes.shape[1], bits)), dtype=torch.uint8)


# ---- the stream, in kernels ------------------------------------------------------------------------------------------


@Device
def squeezed(x: Any, BITS: tl.constexpr) -> Any:
    """`_together`."""
    if BITS < 8:
        low: tl.constexpr = (1 << BITS) - 1
        x = (x & (low * 0x0001000100010001)) | ((x >> (8 - BITS)) & ((low << BITS) * 0x0001000100010001))
        pair: tl.constexpr = (1 << (2 * BITS)) - 1
        x = (x & (pair * 0x100000001)) | ((x >> (16 - 2 * BITS)) & ((pair << (2 * BITS)) * 0x100000001))
        four: tl.constexpr = (1 << (4 * BITS)) - 1
        x = (x & four) | ((x >> (32 - 4 * BITS)) & (four << (4 * BITS)))
    return x


@Device
def spread(x: Any, BITS: tl.constexpr, SIGNED: tl.constexpr) -> Any:
    """`_apart`, and the signs."""
    if BITS < 8:
        four: tl.constexpr = (1 << (4 * BITS)) - 1
        x = (x & four) | ((x & (four << (4 * BITS))) << (32 - 4 * BITS))
        pair: tl.constexpr = (1 << (2 * BITS)) - 1
        x = (x & (pair * 0x100000001)) | ((x & ((pair << (2 * BITS)) * 0x100000001)) << (16 - 2 * BITS))
        low: tl.constexpr = (1 << BITS) - 1
        x = (x & (low * 0x0001000100010001)) | ((x & ((low << BITS) * 0x0001000100010001)) << (8 - BITS))
        if SIGNED:
            # a byte's sign bit, as 0 or 1, times all the bits above it
            x = x | (((x >> (BITS - 1)) & 0x0101010101010101) * (256 - (1 << BITS)))
    return x


@Kernel
def _pack_kernel(codes: Any, packed: Any, words: Any, BITS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """One stream, bits a power of two: words of eight codes -> integers of 8 * BITS bits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = squeezed(tl.load(codes + i, mask=i < words, other=0), BITS)
    tl.store(packed + i, x.to(packed.dtype.element_ty), mask=i < words)


@Kernel
def _unpack_kernel(
    packed: Any, codes: Any, words: Any, BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """The inverse of `_pack_kernel`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(packed + i, mask=i < words, other=0).to(tl.int64)
    tl.store(codes + i, spread(x, BITS, SIGNED), mask=i < words)


@Kernel
def _pack_odd_kernel(
    codes: Any, packed: Any, lines: Any, BITS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """One stream, any bits: lines of 16 words of eight codes -> lines of 4 * BITS <= WIDE integers of 32 bits.

    A line is 16 * BITS bytes long, so that both sides are moved by 16 bytes; an integer has bits of one word or of two.
    """
    line = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    x = squeezed(tl.load(codes + line * 16 + tl.arange(0, 16)[None, :], mask=line < lines, other=0), BITS)
    # numbered within the line; beyond its end anything will do
    i = tl.arange(0, WIDE)[None, :] + tl.zeros((BLOCK, WIDE), tl.int32)
    first = tl.minimum(4 * i // BITS, 15)
    second = tl.minimum(first + 1, 15)
    down = (32 * i - 8 * BITS * first).to(tl.int64)
    value = tl.gather(x, first, axis=1) >> tl.minimum(down, 63)
    # an integer that ends within its first word takes nothing from the second
    value = value | tl.where(down + 32 > 8 * BITS, tl.gather(x, second, axis=1) << tl.maximum(8 * BITS - down, 0), 0)
    tl.store(packed + line * (4 * BITS) + i, value.to(tl.int32), mask=(line < lines) & (i < 4 * BITS))


@Kernel
def _unpack_odd_kernel(
    packed: Any,
    codes: Any,
    lines: Any,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The inverse of `_pack_odd_kernel`, from lines of 2 * BITS <= WIDE integers of 64 bits."""
    line = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    part = tl.arange(0, WIDE)[None, :]
    x = tl.load(packed + line * (2 * BITS) + part, mask=(line < lines) & (part < 2 * BITS), other=0)
    i = tl.arange(0, 16)[None, :] + tl.zeros((BLOCK, 16), tl.int32)
    first = i * BITS // 8
    second = tl.minimum(first + 1, WIDE - 1)
    shift = (i * BITS % 8 * 8).to(tl.uint64)
    value = tl.gather(x, first, axis=1).to(tl.uint64, bitcast=True) >> shift
    # by 64 - shift, which may be 64, in two steps
    value = value | ((tl.gather(x, second, axis=1).to(tl.uint64, bitcast=True) << 1) << (63 - shift))
    value = spread(value.to(tl.int64, bitcast=True), BITS, SIGNED)
    tl.store(codes + line * 16 + tl.arange(0, 16)[None, :], value, mask=line < lines)


@Kernel
def _pack_bytes_kernel(
    codes: Any,
    packed: Any,
    columns: Any,
    row: Any,
    total: Any,
    BITS: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rows of `row` bytes, one byte a thread at a time, from at most MOST codes; any sizes and addresses."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = i % row * 8
    first = start // BITS
    value = tl.zeros((BLOCK,), tl.int32)
    for t in tl.static_range(MOST):
        at = first + t
        code = tl.load(codes + i // row * columns + at, mask=(i < total) & (at < columns), other=0).to(tl.int32)
        code = code & ((1 << BITS) - 1)
        shift = (at * BITS - start).to(tl.int32)
        value = value | tl.where(shift < 0, code >> tl.maximum(-shift, 0), code << tl.maximum(shift, 0))
    tl.store(packed + i, value.to(tl.uint8), mask=i < total)


@Kernel
def _unpack_bytes_kernel(
    packed: Any,
    codes: Any,
    columns: Any,
    row: Any,
    total: Any,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rows of `row` bytes, one code a thread at a time; any sizes and addresses."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = i % columns * BITS
    at = packed + i // columns * row + start // 8
    shift = (start % 8).to(tl.int32)
    low = tl.load(at, mask=i < total, other=0).to(tl.int32)
    high = tl.load(at + 1, mask=(i < total) & (shift + BITS > 8), other=0).to(tl.int32)
    value = ((low | (high << 8)) >> shift) & ((1 << BITS) - 1)
    if SIGNED:
        value = (value ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    tl.store(codes + i, value.to(codes.dtype.element_ty), mask=i < total)


# of a program: words, lines of 16 words, single bytes
_BLOCK, _LINES, _FEW = 2048, 64, 512


def _grid(count: int, block: int) -> tuple[int]:
    return (-(-count // block),)


def _one_stream(codes: Tensor, packed: Tensor, bits: int) -> bool:
    """Whether rows follow each other in the stream without a gap, in whole lines at whole addresses."""
    offsets = (t.data_ptr() % 16 + t.storage_offset() % 8 for t in (codes, packed))
    return codes.shape[1] * bits % 8 == 0 and codes.numel() % 128 == 0 and not any(offsets)


def _pack_triton(codes: Tensor, bits: int) -> Tensor:
    packed = _pack_fake(codes, bits)
    codes = codes.contiguous()
    if not packed.numel():
        return packed
    if _one_stream(codes, packed, bits):
        words = codes.view(-1).view(torch.int64)
        out = packed.view(-1).view(_WHOLE.get(bits, torch.int32))
        if bits in _WHOLE:
            _pack_kernel[_grid(words.numel(), _BLOCK)](words, out, words.numel(), BITS=bits, BLOCK=_BLOCK)
        else:
            lines, wide = words.numel() // 16, 16 if bits == 3 else 32
            _pack_odd_kernel[_grid(lines, _LINES)](words, out, lines, BITS=bits, WIDE=wide, BLOCK=_LINES)
    else:
        most = -(-(8 + bits - math.gcd(8, bits)) // bits)
        sizes = (codes.shape[1], packed.shape[1], packed.numel())
        _pack_bytes_kernel[_grid(packed.numel(), _FEW)](codes, packed, *sizes, BITS=bits, MOST=most, BLOCK=_FEW)
    return packed


def _unpack_triton(packed: Tensor, bits: int, columns: int, signed: bool) -> Tensor:
    codes = _codes(packed, bits, columns, signed)
    packed = packed.contiguous()
    if not codes.numel():
        return codes
    if _one_stream(codes, packed, bits):
        words = codes.view(-1).view(torch.int64)
        stream = packed.view(-1).view(_WHOLE.get(bits, torch.int64))
        count, lines = words.numel(), words.numel() // 16
        if bits in _WHOLE:
            _unpack_kernel[_grid(count, _BLOCK)](stream, words, count, BITS=bits, SIGNED=signed, BLOCK=_BLOCK)
        else:
            odd = {"BITS": bits, "SIGNED": signed, "WIDE": 8 if bits == 3 else 16, "BLOCK": _LINES}
            _unpack_odd_kernel[_grid(lines, _LINES)](stream, words, lines, **odd)
    else:
        sizes = (columns, packed.shape[1], codes.numel())
        _unpack_bytes_kernel[_grid(codes.numel(), _FEW)](packed, codes, *sizes, BITS=bits, SIGNED=signed, BLOCK=_FEW)
    return codes


pack = Op("pack", _pack, _pack_fake, _pack_triton)
unpack = Op("unpack", _unpack, _codes, _unpack_triton)


def _case(kernel: Kernel, pointers: dict[str, str], block: int, sizes: tuple[str, ...], **constants: Any) -> AotCase:
    """The kernels for bytes are there for sizes and addresses of which nothing is known."""
    name = f"{kernel.function.__name__.strip('_').removesuffix('_kernel')} {constants['BITS']} bits"
    signature, constants = pointers | dict.fromkeys(sizes, "i32"), {**constants, "BLOCK": block}
    return AotCase(name, kernel, signature, constants, aligned=() if "row" in sizes else None)


_WORDS = {"packed": "*i64", "codes": "*i64"}
_TYPES = ((2, "*i16"), (4, "*i32"), (8, "*i64"))
_ODD = ((3, 16), (5, 32), (6, 32), (7, 32))
_ROWS = ("columns", "row", "total")
AOT = (
    *(_case(_pack_kernel, {"codes": "*i64", "packed": t}, _BLOCK, ("words",), BITS=b) for b, t in _TYPES),
    *(
        _case(_unpack_kernel, {"packed": t, "codes": "*i64"}, _BLOCK, ("words",), BITS=b, SIGNED=True)
        for b, t in _TYPES
    ),
    *(_case(_pack_odd_kernel, _WORDS | {"packed": "*i32"}, _LINES, ("lines",), BITS=b, WIDE=w) for b, w in _ODD),
    *(_case(_unpack_odd_kernel, _WORDS, _LINES, ("lines",), BITS=b, SIGNED=True, WIDE=w // 2) for b, w in _ODD),
    _case(_pack_bytes_kernel, {"codes": "*i8", "packed": "*u8"}, _FEW, _ROWS, BITS=3, MOST=4),
    _case(_unpack_bytes_kernel, {"packed": "*u8", "codes": "*i8"}, _FEW, _ROWS, BITS=3, SIGNED=True),
)
