"""Causal language modelling: any transformers model folder, text, jsonl or parquet data, plain or chat.

Plain   the text of every record, an end token after each, packed into sequences of `train.seq_len`.
Chat    a record's messages through the tokenizer's chat template; the loss is on the answers alone. Which tokens those
        are comes from the template's generation marks, or, where it has none, from rendering the conversation up to
        each answer: what the answer adds to the prompt is learned. An answer whose rendering is not a part of the whole
        conversation (templates that drop earlier thoughts) becomes a sample of its own.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import QATError
from qat.hf import load_model, load_on_disk, load_tokenizer, read_config
from qat.recipes.schema import Train
from qat.tasks.base import Batches, Task, need_model, read_records, split, value_of

log = logging.getLogger(__name__)
IGNORED = -100
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
Sample = dict[str, list[int]]


class CausalLM(Task):
    """Next-token cross entropy, mean over the tokens with a label. Batch: input_ids, labels, attention_mask [B, T]."""

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(**batch).loss, {}


def build(train: Train) -> tuple[CausalLM, Batches, Any]:
    """(module, data, tokenizer) from a recipe's `train`. Raises QATError for a model or data that cannot be used."""
    folder = need_model(train)
    read_config(folder)
    tokenizer = load_tokenizer(train.tokenizer or folder)
    data = make_data(train, tokenizer)
    if train.offload:
        scratch = Path(train.out or ".")
        scratch.mkdir(parents=True, exist_ok=True)
        model = load_on_disk(folder, scratch, auto="AutoModelForCausalLM")
    else:
        model = load_model(folder, auto="AutoModelForCausalLM", dtype=torch.float32)
    if getattr(model, "loss_type", None) is None:
        # what transformers takes for a class whose name says nothing of its loss (GPT2LMHeadModel), with a notice
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit and train.seq_len > limit:
        raise QATError(f"train.seq_len={train.seq_len} is longer than the {limit} positions of the model in {folder}")
    largest = max(max(sample["input_ids"]) for sample in (*data.train, *data.val))
    size: int = config.vocab_size
    if largest >= size:
        raise QATError(f"the tokenizer gives token {largest}, the model in {folder} has {size}")
    return CausalLM(model.train(), train), data, tokenizer


def make_data(train: Train, tokenizer: Any) -> Batches:
    """Packed or chat samples, split by record unless `train.val_data` is given."""
    records = read_records(train.data, "train.data")
    held_out = read_records(train.val_data, "train.val_data") if train.val_data else []
    chat = train.chat_key in records[0]
    make = chat_samples if chat else packed_samples
    if not held_out:
        records, held_out = split(records, train.val_fraction, train.seed)
    samples = make(records, tokenizer, train)
    if not samples:
        raise QATError(_too_little(train, chat))
    validation = make(held_out, tokenizer, train) if held_out else []
    if not validation and not train.val_data:
        # One document, or validation documents shorter than a sequence: the end of the text is held out instead.
        samples, validation = _cut_end(samples, train.val_fraction)
    if not validation:
        log.warning("nothing is left to validate on; give train.val_data or more text")
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    return Batches(samples, validation, train, lambda batch: padded(batch, pad))


def _cut_end(samples: list[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    count = min(max(1, round(fraction * len(samples))), len(samples) - 1) if fraction > 0 else 0
    return (samples[:-count], samples[-count:]) if count else (samples, [])


def _too_little(train: Train, chat: bool) -> str:
    if chat:
        return (
            f"train.data: no conversation has a token of an answer within train.seq_len={train.seq_len} tokens; "
            "raise train.seq_len or check the roles"
        )
    length = f"train.seq_len={train.seq_len}"
    return f"train.data: the text is shorter than one sequence of {length} tokens; add text or lower it"


def packed_samples(records: list[dict[str, Any]], tokenizer: Any, train: Train) -> list[Sample]:
    """Text of `records` end to end in blocks of seq_len; labels are the tokens themselves."""
    stream: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [value_of(record, train.text_key, "train.text_key", str) for record in records]
    if not any(text.strip() for text in texts):
        raise QATError(f"train.data: the texts under train.text_key={train.text_key!r} are all empty")
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += ids + end
    length = train.seq_len
    starts = range(0, len(stream) - length + 1, length)
    return [{"input_ids": (block := stream[i : i + length]), "labels": block} for i in starts]


def chat_samples(records: list[dict[str, Any]], tokenizer: Any, train: Train) -> list[Sample]:
    """Conversations cut to seq_len; those without a token to learn are left out."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise QATError(
            f"train.data holds conversations under train.chat_key={train.chat_key!r}, but the tokenizer has no chat "
            "template; use the tokenizer of a chat model, or plain text"
        )
    marked = isinstance(template, str) and _MARKS.search(template) is not None
    found: list[Sample] = []
    for record in records:
        messages = value_of(record, train.chat_key, "train.chat_key", list)
        _check_messages(messages, train)
        try:
            samples = [_by_marks(messages, tokenizer)] if marked else _by_difference(messages, tokenizer)
        except QATError:
            raise
        except Exception as problem:  # jinja2's own errors and whatever a template raises
            raise QATError(f"the chat template refuses a conversation of train.data: {problem}") from None
        for sample in samples:
            cut = {key: value[: train.seq_len] for key, value in sample.items()}
            if any(label != IGNORED for label in cut["labels"][1:]):
                found.append(cut)
    return found


def _check_messages(messages: list[Any], train: Train) -> None:
    where = f"train.chat_key={train.chat_key!r}"
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise QATError(f"{where}: a message needs the keys 'role' and 'content', but one is {str(message)[:60]!r}")
    if not any(message["role"] == "assistant" for message in messages):
        raise QATError(f"{where}: a conversation has no message of the role 'assistant', so there is nothing to learn")


def _by_marks(messages: list[Any], tokenizer: Any) -> Sample:
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], out["assistant_masks"]
    return {"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]}


def _by_difference(messages: list[Any], tokenizer: Any) -> list[Sample]:
    def render(count: int, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        return text

    whole = render(len(messages))
    within: list[tuple[int, int]] = []
    samples: list[Sample] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto = render(index + 1)
        prompt = render(index, prompt=True) if index else ""
        span = (_shared(prompt, upto), len(upto))
        if whole.startswith(upto):
            within.append(span)
        else:
            samples.append(_tokens(upto, [span], tokenizer))
    if within:
        samples.append(_tokens(whole, within, tokenizer))
    return samples


def _shared(a: str, b: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _tokens(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> Sample:
    """Tokens of `text`, labelled where they begin inside one of the spans of characters."""
    if tokenizer.is_fast:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = out["input_ids"]
        learned = [any(a <= begin < b for a, b in spans) for begin, _ in out["offset_mapping"]]
    else:
        # No offsets: tokenize piece by piece, as at inference, where the prompt is tokenized without its answer.
        ids, learned, at = [], [], 0
        for a, b in [*spans, (len(text), len(text))]:
            for piece, inside in ((text[at:a], False), (text[a:b], True)):
                part = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
                ids, learned = ids + part, learned + [inside] * len(part)
            at = b
    return {"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, learned, strict=True)]}


def padded(samples: list[Sample], pad: int) -> dict[str, Tensor]:
    """int64 [B, T], T the longest sample: padding has attention 0 and no label."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def stack(key: str, fill: int) -> Tensor:
        return torch.tensor([sample[key] + [fill] * (longest - len(sample[key])) for sample in samples])

    mask = torch.tensor([[1] * len(s["input_ids"]) + [0] * (longest - len(s["input_ids"])) for s in samples])
    return {"input_ids": stack("input_ids", pad), "labels": stack("labels", IGNORED), "attention_mask": mask}
