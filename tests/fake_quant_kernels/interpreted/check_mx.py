"""mx: exponents from bits, small floats with a power of two, Triton against the reference.

Mutations that were tried, and what turned red:

    exponent - lead -> exponent - lead + 1          test_families
    byte 0 as 2^-126 (0x800000)                     test_families (tiny)
    255 left as infinity                            test_families (not finite)
"""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, families, generator, same, views, within

from qat.fake_quant_kernels import mx
from qat.fake_quant_kernels.elements import pack, scaled


@pytest.mark.parametrize("element", mx.ELEMENTS)
def test_families(element: str) -> None:
    exponents = torch.randint(120, 130, (3, 2), generator=generator(1)).to(torch.uint8)
    g = torch.randn(3, 64, generator=generator(2))
    four = element == "e2m1"
    for dtype in DTYPES:
        for family, w in families((3, 64), dtype, 0, 32, not_finite=True).items():
            if dtype == torch.bfloat16 and family in ("tiny", "denormals", "magnitudes"):
                # the interpreter reads denormal bf16 numbers as others
                continue
            context = f"{element} {family} {dtype}"
            found, _ = same(mx.encode_dynamic, w, 2, element, False, context=context)
            same(mx.fake_dynamic, w, 2, element, torch.float32, context=context)
            same(mx.encode, w, exponents, element, False, context=context)
            same(mx.fake, w, exponents, element, torch.float16, context=context)
            same(mx.decode, *found, element, torch.float32, False, context=context)
            same(mx.vjp, g, w, exponents, element, True, False, context=context)
            if four:
                same(mx.encode_dynamic, w, 2, element, True, context=context)
                same(mx.encode, w, exponents, element, True, context=context)
                same(mx.decode, pack(found[0]), found[1], element, torch.float32, True, context=context)


def test_all_exponents() -> None:
    """Every byte, the denormal one and NaN included."""
    exponents = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    w = torch.randn(8, 128, generator=generator(3)) * mx.powers_of(exponents).repeat_interleave(4, 1).nan_to_num()
    for element in mx.ELEMENTS:
        found, _ = same(mx.encode, w, exponents, element, False)
        same(mx.decode, found[0], exponents, element, torch.float32, False)


@pytest.mark.parametrize(("columns", "groups"), [(1, 1), (63, 1), (63, 3), (1000, 1), (1023, 31), (96, 3), (20000, 1)])
def test_sizes(columns: int, groups: int) -> None:
    w = torch.randn(3, columns, generator=generator(columns))
    g = torch.randn(w.shape, generator=generator(4))
    for packed in (False, True) if columns % 2 == 0 else (False,):
        found, _ = same(mx.encode_dynamic, w, groups, "e2m1", packed)
        same(mx.decode, *found, "e2m1", torch.float32, packed)
    _, exponents = mx.encode_dynamic.reference(w, groups, "e2m1", False)
    found, _ = same(mx.vjp, g, w, exponents, "e2m1", True, True, but=(1,))
    v = scaled(w, mx.powers_of(exponents))
    u, inside = mx.e2m1_round_(v.clone()).double(), v.abs() <= 6
    g, v = g.double().reshape(v.shape), v.double() * inside
    within("mx_vjp", found[1], (g * (u - v)).sum(-1), (g.abs() * (u.abs() + v.abs())).sum(-1), 24)


def test_layouts_and_nothing() -> None:
    w = torch.randn(4, 64, generator=generator(0))
    for name, view in views(w).items():
        found, _ = same(mx.encode_dynamic, view, 2, "e2m1", True, context=name)
        same(mx.fake, view, found[1], "e4m3", torch.float32, context=name)
    for shape in ((0, 64), (4, 0)):
        same(mx.encode_dynamic, torch.empty(shape), 2, "e2m1", True)
        same(mx.fake_dynamic, torch.empty(shape), 2, "e5m2", torch.float32)
