"""The compile gate: every kernel, compiled for GPUs that this machine does not have, and what the machine code shows.

    python -m benchmarks.aot                        all cases, all targets -> benchmarks/results/aot-<triton>.json
    python -m benchmarks.aot --modules affine       a part of them; no file is written
    python -m benchmarks.aot --targets sm_90 --first

The cases are the tuples `AOT` of the modules in fake_quant_kernels/; every kernel of a module with kernels has to be in
one. Compiling needs no driver; the assembler and the disassembler are those of the Triton wheel. A case fails if

    it does not compile
    spills        the assembler spilled registers, or local memory is read or written (LDL, STL, scratch on AMD)
    registers     more per thread than AotCase.max_registers (CUDA targets)
    narrow        memory is moved in pieces of less than 16 bytes, see below
    fused         a multiplication and an addition were contracted into one instruction, which rounds once, not twice
    approximate   a division, square root or exponential is not the IEEE one, or denormals are flushed
    tensor cores  AotCase.matmul, and no tensor-core instruction (HMMA, IMMA, QMMA, *GMMA, UTC*MMA, mfma)

and `fused` and `approximate` are only reported where AotCase.matmul. Exit code 1 and one line for each failure.

Narrow. In the optimized LLVM code each access to global memory is traced back to the kernel's argument that its address
comes from; an address that is read from memory counts as an argument of its own. A program's thread moves B bytes
through the argument it moves most through, so it makes at least N = B / 16 accesses there. Another argument may be
accessed in small pieces only if a thread moves at most N numbers through it: one number, a scale say, beside each 16
bytes of the others; numbers of elements are at least twice as many. That is sound, because B does not depend on how
wide the accesses are, and needs nobody to say which arguments hold scales. An address that is the same for all threads
(a scalar) is free, and so are pointers that AotCase.aligned leaves out. The machine code must then hold at least as
many accesses of 16 bytes. In a matrix product the fields of rows and columns are held as the accumulator lies in
registers, many numbers beside few bytes; there the rule is for what is stored, what is copied to shared memory, and
operands of one byte. On AMD, where 64 threads fill two cache lines with 4 bytes each, accesses have at least 4 bytes
instead of 16.

Fused. PTX says it in its instructions: `fma` and `mad` of floats are fused, `add`, `sub` and `mul` of floats without a
rounding modifier may be fused by the assembler, with `.rn` they never are (PTX ISA, "Rounding modifiers"). All three
must not occur. Assemblers have been seen to fuse packed instructions (f32x2) all the same, so the machine code is read
too. There an IEEE division itself is a Newton iteration of FFMA: the assembler gets the kernel a second time with every
division, reciprocal and square root replaced by one addition or multiplication, and no FFMA may be left. On AMD each
IEEE division is five fused instructions and one v_div_fmas; there may be no more than five for each of those, not
counting those with a power of two as a factor or with 0 as the addend, which round once anyway.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from benchmarks.common import RESULTS, Row, environment, row, save
from benchmarks.machine_code import LLVM, WIDE, Assembled, assembled, narrow, read_cuda, read_hip
from qat import fake_quant_kernels
from qat.fake_quant_kernels.dispatch import AotCase, Kernel

# name -> backend, architecture, threads of a warp
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


# backend -> bytes that an access to elements has at least
NARROWEST = {"cuda": WIDE, "hip": 4}
# metrics whose 0 is worth a row
ALWAYS = ("registers", "spill bytes", "shared bytes", "16-byte instructions", "narrow accesses", "fused")


# what is compiled


def modules(names: Iterable[str] = ()) -> Iterator[ModuleType]:
    """Modules of fake_quant_kernels/ that have kernels or cases; those named, or all."""
    wanted = set(names)
    for info in pkgutil.iter_modules(fake_quant_kernels.__path__):
        if not wanted or info.name in wanted:
            module = importlib.import_module(f"{fake_quant_kernels.__name__}.{info.name}")
            if kernels(module) or hasattr(module, "AOT"):
                yield module


def kernels(module: ModuleType) -> dict[str, Kernel]:
    """The kernels that a module defines, by name."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, Kernel)}
    return {name: kernel for name, kernel in found.items() if kernel.function.__module__ == module.__name__}


def cases(module: ModuleType) -> list[AotCase]:
    return list(getattr(module, "AOT", ()))


def without_case(module: ModuleType) -> list[str]:
    """Kernels of a module that no case compiles."""
    covered = [case.kernel for case in cases(module)]
    return [name for name, kernel in kernels(module).items() if kernel not in covered]


def runs_on(case: AotCase, target: str) -> bool:
    _, arch, _ = TARGETS[target]
    return case.min_arch <= arch if isinstance(arch, int) else case.hip


def compiled(case: AotCase, target: str, fusion: bool = False) -> Any:
    """The triton.compiler.CompiledKernel of a case, as the launcher would make it on that GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = case.kernel.jitted()
    names = function.arg_names
    given = {**case.signature, **case.constants}
    if set(given) != set(names):
        raise ValueError(f"signature and constants differ from the kernel's arguments in {set(given) ^ set(names)}")
    sixteen = [name for name, kind in case.signature.items() if kind.startswith("*") or kind in ("i32", "i64")]
    source = ASTSource(
        fn=function,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in (sixteen if case.aligned is None else case.aligned)
        },
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


# the judgement


@dataclass
class Found:
    """What was read about one case on one target, and the lines that say what is wrong with it."""

    case: str
    target: str
    values: dict[str, int] = field(default_factory=dict)
    goals: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def said(self) -> str:
        shown = "  ".join(f"{name} {value}" for name, value in self.values.items() if value or name in self.goals)
        return f"{self.case:44} {self.target:7} {shown or 'nothing'}{'  FAILED' if self.failures else ''}"

    def rows(self, tool: str) -> list[Row]:
        """Rows of the results file, which says nothing of what is 0 as it should be, but for spills and the like."""
        better = {"16-byte instructions": "higher", "tensor core instructions": "higher"}
        return [
            row("aot", self.case, tool, metric, value, self.goals.get(metric), better.get(metric, "lower"))
            | {"target": self.target}
            for metric, value in self.values.items()
            if value or metric in ALWAYS
        ]


def judge(titled: list[tuple[str, AotCase]], target: str, fusion: bool = False) -> list[Found]:
    """Compiles, reads and judges cases, each with its title, on one target."""
    backend, arch, _ = TARGETS[target]
    found, kernels = [Found(title, target) for title, _ in titled], []
    for one, (_, case) in zip(found, titled, strict=True):
        try:
            kernels.append((one, case, compiled(case, target, fusion)))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[-1][:300]}"
            one.failures.append(f"{one.case} on {target}: does not compile: {reason}")
    parts: list[Any] = [None] * len(kernels)
    if backend == "cuda" and kernels:
        ptx, names = zip(*((kernel.asm["ptx"], kernel.metadata.name) for _, _, kernel in kernels), strict=True)
        parts = assembled(list(ptx), list(names), int(arch), fusion)
    for (one, case, kernel), part in zip(kernels, parts, strict=True):
        _judge(one, case, kernel, part)
    return found


def _judge(found: Found, case: AotCase, kernel: Any, part: Assembled | None) -> None:
    """Fills `found` with what is read from the kernel; `part` is None on AMD."""
    title, target = found.case, found.target
    backend = "hip" if part is None else "cuda"
    code = LLVM(kernel.asm["llir"], [name for name in case.kernel.jitted().arg_names if name in case.signature])
    values = read_hip(kernel) if part is None else read_cuda(kernel, part, code.count())
    moved = code.accesses()
    small = narrow(moved, case.signature, case.matmul, NARROWEST[backend])
    if case.aligned is not None:
        free = {*case.signature} - {*case.aligned}
        small = {name: accesses for name, accesses in small.items() if free.isdisjoint(name.split("|"))}
    wide = sum(count for accesses in moved.values() for width, count in accesses.widths.items() if width >= WIDE)
    values["narrow accesses"] = sum(accesses.narrower(NARROWEST[backend]) for accesses in small.values())
    found.values = values
    goals = {"spill bytes": 0, "local memory instructions": 0, "accesses not understood": 0}
    goals |= {"narrow accesses": 0, "16-byte instructions": wide}
    if backend == "cuda":
        goals["registers"] = case.max_registers
    goals |= {"tensor core instructions": 1} if case.matmul else {"fused": 0, "approximate": 0}
    found.goals = {name: goals[name] for name in values if name in goals}
    for name, goal in found.goals.items():
        more = name in ("16-byte instructions", "tensor core instructions")
        if values[name] < goal if more else values[name] > goal:
            detail = ""
            if name == "narrow accesses":
                detail = f" ({'; '.join(f'{n}: bytes {dict(a.widths)}' for n, a in small.items())})"
            bound = f"at least {goal}" if more else f"at most {goal}"
            found.failures.append(f"{title} on {target}: {name} {values[name]}, wanted {bound}{detail}")


def gate(chosen: Iterable[ModuleType], targets: Collection[str], first: Collection[str] = ()) -> Iterator[Found]:
    """Every case of the modules on `targets`, and each module's first case on the targets `first`."""
    for module in chosen:
        short = module.__name__.rpartition(".")[2]
        missing = without_case(module)
        if missing:
            yield Found(short, "", failures=[f"{short}: no AotCase compiles {', '.join(missing)}"])
        for target in dict.fromkeys([*targets, *first]):
            chosen_cases = cases(module)[: None if target in targets else 1]
            yield from judge([(f"{short}: {c.name}", c) for c in chosen_cases if runs_on(c, target)], target)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--modules", nargs="+", default=[], help="of fake_quant_kernels; all if not given")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--first", action="store_true", help="only the first case of each module")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    import triton

    whole = not (options.modules or options.first or set(options.targets) != set(TARGETS))
    targets, first = ((), options.targets) if options.first else (options.targets, ())
    began, results = time.monotonic(), []
    for found in gate(modules(options.modules), targets, first):
        results.append(found)
        print("\n".join([found.said(), *found.failures]) if found.target else "\n".join(found.failures), flush=True)
    failures = [line for found in results for line in found.failures]
    print(f"\n{len(results)} compiled by Triton {triton.__version__} in {time.monotonic() - began:.0f} s")
    print("\n".join(f"failed: {line}" for line in failures) or "nothing failed")
    if whole:
        tool = f"triton {triton.__version__}"
        where = environment(compiler=tool, targets=" ".join(TARGETS), failures=failures)
        save(RESULTS / f"aot-{triton.__version__}.json", where, [row for found in results for row in found.rows(tool)])
    return int(bool(failures) or not results)


if __name__ == "__main__":
    sys.exit(main())
