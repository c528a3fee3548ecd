from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qat
from qat.errors import QATError
from qat.export import export
from qat.recipes import from_dict
from qat.verify import verify


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, never changed: tests damage copies."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    weight = {"bits": 4, "granularity": "group", "group_size": 32}
    rules = {"all": {"types": ["Linear"], "weight": weight}, "head": {"match": ["lm_head"], "keep_float": True}}
    qat.prepare(model, from_dict({"name": "small", "rules": rules, "phases": {"qat": {"steps": -1}}}))
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(model, folder, "compressed-tensors")
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_an_untouched_folder_has_a_row_for_every_tensor(folder: Path) -> None:
    rows = verify(folder)
    receipt = json.loads((folder / "qat_receipt.json").read_text())
    assert [row.name for row in rows] and {row.name for row in rows} == {entry["name"] for entry in receipt["tensors"]}
    assert all(row.max_abs_diff == 0.0 and row.reader.startswith("compressed-tensors") for row in rows)
    assert (receipt["step"], receipt["weights"], receipt["recipe"]["name"]) == (0, "last", "small")
    assert {"torch", "qat", "compressed-tensors", "transformers"} <= set(receipt["versions"])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


WEIGHTS, RECEIPT = "model.safetensors", "qat_receipt.json"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tampered byte": (lambda f: flip(f / WEIGHTS, -3), r"model.safetensors is not the file that was exported"),
    "a missing file": (lambda f: (f / WEIGHTS).unlink(), r"model.safetensors is missing"),
    "a file cut short": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]),
        r"model.safetensors has [\d,]+ bytes, the receipt says",
    ),
    "an edited config": (lambda f: edit(f / "config.json", lambda d: d.update(a=1)), "config.json has"),
    "no receipt": (lambda f: (f / RECEIPT).unlink(), "holds no qat_receipt.json"),
    "a receipt that is no JSON": (lambda f: (f / RECEIPT).write_text("{"), "is not a receipt that can be read"),
    "a receipt that is a list": (lambda f: (f / RECEIPT).write_text("[]"), "is not a receipt that can be read"),
    "a receipt without tensors": (lambda f: edit(f / RECEIPT, lambda d: d.pop("tensors")), "is not a receipt"),
    "a receipt of the future": (lambda f: edit(f / RECEIPT, lambda d: d.update(version=9)), "has version 9"),
    "an unknown dtype": (
        lambda f: edit(f / RECEIPT, lambda d: d["tensors"][0].update(dtype="float3")),
        "is not a receipt",
    ),
    "an unknown format": (lambda f: edit(f / RECEIPT, lambda d: d.update(format="zip")), "format='zip' is unknown"),
    "another hash": (
        lambda f: edit(f / RECEIPT, lambda d: d["tensors"][1].update(sha256="0" * 64)),
        "read back by compressed-tensors .* is not the trained weight",
    ),
    "another shape": (
        lambda f: edit(f / RECEIPT, lambda d: d["tensors"][1].update(shape=[1])),
        r"has shape .* the receipt says \[1\]",
    ),
    "a tensor too many in the files": (
        lambda f: edit(f / RECEIPT, lambda d: d["tensors"].pop()),
        "but not in the receipt",
    ),
    "a tensor too few in the files": (
        lambda f: edit(f / RECEIPT, lambda d: d["tensors"].append({**d["tensors"][0], "name": "more"})),
        "are not in the files, more for one",
    ),
    "a path that leaves the folder": (
        lambda f: edit(f / RECEIPT, lambda d: d["files"][0].update(name="../../x")),
        "outside it",
    ),
}


# Turned red by leaving out the check that the case names.
@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_damage_is_one_clear_error(name: str, folder: Path) -> None:
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(QATError, match=words) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_files_that_match_their_hashes_but_not_the_format(folder: Path) -> None:
    """Somebody changes the file and its entry in the receipt."""
    from qat.export.receipt import file_sha256

    for name, content, words in (
        (WEIGHTS, b"nonsense" * 9, "is not a safetensors file that can be read"),
        ("config.json", b"{}", "holds no quantization_config"),
        ("config.json", b"{", "config.json cannot be read"),
    ):
        (folder / name).write_bytes(content)
        size, digest = len(content), file_sha256(folder / name)

        def agree(data: Any, name: str = name, size: int = size, digest: str = digest) -> None:
            (entry,) = (entry for entry in data["files"] if entry["name"] == name)
            entry.update(bytes=size, sha256=digest)

        edit(folder / RECEIPT, agree)
        with pytest.raises(QATError, match=words):
            verify(folder)


# Turned red by a `read` that drops `input_*`: a range 100 times too large would verify.
def test_a_wrong_input_scale_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from qat.export.receipt import file_sha256

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    given = {"bits": 8, "granularity": "tensor", "quantizer": "ema"}
    rules = {
        "all": {"types": ["Linear"], "weight": {"bits": 8}, "input": given},
        "head": {"match": ["lm_head"], "keep_float": True},
    }
    qat.prepare(model, from_dict({"name": "small", "rules": rules, "phases": {"qat": {"steps": -1}}}))
    model.train()(torch.arange(8).reshape(1, 8))
    qat.after_optimizer_step(model)
    folder = tmp_path / "out"
    export(model.eval(), folder, "compressed-tensors")
    verify(folder)
    tensors = load_file(folder / WEIGHTS)
    name = next(key for key in tensors if key.endswith("input_scale"))
    save_file({**tensors, name: tensors[name] * 100}, folder / WEIGHTS, metadata={"format": "pt"})
    digest, size = file_sha256(folder / WEIGHTS), (folder / WEIGHTS).stat().st_size

    def agree(data: Any) -> None:
        (entry,) = (entry for entry in data["files"] if entry["name"] == WEIGHTS)
        entry.update(bytes=size, sha256=digest)

    edit(folder / RECEIPT, agree)
    with pytest.raises(QATError, match=f"{name} read back by .* is not the trained value"):
        verify(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(QATError, match="there is no folder"):
        verify(tmp_path / "none")
