"""One interpreted launch over many weights writes what `dynamic_absmax` finds for each, bit for bit.

Mutations that were tried, and what turned red:

    bisection: `<= program` -> `< program`               test_lists
    HALVES 1: scale of the low half for both             test_lists[True-...]
    a table kept when a tensor moved                     test_tables_follow_the_tensors
    weights `alone` forgotten                            test_lists (rows of 20000, transposed)
    poison not passed on                                 test_lists (not finite)
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compare import DTYPES, families, generator, same, views
from torch import Tensor

from qat.fake_quant_kernels import multi_tensor
from qat.fake_quant_kernels.multi_tensor import MultiAbsmax
from qat.fake_quant_kernels.rows import empty_codes

PORTABLE = (torch.bfloat16, 2.0**-14, 65280.0)
FULL = (torch.float32, 2.0**-110, 2.0**119)


def fresh(weights: list[Tensor], groups: list[int], lo: int, packed: bool) -> tuple[list[Tensor], list[Tensor]]:
    codes = [empty_codes(w, lo, packed) for w in weights]
    return codes, [torch.empty(w.shape[0], g) for w, g in zip(weights, groups, strict=True)]


@dataclass
class Multi:
    """The call as an operation with results, for `same`."""

    run: MultiAbsmax
    groups: list[int]
    name: str = "multi_absmax"

    def triton(self, weights: list[Tensor]) -> Any:
        codes, scales = fresh(weights, self.groups, self.run.settings[1], self.run.settings[6])
        self.run(weights, codes, scales)
        return codes, scales

    def reference(self, weights: list[Tensor]) -> Any:
        codes, scales = fresh(weights, self.groups, self.run.settings[1], self.run.settings[6])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(multi_tensor.dynamic_absmax, "triton", multi_tensor.dynamic_absmax.reference)
            multi_tensor._reference(weights, codes, scales, [], [], [], *self.run.settings)
        return codes, scales


# shapes and groups of the weights of one call
LISTS = (
    [((64, 64), 2), ((3, 96), 3), ((1, 32), 1), ((70, 32), 1), ((5, 128), 4)],
    [((2, 1), 1), ((2, 63), 1), ((3, 1000), 1), ((1, 1023), 1), ((0, 64), 2), ((2, 1024), 1), ((2, 0), 1)],
    [((2, 48), 2), ((3, 20000), 1), ((4, 24), 1), ((6, 30), 1), ((2, 96), 3), ((2, 4), 2)],
)


@pytest.mark.parametrize("which", range(len(LISTS)))
@pytest.mark.parametrize("packed", [False, True])
def test_lists(packed: bool, which: int) -> None:
    for i, dtype in enumerate(DTYPES):
        shapes = [(shape, g) for shape, g in LISTS[which] if not packed or shape[1] % 2 == 0]
        names = ["normal", "zero groups", "ties", "not finite", "magnitudes"]
        weights = []
        for t, (shape, g) in enumerate(shapes):
            own = families(shape, dtype, seed=t, group=max(1, shape[1] // g), not_finite=True) if min(shape) else {}
            weights.append(own.get(names[(t + i) % len(names)], torch.empty(shape, dtype=dtype)))
        for lo, hi, inverse, stored in ((-8, 7, 1 / 7.5, PORTABLE), (0, 15, 1 / 15, FULL)):
            run = MultiAbsmax(inverse, lo, hi, *stored, packed=packed, poison=bool(i % 2))
            same(Multi(run, [g for _, g in shapes]), weights, context=f"{which} {dtype} {lo} {packed}")


def test_eight_bits_and_layouts() -> None:
    w = torch.randn(6, 64, generator=generator(0))
    weights = [w, *views(w).values()]
    same(Multi(MultiAbsmax(1 / 127.5, -128, 127, *PORTABLE), [2] * len(weights)), weights, context="layouts")
    same(Multi(MultiAbsmax(1 / 255, 0, 255, *PORTABLE), [1] * len(weights)), [t.abs() for t in weights])


def test_tables_follow_the_tensors() -> None:
    """Built once for the same tensors, however their numbers change, and again when one has moved."""
    run = MultiAbsmax(1 / 7.5, -8, 7, *PORTABLE)
    weights = [torch.randn(4, 64, generator=generator(t)) for t in range(3)]
    codes, scales = fresh(weights, [2] * 3, -8, False)
    run(weights, codes, scales)
    tables = run.tables
    weights[1].mul_(-3.0)
    run(weights, codes, scales)
    assert run.tables is tables and len(tables) == 2
    first = codes[1].clone()
    weights[1] = weights[1].neg()
    run(weights, codes, scales)
    assert run.tables is not tables and not torch.equal(codes[1], first)
    wanted = Multi(run, [2] * 3).reference(weights)
    assert all(torch.equal(a, b) for a, b in zip((*codes, *scales), (*wanted[0], *wanted[1]), strict=True))
