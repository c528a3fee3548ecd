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
    if packed.shape[1] != _row_bytes(columns, bits):
        raise QATError(
            f"{columns} codes of {bits} bits take {_row_bytes(columns, bits)} bytes of a row, not {packed.shape[1]}"
        )
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
def _pack_kernel(codes: Any, packed: Any, words: Any, total: Any, BITS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """One stream. Words of eight codes -> `total` integers of 8 * BITS bits, or of 32 bits where there are no such."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if BITS == 1 or BITS == 2 or BITS == 4 or BITS == 8:
        x = squeezed(tl.load(codes + i, mask=i < words, other=0), BITS)
    else:
        first = 4 * i // BITS
        x = tl.zeros((BLOCK,), tl.int64)
        for t in tl.static_range(2):
            at = first + t
            more = squeezed(tl.load(codes + at, mask=at < words, other=0), BITS)
            shift = 8 * BITS * at - 32 * i
            x = x | tl.where(shift < 0, more >> tl.maximum(-shift, 0), more << tl.maximum(shift, 0))
    tl.store(packed + i, x.to(packed.dtype.element_ty), mask=i < total)


@Kernel
def _unpack_kernel(
    packed: Any, codes: Any, words: Any, total: Any, BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """One stream. `total` integers of 8 * BITS bits, or of 64 where there are no such -> words of eight codes."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if BITS == 1 or BITS == 2 or BITS == 4 or BITS == 8:
        x = tl.load(packed + i, mask=i < total, other=0).to(tl.int64)
    else:
        first = i * BITS // 8
        shift = (i * BITS % 8 * 8).to(tl.uint64)
        x = tl.load(packed + first, mask=first < total, other=0).to(tl.uint64, bitcast=True) >> shift
        more = tl.load(packed + first + 1, mask=first + 1 < total, other=0).to(tl.uint64, bitcast=True)
        # by 64 - shift, which may be 64, in two steps
        x = (x | ((more << 1) << (63 - shift))).to(tl.int64, bitcast=True)
    tl.store(codes + i, spread(x, BITS, SIGNED), mask=i < words)


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


# numbers of a program: words, and single bytes
_BLOCK, _FEW = 2048, 512


def _grid(count: int, block: int) -> tuple[int]:
    return (-(-count // block),)


def _one_stream(codes: Tensor, packed: Tensor, bits: int) -> bool:
    """Whether rows follow each other in the stream without a gap, in whole words at whole addresses."""
    return (
        codes.shape[1] * bits % 8 == 0
        and codes.numel() % 64 == 0
        and not (
            codes.data_ptr() % 16 or packed.data_ptr() % 16 or codes.storage_offset() % 8 or packed.storage_offset() % 8
        )
    )


def _pack_triton(codes: Tensor, bits: int) -> Tensor:
    packed = _pack_fake(codes, bits)
    codes = codes.contiguous()
    if not packed.numel():
        return packed
    if _one_stream(codes, packed, bits):
        out = packed.view(-1).view(_WHOLE.get(bits, torch.int32))
        words = codes.view(-1).view(torch.int64)
        _pack_kernel[_grid(out.numel(), _BLOCK)](words, out, words.numel(), out.numel(), BITS=bits, BLOCK=_BLOCK)
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
        stream = packed.view(-1).view(_WHOLE.get(bits, torch.int64))
        words = codes.view(-1).view(torch.int64)
        count, total = words.numel(), stream.numel()
        _unpack_kernel[_grid(count, _BLOCK)](stream, words, count, total, BITS=bits, SIGNED=signed, BLOCK=_BLOCK)
    else:
        sizes = (columns, packed.shape[1], codes.numel())
        _unpack_bytes_kernel[_grid(codes.numel(), _FEW)](packed, codes, *sizes, BITS=bits, SIGNED=signed, BLOCK=_FEW)
    return codes


pack = Op("pack", _pack, _pack_fake, _pack_triton)
unpack = Op("unpack", _unpack, _codes, _unpack_triton)


def _case(name: str, kernel: Kernel, source: str, target: str, sizes: tuple[str, ...], **constants: Any) -> AotCase:
    """Where bits are no power of two, a thread's word is put together from two; byte by byte nothing is wide."""
    to_bytes = kernel is _pack_kernel or kernel is _pack_bytes_kernel
    pointers = {"codes": source, "packed": target} if to_bytes else {"packed": source, "codes": target}
    single = kernel is _pack_bytes_kernel or kernel is _unpack_bytes_kernel
    return AotCase(
        f"{name} {constants['BITS']} bits",
        kernel,
        pointers | dict.fromkeys(sizes, "i32"),
        {**constants, "BLOCK": _FEW if single else _BLOCK},
        aligned=("codes", "packed") if single else None if constants["BITS"] in _WHOLE else (*pointers, *sizes),
    )


_STREAM, _ROWS = ("words", "total"), ("columns", "row", "total")
AOT = (
    *(_case("pack", _pack_kernel, "*i64", t, _STREAM, BITS=b) for b, t in ((2, "*i16"), (4, "*i32"), (8, "*i64"))),
    *(_case("pack", _pack_kernel, "*i64", "*i32", _STREAM, BITS=b) for b in (3, 5, 6)),
    *(
        _case("unpack", _unpack_kernel, s, "*i64", _STREAM, BITS=b, SIGNED=True)
        for b, s in ((2, "*i16"), (4, "*i32"), (8, "*i64"), (3, "*i64"), (5, "*i64"), (6, "*i64"))
    ),
    _case("pack bytes", _pack_bytes_kernel, "*i8", "*u8", _ROWS, BITS=3, MOST=4),
    _case("unpack bytes", _unpack_bytes_kernel, "*u8", "*i8", _ROWS, BITS=3, SIGNED=True),
)
