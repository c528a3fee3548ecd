"""Data of language models: what is learned, what is masked, and every way in which it can be wrong."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.errors import QATError
from qat.recipes.schema import Train
from qat.tasks import causal_lm
from qat.tasks.causal_lm import IGNORED, chat_samples, make_data, packed_samples, padded

MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }};{% endgeneration %}{% else %}{{ m['content'] }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('#')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %};{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [("user", "hello"), ("assistant", "yes#no"), ("user", "add"), ("assistant", "return")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def learned(sample: dict[str, list[int]], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in sample["labels"] if label != IGNORED]))


def test_packed_blocks_are_the_text_in_order(tokenizer: Any) -> None:
    train = Train(seq_len=16)
    samples = packed_samples([{"text": "def add(a, b):\n" * 9}, {"text": "class Point:\n" * 9}], tokenizer, train)
    assert len(samples) > 2 and all(len(s["input_ids"]) == 16 and s["labels"] == s["input_ids"] for s in samples)
    stream = tokenizer("def add(a, b):\n" * 9)["input_ids"] + [tokenizer.eos_token_id]
    stream += tokenizer("class Point:\n" * 9)["input_ids"]
    together = [i for s in samples for i in s["input_ids"]]
    assert together == stream[: len(together)]


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_only_answers_are_learned(tokenizer: Any, template: str) -> None:
    changed = with_template(tokenizer, template)
    (sample,) = chat_samples([{"messages": MESSAGES}], changed, Train())
    assert changed.decode(sample["input_ids"]) == "<user>hello;<assistant>yes#no;<user>add;<assistant>return;"
    assert learned(sample, changed) == "yes#no;return;"


def test_answers_that_a_template_rewrites_later_are_samples_of_their_own(tokenizer: Any) -> None:
    changed = with_template(tokenizer, FORGETFUL)
    first, whole = chat_samples([{"messages": MESSAGES}], changed, Train())
    assert changed.decode(first["input_ids"]) == "<user>hello;<assistant>yes#no;"
    assert learned(first, changed) == "yes#no;"
    assert changed.decode(whole["input_ids"]) == "<user>hello;<assistant>no;<user>add;<assistant>return;"
    assert learned(whole, changed) == "return;"


def test_tokenizers_without_offsets_learn_the_same_text(tokenizer: Any) -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return tokenizer(text, add_special_tokens=add_special_tokens)

    sample = causal_lm._tokens("<user>hello;<assistant>yes;", [(23, 27)], Slow())
    assert learned(sample, tokenizer) == "yes;"


def test_padding_has_no_label_and_no_attention() -> None:
    batch = padded([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}], 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_validation_is_split_by_record_and_repeatable(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"text": f"def f{i}(x):\n" * 20}) + "\n" for i in range(10)), encoding="utf-8")
    train = Train(data=[str(file)], seq_len=16, val_fraction=0.2)
    data, again = make_data(train, tokenizer), make_data(train, tokenizer)
    assert data.train == again.train and data.val == again.val

    def functions(samples: Any) -> set[str]:
        text = tokenizer.decode([i for s in samples for i in s["input_ids"]])
        return {f"def f{i}(" for i in range(10) if f"def f{i}(" in text}

    assert len(functions(data.val)) == 2 and not functions(data.val) & functions(data.train)


def test_one_document_keeps_its_end_for_validation(tokenizer: Any, text_file: Path) -> None:
    data = make_data(Train(data=[str(text_file)], seq_len=16), tokenizer)
    assert data.train and data.val


def test_parquet_and_jsonl_give_the_same_samples(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    records = [{"code": f"def f{i}(x):\n" * 20} for i in range(4)]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    made = [
        make_data(Train(data=[str(tmp_path / name)], text_key="code", seq_len=16), tokenizer).train
        for name in ("a.parquet", "a.jsonl")
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize("shuffle_twice", [1, 2])
def test_training_order_depends_on_the_seed_alone(tokenizer: Any, text_file: Path, shuffle_twice: int) -> None:
    def order(seed: int) -> list[list[int]]:
        data = make_data(Train(data=[str(text_file)], seq_len=16, batch_size=4, seed=seed), tokenizer)
        torch.manual_seed(shuffle_twice)
        return [batch["input_ids"].tolist() for batch in data.train_dataloader()]

    assert order(1) == order(1) != order(2)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "train.model is not set"),
    "model folder missing": ({"model": "nowhere"}, "nowhere does not exist"),
    "no data": ({"data": []}, "train.data is empty"),
    "data missing": ({"data": ["nowhere.txt"]}, "nowhere.txt does not exist"),
    "unknown ending": ({"data": ["odd.xyz"]}, "ends in .xyz"),
    "empty folder": ({"data": ["empty"]}, "holds no file ending in"),
    "not utf-8": ({"data": ["latin.txt"]}, "is not UTF-8"),
    "blank text": ({"data": ["blank.txt"]}, "all empty"),
    "broken jsonl": ({"data": ["broken.jsonl"]}, "line 1 is not JSON"),
    "broken parquet": ({"data": ["broken.parquet"]}, "cannot be read as parquet"),
    "empty jsonl": ({"data": ["void.jsonl"]}, "void.jsonl"),
    "wrong key": ({"data": ["good.jsonl"], "text_key": "body"}, "train.text_key='body' is in no record"),
    "not text": ({"data": ["good.jsonl"], "text_key": "number"}, "holds int where str is needed"),
    "too short": ({"data": ["short.txt"]}, "shorter than one sequence"),
    "too long sequences": ({"seq_len": 4096, "data": ["long.txt"]}, "longer than the 64 positions"),
    "validation missing": ({"val_data": ["gone.txt"]}, "train.val_data: gone.txt does not exist"),
    "no chat template": ({"data": ["chat.jsonl"]}, "no chat template"),
    "no tokenizer": ({"tokenizer": "empty"}, "holds no tokenizer"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_for_what_is_wrong(
    name: str,
    llama_folder: Path,
    text_file: Path,
    chat_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.xyz").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "void.jsonl").write_text("")
    (tmp_path / "good.jsonl").write_text(json.dumps({"text": "a" * 500, "number": 3}) + "\n")
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "long.txt").write_text("def f(x): return x + 1\n" * 4000)
    settings, words = CASES[name]
    train = Train(**{"model": str(llama_folder), "data": [str(text_file)], "seq_len": 32, **settings})
    with pytest.raises(QATError) as refused:
        causal_lm.build(train)
    message = str(refused.value)
    assert words in message and "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "hello"}], "no message of the role 'assistant'"),
        ([{"role": "assistant"}], "needs the keys 'role' and 'content'"),
        ("hello", "holds str where list is needed"),
        (
            [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}],
            "no conversation has a token",
        ),
    ],
)
def test_conversations_that_teach_nothing(tokenizer: Any, tmp_path: Path, messages: Any, words: str) -> None:
    changed = with_template(tokenizer, PLAIN.replace(";", ""))
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    with pytest.raises(QATError, match=words):
        make_data(Train(data=[str(file)]), changed)


def test_template_that_raises_is_one_sentence(tokenizer: Any, chat_file: Path) -> None:
    changed = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(QATError, match=r"chat template refuses.*roles must alternate"):
        make_data(Train(data=[str(chat_file)]), changed)


def test_tokens_outside_the_model_are_refused(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "narrow"
    shutil.copytree(llama_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab.update({piece: index + 1000 for piece, index in vocab.items() if index > 256})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(QATError, match="the model in"):
        causal_lm.build(Train(model=str(folder), data=[str(text_file)], seq_len=32))


def test_gpt2_gives_no_notice_about_its_loss(
    tokenizer: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    module, data, _ = causal_lm.build(Train(model=str(tmp_path / "gpt2"), data=[str(text_file)], seq_len=16))
    said: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", said.append)
    assert module.loss(next(iter(data.train_dataloader())))[0].item() > 0
    # mutation: loss_type stays None -> red
    assert said == []
