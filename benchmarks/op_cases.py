"""Calls of every operation of `qat.fake_quant_kernels`: those that training makes, and `op_table` for the others.

Operations are found by looking (every `Op` of every module), so a new one that has no arguments here shows up as a
missing row and not as silence.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.op_table import Size, listed

Call = tuple[Any, tuple[Any, ...]]


def operations() -> dict[str, Any]:
    """Name -> Op."""
    import qat.fake_quant_kernels as package
    from qat.fake_quant_kernels.dispatch import Op

    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        for value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
            if isinstance(value, Op):
                found[value.name] = value
    return dict(sorted(found.items()))


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Every call of an operation inside, with its arguments as they were."""
    from qat.fake_quant_kernels.dispatch import Op

    calls: list[Call] = []
    original = Op.__call__

    def call(self: Any, first: Tensor, *rest: Any) -> Any:
        calls.append((self, (first, *rest)))
        return original(self, first, *rest)

    Op.__call__ = call  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Op.__call__ = original  # type: ignore[method-assign]


def weights_and_inputs(group: int) -> Iterator[dict[str, Any]]:
    """Rules that together take every path of the affine quantizers."""
    for quantizer, zero in (
        ("absmax", "none"),
        ("minmax", "int"),
        ("minmax", "float"),
        ("lsq", "none"),
        ("lsq", "int"),
    ):
        for granularity in ("group", "channel"):
            size = {"group_size": group} if granularity == "group" else {}
            for bits in (4, 8):
                slot = {"bits": bits, "granularity": granularity, "zero_point": zero, "quantizer": quantizer, **size}
                yield {"weight": slot}
    weight = {"bits": 8, "granularity": "channel", "quantizer": "mse"}
    for quantizer, granularity, zero in (
        ("absmax", "token", "none"),
        ("minmax", "token", "int"),
        ("ema", "tensor", "none"),
    ):
        slot = {"bits": 8, "granularity": granularity, "zero_point": zero, "quantizer": quantizer}
        yield {"weight": weight, "input": slot}


def trained(rows: int, columns: int, group: int, device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """The calls of a training step of one linear [rows, columns] under every rule."""
    from benchmarks.schemes import prepared

    for rule in weights_and_inputs(group):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(columns, rows, bias=False, device=device, dtype=dtype))
        with recorded() as calls:
            prepared(model, rule)
            model(torch.randn(64, columns, device=device, dtype=dtype, requires_grad=True)).sum().backward()
        del model
        while calls:
            yield calls.pop()


def kind(call: Call) -> tuple[Any, ...]:
    """Operation, shapes, dtypes and numbers: calls that agree in them run the same code."""
    op, args = call
    return op.name, *((tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in args)


# multiply matrices: timed against torch's own products and not against a copy
PRODUCTS = ("int8_linear", "fp8_linear")


def calls_at(rows: int, columns: int, group: int, device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Calls of every operation that has arguments, at one size and one of each kind; made one after the other, so that
    few of them are in memory."""
    known, seen = operations(), set()
    others = ((known[name], args) for name, args in listed(known, Size(rows, columns, group, device, dtype)))
    for call in chain(trained(rows, columns, group, device, dtype), others):
        if kind(call) not in seen:
            seen.add(kind(call))
            yield call


def tensors(value: Any) -> list[Tensor]:
    return [t for t in (value if isinstance(value, tuple | list) else (value,)) if isinstance(t, Tensor)]


def moved(args: tuple[Any, ...], results: Any) -> int:
    """Bytes that one pass reads and writes."""
    return sum(t.nbytes for t in (*tensors(args), *tensors(results)))


def differences(call: Call, other: Callable[..., Any]) -> list[str]:
    """Where `other(*args)` differs from the reference.

    Bits are equal, but for sums that may be added in another order: fp32 results smaller than the first argument
    (within 2^-16 of the largest), and the fp8 product, whose tensor cores keep 14 bits of a running sum
    (`fake_quant_kernels.fp8_linear`): within 2^-10 of the sum of magnitudes, and a rounding of the result.
    """
    op, args = call
    wanted, found = tensors(op.reference(*args)), tensors(other(*args))
    problems = [] if len(wanted) == len(found) else [f"{len(found)} results, not {len(wanted)}"]
    for index, (a, b) in enumerate(zip(wanted, found, strict=False)):
        if a.shape != b.shape or a.dtype != b.dtype:
            problems.append(f"result {index} is {tuple(b.shape)} {b.dtype}, not {tuple(a.shape)} {a.dtype}")
        elif not _equal(a, b):
            gap = (a.detach().double() - b.detach().double()).abs()
            allowed: Any = 0.0
            if op.name == "fp8_linear":
                x, w = (args[i].double().abs() * args[i + 1].double() for i in (0, 2))
                allowed = 2.0**-10 * (x @ w.t()) + torch.finfo(a.dtype).eps * a.double().abs()
            elif a.dtype == torch.float32 and a.numel() < args[0].numel():
                allowed = 2.0**-16 * float(a.abs().max())
            if not bool((gap <= allowed).all()):
                count = int((gap != 0).sum())
                problems.append(f"result {index}: {count} of {a.numel()} differ, by {float(gap.max()):.3g} at most")
    return [f"{op.name} {kind(call)[1:]}: {problem}" for problem in problems]


def _equal(a: Tensor, b: Tensor) -> bool:
    """torch.equal, also of fp8 numbers (as bytes)."""
    return torch.equal(*(t.view(torch.uint8) if t.dtype.itemsize == 1 and t.dtype != torch.bool else t for t in (a, b)))


class Many:
    """`multi_tensor` over the weights of a small Llama: one launch for all."""

    def __init__(self, width: int, hidden: int, layers: int, group: int, device: torch.device) -> None:
        from qat.fake_quant_kernels.multi_tensor import MultiAbsmax

        self.settings = (1 / 7.5, -8, 7, torch.bfloat16, 2.0**-14, 65280.0)
        shapes = [*[(width, width)] * 4, *[(hidden, width)] * 2, (width, hidden)] * layers
        self.group = group
        self.weights = [torch.randn(s, device=device).to(torch.bfloat16) for s in shapes]
        self.codes = [torch.zeros(s[0], s[1] // 2, dtype=torch.uint8, device=device) for s in shapes]
        self.scales = [torch.zeros(s[0], s[1] // group, device=device) for s in shapes]
        self.run = MultiAbsmax(*self.settings, packed=True)

    def __call__(self) -> None:
        self.run(self.weights, self.codes, self.scales)

    @property
    def moved(self) -> int:
        return sum(t.nbytes for t in (*self.weights, *self.codes, *self.scales))

    def differences(self) -> list[str]:
        """Against the operation on each weight alone, in its reference."""
        op = operations()["dynamic_absmax"]
        self()
        found = []
        for index, w in enumerate(self.weights):
            codes, scale = op.reference(w, w.shape[1] // self.group, *self.settings, True, False)
            if not torch.equal(codes, self.codes[index]) or not torch.equal(scale, self.scales[index]):
                found.append(f"multi_tensor: weight {index} {tuple(w.shape)} differs")
        return found
