"""Damaged GGUF files: refused in one sentence, or read as the weights that were trained; never a crash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import qat
from qat.errors import ExportError
from qat.export import export, get_format
from qat.export.format import read_back
from qat.export.receipt import Receipt
from qat.verify import verify

MUTATIONS = 20  # of each part


@pytest.fixture
def exported(make_model: Any, quantize: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """Types with one and two levels of scales, a scale of a tensor, floats."""
    grids: dict[str, dict[str, Any]] = {
        "q_proj": {"bits": 4},
        "k_proj": {"bits": 5, "zero_point": "float", "quantizer": "minmax"},
        "v_proj": {"grid": "fp4", "bits": 4, "scale": "nvfp4", "group_size": 16, "quantizer": "absmax"},
        "gate_proj": {"grid": "ternary", "bits": 2, "group_size": 256, "quantizer": "mse"},
        "up_proj": {"grid": "iq4_nl", "bits": 4, "scale": "iq4_xs", "quantizer": "absmax"},
        "down_proj": {"grid": "fp4", "bits": 4, "scale": "e8m0", "quantizer": "absmax"},
    }
    base = {"granularity": "group", "group_size": 32, "quantizer": "absmax"}
    rules = {name: {"match": [f"*{name}"], "weight": {**base, **words}} for name, words in grids.items()}
    model = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=4)
    export(
        quantize(model, {"bits": 8}, ("Linear", "Embedding"), **rules), tmp_path / "out", "gguf", tokenizer=tokenizer
    )
    return tmp_path / "out"


def parts_of(path: Path) -> dict[str, list[int]]:
    """Places of bytes: the header, names and numbers of the model, of tensors, their scales, codes, floats."""
    reader = gguf.GGUFReader(path)
    tensors = reader.tensors
    first = min(int(tensor.field.offset) for tensor in tensors)
    tokens = int(reader.fields["tokenizer.ggml.tokens"].offset)
    found = {
        "header": list(range(24)),
        "metadata": list(range(24, tokens)),
        "tensors": list(range(first, int(reader.data_offset))),
        "scales": [],
        "codes": [],
        "floats": [],
    }
    # where the scales of a block lie
    scales = {"Q4_0": (0, 2), "Q5_1": (0, 4), "NVFP4": (0, 4), "TQ1_0": (52, 54), "IQ4_XS": (0, 8), "MXFP4": (0, 1)}
    for tensor in tensors:
        start, count, kind = int(tensor.data_offset), int(tensor.n_bytes), tensor.tensor_type
        if kind.name == "F32":
            found["floats"] += range(start, start + count)
        elif kind.name in scales:
            size, (low, high) = gguf.GGML_QUANT_SIZES[kind][1], scales[kind.name]
            for at in range(start, start + count):
                found["scales" if low <= (at - start) % size < high else "codes"].append(at)
    return found


# Turned red by: a reader's own exception let through, a table made for as many blocks as the file claims.
def test_damaged_files(exported: Path, record_property: Any) -> None:
    path, fmt = exported / "model.gguf", get_format("gguf")
    good, records = path.read_bytes(), Receipt.load(exported).tensors
    parts = parts_of(path)
    assert all(parts.values())
    generator, count = np.random.default_rng(3), Counter[str]()

    def outcome(part: str, data: bytes) -> None:
        path.write_bytes(data)
        with pytest.raises(ExportError) as caught:  # the hash of the file alone finds any change
            verify(exported)
        try:
            # that the reader is sound shows without it
            rows = read_back(fmt, exported, records)
        except ExportError as problem:
            assert "\n" not in str(problem) and str(problem)
            count[f"{part}: refused"] += 1
        else:
            assert len(rows) == len(records) and "sha256" in str(caught.value)
            count[f"{part}: read as trained"] += 1

    for part, places in parts.items():
        for turn in range(MUTATIONS):
            data = bytearray(good)
            at = int(generator.choice(places))
            if turn % 3:
                data[at] ^= 1 << int(generator.integers(8))
            else:  # a run of bytes, or the largest numbers there are
                width = min(8, len(data) - at)
                data[at : at + width] = b"\xff" * width if turn % 2 else generator.bytes(width)
            outcome(part, bytes(data))
    for _ in range(MUTATIONS):
        outcome("cut short", good[: int(generator.integers(len(good)))])
    record_property(
        "cases", f"{count.total()} damaged files ({', '.join(f'{k} {v}' for k, v in sorted(count.items()))})"
    )
    assert count.total() == 7 * MUTATIONS
    # what is no code's sign of zero is another weight
    assert count["codes: refused"] > MUTATIONS * 3 // 4 and count["floats: refused"] > MUTATIONS * 3 // 4
    assert count["scales: refused"] > MUTATIONS * 3 // 4 and count["cut short: refused"] == MUTATIONS


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("llama.block_count", 2**31 - 1, "blocks of 4 and 4 heads"),
        ("llama.attention.head_count", 3, "self_attn.q_proj.weight cannot be read"),
        ("llama.attention.head_count_kv", 0, "1 blocks of 4 and 0 heads"),
        ("llama.block_count", 0, "0 blocks of"),
    ],
)
def test_numbers_of_the_model_that_cannot_be(field: str, value: int, words: str, exported: Path) -> None:
    path = exported / "model.gguf"
    data, number = bytearray(path.read_bytes()), gguf.GGUFReader(path).fields[field]
    at = int(number.offset) + sum(len(part.tobytes()) for part in number.parts[:-1])
    data[at : at + 4] = np.uint32(value).tobytes()
    path.write_bytes(data)
    with pytest.raises(ExportError, match=words):
        list(get_format("gguf").read(exported))


def test_a_missing_file(exported: Path) -> None:
    (exported / "model.gguf").unlink()
    with pytest.raises(qat.QATError, match=r"model\.gguf is missing"):
        list(get_format("gguf").read(exported))
