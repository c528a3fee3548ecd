"""Codes to numbers: the kernel against the reference, every bit."""

from __future__ import annotations

import pytest
import torch
from compare import generator, same, views
from torch import Tensor

from qat.fake_quant_kernels.affine_decode import affine_decode

SHAPES = [(1, 1), (63, 1), (63, 9), (64, 2), (96, 4), (1000, 1), (1000, 125), (1023, 0), (2100, 1), (64, 0)]
# the interpreter truncates a cast to bf16, a GPU rounds
DTYPES = (torch.float32, torch.float16)


def arguments(
    columns: int, groups: int, kind: str, signed: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    g = generator(columns + groups)
    codes = torch.randint(-128, 128, (3, columns), generator=g).to(torch.int8)
    shape = (1, 1) if groups == 0 else (3, groups)
    scale = torch.rand(shape, generator=g) + 1e-3
    scale[0, 0] = float("nan")
    zero = torch.randint(-8, 8, shape, generator=g).float() if kind == "int" else None
    minimum = torch.randn(shape, generator=g) if kind == "float" else None
    return codes if signed else codes.view(torch.uint8), scale, zero, minimum


@pytest.mark.parametrize("kind", ["none", "int", "float"])
@pytest.mark.parametrize("signed", [True, False])
def test_codes(kind: str, signed: bool) -> None:
    """Mutation: (code - z) * s as code * s - z -> red."""
    for columns, groups in SHAPES:
        for dtype in DTYPES:
            args = arguments(columns, groups, kind, signed)
            same(affine_decode, *args, dtype, False, signed, context=f"{columns} {groups} {dtype}")


@pytest.mark.parametrize("kind", ["none", "int", "float"])
@pytest.mark.parametrize("signed", [True, False])
def test_packed(kind: str, signed: bool) -> None:
    """Mutation: the sign of the high nibble left out -> red."""
    for columns, groups in [(64, 2), (64, 1), (64, 0), (96, 3), (2, 1), (1000, 5), (1000, 0), (1022, 7), (4200, 1)]:
        codes, *fields = arguments(columns, groups, kind, False)
        for dtype in DTYPES:
            packed = codes[:, : columns // 2].contiguous()
            same(affine_decode, packed, *fields, dtype, True, signed, context=f"{columns} {groups} {dtype}")


def test_layouts_and_floats() -> None:
    codes, scale, zero, minimum = arguments(60, 4, "int", True)
    assert zero is not None
    for view in views(codes).values():
        same(
            affine_decode,
            view,
            views(scale)["transposed"],
            views(zero)["every second"],
            None,
            torch.float32,
            False,
            True,
        )
    same(affine_decode, codes.float(), scale, zero, minimum, torch.float32, False, True)
    same(affine_decode, codes[:0], scale[:0], zero[:0], None, torch.float32, False, True)
