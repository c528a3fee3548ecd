"""Scales that are themselves quantized: k-quant super-blocks, EXL2's squared scales, bitsandbytes' double quantization.

What is rounded here is s (and a minimum m); numbers are then encoded and decoded by `affine` or `codebook` with these
s and m, in the order of the consumer's own arithmetic, so that a fake-quantized weight is what the consumer decodes,
bit for bit.

K-quants (ggml), super-blocks of 256 numbers in n sub-blocks, s0 and m0 what the sub-blocks would like:

    d  = fp16(max_n s0 * (1 / top))     sc = clamp(rint(s0 * (1 / d)), 1, top)          s = d * sc      exact in fp32
    d' = fp16(max_n m0 * (1 / top))     mn = clamp(rint(m0 * (1 / d')), 0, top)         m = -(d' * mn)
    w_hat = s * code + m                one rounding, for s * code is exact

            sub-block   code        top   minima        s0 and m0 of `kquant_dynamic`, found in the same pass:
    Q2_K    16           0..3        15   yes
    Q3_K    16          -4..3        31   no            minima: m0 = -min(amin, 0), s0 = (amax + m0) * (1 / hi)
    Q4_K    32           0..15       63   yes           none:   s0 = amax |w| * (2 / (hi - lo))
    Q5_K    32           0..31       63   yes
    Q6_K    16         -32..31      127   no

sc is at least 1: s stays positive. d and d' reach down to fp16's denormals, which small weights need.

EXL2: M fp16 for each group, shared by all rows; k in 1..16, nearest in s:

    P = fp16(M / 256),  k = number of (j^2 + j + 1/2) * P below s0, + 1,  s = fp16(k^2 * P),  w_hat = fp16(s * code)

M is at most 511, so that no w_hat of 8 bits is beyond fp16's range.

Double quantization (Dettmers et al. 2023, section 3): scales a in runs of 256 in row-major order, an offset for all:

    N = max |a - offset|,  code = nearest entry of a table to (a - offset) * (1 / N),  a_hat = table[code] * N + offset

with two roundings, as the consumer does; codes whose a_hat is not positive are not used.

Gradients pass straight through all of these roundings: ds0 = ds, dm0 = dm (what `affine` and `codebook` return). A
stored scale follows its own s0; that d, M and N move with their largest member is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.device import clip, rint
from qat.fake_quant_kernels.dispatch import AotCase, Kernel, Op, tl
from qat.fake_quant_kernels.storage import project, project_minimum

SUPER = 256
_TINY, _HUGE, _LARGEST = 2.0**-24, 65504.0, 2.0**119
_EXL2_LARGEST = 511.0
# name -> numbers of a sub-block, lo, hi, top, minima
KQUANTS = {
    "Q2_K": (16, 0, 3, 15, True),
    "Q3_K": (16, -4, 3, 31, False),
    "Q4_K": (32, 0, 15, 63, True),
    "Q5_K": (32, 0, 31, 63, True),
    "Q6_K": (16, -32, 31, 127, False),
}


def dynamic_map() -> Tensor:
    """bitsandbytes' signed 8-bit table, fp32 [256], ascending (Dettmers 2016, dynamic tree quantization)."""
    entries = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        means = 10.0 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        entries += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(entries), dtype=torch.float32)


def super_scales(s0: Tensor, subs: int, top: int) -> tuple[Tensor, Tensor]:
    """Scales s0 fp32 [R, G] -> (sc uint8 [R, G], d fp32 [R, G / subs], numbers of fp16)."""
    s0 = s0.reshape(s0.shape[0], s0.shape[1] // subs, subs).nan_to_num(nan=torch.inf)
    d = project(s0.amax(-1, keepdim=True) * (1.0 / top), torch.float16, _TINY, _HUGE)
    sc = torch.round((s0 * (1.0 / d)).clamp_(1.0, top))
    return sc.to(torch.uint8).flatten(1), d.squeeze(-1)


def super_minima(m0: Tensor, subs: int, top: int) -> tuple[Tensor, Tensor]:
    """Minima as m0 >= 0 (subtracted), fp32 [R, G] -> (mn uint8 [R, G], d' fp32 [R, G / subs], numbers of fp16)."""
    m0 = m0.reshape(m0.shape[0], m0.shape[1] // subs, subs).nan_to_num(nan=0.0, posinf=torch.inf)
    d = project_minimum(m0.amax(-1, keepdim=True) * (1.0 / top), torch.float16, 0.0, _HUGE)
    mn = torch.where(d > 0, torch.round((m0 * (1.0 / d)).clamp_(0.0, top)), 0.0)
    return mn.to(torch.uint8).flatten(1), d.squeeze(-1)


def super_values(codes: Tensor, d: Tensor) -> Tensor:
    """sc or mn uint8 [R, G] with d [R, G / subs] -> d * code, fp32 [R, G], exact."""
    subs = codes.shape[1] // max(1, d.shape[1])
    return (codes.reshape(*d.shape, subs) * d.unsqueeze(-1)).reshape(codes.shape)


def _kquant_dynamic(
    w: Tensor, size: int, lo: int, hi: int, top: int, minima: bool, codes: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """w [R, K], K % 256 == 0 -> (codes uint8 / int8 or numbers of `dtype` [R, K], sc, d, mn, d'); no minima: empty."""
    rows, groups = w.shape[0], w.shape[1] // size
    blocks = w.reshape(rows, groups, size).float()
    empty = w.numel() == 0
    mn, d_min = w.new_empty(0, dtype=torch.uint8), w.new_empty(0, dtype=torch.float32)
    if minima:
        low = (blocks.new_zeros(rows, groups) if empty else blocks.amin(-1)).clamp(max=0.0)
        high = blocks.new_zeros(rows, groups) if empty else blocks.amax(-1)
        mn, d_min = super_minima(-low, SUPER // size, top)
        s0 = (high - low) * (1.0 / hi)
        shift = super_values(mn, d_min).unsqueeze(-1)
    else:
        s0 = (blocks.new_zeros(rows, groups) if empty else blocks.abs().amax(-1)) * (2.0 / (hi - lo))
    sc, d = super_scales(s0, SUPER // size, top)
    s = super_values(sc, d).unsqueeze(-1)
    v = (blocks + shift if minima else blocks) * (1.0 / s)
    q = torch.round(v.clamp_(lo, hi))
    if codes:
        out = q.nan_to_num_(0.0).to(torch.int8).view(torch.int8 if lo < 0 else torch.uint8)
    else:
        out = (q * s - shift if minima else q * s).to(dtype)
    return out.reshape(w.shape), sc, d, mn, d_min


@Kernel
def kquant_kernel(
    w: Any,
    out: Any,
    sc_out: Any,
    d_out: Any,
    mn_out: Any,
    dmin_out: Any,
    supers: Any,
    inv_reach: Any,
    inv_top: Any,
    lo: Any,
    hi: Any,
    top: Any,
    MINIMA: tl.constexpr,
    CODES: tl.constexpr,
    SUBS: tl.constexpr,
    SIZE: tl.constexpr,
    NS: tl.constexpr,
) -> None:
    """NS super-blocks of SUBS * SIZE numbers."""
    at = tl.program_id(0).to(tl.int64) * NS + tl.arange(0, NS)
    live = at < supers
    sub = at[:, None] * SUBS + tl.arange(0, SUBS)[None, :]
    numbers = sub[:, :, None] * SIZE + tl.arange(0, SIZE)[None, None, :]
    x = tl.load(w + numbers, live[:, None, None], other=0.0).to(tl.float32)
    odd = tl.max((x != x).to(tl.int32), 2) > 0
    if MINIMA:
        low = tl.minimum(tl.min(x, 2), 0.0)
        s0 = (tl.max(x, 2) - low) * inv_reach
        m0 = tl.where(odd, 0.0, -low)
        d_min = tl.minimum(tl.max(m0, 1) * inv_top, 65504.0).to(tl.float16).to(tl.float32)
        mn = clip(m0 * tl.math.div_rn(1.0, tl.where(d_min > 0, d_min, 1.0))[:, None], 0.0, top)
        mn = tl.where((d_min > 0)[:, None], rint(mn), 0.0)
        tl.store(mn_out + sub, mn.to(tl.uint8), live[:, None])
        tl.store(dmin_out + at, d_min, live)
        shift = d_min[:, None] * mn
        x += shift[:, :, None]
    else:
        s0 = tl.max(tl.abs(x), 2) * inv_reach
    s0 = tl.where(odd | (s0 != s0), float("inf"), s0)
    d = tl.minimum(tl.maximum(tl.max(s0, 1) * inv_top, 5.9604644775390625e-8), 65504.0)
    d = d.to(tl.float16).to(tl.float32)
    sc = rint(tl.minimum(tl.maximum(s0 * tl.math.div_rn(1.0, d)[:, None], 1.0), top))
    tl.store(sc_out + sub, sc.to(tl.uint8), live[:, None])
    tl.store(d_out + at, d, live)
    s = d[:, None] * sc
    q = rint(clip(x * tl.math.div_rn(1.0, s)[:, :, None], lo, hi))
    if CODES:
        result = tl.where(q != q, 0.0, q).to(tl.int32).to(out.dtype.element_ty)
    else:
        y = q * s[:, :, None]
        if MINIMA:
            y = y - shift[:, :, None]
        result = y.to(out.dtype.element_ty)
    tl.store(out + numbers, result, live[:, None, None])


def _kquant_triton(
    w: Tensor, size: int, lo: int, hi: int, top: int, minima: bool, codes: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not w.numel():
        return _kquant_dynamic(w, size, lo, hi, top, minima, codes, dtype)
    w = w.contiguous()
    out, sc, d, mn, d_min = _kquant_fake(w, size, lo, hi, top, minima, codes, dtype)
    supers, in_program = d.numel(), 8
    kquant_kernel[(-(-supers // in_program),)](
        w, out, sc, d, mn, d_min, supers, 1.0 / hi if minima else 2.0 / (hi - lo), 1.0 / top, float(lo), float(hi),
        float(top), MINIMA=minima, CODES=codes, SUBS=SUPER // size, SIZE=size, NS=in_program, num_warps=4,
    )  # fmt: skip
    return out, sc, d, mn, d_min


def _kquant_fake(
    w: Tensor, size: int, lo: int, hi: int, top: int, minima: bool, codes: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, groups, supers = w.shape[0], w.shape[1] // size, w.shape[1] // SUPER
    code = torch.int8 if lo < 0 else torch.uint8
    second = ((rows, groups), (rows, supers)) if minima else ((0,), (0,))
    return (
        w.new_empty(w.shape, dtype=code if codes else dtype),
        w.new_empty((rows, groups), dtype=torch.uint8),
        w.new_empty((rows, supers), dtype=torch.float32),
        w.new_empty(second[0], dtype=torch.uint8),
        w.new_empty(second[1], dtype=torch.float32),
    )


def _exl2_encode(s0: Tensor, largest: Tensor) -> Tensor:
    """s0 fp32 [R, G], M fp32 [1, G] as `exl2_largest` gives -> k uint8 [R, G], 1..16."""
    below = torch.arange(1.0, 16.0, device=s0.device)
    below = below * below + below + 0.5
    k = torch.bucketize((s0 * (1.0 / exl2_step(largest))).contiguous(), below, out_int32=True)
    return (k + 1).to(torch.uint8)


def exl2_largest(s0: Tensor) -> Tensor:
    """s0 fp32 [R, G] -> M, fp32 [1, G], numbers of fp16; at least 2^-16, where M / 256 is the smallest one."""
    return project(s0.amax(0, keepdim=True), torch.float16, 2.0**-16, _EXL2_LARGEST)


def exl2_step(largest: Tensor) -> Tensor:
    """M -> P = fp16(M / 256) as fp32."""
    return project(largest * 2.0**-8, torch.float16, _TINY, _HUGE)


def _exl2_decode(k: Tensor, largest: Tensor) -> Tensor:
    """k uint8 [R, G] with M [1, G] -> s fp32 [R, G], numbers of fp16."""
    wide = k.float()
    return project(wide * wide * exl2_step(largest), torch.float16, _TINY, _HUGE)


@Kernel
def exl2_kernel(
    given: Any, largest: Any, out: Any, count: Any, groups: Any, ENCODE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    step = (tl.load(largest + at % groups, live, other=1.0) * 0.00390625).to(tl.float16).to(tl.float32)
    if ENCODE:
        v = tl.load(given + at, live, other=0.0) * tl.math.div_rn(1.0, step)
        k = tl.full([BLOCK], 1, tl.int32)
        for j in tl.static_range(1, 16):
            k += tl.where(v <= j * j + j + 0.5, 0, 1)
        tl.store(out + at, k.to(tl.uint8), live)
    else:
        k = tl.load(given + at, live, other=1).to(tl.float32)
        tl.store(out + at, (k * k * step).to(tl.float16).to(tl.float32), live)


def _exl2(given: Tensor, largest: Tensor, encode: bool) -> Tensor:
    given = given.contiguous()
    out = torch.empty(given.shape, dtype=torch.uint8 if encode else torch.float32, device=given.device)
    if given.numel():
        grid = (-(-given.numel() // 2048),)
        exl2_kernel[grid](
            given, largest.contiguous(), out, given.numel(), given.shape[1], ENCODE=encode, BLOCK=2048, num_warps=4
        )
    return out


def _blocks(a: Tensor) -> Tensor:
    """Any shape -> runs [B, 256]; the last one is filled up with its own first number."""
    flat = a.reshape(-1)
    short = -flat.shape[0] % SUPER
    if short:
        flat = torch.cat((flat, flat[-(SUPER - short)].expand(short)))
    return flat.reshape(-1, SUPER)


def _double_encode(a: Tensor, offset: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """a fp32 of any shape, offset fp32 of one element (their mean), table fp32 [256] -> (codes uint8 as a, N [B])."""
    if not a.numel():
        return a.new_empty(a.shape, dtype=torch.uint8), a.new_empty(0)
    v = _blocks(a) - offset.reshape(1, 1)
    largest = v.abs().amax(-1).nan_to_num(nan=_LARGEST, posinf=_LARGEST).clamp(2.0**-110, _LARGEST)
    codes = torch.bucketize(v * (1.0 / largest).unsqueeze(-1), (table[1:] + table[:-1]) * 0.5, out_int32=True)
    # the first code whose number is positive
    first = (table * largest.unsqueeze(-1) + offset.reshape(1, 1) <= 0).sum(-1, keepdim=True).clamp(max=255)
    codes = torch.maximum(codes, first.to(torch.int32)).to(torch.uint8)
    return codes.reshape(-1)[: a.numel()].reshape(a.shape), largest


def _double_decode(codes: Tensor, largest: Tensor, offset: Tensor, table: Tensor) -> Tensor:
    """codes uint8 of any shape, N [B] -> scales fp32 of that shape."""
    flat = table.index_select(0, codes.reshape(-1).int())
    runs = largest.repeat_interleave(SUPER)[: flat.shape[0]]
    return flat.mul_(runs).add_(offset.reshape(1)).reshape(codes.shape)


@Kernel
def double_kernel(
    a: Any,
    offset: Any,
    table: Any,
    codes: Any,
    largest: Any,
    count: Any,
    runs: Any,
    ENCODE: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
) -> None:
    """RUNS runs of 256: `a` is read and `codes`, `largest` written, or the other way round."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    at = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    live = at < count
    shift = tl.load(offset)
    entry = tl.arange(0, 256)
    entries = tl.load(table + entry)
    if ENCODE:
        v = tl.where(live, tl.load(a + at, live, other=0.0) - shift, 0.0)
        odd = tl.max((v != v).to(tl.int32), 1) > 0
        n = tl.where(odd, 6.646139978924579e35, tl.minimum(tl.max(tl.abs(v), 1), 6.646139978924579e35))
        n = tl.maximum(n, 7.703719777548943e-34)
        tl.store(largest + run, n, run < runs)
        v = tl.reshape(v * tl.math.div_rn(1.0, n)[:, None], [RUNS * RUN])
        middle = (entries + tl.load(table + entry + 1, entry < 255, other=0.0)) * 0.5
        code = tl.zeros([RUNS * RUN], tl.int32)
        # the first code whose number is positive
        first = tl.sum((entries[None, :] * n[:, None] + shift <= 0).to(tl.int32), 1)
        for bit in tl.static_range(8):
            code += tl.where(v <= tl.gather(middle, code + ((128 >> bit) - 1), 0), 0, 128 >> bit)
        code = tl.maximum(tl.reshape(code, [RUNS, RUN]), tl.minimum(first, 255)[:, None])
        tl.store(codes + at, code.to(tl.uint8), live)
    else:
        code = tl.reshape(tl.load(codes + at, live, other=0).to(tl.int32), [RUNS * RUN])
        u = tl.reshape(tl.gather(entries, code, 0), [RUNS, RUN])
        tl.store(a + at, u * tl.load(largest + run, run < runs, other=0.0)[:, None] + shift, live)


def _double_encode_triton(a: Tensor, offset: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    a, runs = a.contiguous(), -(-a.numel() // SUPER)
    codes = torch.empty(a.shape, dtype=torch.uint8, device=a.device)
    largest = torch.empty(runs, dtype=torch.float32, device=a.device)
    if runs:
        grid = (-(-runs // 8),)
        double_kernel[grid](a, offset, table, codes, largest, a.numel(), runs, ENCODE=True, RUN=SUPER, RUNS=8)
    return codes, largest


def _double_decode_triton(codes: Tensor, largest: Tensor, offset: Tensor, table: Tensor) -> Tensor:
    codes, runs = codes.contiguous(), largest.shape[0]
    a = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if runs:
        grid = (-(-runs // 8),)
        double_kernel[grid](a, offset, table, codes, largest, a.numel(), runs, ENCODE=False, RUN=SUPER, RUNS=8)
    return a


kquant_dynamic = Op("kquant_dynamic", _kquant_dynamic, _kquant_fake, _kquant_triton)
exl2_encode = Op(
    "exl2_encode",
    _exl2_encode,
    lambda s0, largest: s0.new_empty(s0.shape, dtype=torch.uint8),
    lambda s0, largest: _exl2(s0, largest, True),
)
exl2_decode = Op(
    "exl2_decode",
    _exl2_decode,
    lambda k, largest: k.new_empty(k.shape, dtype=torch.float32),
    lambda k, largest: _exl2(k, largest, False),
)
double_encode = Op(
    "double_encode",
    _double_encode,
    lambda a, offset, table: (
        a.new_empty(a.shape, dtype=torch.uint8),
        a.new_empty(((a.numel() + SUPER - 1) // SUPER,)),
    ),
    _double_encode_triton,
)
double_decode = Op(
    "double_decode",
    _double_decode,
    lambda codes, largest, offset, table: codes.new_empty(codes.shape, dtype=torch.float32),
    _double_decode_triton,
)


def _kquant_case(name: str, codes: bool) -> AotCase:
    size, lo, _, _, minima = KQUANTS[name]
    signature = {"w": "*bf16", "out": ("*i8" if lo < 0 else "*u8") if codes else "*bf16"}
    signature |= {"sc_out": "*u8", "d_out": "*fp32", "mn_out": "*u8", "dmin_out": "*fp32", "supers": "i32"}
    signature |= dict.fromkeys(("inv_reach", "inv_top", "lo", "hi", "top"), "fp32")
    constants = {"MINIMA": minima, "CODES": codes, "SUBS": SUPER // size, "SIZE": size, "NS": 8}
    return AotCase(f"{name}_{'codes' if codes else 'fake'}", kquant_kernel, signature, constants)


_EXL2 = {"given": "*fp32", "largest": "*fp32", "out": "*u8", "count": "i32", "groups": "i32"}
_DOUBLE = {"a": "*fp32", "offset": "*fp32", "table": "*fp32", "codes": "*u8", "largest": "*fp32"}
_DOUBLE |= {"count": "i32", "runs": "i32"}
AOT = (
    *(_kquant_case(name, codes) for name in ("Q4_K", "Q2_K", "Q6_K") for codes in (False, True)),
    AotCase("exl2_encode", exl2_kernel, _EXL2, {"ENCODE": True, "BLOCK": 2048}),
    AotCase("double_encode", double_kernel, _DOUBLE, {"ENCODE": True, "RUN": SUPER, "RUNS": 8}),
    AotCase("double_decode", double_kernel, _DOUBLE, {"ENCODE": False, "RUN": SUPER, "RUNS": 8}),
)
