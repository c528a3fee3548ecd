"""Which codes exist, and the arithmetic between codes and numbers.

A grid knows nothing of how scales are found. With s fp32 scales of groups:

    IntGrid     w_hat = (code - zero_point) * s  or  code * s + minimum       `fake_quant_kernels.affine`
                or fp16(code * s), for consumers that round on the way (half)
    LevelGrid   w_hat = level[code] * s                                       `fake_quant_kernels.codebook`
    FloatGrid   w_hat = number of the code * s                                `fake_quant_kernels.float8`

    kind      codes                                    bits    levels, in units of s
    int       consecutive integers                     1..8    qmin..qmax
    ternary   the integers -1, 0, 1                    2
    seq       a table                                  2       -3/4, -1/4, 1/4, 3/4   (ParetoQ, Liu et al. 2025, eq. 6)
    binary    a table                                  1       -1, 1
    nf4       a table                                  4       quantiles of a normal (QLoRA, Dettmers et al. 2023)
    bnb_fp4   a table                                  4       bitsandbytes' own float: 0, 1/192, 1/6, 1/4 .. 1
    iq4_nl    a table                                  4       ggml's -127 .. 113
    fp4       floats e2m1                              4       0, 1/2, 1, 3/2, 2, 3, 4, 6 and their negatives
    e4m3      floats e4m3fn                            8       up to 448
    e5m2      floats e5m2                              8       up to 57344

Integers of `bits` bits:

    bits  signed  narrow    qmin   qmax
    8     yes     no        -128    127
    8     yes     yes       -127    127
    8     no      no           0    255
    4     yes     no          -8      7
    4     yes     yes         -7      7
    2     yes     no          -2      1
    2     yes     yes         -1      1      (ternary)
    1     yes     no          -1      0
    1     no      no           0      1
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.fake_quant_kernels import affine, codebook, float8
from qat.fake_quant_kernels.storage import through
from qat.scales import straight_through

# field of a group or None: scale, zero point, minimum, as arguments of a grid's operations
Field = Tensor | None
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool, bool]


class Grid:
    """What every grid can do. Rows [R, K] in any float dtype, fields fp32 [R, G] or [1, 1]; codes [R, K], or [R, K/2]
    packed (two in a byte, `fake_quant_kernels.pack`)."""

    kind: str
    bits: int
    # dtype of codes in a QTensor
    code_dtype: torch.dtype = torch.uint8

    # numbers can be rounded in fewer passes than codes are made and decoded: `IntGrid.rounded`
    direct: bool = False

    @property
    def reach(self) -> float:
        """The magnitude, in units of s, onto which a symmetric scale puts the largest number of its group."""
        raise NotImplementedError

    def reasons(self) -> list[str]:
        """Why there is no such grid; empty means there is."""
        return []

    def encode(self, w: Tensor, scale: Tensor, zero: Field, minimum: Field, packed: bool = False) -> Tensor:
        """Codes of rows."""
        raise NotImplementedError

    def encode_poisoning(
        self, w: Tensor, scale: Tensor, zero: Field, minimum: Field, packed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(codes, scale), the scale NaN throughout if w holds a NaN."""
        return self.encode(w, scale, zero, minimum, packed), affine.poisoned(scale, w)

    def decode(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Field,
        minimum: Field,
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
        again: bool = False,
    ) -> Tensor:
        """Rows [R, K] in `dtype`; again: see `fake_quant_kernels.affine.decode`."""
        raise NotImplementedError

    def fake_quantize(self, w: Tensor, scale: Tensor, zero: Field, minimum: Field, identity: bool = False) -> Tensor:
        """`decode(encode(w))` fp32 with gradients; identity: the weight's is passed on everywhere. NaN stays NaN."""
        raise NotImplementedError

    def vjp(
        self,
        grad: Tensor,
        w: Tensor,
        scale: Tensor,
        zero: Field,
        minimum: Field,
        identity: bool,
        needs: Needs,
        spend: bool = False,
    ) -> Gradients:
        """Gradients of w (in the dtype of grad), scale, zero and minimum where needed; spend: grad may be
        overwritten."""
        raise NotImplementedError


@dataclass(frozen=True)
class IntGrid(Grid):
    """Consecutive integers of `bits` bits. Raises nothing; ask `reasons()` (empty means usable).

    half: numbers are rounded to fp16, and cast after that; the gradient passes straight through.
    """

    bits: int
    signed: bool = True
    narrow: bool = False
    kind: str = "int"
    half: bool = False

    @property
    def qmin(self) -> int:
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def steps(self) -> int:
        """Distance between the outermost codes: `qmax - qmin`."""
        return self.qmax - self.qmin

    @property
    def code_dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.int8 if self.signed else torch.uint8

    @property
    def direct(self) -> bool:  # type: ignore[override]
        return not self.half

    @property
    def reach(self) -> float:
        """Half the distance of the outermost codes, 7.5 for int4 and 127.5 for int8 as compressed-tensors and torchao
        have it, 7 and 127 for narrow grids: the error of absmax stays within half a step on both sides. Unsigned (never
        negative inputs): the largest code."""
        return self.steps / 2 if self.signed else self.qmax

    def reasons(self) -> list[str]:
        found = []
        if not 1 <= self.bits <= 8:
            found.append(f"bits={self.bits} is not in 1..8")
        if self.narrow and not self.signed:
            found.append("narrow=true needs a signed grid (an unsigned one has no extra negative code to drop)")
        if self.narrow and self.bits == 1:
            found.append("narrow=true leaves a 1-bit grid with the single code 0; use bits=2 for ternary")
        return found

    def encode(self, w: Tensor, scale: Tensor, zero: Field, minimum: Field, packed: bool = False) -> Tensor:
        return affine.encode(w, scale, zero, minimum, self.qmin, self.qmax, packed)

    def encode_poisoning(
        self, w: Tensor, scale: Tensor, zero: Field, minimum: Field, packed: bool = False
    ) -> tuple[Tensor, Tensor]:
        return affine.encode_poisoning(w, scale, zero, minimum, self.qmin, self.qmax, packed)

    def decode(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Field,
        minimum: Field,
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
        again: bool = False,
    ) -> Tensor:
        if self.half and torch.compiler.is_compiling():
            # a cast to fp16 and on would be taken for one cast
            exact = affine.decode(codes, scale, zero, minimum, torch.float32, packed, self.signed, again)
            return through(exact, torch.float16).to(dtype)
        way = torch.float16 if self.half else dtype
        return affine.decode(codes, scale, zero, minimum, way, packed, self.signed, again).to(dtype)

    def fake_quantize(self, w: Tensor, scale: Tensor, zero: Field, minimum: Field, identity: bool = False) -> Tensor:
        exact = affine.fake_quantize(w, scale, zero, minimum, self.qmin, self.qmax, identity)
        return straight_through(exact, through(exact.detach(), torch.float16)) if self.half else exact

    def vjp(
        self,
        grad: Tensor,
        w: Tensor,
        scale: Tensor,
        zero: Field,
        minimum: Field,
        identity: bool,
        needs: Needs,
        spend: bool = False,
    ) -> Gradients:
        return affine.vjp(grad, w, scale, zero, minimum, self.qmin, self.qmax, identity, *needs, spend)

    def rounded(
        self, w: Tensor, scale: Tensor, zero: Field, minimum: Field, dtype: torch.dtype, again: bool = False
    ) -> Tensor:
        """`decode(encode(w))` in `dtype` without the codes and without gradients, where `direct`; a NaN stays NaN.
        again: see `fake_quant_kernels.affine.decode`."""
        return affine.rounded(w, scale, zero, minimum, self.qmin, self.qmax, dtype, again)

    def vjp_rounded(
        self, grad: Tensor, w: Tensor, fields: tuple[Tensor, Field, Field], needs: Needs, dtype: torch.dtype
    ) -> tuple[Gradients, Tensor] | None:
        """(`vjp` of a gradient that nobody else holds, `rounded`) in one pass over w, where `direct`; None: there is no
        such pass here."""
        if not affine.spent(grad):
            return None
        hat = w.new_empty(w.shape, dtype=dtype)
        return affine.vjp(grad, w, *fields, self.qmin, self.qmax, False, *needs, True, hat), hat


class ScaledGrid(Grid):
    """Numbers times a scale and nothing else: `_encode`, `_decode`, `_fake` and `_vjp` are those of a kernel file."""

    @property
    def ends(self) -> tuple[float, float]:
        """Between which the weight's gradient is passed on, in units of s."""
        return -self.reach, self.reach

    def _encode(self, w: Tensor, scale: Tensor, packed: bool) -> Tensor:
        raise NotImplementedError

    def _decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype, packed: bool, again: bool) -> Tensor:
        raise NotImplementedError

    def _fake(self, w: Tensor, scale: Tensor) -> Tensor:
        raise NotImplementedError

    def _vjp(self, grad: Tensor, w: Tensor, scale: Tensor, need_w: bool, need_scale: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def encode(self, w: Tensor, scale: Tensor, zero: Field, minimum: Field, packed: bool = False) -> Tensor:
        with torch.no_grad():
            return self._encode(w, scale, packed)

    def decode(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Field,
        minimum: Field,
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
        again: bool = False,
    ) -> Tensor:
        with torch.no_grad():
            return self._decode(codes, scale, dtype, packed, again)

    def fake_quantize(self, w: Tensor, scale: Tensor, zero: Field, minimum: Field, identity: bool = False) -> Tensor:
        return _Fake.apply(w, scale, self, identity)  # type: ignore[no-any-return, no-untyped-call]

    def vjp(
        self,
        grad: Tensor,
        w: Tensor,
        scale: Tensor,
        zero: Field,
        minimum: Field,
        identity: bool,
        needs: Needs,
        spend: bool = False,
    ) -> Gradients:
        need_w, need_scale, *_ = needs
        clips = need_w and not identity
        dw: Tensor | None = grad if need_w else None
        if not (clips or need_scale):
            return dw, None, None, None
        found, dscale = self._vjp(grad, w, scale, clips, need_scale)
        return found if clips else dw, dscale if need_scale else None, None, None


class _Fake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, grid: ScaledGrid, identity: bool) -> Tensor:
        ctx.save_for_backward(w, scale)
        ctx.how = grid, identity
        return grid._fake(w, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grid, identity = ctx.how
        need_w, need_scale = ctx.needs_input_grad[:2]
        needs = (need_w, need_scale, False, False)
        dw, dscale, _, _ = grid.vjp(grads[0], *ctx.saved_tensors, None, None, identity, needs)
        return dw, dscale, None, None


@dataclass(frozen=True)
class LevelGrid(ScaledGrid):
    """A sorted table of levels; a midpoint belongs to the lower one. The weight's gradient is passed on within
    low..high, in units of s. peak: `reach`."""

    kind: str
    bits: int
    levels: tuple[float, ...]
    low: float
    high: float
    peak: float

    @property
    def reach(self) -> float:
        return self.peak

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    def _encode(self, w: Tensor, scale: Tensor, packed: bool) -> Tensor:
        return codebook.encode(w, scale, _table(self.levels, w.device), packed)  # type: ignore[no-any-return]

    def _decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype, packed: bool, again: bool) -> Tensor:
        return codebook.decode(codes, scale, _table(self.levels, codes.device), dtype, packed, again)  # type: ignore[no-any-return]

    def _fake(self, w: Tensor, scale: Tensor) -> Tensor:
        return codebook.fake(w, scale, _table(self.levels, w.device), torch.float32)  # type: ignore[no-any-return]

    def _vjp(self, grad: Tensor, w: Tensor, scale: Tensor, need_w: bool, need_scale: bool) -> tuple[Tensor, Tensor]:
        table = _table(self.levels, w.device)
        return codebook.vjp(grad, w, scale, table, self.low, self.high, need_w, need_scale)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FloatGrid(ScaledGrid):
    """Small floats: e4m3fn and e5m2 in torch's dtypes, e2m1 as uint8 with the sign in bit 3."""

    kind: str
    bits: int
    element: torch.dtype

    @property
    def code_dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.element

    @property
    def reach(self) -> float:
        return float8.ELEMENTS[self.element].top

    def _encode(self, w: Tensor, scale: Tensor, packed: bool) -> Tensor:
        return float8.encode(w, scale, self.element, packed)  # type: ignore[no-any-return]

    def _decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype, packed: bool, again: bool) -> Tensor:
        return float8.decode(codes, scale, dtype, packed, again)  # type: ignore[no-any-return]

    def _fake(self, w: Tensor, scale: Tensor) -> Tensor:
        return float8.fake(w, scale, self.element, torch.float32)  # type: ignore[no-any-return]

    def _vjp(self, grad: Tensor, w: Tensor, scale: Tensor, need_w: bool, need_scale: bool) -> tuple[Tensor, Tensor]:
        return float8.vjp(grad, w, scale, self.element, need_w, need_scale)  # type: ignore[no-any-return]


def _table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The levels as a tensor; in graphs a constant."""
    return torch.tensor(levels, device=device) if torch.compiler.is_compiling() else _kept_table(levels, device)


@functools.lru_cache(maxsize=64)
def _kept_table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once per device: a copy to a GPU would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(levels, device=device)


TERNARY = IntGrid(2, True, True, "ternary")
# kinds that are one grid each; `int` is many
GRIDS: dict[str, Grid] = {
    grid.kind: grid
    for grid in (
        TERNARY,
        LevelGrid("seq", 2, codebook.SEQ2, -0.99, 0.99, 1.0),
        LevelGrid("binary", 1, (-1.0, 1.0), -1.0, 1.0, 1.0),
        LevelGrid("nf4", 4, codebook.NF4, -1.0, 1.0, 1.0),
        LevelGrid("bnb_fp4", 4, codebook.BNB_FP4, -1.0, 1.0, 1.0),
        LevelGrid("iq4_nl", 4, codebook.IQ4_NL, -127.0, 113.0, 127.0),
        FloatGrid("fp4", 4, torch.uint8),
        FloatGrid("e4m3", 8, torch.float8_e4m3fn),
        FloatGrid("e5m2", 8, torch.float8_e5m2),
    )
}
KINDS = ("int", *GRIDS)
