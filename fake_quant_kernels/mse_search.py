"""The scale of least squared error among candidates, for every group, in one read of the weight.

For a group w_1..w_g of range low..high and factors f_1 >= f_2 >= ... (1.0 down to 0.2, say), candidate c is the pair of
stored fields of the shrunken range f_c * low .. f_c * high:

    kind 0   s = project(max(-f low, f high) * inv_reach)
    kind 1   a = min(f low, 0),  s = project((max(f high, 0) - a) * inv_reach),  z = clamp(lo - rint(a / s), lo, hi)
    kind 2   m = project(f low),  s = project((f high - m) * inv_reach)

    e_c = sum_i h_i (decode(encode(w_i)) - w_i)^2           encode, decode as in `affine`; h_i = 1 or an importance
    fields = those of the first c with the least e_c        ties go to the widest range; all NaN or infinite: c = 1

(OMSE, Choukroun et al. 2019, section 3.1; with h = E[x_i^2] the diagonal Hessian weighting of llama.cpp's imatrix.)

The choice may not depend on the machine, so the fp32 sum has one order everywhere: neighbours are added, then
neighbours of the sums, and so on; an odd one at the end moves up as it is.

    e_1 + e_2   e_3 + e_4   e_5        ->   (e_1 + e_2) + (e_3 + e_4)   e_5        ->   ...

Such a tree falls apart into trees of 2^k neighbours, so long groups are cut at multiples of 2^k. Its relative error is
below (ceil(log2 g) + 3) * 2^-24, and only candidates that are closer than that can be taken for each other.

Shapes: w [R, K] of any float dtype, read as fp32; groups G per row with K % G == 0; factors fp32 [C], C >= 1;
importance [K] or [R, K]. Results fp32 [R, G]: scale; zero point or minimum ([0] for kind 0); error e of the choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels.dispatch import AotCase, Kernel, Op, tl
from qat.fake_quant_kernels.fields import fields_of_range, scale_of_amax
from qat.fake_quant_kernels.mse_device import candidate, squared_error
from qat.fake_quant_kernels.storage import storage_code

# numbers that a CPU core works on at a time: they and their errors, fp32, stay in its second-level cache
_PIECE = 1 << 16
# rows of the transposed piece: enough columns remain for vectors
_RUN = 32
# the longest group whose numbers a block of threads keeps in registers, and the runs into which longer ones are cut
_LONGEST = 16384
_LONG_RUN = 512
# no finite product is less (`mse_device.product`)
_LOWEST = torch.finfo(torch.float32).min


def _fields(
    low: Tensor,
    high: Tensor,
    kind: int,
    lo: int,
    hi: int,
    inv_reach: float,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    half: bool,
) -> tuple[Tensor, Tensor | None]:
    """Stored scale and zero point or minimum for ranges low..high of any one shape."""
    if kind:
        return fields_of_range(low, high, inv_reach, lo, hi, storage, smallest, largest, half, kind == 2)
    return scale_of_amax(torch.maximum(-low, high), inv_reach, storage, smallest, largest), None


def _steps(terms: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Views of `terms` [P, ...], P >= 1: the additions a += b that sum dim 0 in the docstring's order, and where to."""
    found = []
    while terms.shape[0] > 1:
        even, odd = terms[0::2], terms[1::2]
        found.append((even[: odd.shape[0]], odd))
        terms = even
    return found, terms[0]


def _tree(terms: Tensor) -> Tensor:
    """Sum over dim 0 (at least 1) in the order of the module's docstring; `terms` is used up."""
    steps, total = _steps(terms)
    for a, b in steps:
        a.add_(b)
    return total


def _errors(
    x: Tensor, scale: Tensor, offset: Tensor | None, importance: Tensor | None, kind: int, lo: int, hi: int
) -> Tensor:
    """Sums [C, n] of the squared errors of groups x [n, g] under fields [C, n]; importance [n, g] or [1, g]."""
    count, size = x.shape
    whole, rest = divmod(size, _RUN)
    sums = torch.empty(whole + (rest > 0), scale.shape[0], count, device=x.device)
    inverse = 1.0 / scale
    for first, runs, run in ((0, whole, _RUN), (whole, 1, rest)):
        if not runs * run:
            continue
        # runs side by side, [n, runs * run] -> [run, runs * n]: a field meets its groups along whole vectors

        def columns(t: Tensor, first: int = first, runs: int = runs, run: int = run) -> Tensor:
            part = t[:, first * _RUN : first * _RUN + runs * run].expand(count, -1)
            return part.reshape(count, runs, run).permute(2, 1, 0).reshape(run, runs * count).contiguous()

        def wide(t: Tensor, runs: int = runs) -> tuple[Tensor, ...]:
            return t.repeat(1, runs).unbind(0)

        target, value = columns(x), torch.empty(run, runs * count, device=x.device)
        weights = None if importance is None else columns(importance)
        scales, inverses = wide(scale), wide(inverse)
        offsets = None if offset is None else wide(offset)
        bounds = None if offset is None or kind == 2 else (wide(lo - offset), wide(hi - offset))
        steps, total = _steps(value)
        found = sums[first : first + runs].movedim(1, 0).unbind(0)
        total = total.reshape(runs, count)
        for c, s in enumerate(scales):
            if offsets is None:
                torch.mul(target, inverses[c], out=value).clamp_(lo, hi).round_().mul_(s)
            elif bounds is not None:
                torch.mul(target, inverses[c], out=value).clamp_(bounds[0][c], bounds[1][c]).round_().mul_(s)
            else:
                torch.sub(target, offsets[c], out=value).mul_(inverses[c]).clamp_(lo, hi).round_().mul_(s)
                value.add_(offsets[c])
            value.sub_(target).square_()
            if weights is not None:
                value.mul_(weights)
            for a, b in steps:
                a.add_(b)
            found[c].copy_(total)
    return _tree(sums)


def _chosen(error: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first of the least errors [C, n] with its fields [C, n] -> three [n] (no offset: [0])."""
    least, index = torch.nan_to_num(error, nan=torch.inf, posinf=torch.inf).min(0)
    index = index.unsqueeze(0)
    return (
        scale.gather(0, index)[0],
        scale.new_empty(0) if offset is None else offset.gather(0, index)[0],
        least,
    )


def _reference(
    w: Tensor,
    factors: Tensor,
    groups: int,
    kind: int,
    lo: int,
    hi: int,
    inv_reach: float,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    half: bool,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale [R, G], zero point or minimum [R, G] (kind 0: [0]) and error [R, G] of the best candidates, fp32.

    w [R, K]; factors fp32 [C], falling; importance [K] or [R, K], never negative. kind 0: scale alone, 1: integer zero
    point, 2: float minimum. inv_reach, storage, smallest, largest, half: see the top and `storage.py`.
    """
    rows = w.shape[0]
    numbers = (kind, lo, hi, inv_reach, storage, smallest, largest, half)
    if not w.numel():
        nothing = torch.zeros(rows, groups, device=w.device)
        scale, offset = _fields(nothing, nothing, *numbers)
        return scale, scale.new_empty(0) if offset is None else offset, nothing
    size = w.shape[1] // groups
    blocks = w.reshape(rows * groups, size)
    weights = None if importance is None else importance.reshape(-1, size)
    piece = _PIECE if w.device.type == "cpu" else _PIECE << 8
    count = max(1, piece // size)
    found = []
    for first in range(0, blocks.shape[0], count):
        x = blocks[first : first + count].float()
        low, high = _ranges(x, factors)
        scale, offset = _fields(low, high, *numbers)
        own = torch.arange(first, first + x.shape[0], device=w.device)
        h = None if weights is None else weights[own % weights.shape[0]].float()
        sums = [
            _errors(x[:, at : at + piece], scale, offset, None if h is None else h[:, at : at + piece], kind, lo, hi)
            for at in range(0, size, piece)
        ]
        found.append(_chosen(_tree(torch.stack(sums)), scale, offset))
    scale, offset, error = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale.view(rows, groups), offset.view(rows, groups) if kind else offset, error.view(rows, groups)


def _ranges(x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """[C, n] of groups x [n, g]."""
    return x.amin(-1) * factors.unsqueeze(1), x.amax(-1) * factors.unsqueeze(1)


def _fake(w: Tensor, factors: Tensor, groups: int, kind: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    scale = w.new_empty((w.shape[0], groups), dtype=torch.float32)
    return scale, torch.empty_like(scale) if kind else scale.new_empty(0), torch.empty_like(scale)


@Kernel
def _search_kernel(
    w_ptr: Any,
    h_ptr: Any,
    f_ptr: Any,
    s_ptr: Any,
    o_ptr: Any,
    e_ptr: Any,
    total: Any,
    period: Any,
    lo: Any,
    hi: Any,
    inv_reach: Any,
    smallest: Any,
    largest: Any,
    lowest: Any,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    KIND: tl.constexpr,
    STORAGE: tl.constexpr,
    HALF: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """GROUPS whole groups of SIZE <= BLOCK = 2^LEVELS numbers; they stay in registers for all candidates."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = group * SIZE + column
    inside = (group < total) & (column < SIZE)
    h = 1.0
    if EVEN:
        w = tl.load(w_ptr + at).to(tl.float32)
        low, high = w, w
        if WEIGHTED:
            h = tl.load(h_ptr + (group % period) * SIZE + column).to(tl.float32)
    else:
        w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
        low, high = tl.where(inside, w, float("inf")), tl.where(inside, w, float("-inf"))
        if WEIGHTED:
            h = tl.load(h_ptr + (group % period) * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    # a reduction may lose NaN: look for it apart
    broken = tl.max((w != w).to(tl.int32), axis=1)[:, None] > 0
    low = tl.where(broken, float("nan"), tl.min(low, axis=1)[:, None])
    high = tl.where(broken, float("nan"), tl.max(high, axis=1)[:, None])
    best_scale, best_offset, least = low, low, tl.where(broken, float("inf"), float("inf"))
    for c in range(COUNT):
        factor = tl.load(f_ptr + c)
        scale, offset = candidate(
            low * factor, high * factor, lo, hi, inv_reach, smallest, largest, lowest, KIND, STORAGE, HALF
        )
        error = squared_error(w, h, inside, scale, offset, lo, hi, lowest, GROUPS, BLOCK, LEVELS, KIND, WEIGHTED, EVEN)
        better = (error < least) | (c == 0)
        least = tl.where(error < least, error, least)
        best_scale = tl.where(better, scale, best_scale)
        best_offset = tl.where(better, offset, best_offset)
    if EVEN:
        tl.store(s_ptr + group, best_scale)
        tl.store(e_ptr + group, least)
        if KIND > 0:
            tl.store(o_ptr + group, best_offset)
    else:
        tl.store(s_ptr + group, best_scale, mask=group < total)
        tl.store(e_ptr + group, least, mask=group < total)
        if KIND > 0:
            tl.store(o_ptr + group, best_offset, mask=group < total)


@Kernel
def _partial_kernel(
    w_ptr: Any,
    h_ptr: Any,
    s_ptr: Any,
    o_ptr: Any,
    e_ptr: Any,
    size: Any,
    runs: Any,
    total: Any,
    period: Any,
    lo: Any,
    hi: Any,
    lowest: Any,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Errors of GROUPS runs of BLOCK numbers of groups that no block of threads can hold: [runs, COUNT, total]."""
    unit = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    group, run = unit // runs, unit % runs
    column = run * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (group < total) & (column < size)
    # one number for each run, not for each of its threads
    own = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    field, known = own // runs, own // runs < total
    h = 1.0
    if EVEN:
        w = tl.load(w_ptr + group * size + column).to(tl.float32)
        if WEIGHTED:
            h = tl.load(h_ptr + (group % period) * size + column).to(tl.float32)
    else:
        w = tl.load(w_ptr + group * size + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            h = tl.load(h_ptr + (group % period) * size + column, mask=inside, other=0.0).to(tl.float32)
    for c in range(COUNT):
        scale = tl.load(s_ptr + c * total + field, mask=known, other=1.0)[:, None]
        offset = scale
        if KIND > 0:
            offset = tl.load(o_ptr + c * total + field, mask=known, other=0.0)[:, None]
        error = squared_error(w, h, inside, scale, offset, lo, hi, lowest, GROUPS, BLOCK, LEVELS, KIND, WEIGHTED, EVEN)
        tl.store(e_ptr + (own % runs * COUNT + c) * total + field, tl.reshape(error, (GROUPS,)), mask=known)


def _shape(size: int) -> tuple[int, int, int]:
    """(BLOCK, GROUPS, warps) for groups of `size` numbers: 16 or 32 numbers a thread."""
    block = max(16, 1 << (size - 1).bit_length())
    return block, max(1, 2048 // block), 4 if block <= 2048 else 8 if block == 4096 else 16


def _launch(
    w: Tensor,
    factors: Tensor,
    groups: int,
    kind: int,
    lo: int,
    hi: int,
    inv_reach: float,
    storage: torch.dtype,
    smallest: float,
    largest: float,
    half: bool,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if not w.numel():
        return _reference(w, factors, groups, kind, lo, hi, inv_reach, storage, smallest, largest, half)
    rows, size = w.shape[0], w.shape[1] // groups
    total = rows * groups
    w, factors = w.contiguous(), factors.contiguous()
    h = w if importance is None else importance.contiguous()
    period = h.numel() // size
    if size <= _LONGEST:
        scale, offset, error = _fake(w, factors, groups, kind)
        block, count, warps = _shape(size)
        _search_kernel[(-(-total // count),)](
            w, h, factors, scale, offset, error, total, period,
            float(lo), float(hi), inv_reach, smallest, largest, _LOWEST,
            COUNT=factors.shape[0], SIZE=size, BLOCK=block, LEVELS=block.bit_length() - 1, GROUPS=count, KIND=kind,
            STORAGE=storage_code(storage), HALF=half, WEIGHTED=importance is not None,
            EVEN=size == block and total % count == 0, num_warps=warps,
        )  # fmt: skip
        return scale, offset, error
    runs = -(-size // _LONG_RUN)
    low, high = _ranges(w.view(total, size), factors)
    table, second = _fields(low, high, kind, lo, hi, inv_reach, storage, smallest, largest, half)
    sums = torch.empty(runs, factors.shape[0], total, device=w.device)
    _partial_kernel[(-(-total * runs // 4),)](
        w, h, table, table if second is None else second, sums, size, runs, total, period, float(lo), float(hi),
        _LOWEST, COUNT=factors.shape[0], BLOCK=_LONG_RUN, LEVELS=_LONG_RUN.bit_length() - 1, GROUPS=4, KIND=kind,
        WEIGHTED=importance is not None, EVEN=size % _LONG_RUN == 0 and total * runs % 4 == 0, num_warps=4,
    )  # fmt: skip
    scale, offset, error = _chosen(_tree(sums), table, second)
    return scale.view(rows, groups), offset.view(rows, groups) if kind else offset, error.view(rows, groups)


search = Op("mse_search", _reference, _fake, _launch)


def _aot(name: str, size: int, kind: int, dtype: str, weighted: bool = False) -> AotCase:
    """`_search_kernel` on whole tiles."""
    block, count, warps = _shape(size)
    pointers = {"w_ptr": f"*{dtype}"} | dict.fromkeys(("h_ptr", "f_ptr", "s_ptr", "o_ptr", "e_ptr"), "*fp32")
    numbers = dict.fromkeys(("lo", "hi", "inv_reach", "smallest", "largest", "lowest"), "fp32")
    constants = {
        "COUNT": 60, "SIZE": size, "BLOCK": block, "LEVELS": block.bit_length() - 1, "GROUPS": count, "KIND": kind,
        "STORAGE": 2, "HALF": True, "WEIGHTED": weighted, "EVEN": size == block,
    }  # fmt: skip
    counts = dict.fromkeys(("total", "period"), "i32")
    return AotCase(name, _search_kernel, pointers | counts | numbers, constants, num_warps=warps)


AOT = (
    _aot("mse_g32", 32, 0, "bf16"),
    _aot("mse_g32_zero", 32, 1, "bf16"),
    _aot("mse_g32_minimum_weighted", 32, 2, "bf16", weighted=True),
    _aot("mse_g128_fp32", 128, 0, "fp32"),
    _aot("mse_g24", 24, 0, "bf16"),
    _aot("mse_row_4096", 4096, 0, "bf16"),
    _aot("mse_row_14336", 14336, 2, "bf16"),
    AotCase(
        "mse_tensor",
        _partial_kernel,
        {"w_ptr": "*bf16"}
        | dict.fromkeys(("h_ptr", "s_ptr", "o_ptr", "e_ptr"), "*fp32")
        | dict.fromkeys(("size", "runs", "total", "period"), "i32")
        | dict.fromkeys(("lo", "hi", "lowest"), "fp32"),
        {"COUNT": 60, "BLOCK": 512, "LEVELS": 9, "GROUPS": 4, "KIND": 1, "WEIGHTED": False, "EVEN": True},
    ),
)
