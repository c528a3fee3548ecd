"""nvfp4: both conventions of the tensor's scale, Triton against the reference.

Mutations that were tried, and what turned red:

    f / T computed as f * (1 / T)                       test_families
    the lower bound 2^-9 of f left out                  test_families (zero groups)
"""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, families, generator, same, views, within

from qat.fake_quant_kernels import float8, nvfp4
from qat.fake_quant_kernels.elements import e2m1_round_, pack, scaled


@pytest.mark.parametrize("over", [False, True])
def test_families(over: bool) -> None:
    g = torch.randn(3, 64, generator=generator(2))
    for dtype in DTYPES:
        for family, w in families((3, 64), dtype, 0, 16, not_finite=True).items():
            if dtype == torch.bfloat16 and family in ("tiny", "denormals", "magnitudes"):
                # the interpreter reads denormal bf16 numbers as others
                continue
            context = f"{over} {family} {dtype}"
            tensors = (nvfp4.tensor_scale(float8.amax.reference(w), over), torch.tensor([0.37]))
            for tensor in tensors if dtype == torch.float32 else tensors[:1]:
                found, _ = same(nvfp4.encode_dynamic, w, tensor, 4, over, False, context=context)
                same(nvfp4.encode_dynamic, w, tensor, 4, over, True, context=context)
                same(nvfp4.fake_dynamic, w, tensor, 4, over, torch.float32, context=context)
                same(nvfp4.decode, *found, tensor, over, torch.float32, False, context=context)
                same(nvfp4.decode, pack(found[0]), found[1], tensor, over, torch.float32, True, context=context)
                same(nvfp4.fake, w, found[1].flip(0), tensor, over, torch.float16, context=context)
                same(nvfp4.encode, w, found[1].flip(0), tensor, over, True, context=context)
                same(nvfp4.vjp, g, w, found[1].flip(0), tensor, over, True, False, context=context)


def test_all_scales() -> None:
    """Every positive e4m3 number, denormals included."""
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(3, 42)
    w = torch.randn(3, 42 * 16, generator=generator(0))
    for over in (False, True):
        same(nvfp4.fake, w, scales, torch.tensor([[0.0123]]), over, torch.float32)
        same(
            nvfp4.decode, torch.randint(0, 16, w.shape).byte(), scales, torch.tensor([0.7]), over, torch.float32, False
        )


@pytest.mark.parametrize(("columns", "groups"), [(1, 1), (63, 1), (1000, 1), (1023, 33), (48, 3), (20000, 1)])
def test_sizes(columns: int, groups: int) -> None:
    w = torch.randn(3, columns, generator=generator(columns))
    g = torch.randn(w.shape, generator=generator(4))
    tensor = torch.tensor([0.001])
    for packed in (False, True) if columns % 2 == 0 else (False,):
        found, _ = same(nvfp4.encode_dynamic, w, tensor, groups, False, packed)
        same(nvfp4.decode, *found, tensor, False, torch.float32, packed)
    _, scales = nvfp4.encode_dynamic.reference(w, tensor, groups, False, False)
    found, _ = same(nvfp4.vjp, g, w, scales, tensor, False, True, True, but=(1,))
    v = scaled(w, nvfp4.values_of(scales, tensor, False))
    u, inside = e2m1_round_(v.clone()).double(), v.abs() <= 6
    g, v = g.double().reshape(v.shape), v.double() * inside
    within("nvfp4_vjp", found[1], (g * (u - v)).sum(-1), (g.abs() * (u.abs() + v.abs())).sum(-1), 24)


def test_layouts_and_nothing() -> None:
    w, tensor = torch.randn(4, 32, generator=generator(0)), torch.tensor([[0.01]])
    for name, view in views(w).items():
        found, _ = same(nvfp4.encode_dynamic, view, tensor, 2, True, True, context=name)
        same(nvfp4.fake, view, found[1].T.contiguous().T, tensor, True, torch.float32, context=name)
    for shape in ((0, 32), (4, 0)):
        same(nvfp4.encode_dynamic, torch.empty(shape), tensor, 2, True, True)
        same(nvfp4.fake_dynamic, torch.empty(shape), tensor, 2, False, torch.float32)
