"""Reading what a compiler made of a kernel: accesses to memory from LLVM code, the rest from assembly and machine code.

`benchmarks.aot` says what is read and why. Nothing here needs a GPU; the assembler and the disassembler are those of
the Triton wheel.
"""

from __future__ import annotations

import math
import re
import struct
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDE = 16
BITS = {"float": 32, "double": 64, "half": 16, "bfloat": 16, "ptr": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}


# memory: accesses in LLVM code


@dataclass
class Accesses:
    """Of one thread through one argument, at addresses that differ between threads: widths in bytes -> how many.

    stored: some are stores; copied: some are asynchronous copies to shared memory
    """

    widths: Counter[int] = field(default_factory=Counter)
    stored: bool = False
    copied: bool = False

    @property
    def bytes(self) -> int:
        return sum(width * count for width, count in self.widths.items())

    def narrower(self, width: int) -> int:
        return sum(count for own, count in self.widths.items() if own < width)


PTX_ACCESS = re.compile(r"\b(?:ld|st)\.[\w.:]*global[\w.:]*?(?:\.v(\d+))?\.[bsuf](\d+)\b")
PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)")
LLVM_LOAD = re.compile(r"\bload (?:volatile )?(<[^>]*>|\w+), ptr addrspace\(1\) (%[\w.]+)")
LLVM_STORE = re.compile(r"\bstore (?:volatile )?(<[^>]*>|\w+) .*, ptr addrspace\(1\) (%[\w.]+)")
BUFFER = re.compile(
    r"@llvm\.amdgcn\.raw\.ptr\.buffer\.(?:load|store)\.(?:v(\d+))?([a-z]+\d+)\(.*?ptr addrspace\(8\) (%[\w.]+)"
)
POINTER = re.compile(r"\bptr(?: addrspace\(\d\))?(?: \w+)*? (%[\w.]+)")
STORES = re.compile(r"\bst\.[\w.:]*global|\bstore\b|\.buffer\.store\.")
THREAD = re.compile(r"@llvm\.(nvvm\.read\.ptx\.sreg\.tid|amdgcn\.workitem\.id)")
VALUE = re.compile(r"%[\w.]+")


def bytes_of(kind: str) -> int:
    """Of an LLVM type such as <8 x bfloat>, i32, ptr."""
    count, _, scalar = kind.strip("<>").rpartition(" x ")
    scalar = scalar.split(" ")[0]
    return int(count or 1) * (BITS[scalar] if scalar in BITS else int(scalar[1:])) // 8


class LLVM:
    """Optimized LLVM code of one kernel, whose parameters are named by `names` in order."""

    def __init__(self, text: str, names: list[str]) -> None:
        body = text[text.index("define ") :].splitlines()
        parameters = re.findall(r" (%[\w.]+)[,)]", body[0])
        self.parameters = dict(zip(parameters, names, strict=False))
        self.lines = body[1 : body.index("}")]
        split = (line.strip().partition(" = ") for line in self.lines)
        self.definitions = {name: code.partition(", !")[0] for name, equals, code in split if equals}
        self.differing = self._differing()

    def _differing(self) -> set[str]:
        """Values that depend on which thread of the program computes them."""
        users = defaultdict(list)
        for name, code in self.definitions.items():
            for operand in VALUE.findall(code):
                users[operand].append(name)
        found, left = set(), [name for name, code in self.definitions.items() if THREAD.search(code)]
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += users[name]
        return found

    def roots(self, value: str, seen: set[str] | None = None) -> set[str]:
        """The arguments that an address comes from."""
        seen = set() if seen is None else seen
        if value in self.parameters:
            return {self.parameters[value]}
        if value in seen:
            return set()
        seen.add(value)
        code = self.definitions.get(value, "")
        loaded = code.startswith("load ") or " asm " in code
        pointers = [] if loaded else re.findall(r"\[ (%[\w.]+)," if code.startswith("phi ") else POINTER, code)
        return {root for pointer in pointers for root in self.roots(pointer, seen)} if pointers else {f"table {value}"}

    def count(self) -> int:
        """How many accesses to global memory there are, scalars included."""
        return sum(1 for line in self.lines for _ in _accesses_of(line))

    def accesses(self) -> dict[str, Accesses]:
        """Argument -> what a thread moves through it; each instruction counts once, also in a loop."""
        found: dict[str, Accesses] = defaultdict(Accesses)
        for line in self.lines:
            for width, address in _accesses_of(line):
                if address in self.differing:
                    accesses = found["|".join(sorted(self.roots(address)))]
                    accesses.widths[width] += 1
                    accesses.stored |= bool(STORES.search(line))
                    accesses.copied |= "cp.async" in line
        return found


def _accesses_of(line: str) -> Iterator[tuple[int, str]]:
    """Width in bytes and address of each access to global memory in one line of LLVM code."""
    if " asm " in line:
        instruction, _, operands = line.rpartition('"(')
        instruction = re.sub(r"\\[0-9A-F]{2}", "\n", instruction)
        widths = [int(count or 1) * int(bits) // 8 for count, bits in PTX_ACCESS.findall(instruction)]
        widths += [int(size, 0) for size in PTX_COPY.findall(instruction)]
        address = re.search(r"ptr addrspace\(1\)(?: \w+)*? (%[\w.]+)", operands)
        if widths and address:
            yield from ((width, address[1]) for width in widths)
    elif found := BUFFER.search(line):
        yield int(found[1] or 1) * (BITS.get(found[2]) or int(found[2][1:])) // 8, found[3]
    elif found := LLVM_LOAD.search(line) or LLVM_STORE.search(line):
        yield bytes_of(found[1]), found[2]


def narrow(moved: dict[str, Accesses], signature: dict[str, str], matmul: bool, width: int) -> dict[str, Accesses]:
    """The arguments that hold elements and are accessed in pieces of less than `width` bytes."""
    most = max((accesses.bytes for accesses in moved.values()), default=0)
    found = {}
    for name, accesses in moved.items():
        size = item_bytes(signature.get(name), accesses)
        operand = size == 1 or accesses.stored or accesses.copied
        elements = operand if matmul else accesses.bytes > size * most / WIDE
        if elements and accesses.narrower(width):
            found[name] = accesses
    return found


def item_bytes(kind: str | None, accesses: Accesses) -> int:
    """Of a number that a Triton pointer type points to; the narrowest access where the address comes from a table."""
    if kind is None:
        return min(accesses.widths)
    digits = re.search(r"\d+", kind)
    return 1 if digits is None or kind.startswith("*fp8") else max(1, int(digits[0]) // 8)


# machine code

TENSOR = re.compile(r"^(HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)")
PTX_ANY_ACCESS = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:ld|st|cp\.async\.c[ag])\.[\w.:]*global", re.M)
PTX_FUSED = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:fma|mad)\.(?!lo|hi|wide)[\w.]+", re.M)
PTX_FUSABLE = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:add|sub|mul)(?:\.ftz|\.sat)*\.(?:f16|bf16|f32|f64)\w*", re.M)
PTX_APPROXIMATE = re.compile(r"^\s*(?:@!?%\w+\s+)?\w+\.(?:approx|full|rn\.ftz|ftz)[\w.]*", re.M)
PTX_DIVISION = re.compile(r"\b(div)\.rn(\.f\d+)|\b(rcp|sqrt)\.rn(\.f\d+\s+(%\w+), (%\w+));")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]+)", re.M)


@dataclass
class Assembled:
    """What the assembler said of a kernel, its instructions, and those of the kernel without divisions."""

    remarks: str
    own: list[str]
    plain: list[str]


def assembled(ptx: list[str], names: list[str], arch: int, fusion: bool) -> list[Assembled]:
    """PTX of kernels, called `names` there, through assembler and disassembler: both once, they take long to start.

    The options are those that Triton gives the assembler, and line numbers for debuggers are left out.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    head: dict[str, None] = {}
    entries = []
    for index, (text, name) in enumerate(zip(ptx, names, strict=True)):
        found = re.search(r"^\.visible \.entry .*^\}", text, re.M | re.S)
        assert found is not None
        head |= dict.fromkeys(line for line in text[: found.start()].splitlines() if line.startswith("."))
        entry = re.sub(r"^\s*\.loc\s.*\n", "", found[0], flags=re.M)
        for title in (f"own{index}", f"plain{index}"):
            entries.append(re.sub(rf"\b{re.escape(name)}(?=\b|_param_)", title, entry))
        entries[-1] = PTX_DIVISION.sub(_without_division, entries[-1])
    (gpu,) = (line.split()[1].strip(",") for line in head if line.startswith(".target"))
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        source.write_text("\n".join([*head, *entries, ""]), encoding="utf-8")
        options = ["-v", *([] if fusion else ["--fmad=false"]), f"--gpu-name={gpu}"]
        remarks = _run([get_ptxas(arch).path, *options, str(source), "-o", str(cubin)]).stderr
        listing = _run([knobs.nvidia.cuobjdump.path, "--dump-sass", str(cubin)]).stdout
    functions = re.split(r"^\s*Function : (\S+)$", listing, flags=re.M)
    code = {title: INSTRUCTION.findall(text) for title, text in zip(functions[1::2], functions[2::2], strict=True)}
    blocks = re.split(r"Compiling entry function '(\S+)'.*$", remarks, flags=re.M)
    about = dict(zip(blocks[1::2], blocks[2::2], strict=True))
    return [Assembled(about[f"own{i}"], code[f"own{i}"], code[f"plain{i}"]) for i in range(len(ptx))]


def _without_division(found: re.Match[str]) -> str:
    """One addition or multiplication in place of a division, reciprocal or square root of PTX."""
    return f"mul.rn{found[2]}" if found[1] else f"add.rn{found[4]}, {found[6]};"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done


def _first(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def read_cuda(kernel: Any, code: Assembled, count: int) -> dict[str, int]:
    """Metrics of a kernel for NVIDIA; `count` accesses were found in its LLVM code."""
    ptx, own, remarks = kernel.asm["ptx"], code.own, code.remarks
    memory = [op for op in own if re.match(r"(LDG|STG|LDGSTS)\b", op)]
    plain = sum(op.startswith(("FFMA", "DFMA")) for op in code.plain)
    return {
        "registers": _first(r"Used (\d+) registers", remarks),
        "spill bytes": _first(r"(\d+) bytes spill stores", remarks) + _first(r"(\d+) bytes spill loads", remarks),
        "local memory instructions": sum(op.startswith(("LDL", "STL")) for op in own),
        "stack bytes": _first(r"(\d+) bytes stack frame", remarks),
        "shared bytes": kernel.metadata.shared,
        "instructions": len(own),
        "16-byte instructions": sum(bool(re.search(r"\.(128|256)\b", op)) for op in memory),
        "accesses not understood": max(0, len(PTX_ANY_ACCESS.findall(ptx)) - count),
        "fused": plain + len(PTX_FUSED.findall(ptx)) + len(PTX_FUSABLE.findall(ptx)),
        "approximate": len(PTX_APPROXIMATE.findall(ptx)),
        "tensor core instructions": sum(bool(TENSOR.match(op)) for op in own),
    }


HIP_FUSED = re.compile(r"^\s+v_(?:pk_|dual_)?(?:fma|fmac|mad|mac)(?:_mix\w*?|mk|ak)?_(?:f\d|legacy)\w*\s+(.*)$", re.M)


def rounds_once(operands: str) -> bool:
    """Whether a factor is a power of two or the addend is 0, so that separate instructions would round once as well.

    The compiler makes such instructions of additions and products of fp16 numbers and of 64-bit integer divisions.
    """
    into, *read = (operand.strip() for operand in operands.split(","))
    # the addend of fmac is its result
    addend = read[2].split()[0] if len(read) > 2 else into
    if addend in ("0", "neg(0)"):
        return True
    for operand in read[:2]:
        literal = operand.lstrip("-|")
        if literal.startswith("0x"):
            number = struct.unpack("<f", struct.pack("<I", int(literal.split()[0], 16)))[0]
        elif re.fullmatch(r"\d+\.\d+", literal):
            number = float(literal)
        else:
            continue
        if abs(math.frexp(number)[0]) == 0.5:
            return True
    return False


def read_hip(kernel: Any) -> dict[str, int]:
    """Metrics of a kernel for AMD."""
    text = kernel.asm["amdgcn"]
    ops = re.findall(r"^\s+([a-z]\w+)(?:\s|$)", text, re.M)
    fused = sum(not rounds_once(operands) for operands in HIP_FUSED.findall(text))
    divisions = sum(op.startswith("v_div_fmas_f") for op in ops)
    flags = re.compile(
        r"\b(?:fadd|fsub|fmul|fdiv)(?: \w+)* (?:fast|contract|arcp|afn)\b|@llvm\.amdgcn\.(?:rcp|sqrt|exp2)\b"
    )
    return {
        "registers": _first(r"\.vgpr_count:\s+(\d+)", text),
        "spill bytes": 4 * _first(r"\.vgpr_spill_count:\s+(\d+)", text),
        "local memory instructions": sum(op.startswith("scratch_") for op in ops),
        "stack bytes": _first(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "shared bytes": kernel.metadata.shared,
        "instructions": sum(
            op.startswith(("v_", "s_", "global_", "buffer_", "ds_", "flat_", "scratch_")) for op in ops
        ),
        "16-byte instructions": sum(bool(re.match(r"(global|buffer|flat)_(load|store)_dwordx4", op)) for op in ops),
        "fused": max(0, fused - 5 * divisions),
        "approximate": len(flags.findall(kernel.asm["llir"])),
        "tensor core instructions": sum(op.startswith(("v_mfma", "v_smfmac")) for op in ops),
    }
