"""Small prepared Llama models and byte-level BPE tokenizers."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import qat
from qat.export.format import Format, Row, read_back
from qat.export.receipt import TensorRecord
from qat.recipes import from_dict
from qat.specs import QuantSpec

GROUPS_OF_32 = {"granularity": "group", "group_size": 32, "quantizer": "absmax"}
CORPUS = [
    "def f(x, y):\n    return x + y  # it's the sum\n\n" * 4,
    "for i in range(10):\n\tprint(i, 'and', 1234)\n" * 4,
]


def _note(**entry: Any) -> None:
    """A line in the file that $QAT_PROOFS names; workers share it, one write a line."""
    with open(os.environ["QAT_PROOFS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


@pytest.fixture(autouse=True, scope="session")
def proofs() -> Iterator[None]:
    """For `make formats`: whatever is read back and compared in a test is noted, by format, grid and reader."""

    def noting(fmt: Format, folder: Path, records: list[TensorRecord], *more: Any) -> list[Row]:
        rows = read_back(fmt, folder, records, *more)
        for record in records:
            if record.spec is not None:
                grid = str(QuantSpec.from_dict(record.spec)).rpartition(" ")[0]
                _note(
                    format=fmt.name, grid=grid, reader=fmt.reader(), dtype=record.dtype, difference=record.max_abs_diff
                )
        return rows

    with pytest.MonkeyPatch.context() as patch:
        if "QAT_PROOFS" in os.environ:
            patch.setattr(sys.modules["qat.export"], "read_back", noting)
        yield


@pytest.fixture(scope="session")
def ran() -> Callable[..., None]:
    """For `make formats`: a program ran a folder of a format, and how far it was from our model: `kl` in nats per
    position, or the largest difference of `logits`."""

    def note(format: str, program: str, what: str, **found: float) -> None:
        ((metric, value),) = found.items()
        if "QAT_PROOFS" in os.environ:
            _note(format=format, program=program, what=what, metric=metric, value=float(value))

    return note


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """A trained byte-level BPE tokenizer of 300 tokens; `splitting` replaces its pre-tokenizer."""

    def make(splitting: Any = None, post: Any = None, size: int = 300) -> Any:
        level = tokenizers.pre_tokenizers.ByteLevel
        raw = tokenizers.Tokenizer(tokenizers.models.BPE())
        raw.pre_tokenizer = splitting or level(add_prefix_space=False)
        raw.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=level.alphabet(), show_progress=False
        )
        raw.train_from_iterator(CORPUS, trainer)
        if post is not None:
            raw.post_processor = post
        return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """A two-layer model of random weights large enough that its logits are far from uniform."""

    def make(kind: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, "initializer_range": 0.15, **changes})
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide a mix-up
                    parameter.add_(torch.rand_like(parameter) * 0.2)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def quantize() -> Callable[..., qat.Bundle]:
    """`weight` for the layers of `types`, more rules by name; `seen` goes through one training forward."""

    def make(
        model: torch.nn.Module,
        weight: dict[str, Any],
        types: tuple[str, ...] = ("Linear",),
        input: dict[str, Any] | None = None,
        seen: torch.Tensor | None = None,
        **rules: Any,
    ) -> qat.Bundle:
        first = {"match": ["*"], "types": list(types), "weight": {**GROUPS_OF_32, **weight}, "input": input}
        recipe = from_dict({"name": "small", "rules": {"layers": first, **rules}, "phases": {"qat": {"steps": -1}}})
        # the readers compute with floats
        qat.prepare(model, recipe, real=False)
        if seen is not None:
            model.train()(seen)
            qat.after_optimizer_step(model)
            model.eval()
        return qat.convert(model)

    return make


@pytest.fixture(scope="session")
def read_by_c() -> Callable[[str, torch.Tensor, int], torch.Tensor]:
    """(ggml type, bytes, how many numbers) -> fp32 [numbers], by the C code that llama.cpp runs."""
    extension = pytest.importorskip("xllamacpp.xllamacpp", reason="llama.cpp (xllamacpp) is not installed")
    library = ctypes.CDLL(extension.__file__)

    def read(kind: str, data: torch.Tensor, count: int) -> torch.Tensor:
        function = getattr(library, f"dequantize_row_{kind.lower().removesuffix('_k')}" + "_K" * kind.endswith("_K"))
        function.restype, data = None, data.contiguous()
        found = torch.empty(count)
        pointers = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(found.data_ptr())
        function(*pointers, ctypes.c_int64(count))
        return found

    return read


KEEP_HEAD = {"match": ["lm_head"], "keep_float": True}


@pytest.fixture
def bundle(make_model: Callable[..., Any], quantize: Callable[..., qat.Bundle]) -> qat.Bundle:
    """Every Linear and the embedding on the Q4_0 grid."""
    return quantize(make_model(tie_word_embeddings=True), {"bits": 4}, ("Linear", "Embedding"))
