"""Damaged GPTQ and AWQ folders: refused in one sentence, or read as something that is not what was trained.

Each case changes one thing of a good folder; `read` gets it, not `verify`, whose hashes would catch all of them.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.errors import ExportError
from qat.export import export, get_format
from qat.export.format import read_back
from qat.export.packed_groups import PackedGroups, undisturbed
from qat.export.receipt import Receipt

WEIGHTS = "model.safetensors"
LAYER = "model.layers.0.mlp.down_proj"
Damage = Callable[[Path], None]


def in_config(**changes: Any) -> Damage:
    """Entries of quantization_config; None: taken away."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            if value is None:
                config["quantization_config"].pop(key)
            else:
                config["quantization_config"][key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def whole_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def in_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """Another tensor of this name; None: taken away."""

    def damage(folder: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
        before = tensors.pop(name)
        changed = change(before.clone())
        if changed is not None and changed.dtype == before.dtype and torch.equal(changed, before):
            raise KeyError(name)
        if changed is not None:
            tensors[name] = changed.contiguous()
        save_file(tensors, folder / WEIGHTS)

    return damage


def in_bytes(change: Callable[[bytearray], Any]) -> Damage:
    def damage(folder: Path) -> None:
        data = bytearray((folder / WEIGHTS).read_bytes())
        change(data)
        (folder / WEIGHTS).write_bytes(bytes(data))

    return damage


def header_byte(chance: random.Random) -> Damage:
    at, bit = chance.random(), chance.randrange(8)

    def change(data: bytearray) -> None:
        (length,) = struct.unpack("<Q", data[:8])
        data[int(at * (8 + length))] ^= 1 << bit

    return in_bytes(change)


def cut(share: float) -> Damage:
    return in_bytes(lambda data: data.__delitem__(slice(int(len(data) * share), None)))


def flipped(name: str, chance: random.Random) -> Damage:
    """One bit of a tensor."""
    at, bit = chance.random(), chance.randrange(8)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.contiguous().view(torch.uint8).reshape(-1)
        raw[int(at * raw.numel())] ^= 1 << bit
        return raw.view(tensor.dtype).reshape(tensor.shape)

    return in_tensor(name, change)


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = value
        return tensor

    return change


CONFIGS: list[dict[str, Any]] = [
    *({"bits": value} for value in (None, 0, 1, 2, 5, 8, 99, -4, 4.0, "4", [4], True)),
    *({"group_size": value} for value in (None, 0, 16, 33, 64, -1, -2, 10**9, "32", {}, 32.0)),
    *({"checkpoint_format": value, "version": value} for value in ("gptq_v2", "marlin", 7, [], "gemv", "GEMM")),
    *({"dynamic": value} for value in ([], "x", 3, {"+:^" + LAYER.replace(".", "\\.") + "$": []})),
    *({"dynamic": {"+:^" + LAYER.replace(".", "\\.") + "$": value}} for value in ({"bits": 8}, {"group_size": "x"})),
    *({"dynamic": {".*down": value}} for value in ({"bits": 8}, {"group_size": 64}, {"bits": 4}, [], None)),
    *(
        {"dynamic": {pattern: {}}}
        for pattern in ("-:.*down", "-:model", "(", "+:[", "*", "x" * 5000, "(?!x)", "\ud800")
    ),
    *({"desc_act": value} for value in (True, "x", None)),
    *({"meta": value} for value in ([], 3, {"transposed": 7}, {"transposed": [LAYER]})),
]
SHAPES: list[Callable[[torch.Tensor], torch.Tensor | None]] = [
    lambda t: None,
    lambda t: t[:-1],
    lambda t: t[..., :-1],
    lambda t: t.reshape(-1),
    lambda t: t[:0],
    lambda t: t.T if t.dim() == 2 else t.reshape(1, -1),
    lambda t: t.unsqueeze(0),
    lambda t: torch.cat([t, t]),
    lambda t: t.double(),
    lambda t: t.to(torch.int64),
    lambda t: t.bool(),
]


def damages(keys: tuple[str, ...]) -> Iterator[tuple[str, Damage]]:
    """(stratum, damage)"""
    chance = random.Random(0)
    for _ in range(40):
        yield "header", header_byte(chance)
    yield from (("header", cut(share)) for share in (0.0, 0.0001, 0.01, 0.5, 0.99))
    yield from (("metadata", in_config(**changes)) for changes in CONFIGS)
    for value in (None, 3, "float64", "int8", [], "torch.float16"):
        yield "metadata", whole_config(dtype=value)
    yield from (("metadata", whole_config(quantization_config=value)) for value in (None, [], "x", {}))
    for key in keys:
        yield from (("shapes", in_tensor(f"{LAYER}.{key}", change)) for change in SHAPES)
    for value in (float("nan"), float("inf"), 0.0, -1.0, 65504.0):
        yield "scales", in_tensor(f"{LAYER}.scales", filled(value))
    for _ in range(12):
        yield "scales", flipped(f"{LAYER}.scales", chance)
    for key in ("qweight", "qzeros"):
        for _ in range(16):
            yield "codes", flipped(f"{LAYER}.{key}", chance)
    if "g_idx" in keys:
        for value in (-1, 3, 10**6, -(2**31)):
            yield "codes", in_tensor(f"{LAYER}.g_idx", lambda t, value=value: torch.cat([t[:-1], t[:1] * 0 + value]))
        yield "codes", in_tensor(f"{LAYER}.g_idx", lambda t: t.flip(0))
        # one group larger than another, two inputs that change places, all at random
        yield "codes", in_tensor(f"{LAYER}.g_idx", lambda t: torch.cat([t[-1:], t[1:]]))
        yield "codes", in_tensor(f"{LAYER}.g_idx", lambda t: torch.cat([t[-1:], t[1:-1], t[:1]]))
        yield "codes", in_tensor(f"{LAYER}.g_idx", lambda t: t[torch.randperm(len(t))])
        yield "codes", in_tensor(f"{LAYER}.g_idx", lambda t: t * 0)
        for _ in range(12):
            yield "codes", flipped(f"{LAYER}.g_idx", chance)


# Turned red by: shapes not compared with the configuration, a `number` that takes True, `dynamic` taken for a mapping,
# g_idx handed to the kernel unseen.
@pytest.mark.parametrize("own", [False, True], ids=["gptqmodel", "qat"])
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_damaged_folders(
    name: str,
    own: bool,
    make_model: Any,
    quantize: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    if own:
        monkeypatch.setattr(PackedGroups, "installed", lambda self: False)
    else:
        with undisturbed():
            pytest.importorskip("gptqmodel", reason="GPTQModel is not installed: pip install 'lightning-qat[gptq]'")
    model = make_model(dtype=torch.float16, num_hidden_layers=1, vocab_size=32)
    keep = {"match": ["*lm_head", "*q_proj"], "keep_float": True}
    good = tmp_path / "good"
    export(quantize(model, {"bits": 4, "zero_point": "int", "quantizer": "minmax"}, keep=keep), good, name)
    records = Receipt.load(good).tensors
    fmt = get_format(name)
    read_back(fmt, good, records)
    count: Counter[str] = Counter()
    keys = ("qweight", "qzeros", "scales", *(("g_idx",) if name == "gptq" else ()))
    for number, (stratum, damage) in enumerate(damages(keys)):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        try:
            damage(folder)
        except KeyError:
            # the other format's word, or a change that changes nothing here
            continue
        try:
            read_back(fmt, folder, records)
        except ExportError as refused:
            assert "\n" not in str(refused) and str(folder) in str(refused), (stratum, number)
            said = "not the trained" if "not the trained" in str(refused) else "refused"
            count[f"{stratum}: {said}"] += 1
        else:
            # nothing that the reader goes by was changed
            assert stratum in ("header", "metadata"), (stratum, number)
            count[f"{stratum}: read right"] += 1
        shutil.rmtree(folder)
    record_property("cases", f"{count.total()} damaged folders ({dict(sorted(count.items()))})")
    print(dict(sorted(count.items())))
    assert count.total() >= 100
    for stratum in ("header", "metadata", "shapes", "scales", "codes"):
        assert count[f"{stratum}: refused"] + count[f"{stratum}: not the trained"] >= 10, stratum
