"""Which implementation of an operation runs, and why not the other.

Every operation is one `Op`: a reference in plain torch (the truth, and what Inductor fuses on a CPU), a Triton launcher
with the same signature, and the shapes of its results. On CUDA it is called as `torch.ops.qat.<name>`, opaque to the
compiler; on a CPU the reference runs as it stands. A choice never changes a number.

    QAT_KERNELS=reference    plain torch everywhere
    QAT_KERNELS=triton       Triton or an error that lists the reasons (a CPU needs TRITON_INTERPRET=1)

The variable is read once, when this module is imported. Triton itself is imported at the first launch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.errors import QATError

__all__ = [
    "CHOICES",
    "INTERPRETED",
    "AotCase",
    "Device",
    "Kernel",
    "Op",
    "choice",
    "constant",
    "on_device_of_first",
    "tl",
    "triton_reasons",
    "uncompiled",
    "uses_triton",
]

CHOICES = ("", "reference", "triton")
# what the environment asked for; tests set it
choice = os.environ.get("QAT_KERNELS", "").strip().lower()
INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"

if TYPE_CHECKING:
    import triton.language as tl
else:
    # a kernel's module gets the real triton.language in place of this name before it is compiled
    tl = None


def triton_reasons(device: torch.device) -> list[str]:
    """Why Triton cannot run on tensors of `device`; empty means it can."""
    found = []
    if importlib.util.find_spec("triton") is None:
        found.append("triton is not installed; pip install lightning-qat[gpu]")
    if device.type == "cpu" and not INTERPRETED:
        found.append("the tensor is on the CPU, where Triton runs only with TRITON_INTERPRET=1 set before the start")
    elif device.type not in ("cpu", "cuda"):
        found.append(f"there are no kernels for {device.type}")
    elif device.type == "cuda" and (reason := _contracts(device.index or 0)):
        found.append(reason)
    return found


@functools.cache
def _contracts(index: int) -> str:
    """Why this Triton's assembler cannot be trusted with this GPU; empty if it can (found by `make aot`)."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(index) < (10, 0):
        return ""
    found = version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) >= (3, 9):
        return ""
    return (
        f"Triton {found} fuses multiplications and additions on this GPU although it is told not to, which flips "
        "codes; install triton>=3.9"
    )


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: while a graph is traced, the answer is a constant of that graph. What torch.compiler's
    assume_constant_result does, without importing the compiler (and Triton with it) just to say so."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def no_grad() -> contextlib.AbstractContextManager[None]:
    """torch.no_grad(), which is not free, where it changes something."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


_NOTHING = contextlib.nullcontext()


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: runs outside any compiled graph, as with torch.compiler.disable, which imports the compiler."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # without the compiler's module nothing is being compiled
        call = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function  # type: ignore[no-untyped-call]
        return call(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return run


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def uses_triton(device: torch.device) -> bool:
    """Whether operations on `device` run as Triton kernels; raises QATError if QAT_KERNELS asks for what cannot be."""
    if choice not in CHOICES:
        raise QATError(f"QAT_KERNELS={choice!r} is unknown; use reference or triton, or leave it unset")
    if choice == "triton":
        reasons = triton_reasons(device)
        if reasons:
            raise QATError(f"QAT_KERNELS=triton cannot be followed: {'; '.join(reasons)}")
        return True
    return choice == "" and _HAS_TRITON and device.type == "cuda" and not triton_reasons(device)


def on_device_of_first(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher that runs on the device of its first tensor: Triton launches on the current one, whichever that is."""

    @functools.wraps(launcher)
    def launch(first: Any, *rest: Any, **named: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        with torch.cuda.device(tensor.device):
            return launcher(first, *rest, **named)

    return launch


class Op:
    """One operation in its implementations, called like a function.

    name        `torch.ops.qat.<name>`
    reference   plain torch; its annotations are the operator's schema (Tensor, Tensor | None, int, float, bool, dtype)
    fake        empty results of the right shapes, dtypes and device, from the same arguments
    triton      the launcher, same arguments and results

    The first argument must be a tensor. No result may alias an argument. Not differentiable: autograd is the caller's.
    """

    def __init__(
        self, name: str, reference: Callable[..., Any], fake: Callable[..., Any], triton: Callable[..., Any]
    ) -> None:
        self.name, self.reference, self.triton = name, reference, triton
        custom = torch.library.custom_op(f"qat::{name}", reference, mutates_args=(), device_types="cpu")
        custom.register_kernel("cuda")(on_device_of_first(triton))
        custom.register_fake(fake)
        self.custom = custom
        self.__doc__ = reference.__doc__

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        if uses_triton(first.device):
            return self.custom(first, *rest) if first.is_cuda else self.triton(first, *rest)
        return self.reference(first, *rest)


class _Lazy:
    """A Triton function that is compiled when it is first used; the device functions that it names come with it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._jitted: Any = None

    def jitted(self) -> Any:
        """The triton.JITFunction."""
        if self._jitted is None:
            import triton
            import triton.language

            assert isinstance(self.function, FunctionType)
            names = self.function.__globals__
            names["tl"] = triton.language
            # the compiler resolves annotations too, and knows no others
            names["Any"] = triton.language.tensor
            for name in self.function.__code__.co_names:
                if isinstance(names.get(name), Device):
                    names[name] = names[name].jitted()
            self._jitted = triton.jit(self.function)
        return self._jitted


class Device(_Lazy):
    """A function that kernels call; usable as a decorator."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.function.__name__} runs inside kernels only")


class Kernel(_Lazy):
    """A kernel: `kernel[grid](...)` launches it; usable as a decorator.

    Fused multiply-adds are off: a contracted one rounds once where the reference rounds twice, and flips codes.
    """

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self.jitted()[grid]
        if INTERPRETED:
            return launch  # type: ignore[no-any-return]
        return lambda *args, **kwargs: launch(*args, enable_fp_fusion=False, **kwargs)


@dataclass(frozen=True)
class AotCase:
    """One way to compile a kernel without a GPU; a module's tuple `AOT` of them is what the compile gate goes through.

    signature    argument -> Triton type ("*bf16", "i32", "fp32"), constexpr arguments left out
    constants    constexpr argument -> value
    aligned      arguments that the launcher would find divisible by 16; None: every pointer and every i32
    matmul       the tensor-core instruction has to be there
    min_arch     the first CUDA architecture that can run it; hip says whether AMD's can
    max_registers   per thread
    """

    name: str
    kernel: Kernel
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] | None = None
    matmul: bool = False
    min_arch: int = 80
    hip: bool = True
    max_registers: int = 128
