"""A byte-level BPE tokenizer as GGUF metadata, and the proof that llama.cpp splits text as transformers does.

llama.cpp re-implements each family's splitting of text into words under a name ("pre-tokenizer"). The name is chosen by
what tokenizer.json really does; a splitting that has no name is refused, and the written file is asked to tokenize
`SAMPLES`, which has to give the ids that transformers gives.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from qat.errors import ExportError, QATError
from qat.export.hf_folder import load_tokenizer
from qat.export.llama_cpp import LlamaCpp, installed

log = logging.getLogger(__name__)

# token types of GGUF
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# regular expression of a Split step -> llama.cpp's name
_REGEXES = {
    _GPT2: "gpt-2",
    _CASELESS + r"\p{N}{1,3}" + _TAIL: "llama-bpe",
    _CASELESS + r"\p{N}" + _TAIL: "qwen2",
}

SAMPLES = (
    "Hello, world!  It's 3.14159 and 1234567 -- isn't it?",
    "def f(x: int) -> list[str]:\n    return [str(i) for i in range(x)]\n\n\n",
    '\tif a != b:\r\n\t\traise ValueError(f"{a!r} is not {b!r}")  # WE\'LL SEE\n',
    "   leading, trailing   \n \n  and\u00a0hard spaces\u3000too ",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093 \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "caf\u00e9 na\u00efve \u00dcbergr\u00f6\u00dfe",
    "emoji \U0001f600\U0001f44d\U0001f3fd, math \u2200x\u2208\u211d: \u221ax\u00b2=|x|, \u00bd \u2163 \u0663\u0664",
    '__init__ self.x1y2 0x1F 1e-5 a_b-c+d*e/f%g **kwargs @dec <tag/> {"k": [1,2,3]}\\n',
)


def tokenizer_reasons(tokenizer: Any, vocab_size: int) -> list[str]:
    """Why this tokenizer cannot go into a GGUF file for a model with `vocab_size` embeddings; empty means it can."""
    if tokenizer is None:
        return ["llama.cpp needs the tokenizer inside the file; pass tokenizer= (one of transformers, or a folder)"]
    try:
        loaded = load_tokenizer(tokenizer)
        data = _description(loaded)
    except QATError as problem:
        return [str(problem)]
    model = data["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not _is_byte_level(data):
        kind = f"{model['type']}{' with byte fallback' if model.get('byte_fallback') else ''}"
        return [f"the tokenizer is {kind}; GGUF export knows byte-level BPE (the kind of GPT-2, Llama 3 and Qwen)"]
    found = []
    if pre_tokenizer_name(data) is None:
        steps = ", ".join(_step(step) for step in _steps(data)) or "nothing"
        found.append(f"llama.cpp has no name for the way this tokenizer splits text ({steps}); use gpt-2's splitting")
    if data.get("normalizer") not in (None, {"type": "NFC"}):
        found.append(f"the tokenizer normalizes text ({data['normalizer'].get('type')}), which llama.cpp would not do")
    largest = max([*model["vocab"].values(), *(token["id"] for token in data["added_tokens"])], default=-1)
    if largest >= vocab_size:
        found.append(f"the tokenizer has token id {largest}, the model {vocab_size} embeddings; resize the embeddings")
    if not model["merges"]:
        found.append("the tokenizer has no merges; llama.cpp needs at least one")
    if _added_at_the_ends(loaded) is None:
        found.append("the tokenizer adds other tokens than bos in front and eos at the end; llama.cpp adds only these")
    return found


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write a tokenizer without `tokenizer_reasons` into a gguf.GGUFWriter."""
    loaded = load_tokenizer(tokenizer)
    data = _description(loaded)
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for text, index in data["model"]["vocab"].items():
        tokens[index], types[index] = text, _NORMAL
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(data))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for kind in ("bos", "eos", "pad", "unk"):
        index = getattr(loaded, f"{kind}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    begins, ends = _added_at_the_ends(loaded) or (False, False)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    template = getattr(loaded, "chat_template", None)
    if template:
        writer.add_chat_template(template)


def compare_tokens(path: Path, tokenizer: Any) -> None:
    """Raise ExportError unless llama.cpp, reading `path`, gives the ids that the tokenizer gives."""
    if not installed():
        log.warning("xllamacpp is not installed: llama.cpp's tokens for %s were not compared", path)
        return
    loaded = load_tokenizer(tokenizer)
    with LlamaCpp(path, context=32) as llama:
        for text in SAMPLES:
            for special in (False, True):
                ours = loaded(text, add_special_tokens=special)["input_ids"]
                theirs = llama.tokenize(text, special=special)
                if list(ours) != theirs:
                    raise ExportError(
                        f"llama.cpp splits text otherwise than this tokenizer: {text[:24]!r} is {list(ours)[:12]} here "
                        f"and {theirs[:12]} there; train a tokenizer that splits as gpt-2 does"
                    )


def pre_tokenizer_name(data: dict[str, Any]) -> str | None:
    """llama.cpp's name for what the tokenizer.json does before BPE, or None if it has none."""
    steps = _steps(data)
    kinds = [step["type"] for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    splits_itself = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"]:
        return "gpt-2" if splits_itself else None
    if kinds == ["Digits", "ByteLevel"] and splits_itself and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not splits_itself:
        first = steps[0]
        whole = first.get("behavior") == "Isolated" and not first.get("invert")
        return _REGEXES.get(first["pattern"].get("Regex", "")) if whole else None
    return None


def _description(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} has no tokenizer.json; pass a fast tokenizer of transformers")
    return json.loads(backend.to_str())  # type: ignore[no-any-return]


def _steps(data: dict[str, Any]) -> list[dict[str, Any]]:
    step = data.get("pre_tokenizer")
    if step is None:
        return []
    return step["pretokenizers"] if step["type"] == "Sequence" else [step]


def _step(step: dict[str, Any]) -> str:
    return ", ".join([step["type"], *(f"{key}={value}" for key, value in step.items() if key != "type")])[:120]


def _is_byte_level(data: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(data))


def _added_at_the_ends(tokenizer: Any) -> tuple[bool, bool] | None:
    """(bos in front, eos at the end) when special tokens are added; None if anything else is."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            head = [tokenizer.bos_token_id] if begins else []
            tail = [tokenizer.eos_token_id] if ends else []
            if [*head, *plain, *tail] == list(full):
                return begins, ends
    return None
