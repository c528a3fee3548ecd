"""What the checks of interpreted kernels share: inputs that are hard to round, and the comparison with the reference.

    for name, w in families((3, 64), torch.float32, seed=0, group=16).items():
        same(OP, w, 16, name_in_messages)

`same` runs an operation's Triton launcher, under TRITON_INTERPRET=1, and its reference on equal copies of the arguments
and asserts equal bits; nothing that a kernel forgot to write can look right, because fresh memory holds NaN. What was
compared is counted in `elements` and `calls`, and conftest.py prints it at the end of the run.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SIZES = (1, 63, 1000, 1023)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# operation -> result elements compared, calls
elements: Counter[str] = Counter()
calls: Counter[str] = Counter()


def said() -> list[str]:
    """One line for each operation, as the launching test reads them."""
    return [f"compared {elements[name]} elements in {calls[name]} calls of {name}" for name in sorted(calls)]


@contextlib.contextmanager
def nan_filled() -> Iterator[None]:
    """Fresh memory (torch.empty, empty_like, new_empty, empty_strided) holds NaN, or an integer type's largest number.

    PyTorch does it itself where deterministic algorithms are asked for.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ties(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, group: int | None = None, largest: int = 7
) -> tuple[Tensor, Tensor]:
    """Numbers that lie on a grid's codes or exactly between two of them, and the grid's steps.

    Each row is half-integers within -largest..largest times a power of two, and each group holds largest times it, so
    that a scale taken as absmax / largest is that power of two as well. group: numbers of a group, None for whole rows.
    Returns the numbers [..., K] in dtype and the steps [..., G] in fp32.
    """
    group = group or shape[-1]
    g = generator(seed)
    step = torch.exp2(torch.randint(-6, 4, (*shape[:-1], 1), generator=g).float())
    halves = torch.randint(-2 * largest, 2 * largest + 1, shape, generator=g).float()
    halves[..., ::group] = 2.0 * largest
    return (halves * 0.5 * step).to(dtype), step.expand(*shape[:-1], -(-shape[-1] // group)).contiguous()


def families(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    group: int | None = None,
    largest: int = 7,
    not_finite: bool = False,
) -> dict[str, Tensor]:
    """Inputs by name, each of `shape` [..., K] and `dtype`; `group` numbers of a row share a scale (None: whole rows).

    normal        standard normal
    heavy         heavy tails, and rows whose magnitudes differ by a factor of a million
    ties          see `ties`
    zero groups   every second group is zero, the others are normal
    constant      each group is one number
    signed zeros  half of the numbers are 0.0 or -0.0
    all zero      nothing else
    huge          up to the dtype's largest number
    tiny          around its smallest normal number
    denormals     small multiples of its smallest denormal number
    magnitudes    exponents from everywhere in its range, side by side
    not finite    some NaN and infinities (only if asked for)
    """
    group = group or shape[-1]
    g = generator(seed)
    info = torch.finfo(dtype)
    normal = torch.randn(shape, generator=g)
    sign = torch.randint(0, 2, shape, generator=g) * 2.0 - 1.0
    uniform = torch.rand(shape, generator=g)
    rows = torch.arange(normal[..., :1].numel()).reshape(*shape[:-1], 1)
    groups = torch.arange(shape[-1]) // group
    head = groups * group

    magnitude = torch.logspace(-3, 3, max(2, rows.numel()))[rows]
    smallest = info.tiny * info.eps
    low, high = math.log2(smallest), math.log2(info.max)
    zeros = torch.where(sign > 0, 0.0, -0.0)
    found = {
        "normal": normal,
        "heavy": (normal / (0.01 + uniform) * magnitude).clamp(-info.max, info.max),
        "ties": ties(shape, dtype, seed, group, largest)[0].float(),
        "zero groups": torch.where((groups + rows) % 2 == 0, zeros, normal),
        "constant": normal[..., head],
        "signed zeros": torch.where(uniform < 0.5, zeros, normal),
        "all zero": zeros,
        "huge": sign * info.max * (0.5 + 0.5 * uniform),
        "tiny": normal * info.tiny * 4,
        "denormals": sign * torch.round(uniform * 9) * smallest,
        "magnitudes": sign * torch.exp2(low + (high - low) * uniform.double()),
    }
    if not_finite:
        odd = normal.clone()
        odd[uniform < 0.03] = float("nan")
        odd[uniform > 0.97] = float("inf")
        odd.view(-1)[::37] = float("-inf")
        odd.view(-1)[::53] = float("nan")
        found["not finite"] = odd
    return {name: numbers.to(dtype) for name, numbers in found.items()}


def views(t: Tensor) -> dict[str, Tensor]:
    """t [..., K] in memory layouts of other kinds, equal to it: each must give the results of t.

    Memory between the numbers is NaN (or the integer type's largest number).
    """
    with nan_filled():
        wide = t.new_empty((*t.shape[:-1], 2 * t.shape[-1]))
        shifted = t.new_empty(t.numel() + 1)
    wide[..., ::2] = t
    shifted[1:] = t.reshape(-1)
    found = {"every second": wide[..., ::2], "not aligned": shifted[1:].view(t.shape)}
    if t.dim() >= 2:
        found["transposed"] = t.mT.contiguous().mT
    return found


def _copied(argument: Any) -> Any:
    """A tensor with memory of its own in the same layout; anything else as it is."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(_copied(part) for part in argument)
    if not isinstance(argument, Tensor):
        return argument
    fresh = torch.empty(0, dtype=argument.dtype)
    memory = argument.detach().untyped_storage().clone()
    return fresh.set_(memory, argument.storage_offset(), argument.shape, argument.stride())  # type: ignore[call-overload]


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _comparable(t: Tensor) -> Tensor:
    """Types of one byte as fp32, which holds all of their numbers: PyTorch compares few of them."""
    return t.float() if t.is_floating_point() and t.element_size() == 1 else t


def assert_equal(found: Tensor, wanted: Tensor, context: str) -> None:
    """Shape, dtype and every number; 0.0 equals -0.0, and NaN stands where the other has it."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), (
        f"{context}: {tuple(found.shape)} {found.dtype}, the reference has {tuple(wanted.shape)} {wanted.dtype}"
    )
    a, b = _comparable(found), _comparable(wanted)
    different = (a != b) & ~((a != a) & (b != b))
    if bool(different.any()):
        at = tuple(int(i[0]) for i in torch.nonzero(different, as_tuple=True))
        raise AssertionError(
            f"{context}: {int(different.sum())} of {different.numel()} differ, "
            f"first at {at}: {a[at].item()!r}, the reference has {b[at].item()!r}"
        )


def same(op: Any, *args: Any, context: str = "", but: tuple[int, ...] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """op.triton(*args) == op.reference(*args), every result tensor, and neither writes to an argument.

    but: indices among the result tensors that are not compared here, because their sums run in another order; compare
    them with `within`. Returns the result tensors of Triton and of the reference.
    """
    before, mine, theirs = _copied(args), _copied(args), _copied(args)
    with nan_filled():
        found = _tensors(op.triton(*mine))
    wanted = _tensors(op.reference(*theirs))
    where = f"{op.name} {context}".strip()
    assert len(found) == len(wanted) > 0, f"{where}: {len(found)} result tensors, the reference has {len(wanted)}"
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if index not in but:
            assert_equal(a, b, f"{where}, result {index}")
            elements[op.name] += a.numel()
    for who, used in (("the kernel", mine), ("the reference", theirs)):
        for index, (a, b) in enumerate(zip(_tensors(used), _tensors(before), strict=True)):
            assert_equal(a, b, f"{where}: {who} wrote to tensor argument {index}")
    calls[op.name] += 1
    return found, wanted


def within(name: str, found: Tensor, exact: Tensor, magnitude: Tensor, ulps: float) -> None:
    """|found - exact| <= ulps * 2^-23 * magnitude, for sums in fp32 whose order is the kernel's own.

    exact: the sum in fp64; magnitude: the sum of its terms' absolute values, in fp64; name: the operation's, for the
    count. A sum of n terms by halves stays within about log2(n) ulps plus those of the terms.
    """
    assert found.dtype == torch.float32 and exact.dtype == magnitude.dtype == torch.float64
    assert found.shape == exact.shape, f"{name}: {tuple(found.shape)}, wanted {tuple(exact.shape)}"
    allowed = ulps * 2.0**-23 * magnitude + 2.0**-149
    off = (found.double() - exact).abs()
    # not `off > allowed`: NaN has to fail
    wrong = ~(off <= allowed)
    assert not bool(wrong.any()), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} sums off, up to {float((off / allowed).max()) * ulps:.3g} ulps"
    )
    elements[f"{name} (sums)"] += found.numel()
    calls[f"{name} (sums)"] += 1
