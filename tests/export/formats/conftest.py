"""Damage for model folders: what a reader must refuse in one sentence, or read as something that is noticed."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat.errors import ExportError
from qat.export.format import Format, read_back
from qat.export.receipt import Receipt

JUNK: tuple[Any, ...] = (None, -1, 0, 7, 10**9, 2**70, 1.5, True, "", "x", [], [1], {}, {"a": 1})
CODES = (".weight", ".weight_packed", "_qdata", ".q_weight")
WHERE = ("header", "cut", "config", "shape", "dtype", "missing", "values", "scales")


@pytest.fixture(scope="session")
def exact_sums() -> bool:
    """Whether integer kernels of the programs add up products of 8-bit codes without losing any: x86 has VNNI for it,
    and where there is AVX2 alone sums of two saturate."""
    flags = Path("/proc/cpuinfo")
    return not flags.is_file() or "vnni" in flags.read_text() or "avx2" not in flags.read_text()


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all entries of nested JSON."""
    keys = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [p for key in keys for p in ((*path, key), *_places(data[key], (*path, key)))]


def _junk_in(data: Any, rng: random.Random) -> None:
    *path, last = rng.choice(_places(data))
    for key in path:
        data = data[key]
    if rng.random() < 0.3 and isinstance(data, dict):
        del data[last]
    else:
        data[last] = rng.choice(JUNK)


def _reshaped(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    if tensor.dim() == 0:
        return tensor.reshape(1)
    axis = rng.randrange(tensor.dim())
    cut = tensor.narrow(axis, 0, rng.randrange(tensor.shape[axis]))
    twice = torch.cat((tensor.view(torch.uint8), tensor.view(torch.uint8)), 0).view(tensor.dtype)
    return rng.choice((cut, twice, tensor.flatten(), tensor.unsqueeze(0), tensor.reshape(tensor.shape[::-1])))


def _damage(folder: Path, where: str, rng: random.Random) -> str:
    """Damages the folder and names the tensor that was changed, if it was one."""
    path = folder / "model.safetensors"
    if where in ("header", "cut"):
        raw = bytearray(path.read_bytes())
        size = 8 + int.from_bytes(raw[:8], "little")
        if where == "header":
            raw[rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(raw if where == "header" else raw[: rng.randrange(len(raw))])
        return ""
    if where == "config":
        data = json.loads((folder / "config.json").read_text())
        _junk_in(data["quantization_config"], rng)
        (folder / "config.json").write_text(json.dumps(data))
        return ""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    # of a quantized layer: what lies beside a weight
    layers = {name.partition(".weight")[0] for name in tensors if ".weight_" in name or ".weight." in name}
    beside = (".SCB", ".scales", ".biases", "._weight_qdata", "._weight_scale", "._weight_zero_point")
    beside += (".q_weight", ".q_scale", ".q_scale_max", ".q_groups", ".q_invperm")
    layers |= {name.rpartition(".")[0] for name in tensors if name.endswith(beside)}
    own = {f"{x}{key}" for x in layers for key in beside}
    names = [n for n in tensors if n in own or any(n.startswith(f"{x}.weight") for x in sorted(layers))]
    names = [n for n in names if not n.endswith("weight_format")]
    if where == "values":
        names = [n for n in names if n.endswith(CODES)]
    if where == "scales":
        names = [n for n in names if not n.endswith(CODES)]
    name = rng.choice(sorted(names))
    tensor = tensors[name].clone()
    if where == "missing":
        del tensors[name]
    elif where == "shape":
        tensors[name] = _reshaped(tensor, rng).contiguous()
    elif where == "dtype":
        tensors[name] = tensor.to(
            rng.choice([d for d in (torch.float64, torch.int16, torch.bool) if d != tensor.dtype])
        )
    else:
        # of a float its sign or exponent: the last bits of a scale may be rounded away
        raw_bytes = tensor.reshape(-1).view(torch.uint8).reshape(-1, tensor.element_size())
        raw_bytes[rng.randrange(len(raw_bytes)), -1] ^= 1 << rng.randrange(8)
        tensors[name] = tensor
    save_file(tensors, path, metadata=metadata)
    return name


@pytest.fixture
def attack(tmp_path: Path) -> Callable[..., Counter[str]]:
    """attack(fmt, folder, rounds): copies of an exported folder are damaged, `rounds` for each of WHERE, and read.

    A damaged file is refused in one sentence, or what is read from it is refused by the receipt, or it is what it was
    (of bytes that say nothing); damaged codes and scales are never the last.
    """

    def run(fmt: Format, folder: Path, rounds: int) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        records = Receipt.load(folder).tensors
        for number, where in enumerate(WHERE * rounds):
            bad = tmp_path / "damaged"
            shutil.copytree(folder, bad)
            name = _damage(bad, where, random.Random(number))
            context = f"{fmt.name}: {where} {name}, seed {number}"
            try:
                for _ in fmt.read(bad):
                    pass
            except ExportError as problem:
                outcomes["refused"] += 1
                assert "\n" not in str(problem) and len(str(problem)) < 600, context
            else:
                try:
                    read_back(fmt, bad, copy.deepcopy(records))
                except ExportError:
                    outcomes["noticed"] += 1
                else:
                    outcomes["as it was"] += 1
                    # spaces in a state's JSON, and digits that are rounded away
                    assert where in ("header", "config", "shape", "dtype") or "quant_state" in name, context
            shutil.rmtree(bad)
        return outcomes

    return run
