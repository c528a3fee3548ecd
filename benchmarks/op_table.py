"""Arguments of the operations that no recipe reaches, or not in every form: name -> arguments at a size.

A function yields argument tuples for x [rows, columns] in groups; what one operation makes (codes, scales) is handed to
the next. `dtype` is that of weights and gradients; columns are even and `group` divides them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = Iterator[tuple[str, tuple[Any, ...]]]
# storage of a scale: fp16 within its normal range
STORED = (torch.float16, 2.0**-14, 65504.0)
F8 = torch.float8_e4m3fn
# the shrinking factors of the search are sixty; fewer show the same
FACTORS = 8


@dataclass(frozen=True)
class Size:
    rows: int
    columns: int
    group: int
    device: torch.device
    dtype: torch.dtype

    @property
    def groups(self) -> int:
        return self.columns // self.group

    def normal(self, seed: int, *shape: int) -> Tensor:
        g = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape or (self.rows, self.columns), generator=g, device=self.device).to(self.dtype)

    def scale(self, seed: int = 9, *shape: int) -> Tensor:
        """fp32 [R, G] around the scale of normal numbers on a few levels."""
        g = torch.Generator(self.device).manual_seed(seed)
        return torch.rand(shape or (self.rows, self.groups), generator=g, device=self.device) * 0.3 + 0.2


def affine(at: Size) -> Arguments:
    zero = torch.randint(-3, 4, (at.rows, at.groups), device=at.device).float()
    yield "affine_fake", (at.normal(0), at.scale(), None, None, -8, 7, torch.float32)
    yield "affine_fake", (at.normal(0), at.scale(), zero, None, -8, 7, torch.float32)
    yield "affine_fake", (at.normal(0), at.scale(), None, -3 * at.scale(8), 0, 15, torch.bfloat16)
    # on a CPU layers reach plain torch without these operations
    yield "affine_encode", (at.normal(0), at.scale(), None, None, -8, 7, True)
    yield "affine_vjp", (at.normal(1), at.normal(0), at.scale(), None, None, -8, 7, True, True, False)


def codebook(encode_dynamic: Callable[..., Any], at: Size) -> Arguments:
    from qat.fake_quant_kernels.codebook import NF4

    levels, w = torch.tensor(NF4, device=at.device), at.normal(0)
    dynamic = (w, levels, at.groups, 1.0, *STORED)
    yield "codebook_fake_dynamic", (*dynamic, at.dtype)
    for packed in (False, True):
        yield "codebook_encode_dynamic", (*dynamic, packed)
        codes, scale = encode_dynamic(*dynamic, packed)
        yield "codebook_decode", (codes, scale, levels, at.dtype, packed)
        yield "codebook_encode", (w, scale, levels, packed)
    yield "codebook_fake", (w, scale, levels, at.dtype)
    yield "codebook_vjp", (at.normal(1), w, at.scale(), levels, -1.0, 1.0, True, True)


def float8(encode_dynamic: Callable[..., Any], at: Size) -> Arguments:
    w = at.normal(0)
    yield "float8_encode_dynamic", (w, at.groups, F8, *STORED)
    yield "float8_fake_dynamic", (w, at.groups, F8, *STORED, at.dtype)
    codes, scale = encode_dynamic(w, at.groups, F8, *STORED)
    yield "float8_decode", (codes, scale, at.dtype)
    yield "float8_encode", (w, scale, F8)
    yield "float8_fake", (w, scale, F8, at.dtype)
    yield "float8_vjp", (at.normal(1), w, scale, F8, True, True)
    yield "amax", (w,)


def mx(encode_dynamic: Callable[..., Any], at: Size) -> Arguments:
    w = at.normal(0)
    for element, packed in (("e2m1", True), ("e4m3", False)):
        yield "mx_encode_dynamic", (w, at.groups, element, packed)
        yield "mx_fake_dynamic", (w, at.groups, element, at.dtype)
        codes, exponents = encode_dynamic(w, at.groups, element, packed)
        yield "mx_decode", (codes, exponents, element, at.dtype, packed)
        yield "mx_encode", (w, exponents, element, packed)
        yield "mx_fake", (w, exponents, element, at.dtype)
        yield "mx_vjp", (at.normal(1), w, exponents, element, True, True)


def nvfp4(encode_dynamic: Callable[..., Any], at: Size) -> Arguments:
    w = at.normal(0)
    tensor = (w.float().abs().amax() / (6 * 448)).reshape(1)
    for over, factor in ((False, tensor), (True, 1 / tensor)):
        yield "nvfp4_fake_dynamic", (w, factor, at.groups, over, at.dtype)
        yield "nvfp4_encode_dynamic", (w, factor, at.groups, over, True)
        codes, scales = encode_dynamic(w, factor, at.groups, over, True)
        yield "nvfp4_decode", (codes, scales, factor, over, at.dtype, True)
        yield "nvfp4_encode", (w, scales, factor, over, True)
        yield "nvfp4_fake", (w, scales, factor, over, at.dtype)
        yield "nvfp4_vjp", (at.normal(1), w, scales, factor, over, True, True)


def search(at: Size) -> Arguments:
    factors = torch.linspace(1.0, 0.2, FACTORS, device=at.device)
    for kind, lo, hi, reach in ((0, -8, 7, 7.5), (1, 0, 15, 15.0), (2, 0, 15, 15.0)):
        storage = (torch.bfloat16, 2.0**-14, 65280.0, True)
        yield "mse_search", (at.normal(0), factors, at.groups, kind, lo, hi, 1 / reach, *storage, None)


def products(at: Size) -> Arguments:
    def codes() -> Tensor:
        return torch.randint(-127, 128, (at.rows, at.columns), device=at.device, dtype=torch.int8)

    x, w, one = codes(), codes(), (at.rows, 1)
    x_scale, w_scale, bias = at.scale(5, *one) / 100, at.scale(6, *one) / 100, at.normal(7, at.rows)
    for dtype, b in ((at.dtype, None), (at.dtype, bias), (torch.float32, bias)):
        yield "int8_linear", (x, x_scale, w, w_scale, b, dtype, None)
    yield "int8_linear", (x, x_scale, w, w_scale, None, at.dtype, torch.full(one, 3.0, device=at.device))
    fp8 = at.normal(0).to(F8), at.scale(5, *one), at.normal(1).to(F8), at.scale(6, *one)
    yield "fp8_linear", (*fp8, None, at.dtype)
    yield "fp8_linear", (*fp8, bias, torch.float32)


def stochastic(at: Size) -> Arguments:
    yield "stochastic_int8", (at.normal(0), torch.tensor([7], device=at.device), None)


def packing(at: Size) -> Arguments:
    for bits in (2, 3, 4, 6, 8):
        codes = torch.randint(0, 1 << bits, (at.rows, at.columns), device=at.device, dtype=torch.uint8)
        yield "pack", (codes, bits)
        taken = -(-at.columns * bits // 8)
        packed = torch.randint(0, 256, (at.rows, taken), device=at.device, dtype=torch.uint8)
        yield "unpack", (packed, bits, at.columns, False)


def two_level(at: Size) -> Arguments:
    """Weights in super-blocks of 256, and scales: as many of them as there are weights, so that a pass is long."""
    from qat.fake_quant_kernels.two_level import double_encode, exl2_encode, exl2_largest

    w = at.normal(0, at.rows, max(256, at.columns // 256 * 256))
    # Q4_K and Q6_K
    for how in ((32, 0, 15, 63, True), (16, -32, 31, 127, False)):
        yield "kquant_dynamic", (w, *how, True, at.dtype)
        yield "kquant_dynamic", (w, *how, False, at.dtype)
    scales = at.scale(3, at.rows, at.columns) * 0.01
    largest = exl2_largest(scales)
    yield "exl2_encode", (scales, largest)
    yield "exl2_decode", (exl2_encode.reference(scales, largest), largest)
    table, offset = torch.linspace(-1, 1, 256, device=at.device), scales.mean().reshape(1)
    yield "double_encode", (scales, offset, table)
    yield "double_decode", (*double_encode.reference(scales, offset, table), offset, table)


def listed(operations: dict[str, Any], at: Size) -> Arguments:
    """(operation, arguments) of everything above that exists."""
    sources = [affine, search, products, stochastic, packing, two_level]
    for family in (codebook, float8, mx, nvfp4):
        encode = operations.get(f"{family.__name__}_encode_dynamic")
        if encode is not None:
            sources.append(lambda at, family=family, encode=encode: family(encode.reference, at))  # type: ignore[misc]
    for source in sources:
        yield from ((name, args) for name, args in source(at) if name in operations)
