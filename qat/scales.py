"""How a scale (and a minimum) is stored: scales live on a grid too.

`project` moves a scale onto the numbers that its storage can hold, inside the training forward and with a
straight-through gradient, so that packing it later changes nothing. Magnitudes are kept between the smallest
normal number and a maximum for which `code * scale` stays finite; a NaN or infinite input becomes the nearest end
of that range, so a stored scale is always finite and positive.

    portable   rounded to bf16 (8-bit significand) and kept within fp16's normal range 2^-14 .. 65280:
               exactly the same number in bf16, fp16 and fp32, hence in almost every file format
    fp16       2^-14 .. 65504
    bf16       2^-126 .. 2^119
    e8m0       powers of two, 2^-110 .. 2^119 (OCP Microscaling formats, v1.0)
    fp32       2^-110 .. 2^119 (below, three bf16 numbers no longer hold all bits: `qat.quantizers._parts.split`)

A minimum (zero_point float) has any sign and may be 0; a portable one is a number of fp16 as well, denormals included.

Two levels: scales that are themselves codes times a scale (`fake_quant_kernels.two_level`, `nvfp4`). What is learned or
searched is the scale that a group would like, in fp32; `encode` makes what a file holds of those of the whole tensor,
and `decode` the numbers that weights are computed with. Both run in every forward. Of an input the whole tensor is not
seen: the largest scale is then given (nvfp4 alone).

                    codes of scales             times                          of
    q2_k .. q6_k    4, 6 or 8 bits, minima too  fp16 for 256 numbers           integers in groups of 16 or 32: ggml
    iq4_xs          6 bits                      fp16 for 256 numbers           iq4_nl in groups of 32: ggml
    nvfp4           e4m3                        fp32 for the tensor            fp4 in groups of 16: TensorRT-LLM
    nvfp4_over      e4m3                        1 / fp32 for the tensor        the same: compressed-tensors
    nvfp4_portable  e4m3                        a power of two for the tensor  the same: both, in any float dtype
    bnb_nested      a table of 256              fp32 for 256, and a mean       nf4 or bnb_fp4 in groups: bitsandbytes
    exl2            1, 4, 9 .. 256: 4 bits      fp16 for a group, all rows     integers in groups: exllamav2

With exl2 a weight is rounded to fp16 as well (`half`), whatever dtype it is computed in after that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.errors import RecipeError
from qat.fake_quant_kernels import nvfp4, two_level
from qat.fake_quant_kernels.storage import project, project_minimum

# (code - zero_point) spans at most 255 < 2^8 steps: below 2^119 no product leaves fp32's or bf16's range.
_LARGEST = 2.0**119
_FP16_SMALLEST_NORMAL = 2.0**-14
_BF16_SMALLEST_NORMAL = 2.0**-126
_FP32_SMALLEST = 2.0**-110
# older versions of torch lack it
_E8M0 = getattr(torch, "float8_e8m0fnu", None)


@dataclass(frozen=True)
class ScaleGrid:
    """The storage of one scale. `dtype` is what a file holds; `smallest`/`largest` bound the magnitude."""

    name: str
    dtype: torch.dtype
    smallest: float
    largest: float
    # code * scale is rounded to fp16 before it is cast
    half: ClassVar[bool] = False

    def project(self, scale: Tensor, signed: bool = False) -> Tensor:
        """fp32 scales of any shape -> the nearest storable fp32 numbers, positive or (signed) of the same sign;
        gradient passes straight through."""
        with torch.no_grad():
            stored = project(scale.abs() if signed else scale, self.dtype, self.smallest, self.largest)
            if signed:
                stored = torch.copysign(stored, scale)
        return straight_through(scale, stored)

    def project_minimum(self, minimum: Tensor) -> Tensor:
        """fp32 minima (any sign, zero included) -> the nearest storable numbers; gradient passes straight through."""
        with torch.no_grad():
            portable = self.name == "portable"
            stored = project_minimum(minimum, self.dtype, self.smallest, self.largest, portable)
        return straight_through(minimum, stored)

    @property
    def bits(self) -> int:
        return self.dtype.itemsize * 8

    @property
    def parts(self) -> int:
        """How many bf16 numbers add up to any stored scale exactly (`qat.quantizers._parts.split`)."""
        return {torch.float16: 2, torch.float32: 3}.get(self.dtype, 1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, stored: Tensor) -> Tensor:
        return stored

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


def straight_through(value: Tensor, stored: Tensor) -> Tensor:
    """`stored` with the gradient of `value`."""
    if value.requires_grad:
        return _StraightThrough.apply(value, stored)  # type: ignore[no-any-return, no-untyped-call]
    return stored


Parts = dict[str, Tensor]


@dataclass(frozen=True)
class TwoLevel(ScaleGrid):
    """Scales [R, G] of a whole tensor, each a code times a scale that several groups share.

    words   what the spec of such a tensor has to say, by field of `qat.specs.QuantSpec`
    also    kinds that may take the place of `words["kind"]`
    extra   stored bits of a row of `words["group_size"]` numbers beside its codes

    over_rows   all rows of a group share its scale of scales
    """

    over_rows: ClassVar[bool] = False

    words: tuple[tuple[str, Any], ...] = ()
    extra: float = 0.0
    # numbers of a row that share the scale of scales, and the largest code of a scale under it; 1: the tensor shares it
    run: int = 1
    top: int = 0
    also: tuple[str, ...] = ()

    # `encode` can do with a largest scale that is given
    local: bool = False

    def encode(self, scale: Tensor, minimum: Tensor | None, largest: Tensor | None = None) -> Parts:
        """fp32 scales [R, G], and minima, as the groups would like them -> what a file holds. largest: fp32 [1], where
        it is not that of these scales."""
        raise NotImplementedError

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """What a file holds -> fp32 scales [R, G], and minima, as a consumer computes with."""
        raise NotImplementedError

    def beside(self, parts: Parts) -> list[Tensor]:
        """Scales [R, G] whose codes are the next ones, under the scale of scales as it is; with `over_rows`."""
        raise NotImplementedError

    def stored(
        self, scale: Tensor, minimum: Tensor | None, largest: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`decode(encode(...))`; gradients pass straight through."""
        with torch.no_grad():
            found, low = self.decode(self.encode(scale, minimum, largest))
        return straight_through(scale, found), None if minimum is None or low is None else straight_through(
            minimum, low
        )


@dataclass(frozen=True)
class _SuperBlock(TwoLevel):
    """ggml's k-quants and IQ4_XS; parts: sc int8 or uint8 [R, G], d fp16 [R, G / n], and with minima mn, d_min.

    size: numbers of a group.
    """

    run: int = two_level.SUPER
    size: int = 32
    top: int = 31
    minima: bool = False

    def encode(self, scale: Tensor, minimum: Tensor | None, largest: Tensor | None = None) -> Parts:
        subs, top, minima = two_level.SUPER // self.size, self.top, self.minima
        sc, d = two_level.super_scales(scale.abs(), subs, top)
        # a scale of 0 has no sign
        sc = sc if minima else torch.where(scale < 0, -sc.to(torch.int8), sc.to(torch.int8))
        parts = {"sc": sc, "d": d.to(torch.float16)}
        if minimum is not None:
            mn, d_min = two_level.super_minima(-minimum.clamp(max=0.0), subs, top)
            parts |= {"mn": mn, "d_min": d_min.to(torch.float16)}
        return parts

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        scale = two_level.super_values(parts["sc"], parts["d"].float())
        if "mn" not in parts:
            return scale, None
        return scale, -two_level.super_values(parts["mn"], parts["d_min"].float())


@dataclass(frozen=True)
class _Nvfp4(TwoLevel):
    """parts: block float8_e4m3fn [R, G], tensor fp32 [1]. A scale beyond the largest one given becomes that one.

    Multiplied with a power of two, or divided by its inverse, an e4m3 number stays what it is, and so does the product
    with a number of e2m1: 6 bits, exact in bf16.
    """

    local: bool = True

    @property
    def _over(self) -> bool:
        return self.name.endswith("over")

    def encode(self, scale: Tensor, minimum: Tensor | None, largest: Tensor | None = None) -> Parts:
        if largest is None:
            largest = scale.amax().reshape(1) if scale.numel() else scale.new_zeros(1)
        tensor = nvfp4.tensor_scale(largest * 6.0, self._over)
        if self.name.endswith("portable"):
            octave = (tensor.view(torch.int32) & 0x7F800000).view(torch.float32)
            tensor = torch.where(octave < tensor, octave * 2.0, octave)
        return {"block": nvfp4.scales_of(scale * 6.0, tensor, self._over), "tensor": tensor}

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        return nvfp4.values_of(parts["block"], parts["tensor"], self._over), None


@dataclass(frozen=True)
class _Nested(TwoLevel):
    """parts: absmax uint8 [R, G], nested fp32 [ceil(R * G / 256)], offset fp32 [1]."""

    def encode(self, scale: Tensor, minimum: Tensor | None, largest: Tensor | None = None) -> Parts:
        # in double: an fp32 sum would depend on how many threads add it up
        offset = scale.double().mean().float().reshape(1) if scale.numel() else scale.new_zeros(1)
        offset = offset.nan_to_num(nan=0.0, posinf=_LARGEST).clamp(max=_LARGEST)
        codes, nested = two_level.double_encode(scale.contiguous(), offset, _dynamic_map(scale.device))
        return {"absmax": codes, "nested": nested, "offset": offset}

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        table = _dynamic_map(parts["absmax"].device)
        return two_level.double_decode(parts["absmax"], parts["nested"], parts["offset"], table), None


@dataclass(frozen=True)
class _Squared(TwoLevel):
    """EXL2; parts: k uint8 [R, G], 1..16, largest fp16 [G], of all rows."""

    half: ClassVar[bool] = True
    over_rows: ClassVar[bool] = True

    def encode(self, scale: Tensor, minimum: Tensor | None, largest: Tensor | None = None) -> Parts:
        largest = two_level.exl2_largest(scale) if scale.numel() else scale.new_ones(1, scale.shape[1])
        k = two_level.exl2_encode(scale.contiguous(), largest)
        return {"k": k, "largest": largest.to(torch.float16).reshape(-1)}

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        return two_level.exl2_decode(parts["k"], parts["largest"].float().reshape(1, -1)), None

    def beside(self, parts: Parts) -> list[Tensor]:
        k = parts["k"].int()
        # of a scale with k = 16 `encode` knows M again
        near = [torch.where(k < 16, (k + step).clamp(1, 15), k).to(torch.uint8) for step in (-1, 1)]
        return [self.decode({**parts, "k": each})[0] for each in near]


@functools.lru_cache(maxsize=8)
def _dynamic_map(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return two_level.dynamic_map().to(device)


def _kquant(name: str, bits_of_scale: int) -> TwoLevel:
    size, low, high, top, minima = two_level.KQUANTS[name.upper()]
    words = {
        "kind": "int",
        "bits": (high - low).bit_length(),
        "signed": low < 0,
        "narrow": False,
        "granularity": "group",
        "group_size": size,
        "zero_point": "float" if minima else "none",
    }
    extra = (1 + minima) * (bits_of_scale + 16 * size / two_level.SUPER)
    return _super_block(name, words, extra, size, top, minima)


def _super_block(
    name: str, words: dict[str, Any], extra: float, size: int = 32, top: int = 31, minima: bool = False
) -> TwoLevel:
    bounds = torch.float32, _FP32_SMALLEST, _LARGEST
    return _SuperBlock(name, *bounds, tuple(words.items()), extra, size=size, top=top, minima=minima)


_IQ4 = {"kind": "iq4_nl", "granularity": "group", "group_size": 32}
_FP4 = (("kind", "fp4"), ("granularity", "group"), ("group_size", 16), ("signed_scale", False))
_NF4 = (("kind", "nf4"), ("granularity", "group"), ("signed_scale", False))
_INT = (("kind", "int"), ("signed", True), ("granularity", "group"), ("zero_point", "none"), ("signed_scale", False))
SCALE_GRIDS: dict[str, ScaleGrid] = {
    grid.name: grid
    for grid in (
        # 65280 = 255 * 2^8 is the largest bf16 number that fp16 can hold.
        ScaleGrid("portable", torch.bfloat16, _FP16_SMALLEST_NORMAL, 65280.0),
        ScaleGrid("fp16", torch.float16, _FP16_SMALLEST_NORMAL, 65504.0),
        ScaleGrid("bf16", torch.bfloat16, _BF16_SMALLEST_NORMAL, _LARGEST),
        ScaleGrid("fp32", torch.float32, _FP32_SMALLEST, _LARGEST),
        *([ScaleGrid("e8m0", _E8M0, _FP32_SMALLEST, _LARGEST)] if _E8M0 else ()),
        *(_kquant(name, bits) for name, bits in (("q2_k", 4), ("q3_k", 6), ("q4_k", 6), ("q5_k", 6), ("q6_k", 8))),
        _super_block("iq4_xs", _IQ4, 8.0),
        _Nvfp4("nvfp4", torch.float32, _FP32_SMALLEST, _LARGEST, _FP4, 8.0),
        _Nvfp4("nvfp4_over", torch.float32, _FP32_SMALLEST, _LARGEST, _FP4, 8.0),
        _Nvfp4("nvfp4_portable", torch.float32, _FP32_SMALLEST, _LARGEST, _FP4, 8.0),
        _Nested("bnb_nested", torch.float32, _FP32_SMALLEST, _LARGEST, _NF4, 8.0, also=("bnb_fp4",)),
        _Squared("exl2", torch.float32, _FP32_SMALLEST, _LARGEST, _INT, 4.0),
    )
}


def scale_grid(name: str) -> ScaleGrid:
    """The grid called `name`; raises RecipeError listing the known names."""
    if name not in SCALE_GRIDS:
        raise RecipeError(f"scale={name!r} is unknown; use one of {', '.join(SCALE_GRIDS)}")
    return SCALE_GRIDS[name]
