"""Scales found in the data, against the formulas written out once more with NumPy and torch's own casts.

Mutations that were tried, and the test that turned red for each:

    project: nearest -> truncated (bf16, fp16, e4m3)      test_storages_are_those_of_torch_casts
    bits replaced by .to(storage).to(float32)             test_compiled_equals_eager
    amax |w| -> amax w                                    test_absmax
    range without 0                                       test_minmax
    zero_of: low * (1 / s) -> low / s                     test_the_zero_point_multiplies_by_the_reciprocal
    minimum not stored before the scale                   test_minmax
    poison: isnan of the scale, not of the extreme        test_poison
    chunks: fields of the first chunk for all             test_chunks_change_nothing
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels import rows as rows_module
from qat.fake_quant_kernels.dynamic import (
    absmax,
    absmax_fields,
    dynamic_absmax,
    dynamic_minmax,
    minmax,
    minmax_fields,
    zero_of,
)
from qat.fake_quant_kernels.pack import unpack_halves
from qat.fake_quant_kernels.storage import project, project_minimum, storage_code

# name -> storage, smallest, largest, half
STORAGES: dict[str, tuple[torch.dtype, float, float, bool]] = {
    "portable": (torch.bfloat16, 2.0**-14, 65280.0, True),
    "fp16": (torch.float16, 2.0**-14, 65504.0, False),
    "bf16": (torch.bfloat16, 2.0**-126, 2.0**119, False),
    "fp32": (torch.float32, 2.0**-110, 2.0**119, False),
    "e8m0": (torch.float8_e8m0fnu, 2.0**-126, 2.0**119, False),
    "e4m3": (torch.float8_e4m3fn, 2.0**-9, 448.0, False),
}
# bits, signed, narrow -> the codes
GRIDS = [
    (-(1 << (bits - 1)) + narrow if signed else 0, (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1)
    for bits, signed, narrow in product(range(1, 9), (True, False), (0, 1))
    if not narrow or (signed and bits > 1)
]


def numbers(groups: int, seed: int) -> Tensor:
    """Six rows of 48 whose magnitudes differ by far; one group is zero, one holds one sign only."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 48, generator=g) * torch.logspace(-6, 5, 6).unsqueeze(1)
    w[1, : 48 // groups] = 0.0
    w[2] = w[2].abs() + 0.01
    w[3] = -w[3].abs()
    return w


def cast(value: Any, storage: torch.dtype) -> Any:
    return torch.from_numpy(np.asarray(value)).to(storage).to(torch.float32).numpy()


def numpy_codes(blocks: Any, s: Any, z: Any, m: Any, lo: int, hi: int) -> Any:
    value = (blocks if m is None else blocks - m) * (np.float32(1) / s)
    low, high = (lo, hi) if z is None else (np.float32(lo) - z, np.float32(hi) - z)
    q = np.rint(np.minimum(np.maximum(value, low), high))
    return q if z is None else q + z


def expected(w: Tensor, groups: int, lo: int, hi: int, name: str, kind: str) -> tuple[Any, Any, Any]:
    """(codes, scale, zero or minimum) as the equations say, in NumPy's fp32."""
    storage, smallest, largest, half = STORAGES[name]
    blocks = w.float().numpy().reshape(w.shape[0], groups, -1)
    f32 = np.float32
    high, low = blocks.max(-1, keepdims=True), blocks.min(-1, keepdims=True)

    def scale_of(value: Any) -> Any:
        return cast(np.clip(value.astype(f32), f32(smallest), f32(largest)), storage)

    z = m = None
    if kind == "none":
        reach = (hi - lo) / 2 if lo < 0 else hi
        s = scale_of(np.maximum(high, -low) * f32(1.0 / reach))
    elif kind == "int":
        low, high = np.minimum(low, f32(0)), np.maximum(high, f32(0))
        s = scale_of((high - low) * f32(1.0 / (hi - lo)))
        z = np.clip(f32(lo) - np.rint(low * (f32(1) / s)), f32(lo), f32(hi))
    else:
        m = cast(np.clip(low, -f32(largest), f32(largest)), storage)
        if half:
            m = cast(m, torch.float16)
        s = scale_of((high - m) * f32(1.0 / (hi - lo)))
    codes = numpy_codes(blocks, s, z, m, lo, hi).reshape(w.shape)
    second = z if z is not None else m
    return codes, s[..., 0], None if second is None else second[..., 0]


@pytest.mark.parametrize("name", STORAGES)
def test_absmax(name: str) -> None:
    """Every grid of 1 to 8 bits, signed, unsigned (never negative or not) and narrow."""
    for (lo, hi), groups, dtype in product(GRIDS, (1, 3, 6), (torch.float32, torch.bfloat16)):
        w = numbers(groups, hi).to(dtype)
        codes, scale, _ = expected(w, groups, lo, hi, name, "none")
        inverse = 1.0 / ((hi - lo) / 2 if lo < 0 else hi)
        found = absmax(w, groups, inverse, lo, hi, *STORAGES[name][:3], lo < 0)
        assert found[0].dtype == (torch.int8 if lo < 0 else torch.uint8) and found[1].dtype == torch.float32
        assert np.array_equal(found[0].numpy(), codes) and np.array_equal(found[1].numpy(), scale)
        assert torch.equal(found[1], absmax_fields(w, groups, inverse, *STORAGES[name][:3]))


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("name", [name for name in STORAGES if name != "e8m0"])
def test_minmax(name: str, kind: str) -> None:
    for (lo, hi), groups, dtype in product(GRIDS, (1, 3, 6), (torch.float32, torch.bfloat16)):
        w = numbers(groups, hi).to(dtype)
        codes, scale, second = expected(w, groups, lo, hi, name, kind)
        how = groups, 1.0 / (hi - lo), lo, hi, *STORAGES[name], kind == "float"
        found = minmax(w, *how)
        assert np.array_equal(found[0].numpy(), codes) and np.array_equal(found[1].numpy(), scale)
        assert np.array_equal(found[2].numpy(), second)
        for one, other in zip(found[1:], minmax_fields(w, *how), strict=True):
            assert torch.equal(one, other)


def test_the_zero_point_multiplies_by_the_reciprocal() -> None:
    low = -torch.arange(1, 4000, dtype=torch.float32) * 0.37
    scale = -low * torch.tensor(2.0 / 15)
    found = zero_of(low, scale, 0, 15)
    assert torch.equal(found, (0 - torch.round(low * (1.0 / scale))).clamp(0, 15))
    assert not torch.equal(found, (0 - torch.round(low / scale)).clamp(0, 15)), "the sample no longer tells them apart"
    odd = torch.tensor([float("nan"), float("-inf"), 0.0])
    assert zero_of(odd, torch.ones(3), -8, 7).tolist() == [0.0, 7.0, -8.0]


@pytest.mark.parametrize("name", STORAGES)
def test_storages_are_those_of_torch_casts(name: str) -> None:
    """Numbers, midpoints and their neighbours over the whole range, and all of it at random."""
    storage, smallest, largest, _ = STORAGES[name]
    bits = torch.randint(
        0x00800000, 0x7F800000, (200_000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0)
    )
    upper = torch.arange(0x0080, 0x7F80, dtype=torch.int32) << 16
    around = [upper, upper + 0x8000, upper + 0x7FFF, upper + 0x8001, upper + 0x1000, upper + 0x3000]
    value = torch.cat([bits, *around]).view(torch.float32)
    value = torch.cat([value, torch.exp2(torch.linspace(-24, 17, 100_000))])
    assert torch.equal(project(value, storage, smallest, largest), value.clamp(smallest, largest).to(storage).float())
    ends = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -1.0])
    low, high = (float(torch.tensor(end).to(storage).float()) for end in (smallest, largest))
    assert project(ends, storage, smallest, largest).tolist() == [high, high, low, low, low]
    if name == "e8m0":
        with pytest.raises(QATError, match="neither a sign nor a zero"):
            project_minimum(value, storage, smallest, largest)
        return
    signed = torch.cat([value, -value, torch.exp2(torch.linspace(-30, -9, 1000)), torch.zeros(1)])
    stored = signed.clamp(-largest, largest).to(storage).float()
    if name == "portable":
        stored = stored.to(torch.float16).float()
    if name == "fp32":
        stored[stored.abs() < smallest] = 0.0
    assert torch.equal(project_minimum(signed, storage, smallest, largest, name == "portable"), stored)


def test_only_known_storages() -> None:
    assert len({storage_code(storage) for storage, *_ in STORAGES.values()}) == 5
    with pytest.raises(QATError, match="int32 stores no scales"):
        storage_code(torch.int32)


@pytest.mark.parametrize("kind", ["none", "int", "float"])
def test_poison(kind: str) -> None:
    """A NaN makes the scale of its group NaN if asked to, an infinity never; without, every field is finite."""
    w = numbers(3, 1)
    w[4, 20], w[5, 0], w[0, 47] = float("nan"), float("inf"), float("-inf")
    for name, poison in product(STORAGES, (False, True)):
        if kind == "none":
            codes, *found = absmax(w, 3, 1 / 7.5, -8, 7, *STORAGES[name][:3], True, poison=poison)
        elif name == "e8m0":
            continue
        else:
            codes, *found = minmax(w, 3, 1 / 15, 0, 15, *STORAGES[name], kind == "float", poison=poison)
        assert torch.isnan(found[0]).nonzero().tolist() == ([[4, 1]] if poison else [])
        found[0][4, 1] = 1.0
        assert all(bool(torch.isfinite(t).all()) for t in found)
        assert int(codes.min()) >= (-8 if kind == "none" else 0) and int(codes.max()) <= 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything() -> list[Tensor]:
        w = numbers(3, 2).to(dtype)
        w[4, 20] = float("nan")
        how = STORAGES["portable"]
        return [
            *absmax(w, 3, 1 / 7.5, -8, 7, *how[:3], True, True),
            *minmax(w, 3, 1 / 255, 0, 255, *how, False),
            *minmax(w, 3, 1 / 15, 0, 15, *how, True, True),
        ]

    whole = everything()
    monkeypatch.setattr(rows_module, "_CHUNK", 200)
    assert len(rows_module.chunks(torch.empty(6, 48), 0)) == 2
    assert all(torch.equal(one, other) for one, other in zip(whole, everything(), strict=True))


def test_nothing() -> None:
    for shape in ((0, 6), (4, 0)):
        codes, scale, zero = minmax(torch.empty(shape), 2, 1 / 15, 0, 15, *STORAGES["fp32"], False)
        assert codes.shape == shape and scale.shape == zero.shape == (shape[0], 2)
        codes, scale = absmax(torch.empty(shape), 2, 1 / 15, 0, 15, *STORAGES["fp32"][:3], False, True)
        assert codes.shape == (shape[0], shape[1] // 2) and bool((scale == 2.0**-110).all())


def test_operators() -> None:
    """Schema, shapes of the fake results, no aliases."""
    w = numbers(3, 1)
    for packed, poison in ((False, True), (True, False)):
        torch.library.opcheck(
            dynamic_absmax.custom, (w, 3, 1 / 7.5, -8, 7, torch.float16, 2.0**-14, 65504.0, packed, poison)
        )
        args = w, 3, 1 / 15, 0, 15, *STORAGES["portable"], packed, packed, poison
        torch.library.opcheck(dynamic_minmax.custom, args)


def test_compiled_equals_eager() -> None:
    """The compiler drops a cast to bf16 and back to fp32 where it fuses: the fields are rounded without casts."""

    def everything(w: Tensor) -> list[Tensor]:
        found = [*absmax(w, 3, 1 / 7.5, -8, 7, *STORAGES["portable"][:3], True, True, poison=True)]
        found += minmax(w, 3, 1 / 255, 0, 255, *STORAGES["fp16"], False)
        found += minmax(w, 3, 1 / 15, 0, 15, *STORAGES["portable"], True)
        return found + [absmax_fields(w, 3, 1 / 7.5, *STORAGES[name][:3]) for name in ("e8m0", "e4m3")]

    w = numbers(3, 5).bfloat16()
    compiled = torch.compile(everything, fullgraph=True)(w)
    for index, (one, other) in enumerate(zip(everything(w), compiled, strict=True)):
        assert one.dtype == other.dtype and torch.equal(one, other), index


@pytest.mark.parametrize("packed", [False, True])
def test_codes_of_a_group_with_nan_are_those_of_0(packed: bool) -> None:
    """Mutation: `finite = True` in `_absmax` (a NaN becomes 128)."""
    w = torch.rand(3, 64)
    w[1, 5] = torch.nan
    hi = 15 if packed else 255
    codes, scale = absmax(w, 2, 1.0 / hi, 0, hi, torch.float32, 1e-30, 1e30, False, packed, poison=True)
    codes = unpack_halves(codes, False).reshape(3, 64) if packed else codes
    assert bool((codes[1, :32] == 0).all()) and bool((codes[[0, 2]] > 0).any())
    assert torch.equal(scale.isnan(), torch.tensor([[False, False], [True, False], [False, False]]))
