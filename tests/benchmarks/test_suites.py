"""Both suites run from end to end in tiny sizes, and refuse to time what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import backward, cpu, gpu, op_cases, schemes
from benchmarks.common import AGAIN, FIELDS, FLOAT
from benchmarks.peers import PEERS

ROOT = Path(__file__).parents[2]


def rows_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert all(tuple(entry) == FIELDS for entry in found)
    return found


def test_cpu_suite(tmp_path: Path) -> None:
    """Every tool has figures or a reason in every case. Mutation: rows of `absent` left out."""
    out = tmp_path / "cpu.json"
    assert cpu.main(["--dry-run", "--rounds", "1", "--only", "block fp32 eager", "--out", str(out)]) == 0
    rows = rows_of(out)
    cases = {entry["case"] for entry in rows}
    assert cases == {f"block fp32 eager accumulation {n}" for n in (1, 8)}
    for case in cases:
        of_case = [entry for entry in rows if entry["case"] == case]
        assert {entry["tool"] for entry in of_case} == {FLOAT, AGAIN, *cpu.OURS, *PEERS}
        figures = {(entry["tool"], entry["metric"]): entry for entry in of_case}
        for tool in (FLOAT, AGAIN, *cpu.OURS):
            for metric in ("time_ratio", "time_ratio_median", "peak_bytes", "alive_bytes", "host_syncs"):
                assert figures[tool, metric]["value"] >= 0
        assert figures["qat W4 g32", "host_syncs"]["goal"] == 0
    goals = {(e["case"][-1], e["tool"]): e["goal"] for e in rows if e["metric"] == "time_ratio" and e["goal"]}
    assert goals["1", "qat W4 g32"] == 1.10 and goals["8", "qat W4 g32"] == 1.03 and goals["1", "qat W8A8"] == 1.15


def test_cpu_suite_with_a_transformers_llama(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "cpu.json"
    assert cpu.main(["--dry-run", "--only", "llama bf16 eager accumulation 1", "--out", str(out)]) == 0
    timed = {entry["tool"] for entry in rows_of(out) if entry["metric"] == "time_ratio"}
    assert timed >= {FLOAT, AGAIN, *cpu.OURS}


def test_no_case() -> None:
    assert cpu.main(["--dry-run", "--only", "nothing like it"]) == 2


def test_gpu_suite(tmp_path: Path) -> None:
    """Operations, products and steps of every scheme, or a reason. Mutation: an operation without arguments."""
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--only", "eager", "--out", str(out)]) == 0
    rows = rows_of(out)
    shares = {entry["tool"].split(" ")[0] for entry in rows if entry["metric"] == "share of copy"}
    assert shares == {*op_cases.operations(), "multi_tensor"} - set(op_cases.PRODUCTS)
    assert {e["metric"] for e in rows if e["tool"] == "qat int8_linear"} >= {"operations_per_second"}
    steps = [entry for entry in rows if entry["case"].startswith("llama")]
    assert {entry["tool"] for entry in steps} == {FLOAT, AGAIN, *schemes.GPU, *PEERS}
    timed = {entry["tool"] for entry in steps if entry["metric"] == "time_ratio"}
    assert timed >= {FLOAT, *(tool for tool in schemes.GPU if "fp8 backward" not in tool)}


def test_quality_of_backwards(tmp_path: Path) -> None:
    """Every recipe with every backward has figures, and that of a rounded one over the float one's."""
    pytest.importorskip("transformers")
    out = tmp_path / "backward.json"
    assert backward.main(["--fast", "--seeds", "0", "--out", str(out)]) == 0
    figures = {(e["case"], e["tool"], e["metric"]): e["value"] for e in rows_of(out) if e["suite"] == backward.SUITE}
    for case in backward.RECIPES:
        exact = figures[case, "float backward", "kl"]
        for kind in backward.BACKWARDS[1:]:
            rounded = figures[case, f"{kind} backward", "kl"]
            assert rounded != exact
            assert figures[case, f"{kind} backward", "kl / float backward's"] == pytest.approx(rounded / exact)


def test_gpu_suite_needs_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def wrong(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One part of a quantized layer computes something else."""
    from qat.quantizers import Quantizer

    right = getattr(Quantizer, name)

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = right(self, *args, **kwargs)
        return found * 1.01 if isinstance(found, Tensor) else found

    monkeypatch.setattr(Quantizer, name, shifted)


def test_a_red_gate_stops_the_suite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The law is broken. Mutation: `group.problems` not looked at."""
    wrong(monkeypatch, "forward")
    assert cpu.main(["--dry-run", "--only", "block fp32 eager accumulation 1"]) == 1
    message = capsys.readouterr().err
    assert "the gate is red" in message and "differs from quantizer.integers(w).dequantize()" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tool", list(schemes.CPU))
def test_gate(tool: str, dtype: torch.dtype) -> None:
    """Green as it is; red for a loss that is not finite, a wrong output, a wrong gradient.

    Mutations: the comparison of y, or of the gradients, left out of `_differences`.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).to(dtype)
    schemes.prepared(model, schemes.CPU[tool].rule)
    fine = torch.tensor(1.0)
    assert schemes.gate(model, fine) == []
    assert "nan" in schemes.gate(model, fine * float("nan"))[0]
    for where, hook in (("y", lambda m, i, y: y * 1.1), ("dx", lambda m, i, y: y + Doubled.apply(y) - y.detach())):
        handle = model[0].register_forward_hook(hook)
        problems = schemes.gate(model, fine)
        handle.remove()
        assert any(f": {where} differs" in problem for problem in problems), problems


class Doubled(torch.autograd.Function):
    """y forward, the gradient twice backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def test_the_gate_of_operations_finds_one_number() -> None:
    """Mutation: `_equal` replaced by a comparison of shapes."""
    for op, args in op_cases.calls_at(8, 96, 24, torch.device("cpu"), torch.float32):
        assert op_cases.differences((op, args), op.custom) == []

        def off_by_one(*given: Any, op: Any = op) -> Any:
            found = op.reference(*given)
            first = op_cases.tensors(found)[0]
            as_bytes = first.view(torch.uint8).view(-1)
            as_bytes[as_bytes.numel() // 2] ^= 64
            as_bytes[-1] ^= 64
            return found

        problems = op_cases.differences((op, args), off_by_one)
        assert len(problems) == 1 and op.name in problems[0], op.name


BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("yaml", "omegaconf"):
            raise ModuleNotFoundError(name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("yaml", "omegaconf") else real(name, package)
sys.meta_path.insert(0, Refuse())
from benchmarks import bare
assert bare.install() == ["yaml", "omegaconf"]
import torch
from benchmarks import schemes
from qat.recipes import from_dict, to_dict
for scheme in schemes.CPU.values():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    schemes.prepared(model, scheme.rule)
    loss = model(torch.randn(4, 64)).square().mean()
    loss.backward()
    assert schemes.gate(model, loss) == []
import json
print(json.dumps(to_dict(schemes.recipe(schemes.W8A8)), sort_keys=True))
"""


def test_nothing_but_torch_is_needed() -> None:
    """Without PyYAML and OmegaConf recipes mean the same. Mutation: `_merged` ignores nested mappings."""
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from qat.recipes import to_dict

    expected = to_dict(schemes.recipe(schemes.W8A8))
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(json.dumps(expected))
