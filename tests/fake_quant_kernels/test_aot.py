"""The compile gate of benchmarks/aot.py: all kernels pass it, and kernels that are bad in one way each do not.

On sm_90 the first case of each kernel and every second one, on sm_80 and sm_100 the first case of each module; `make
aot` takes every case on every target, and AMD's.

Mutations that were tried in the gate, and the planted kernel that turned red:

    narrow() finds nothing, or trusts half of the bytes to be fields    two_bytes, eight_bytes
    addresses that differ between threads not told from scalars         scalars
    spill bytes or local memory not judged                              spills
    `fma` in PTX not counted                                            hidden_fma
    `.rn` not asked for / FFMA not counted                              test_the_assembler_contracts
    several instructions in one string of assembly: one seen            two_bytes and others
    division told from contraction by nothing (FFMA as they stand)      divides
    approximate division not judged                                     approximate_division
    registers, tensor cores not judged                                  registers, no_tensor_core
    a kernel without a case not noticed                                 test_a_kernel_without_a_case
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qat.fake_quant_kernels.dispatch import AotCase, Device, Kernel, tl

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import aot

FOLDER = Path(aot.fake_quant_kernels.__path__[0])
WITH_CASES = sorted(p.stem for p in FOLDER.glob("*.py") if "\nAOT" in p.read_text("utf-8"))

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed, there is none for macOS"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted: TRITON_INTERPRET=1"),
]


def titled(module: ModuleType, chosen: list[AotCase]) -> list[tuple[str, AotCase]]:
    return [(f"{module.__name__.rpartition('.')[2]}: {case.name}", case) for case in chosen]


def said(found: list[aot.Found]) -> str:
    """What a run reports; fails with the failures."""
    assert not [line for one in found for line in one.failures]
    return f"{len(found)} compiled, {max(one.values['registers'] for one in found)} registers at most"


@pytest.mark.parametrize("name", WITH_CASES)
def test_gate(name: str, record_property: Callable[[str, object], None]) -> None:
    (module,) = aot.modules([name])
    cases = aot.cases(module)
    kernels = [case.kernel for case in cases]
    chosen = [case for i, case in enumerate(cases) if kernels.index(case.kernel) == i or i % 2 == 0]
    assert aot.without_case(module) == []
    record_property("cases", said(aot.judge(titled(module, chosen), "sm_90")))


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_other_targets(target: str, record_property: Callable[[str, object], None]) -> None:
    runnable = [(m, [case for case in aot.cases(m) if aot.runs_on(case, target)][:1]) for m in aot.modules()]
    record_property("cases", said(aot.judge([one for m, chosen in runnable for one in titled(m, chosen)], target)))


def test_there_are_modules() -> None:
    """Mutation: modules() finds those with AOT only, or none -> red."""
    assert {module.__name__.rpartition(".")[2] for module in aot.modules()} >= set(WITH_CASES)
    assert len(WITH_CASES) >= 1


# kernels: a good one, and bad ones


@Kernel
def good(w: Any, s: Any, z: Any, y: Any, groups: Any, GROUP: tl.constexpr, TILE: tl.constexpr) -> None:
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = rows < groups
    scale = tl.load(s + rows, mask=mask, other=1.0)
    zero = tl.load(z + rows, mask=mask, other=0.0)
    t = tl.load(w + at, mask=mask[:, None], other=0.0).to(tl.float32) * scale[:, None] + zero[:, None]
    tl.store(y + at, t.to(y.dtype.element_ty), mask=mask[:, None])


@Kernel
def divides(w: Any, s: Any, z: Any, y: Any, groups: Any, GROUP: tl.constexpr, TILE: tl.constexpr) -> None:
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = rows < groups
    scale = tl.math.div_rn(1.0, tl.load(s + rows, mask=mask, other=1.0))
    zero = tl.load(z + rows, mask=mask, other=0.0)
    t = tl.load(w + at, mask=mask[:, None], other=0.0).to(tl.float32) * scale[:, None] + zero[:, None]
    tl.store(y + at, t.to(y.dtype.element_ty), mask=mask[:, None])


@Kernel
def approximate_division(w: Any, s: Any, z: Any, y: Any, groups: Any, GROUP: tl.constexpr, TILE: tl.constexpr) -> None:
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    scale = 1.0 / tl.load(s + rows) + tl.load(z + rows)
    tl.store(y + at, (tl.load(w + at).to(tl.float32) * scale[:, None]).to(y.dtype.element_ty))


@Device
def fused(a: Any, b: Any, c: Any) -> Any:
    return tl.fma(a, b, c)


@Kernel
def hidden_fma(w: Any, s: Any, z: Any, y: Any, groups: Any, GROUP: tl.constexpr, TILE: tl.constexpr) -> None:
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    scale = tl.load(s + rows)[:, None] + tl.zeros((TILE, GROUP), tl.float32)
    zero = tl.load(z + rows)[:, None] + tl.zeros((TILE, GROUP), tl.float32)
    tl.store(y + at, fused(tl.load(w + at).to(tl.float32), scale, zero).to(y.dtype.element_ty))


@Kernel
def two_bytes(w: Any, s: Any, z: Any, y: Any, groups: Any, GROUP: tl.constexpr, TILE: tl.constexpr) -> None:
    """A pointer from a table, whose alignment nobody promises."""
    address = tl.load(w + tl.program_id(1)).to(tl.pointer_type(tl.bfloat16))
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    scale = tl.load(s + rows) + tl.load(z + rows)
    tl.store(y + at, (tl.load(address + at).to(tl.float32) * scale[:, None]).to(y.dtype.element_ty))


@Kernel
def scalars(w: Any, s: Any, z: Any, y: Any, groups: Any, GROUP: tl.constexpr, TILE: tl.constexpr) -> None:
    """Many numbers, the same for all threads of a program."""
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    t = tl.load(w + at).to(tl.float32)
    for i in tl.static_range(32):
        t = t * tl.load(s + tl.program_id(0) * 32 + i) + tl.load(z + i)
    tl.store(y + at, t.to(y.dtype.element_ty))


SIGNATURE = {"w": "*bf16", "s": "*fp32", "z": "*fp32", "y": "*bf16", "groups": "i32"}
GOOD = AotCase("good", good, SIGNATURE, {"GROUP": 32, "TILE": 64}, max_registers=40)
TABLE = {**SIGNATURE, "w": "*i64"}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_good_kernels_pass(target: str) -> None:
    kernels = {"good": good, "divides": divides, "scalars": scalars}
    found = aot.judge([(name, replace(GOOD, kernel=kernel)) for name, kernel in kernels.items()], target)
    assert not [line for one in found for line in one.failures]
    values = found[0].values
    assert values["16-byte instructions"] >= 2 and values["registers"] > 8 and values["instructions"] > 50


BAD = {
    "two_bytes": (
        replace(GOOD, kernel=two_bytes, signature=TABLE),
        r"narrow accesses 16, .*\(table %\d+: bytes {2: 16}",
    ),
    "eight_bytes": (
        replace(GOOD, constants={"GROUP": 4, "TILE": 256}),
        "narrow accesses .*(w|y): bytes {8: ",
    ),
    "approximate_division": (replace(GOOD, kernel=approximate_division), "approximate [1-9]"),
    "hidden_fma": (replace(GOOD, kernel=hidden_fma), "fused 32,"),
    "spills": (
        replace(GOOD, num_warps=1, constants={"GROUP": 64, "TILE": 256}, max_registers=255),
        "spill bytes [1-9]",
    ),
    "registers": (replace(GOOD, max_registers=16), r"registers \d+, wanted at most 16"),
    "no_tensor_core": (replace(GOOD, matmul=True), "tensor core instructions 0, wanted at least 1"),
    "no_such_argument": (replace(GOOD, constants={"GROUP": 32}), "does not compile: ValueError: .*'TILE'"),
    "not_promised": (replace(GOOD, aligned=("s", "z", "y", "groups")), ""),
    "promised": (replace(GOOD, aligned=("w", "s", "z", "y")), ""),
    "promised_in_vain": (
        replace(GOOD, constants={"GROUP": 4, "TILE": 256}, aligned=("w", "y")),
        "narrow accesses [1-9]",
    ),
}


@pytest.fixture(scope="module")
def judged() -> dict[str, str]:
    """What is said of each planted case."""
    found = aot.judge([(name, case) for name, (case, _) in BAD.items()], "sm_90")
    return {one.case: "\n".join(one.failures) for one in found}


@pytest.mark.parametrize("name", BAD)
def test_bad_kernels_fail(name: str, judged: dict[str, str]) -> None:
    wanted, found = BAD[name][1], judged[name]
    assert re.search(wanted, found) if wanted else not found, found
    assert found.count("\n") == 0 or name == "spills"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_contracted(target: str) -> None:
    """A kernel that is good turns bad by fp fusion alone."""
    (found,) = aot.judge([("planted", GOOD)], target, fusion=True)
    assert "fused" in "\n".join(found.failures)


def test_the_assembler_contracts() -> None:
    """PTX without rounding modifiers is counted, and so is what the assembler makes of it if it may."""
    kernel = aot.compiled(GOOD, "sm_90")
    loose = re.sub(r"\b(mul|add|sub)\.rn\.f32", r"\1.f32", kernel.asm["ptx"])
    assert loose != kernel.asm["ptx"]
    found = []
    for fusion in (False, True):
        (part,) = aot.assembled([loose], [kernel.metadata.name], 90, fusion)
        found.append(aot.read_cuda(SimpleNamespace(asm={"ptx": loose}, metadata=kernel.metadata), part, 99)["fused"])
    kept, contracted = found
    assert 0 < kept < contracted


def test_a_kernel_without_a_case() -> None:
    module = ModuleType("qat.fake_quant_kernels.planted")
    module.first, module.second = good, divides  # type: ignore[attr-defined]
    module.AOT = (GOOD,)  # type: ignore[attr-defined]
    assert aot.without_case(module) == []
    for kernel in (good, divides):
        kernel.function.__module__, kept = module.__name__, kernel.function.__module__
        found = aot.without_case(module)
        kernel.function.__module__ = kept
        assert found == ([] if kernel is good else ["second"])
