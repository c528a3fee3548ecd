"""Many weights at once on a CPU, what is refused, and the plan of launches; interpreted/ has the kernel.

Mutations of `fake_quant_kernels/multi_tensor.py` that were tried, and the test that turned red for each:

    _reference: scale.copy_ left out                    test_equals_numpy
    _build: starts without rounding up                  test_every_number_is_in_one_tile
    _build: tables by dtype alone, not by tile          test_launches_of_a_model
    _build: EVEN without the codes' address             test_even_is_said_only_where_it_holds
    _check left out on one side                         test_refused
    schema: codes not written to                        test_opcheck
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.errors import QATError
from qat.fake_quant_kernels import multi_tensor
from qat.fake_quant_kernels.multi_tensor import MultiAbsmax

PORTABLE = (torch.bfloat16, 2.0**-14, 65280.0)


def weights_of(shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=g) * 10.0**-t).to(dtype) for t, shape in enumerate(shapes)]


def fresh(weights: list[Tensor], groups: list[int], packed: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    dtype = torch.uint8 if packed else torch.int8
    codes = [torch.full((w.shape[0], w.shape[1] >> packed), 99, dtype=dtype) for w in weights]
    return codes, [torch.full((w.shape[0], g), torch.nan) for w, g in zip(weights, groups, strict=True)]


def planned(
    weights: list[Tensor], groups: list[int], packed: bool = False
) -> tuple[MultiAbsmax, list[list[list[int]]], list[list[int]]]:
    """The object with its tables, as if on a GPU; the tables; the plan by launch."""
    run = MultiAbsmax(1 / 7.5, -8, 7, *PORTABLE, packed=packed)
    codes, scales = fresh(weights, groups, packed)
    run._check(weights, codes, scales)
    run._build(weights, codes, scales)
    size = multi_tensor._NUMBERS
    plan = [run.plan[i : i + size] for i in range(0, len(run.plan), size)]
    assert len(run.tables) == 2 * len(plan)
    return run, [t.tolist() for t in run.tables], plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_numpy(dtype: torch.dtype) -> None:
    weights = weights_of([(3, 64), (1, 32), (5, 96)], dtype)
    codes, scales = fresh(weights, [2, 1, 3])
    MultiAbsmax(1 / 7.5, -8, 7, torch.float32, 2.0**-110, 2.0**119)(weights, codes, scales)
    for w, code, scale in zip(weights, codes, scales, strict=True):
        blocks = w.float().numpy().reshape(w.shape[0], scale.shape[1], -1)
        wanted = np.abs(blocks).max(-1) * np.float32(1 / 7.5)
        assert np.array_equal(scale.numpy(), wanted)
        own = np.rint(np.clip(blocks * (np.float32(1) / wanted)[..., None], np.float32(-8), np.float32(7)))
        assert np.array_equal(code.numpy(), own.reshape(w.shape).astype(np.int8))


def test_every_number_is_in_one_tile() -> None:
    """Programs of a table cover the units of each weight, and no program has more than one weight's."""
    shapes = [(3, 64), (1, 32), (170, 96), (64, 64), (1, 2048)]
    weights = weights_of(shapes)
    run, (table, starts), ((count, programs, high, wide, *_),) = planned(weights, [r // 32 for _, r in shapes])
    assert not run.alone and count == len(table) == len(starts) - 1 == 5 and wide == 32 and programs == starts[-1]
    for t, (w, row) in enumerate(zip(weights, table, strict=True)):
        assert row[0] == w.data_ptr() and row[3:] == [w.numel() // 32, 32, 1]
        assert (starts[t + 1] - starts[t] - 1) * high < row[3] <= (starts[t + 1] - starts[t]) * high


def test_launches_of_a_model() -> None:
    """Per group one launch; per row one for each power of two; what no program can hold goes alone."""
    shapes = [(8, 512), (2, 512), (16, 128), (8, 1376), (8, 1024)] * 3
    groups = [columns // 32 for _, columns in shapes]
    run, _, plan = planned(weights_of(shapes), groups)
    assert len(plan) == 1 and plan[0][0] == 15 and not run.alone
    run, _, plan = planned(weights_of(shapes), groups, packed=True)
    # 1376 / 32 is odd: the half of a row ends inside a group
    assert len(plan) == 1 and plan[0][0] == 12 and run.alone == [3, 8, 13]
    run, _, plan = planned(weights_of([*shapes, (1, 20000), (0, 64), (2, 0)]), [1] * 18)
    assert sorted(launch[3] for launch in plan) == [128, 512, 1024, 2048] and run.alone == [15, 17]
    columns = torch.randn(64, 8).t()
    run, _, plan = planned([columns, columns.contiguous()], [2, 2])
    assert run.alone == [0] and plan[0][0] == 1


def test_even_is_said_only_where_it_holds() -> None:
    memory = torch.randn(1 + 4 * 32)
    run, _, plan = planned([memory[1:].view(4, 32)], [1])
    assert [launch[-1] for launch in plan] == [0]
    run, _, plan = planned([memory[:-1].view(4, 32)], [1])
    assert [launch[-1] for launch in plan] == [1]
    run, _, plan = planned([torch.randn(4, 24)], [1])
    assert [launch[-1] for launch in plan] == [0]
    run = MultiAbsmax(1 / 7.5, -8, 7, *PORTABLE)
    run._build([memory[:-1].view(4, 32)], [torch.empty(129, dtype=torch.int8)[1:].view(4, 32)], [torch.empty(4, 1)])
    assert run.plan[-1] == 0


def test_refused() -> None:
    """One sentence that names the tensor and what was given."""
    run = MultiAbsmax(1 / 7.5, -8, 7, *PORTABLE)
    weights = weights_of([(3, 64), (1, 32)])
    codes, scales = fresh(weights, [2, 1])
    run([], [], [])
    cases: list[tuple[Any, str]] = [
        ((weights, codes[:1], scales), "1 codes"),
        (([weights[0], weights[1].bfloat16()], codes, scales), "weight 1 is torch.bfloat16"),
        (([w.double() for w in weights], codes, scales), "weight 0 is torch.float64"),
        ((weights, [codes[0].view(torch.uint8), codes[1]], scales), "codes 0 are torch.uint8"),
        ((weights, [codes[0], codes[1][:, :16]], scales), r"codes 1 are torch.int8 \(1, 16\)"),
        ((weights, codes, [scales[0].half(), scales[1]]), "scales 0 are torch.float16"),
        ((weights, codes, [torch.empty(3, 5), scales[1]]), r"scales 0 are torch.float32 \(3, 5\)"),
        ((weights, codes, [scales[0], torch.empty(2, 1)]), r"scales 1 are torch.float32 \(2, 1\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(QATError, match=message):
            run(*arguments)
    packed = MultiAbsmax(1 / 7.5, -8, 7, *PORTABLE, packed=True)
    odd = [torch.randn(2, 7)]
    with pytest.raises(QATError, match="codes 0"):
        packed(odd, [torch.empty(2, 3, dtype=torch.uint8)], [torch.empty(2, 1)])


def test_opcheck() -> None:
    weights = weights_of([(3, 64), (1, 32)])
    settings = (1 / 7.5, -8, 7, *PORTABLE, False, False)
    torch.library.opcheck(multi_tensor._op, (weights, *fresh(weights, [2, 1]), [], [], [], *settings))
    codes, scales = fresh(weights, [2, 1])
    torch.ops.qat.multi_absmax(weights, codes, scales, [], [], [], *settings)
    wanted = fresh(weights, [2, 1])
    MultiAbsmax(1 / 7.5, -8, 7, *PORTABLE)(weights, *wanted)
    assert all(torch.equal(a, b) for a, b in zip((*codes, *scales), (*wanted[0], *wanted[1]), strict=True))
