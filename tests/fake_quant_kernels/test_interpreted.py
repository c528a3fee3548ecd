"""Every Triton kernel against its reference, bit for bit, on a CPU: interpreted/check_*.py, one process for each file.

TRITON_INTERPRET has to be set before Triton is imported, so the checks cannot run in this process. They compare on
stated input families (interpreted/compare.py) and print how many numbers they compared, which ends up in this run's
summary. A module of fake_quant_kernels/ that has kernels and no check of its name is an error.

Mutations that were tried, and what turned red:

    same() compares no result, or not the arguments         test_interpreted[check_compare]
    fresh memory not NaN-filled                             test_interpreted[check_compare]
    a check_*.py renamed                                    test_every_kernel_has_a_check
    a check_*.py that fails, or that compares nothing       test_interpreted
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "interpreted"
CHECKS = sorted(FOLDER.rglob("check_*.py"))
AT_LEAST = 18
OPERATION = re.compile(r"^\w+ = Op\(", re.M)
COMPARED = re.compile(r"^compared (\d+) elements in (\d+) calls of (.+)$", re.M)

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed, there is none for macOS")


def checked(path: Path) -> subprocess.CompletedProcess[str]:
    """pytest on one file in a process of its own, with Triton interpreted and asked for."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "QAT_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_every_kernel_has_a_check() -> None:
    """Mutation: rename a check file -> red."""
    kernels = [p.stem for p in (ROOT / "fake_quant_kernels").glob("*.py") if OPERATION.search(p.read_text("utf-8"))]
    missing = {f"check_{name}.py" for name in kernels} - {path.name for path in CHECKS}
    assert not missing, f"no {', '.join(sorted(missing))} in {FOLDER}"
    assert len(CHECKS) >= AT_LEAST


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_interpreted(path: Path, record_property: Callable[[str, object], None]) -> None:
    done = checked(path)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    found = COMPARED.findall(done.stdout)
    assert found and all(int(count) > 0 for count, *_ in found), f"{path.name} compared nothing\n{done.stdout[-2000:]}"
    record_property("cases", "; ".join(f"{name}: {count} elements in {calls} calls" for count, calls, name in found))
