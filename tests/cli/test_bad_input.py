"""Wrong recipes, models, data, checkpoints and folders: exit code 2, one sentence, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RECIPE, check_refusal, listing, make_llama, make_tokenizer

Refused = Callable[..., str]

# ---- recipes -------------------------------------------------------------------------------------------------------

# (what is wrong, text of the file, what the sentence has to name)
RECIPES: list[tuple[str, str | bytes, tuple[str, ...]]] = [
    ("unknown key", "name: x\nruels: {}\n", ("ruels", "unknown key", '"rules"')),
    ("unknown inner key", RECIPE.replace("bits: 4", "bit: 4"), ("rules.linears.weight.bit", '"bits"')),
    ("wrong type", RECIPE.replace("bits: 4", "bits: four"), ("rules.linears.weight.bits", "four", "a whole number")),
    ("too many bits", RECIPE.replace("bits: 4", "bits: 9"), ("rules.linears.weight.bits", "9", "1..8")),
    ("unknown scale", RECIPE.replace("fp16", "fp12"), ("rules.linears.weight.scale", "fp12", "portable")),
    ("unknown quantizer", RECIPE.replace("absmax", "lsqq"), ("rules.linears.weight.quantizer", '"lsq"')),
    ("group without its size", RECIPE.replace("group_size: 32, ", ""), ("rules.linears.weight.group_size", "null")),
    (
        "absmax with a zero point",
        RECIPE.replace("zero_point: none", "zero_point: int"),
        ("rules.linears.weight.zero_point", "absmax"),
    ),
    ("unknown format", RECIPE.replace("[gguf]", "[guff]"), ("export.targets[0]", "guff", '"gguf"')),
    ("unknown task", RECIPE.replace("causal_lm", "chess"), ("train.task", "chess", "causal_lm")),
    ("negative steps", RECIPE.replace("max_steps: 2", "max_steps: -2"), ("train.max_steps", "-2", "1 or more")),
    ("no rule quantizes", "name: x\nrules: {a: {keep_float: true}}\n", ("rules", "nothing would be quantized")),
    ("no rules", "name: x\nrules: {}\n", ("rules", "nothing would be quantized")),
    ("bad regex", RECIPE.replace('match: ["*"]', 'match: ["re:("]', 1), ("rules.linears.match[0]", "re:(")),
    ("last phase ends", RECIPE + "phases: {qat: {steps: 5}}\n", ("phases.qat.steps", "-1")),
    ("bits of no rule", RECIPE + "phases: {qat: {bits: {linear: 8}}}\n", ("phases.qat.bits.linear", '"linears"')),
    ("interpolation", RECIPE.replace("name: tiny", "name: ${oc.env:HOME}"), ("name", "interpolation")),
    ("yaml tag", RECIPE.replace("name: tiny", "name: !!python/object/apply:os.getcwd []"), ("tag", "line 2")),
    ("yaml alias", "a: &a [1]\nb: *a\n", ("anchors and aliases",)),
    ("key twice", "name: x\nname: y\n", ('"name" is there twice',)),
    ("broken yaml", "rules: {linears: [\n", ("not YAML", "line 2")),
    ("a list", "- name: x\n", ("a recipe is a mapping",)),
    ("empty file", "", ("a recipe is a mapping",)),
    ("binary file", bytes(range(256)), ("cannot be read as UTF-8",)),
    ("nan", RECIPE + "distill: {temperature: .nan}\n", ("distill.temperature", "finite")),
    ("deep nesting", "[" * 5000, ("nested too deeply",)),
]


@pytest.mark.parametrize(("text", "says"), [case[1:] for case in RECIPES], ids=[case[0] for case in RECIPES])
def test_recipe(refused: Refused, tmp_path: Path, llama: Path, text: str | bytes, says: tuple[str, ...]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused("plan", file, "--model", llama, says=("wrong.yaml", *says))
    refused("train", file, f"train.model={llama}", "train.data=[x.txt]", says=("wrong.yaml", *says))


def test_recipe_that_does_not_exist(refused: Refused, tmp_path: Path, llama: Path) -> None:
    refused("plan", "no.yaml", "--model", llama, says=("no.yaml", "does not exist"))
    refused("plan", f"{tmp_path}/", "--model", llama, says=(str(tmp_path), "is a folder"))
    refused("plan", "w4a16_g182", "--model", llama, says=("w4a16_g182", '"w4a16_g128"'))
    refused("recipes", "w9", says=("w9", "w8a8"))


OVERRIDES = [
    ("rules.linears.weight.bits", ("rules.linears.weight.bits", "=value")),
    ("rules.linears.weight.bits=", ("the value is missing", "rules.linears.weight.bits=null")),
    ("rules.linear.weight.bits=3", ("rules.linear", '"linears"')),
    ("rules.linears.weight.bits.x=3", ("rules.linears.weight.bits", "without keys")),
    ("rules.linears.weight.bits=x", ("rules.linears.weight.bits", "a whole number")),
    ("train.lr=[", ("train.lr=[", "not YAML")),
    ("=3", ("=3",)),
]


@pytest.mark.parametrize(("override", "says"), OVERRIDES, ids=[case[0] for case in OVERRIDES])
def test_override(
    refused: Refused, llama: Path, recipe_file: Path, override: str, says: tuple[str, ...]
) -> None:
    refused("plan", recipe_file, "--model", llama, override, says=says)


# ---- arguments -----------------------------------------------------------------------------------------------------

ARGUMENTS = [
    (["plna"], "plna"),
    (["plan"], "RECIPE"),
    (["plan", "w8a8"], "--model"),
    (["plan", "w8a8", "--modle", "x"], "--modle"),
    (["export", "x.ckpt", "--model", "x"], "--out"),
    (["verify"], "FOLDER"),
    (["verify", "a", "b"], "b"),
    (["report"], "FOLDER"),
    (["train"], "RECIPE"),
    (["--colour", "recipes"], "--colour"),
]


@pytest.mark.parametrize(("arguments", "says"), ARGUMENTS, ids=[" ".join(case[0]) for case in ARGUMENTS])
def test_argument(refused: Refused, arguments: list[str], says: str) -> None:
    refused(*arguments, says=(says, "--help"))


# ---- model folders -------------------------------------------------------------------------------------------------


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edited(folder: Path, **changes: Any) -> None:
    """config.json of `folder` with changes; None removes a key."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_model_that_does_not_exist(refused: Refused, tmp_path: Path, recipe_file: Path) -> None:
    refused("plan", recipe_file, "--model", "meta/llama", says=("meta/llama", "does not exist"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    refused("plan", recipe_file, "--model", file, says=(str(file), "is a file"))


def test_model_folder_without_config(refused: Refused, tmp_path: Path, recipe_file: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("plan", recipe_file, "--model", empty, says=(str(empty), "config.json"))


CONFIGS: list[tuple[str, str | dict[str, Any], tuple[str, ...]]] = [
    ("cut short", '{"model_type": "lla', ("config.json", "JSON")),
    ("binary", "\x00\x01\x02", ("config.json", "JSON")),
    ("a list", "[1, 2]", ("config.json", "model_type")),
    ("no model type", {"model_type": None}, ("config.json", "model_type")),
    ("unknown model type", {"model_type": "lama"}, ("config.json", "lama", "unknown")),
    (
        "code of its own",
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
        ("config.json", "mine", "is not run"),
    ),
    ("hidden size that is text", {"hidden_size": "many"}, ("config.json",)),
    ("heads that do not divide", {"num_attention_heads": 7, "head_dim": None}, ("config.json",)),
]


@pytest.mark.parametrize(("config", "says"), [case[1:] for case in CONFIGS], ids=[case[0] for case in CONFIGS])
def test_model_config(
    refused: Refused, tmp_path: Path, llama: Path, recipe_file: Path, config: Any, says: tuple[str, ...]
) -> None:
    folder = copied(llama, tmp_path / "model")
    if isinstance(config, str):
        (folder / "config.json").write_text(config)
    else:
        edited(folder, **config)
    refused("plan", recipe_file, "--model", folder, says=says)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Enough text for a run."""
    file = tmp_path / "data.txt"
    file.write_text("the grid you deploy on is the grid you train on. " * 200)
    return file


@pytest.fixture
def train(refused: Refused, recipe_file: Path, llama: Path) -> Refused:
    """`qat train` with the tiny recipe and model; settings may be given again."""

    def run(*overrides: str, says: str | tuple[str, ...]) -> str:
        return refused("train", recipe_file, f"train.model={llama}", *overrides, says=says)

    return run


def test_weights_cut_short(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    train(f"train.model={folder}", f"train.data=[{data}]", says=(str(file), "not a whole safetensors file"))


def test_weights_corrupted(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    train(f"train.model={folder}", f"train.data=[{data}]", says=(str(file), "not a whole safetensors file"))


def test_weights_missing(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    train(f"train.model={folder}", f"train.data=[{data}]", says=("model.safetensors", "do not exist"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}))
    train(f"train.model={folder}", f"train.data=[{data}]", says=("model-1-of-2.safetensors", "do not exist"))
    index.write_text("{}")
    train(f"train.model={folder}", f"train.data=[{data}]", says=(str(index), "weight_map"))


def test_weights_incomplete(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    train(f"train.model={folder}", f"train.data=[{data}]", says=("model.layers.1.mlp.up_proj.weight", "at random"))


def test_weights_of_another_shape(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    edited(folder, intermediate_size=160)
    train(f"train.model={folder}", f"train.data=[{data}]", says=(str(folder),))


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def test_pickled_weights_are_not_read(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, folder / "pytorch_model.bin")
    train(f"train.model={folder}", f"train.data=[{data}]", says=("pytorch_model.bin", "pickle"))
    assert not (tmp_path / "unpickled").exists()


# ---- recipes that do not fit the model -----------------------------------------------------------------------------

FITS: list[tuple[str, list[str], tuple[str, ...]]] = [
    (
        "rule that matches nothing",
        ["rules.linears.match=['*.q_porj']"],
        ("rules.linears matches no layer", "q_proj", "optional: true"),
    ),
    (
        "group that does not divide",
        ["rules.linears.weight.group_size=48", "export.targets=[]"],
        ("model.layers.0.self_attn.q_proj", "group_size=48", "64 inputs"),
    ),
    ("attention module", ["rules.linears.types=[MultiheadAttention]"], ("rules.linears.types", "MultiheadAttention")),
    ("recurrent module", ["rules.linears.types=[LSTM]"], ("rules.linears.types", "LSTM")),
    ("misspelt type", ["rules.linears.types=[Liner]"], ("rules.linears.types", "'Linear'")),
    (
        "strict with layers left over",
        ["strict=true", "rules.embeddings=null"],
        ("strict", "model.embed_tokens", "keep_float"),
    ),
    (
        "zero point in GGUF",
        ["rules.linears.weight={bits: 4, granularity: group, group_size: 32, zero_point: int, quantizer: minmax}"],
        ("gguf", "model.layers.0.self_attn.q_proj", "zero_point"),
    ),
    ("groups of 16 in GGUF", ["rules.linears.weight.group_size=16"], ("gguf", "model.layers.0.self_attn.q_proj", "32")),
    ("float32 scales in GGUF", ["rules.linears.weight.scale=fp32"], ("gguf", "q_proj", "fp32")),
    (
        "embedding in compressed-tensors",
        [
            "export.targets=[compressed-tensors]",
            "rules.embeddings={types: [Embedding], weight: {bits: 8, granularity: channel, scale: portable}}",
        ],
        ("compressed-tensors", "model.embed_tokens", "not Embedding"),
    ),
    (
        "float minimum in compressed-tensors",
        [
            "export.targets=[compressed-tensors]",
            "rules.linears.weight={bits: 4, granularity: group, group_size: 32, zero_point: float, quantizer: minmax}",
        ],
        ("compressed-tensors", "q_proj", "zero_point=float"),
    ),
]


@pytest.mark.parametrize(("overrides", "says"), [case[1:] for case in FITS], ids=[case[0] for case in FITS])
def test_recipe_that_does_not_fit(
    refused: Refused,
    train: Refused,
    llama: Path,
    recipe_file: Path,
    data: Path,
    overrides: list[str],
    says: tuple[str, ...],
) -> None:
    refused("plan", recipe_file, "--model", llama, *overrides, says=says)
    train(f"train.data=[{data}]", *overrides, says=says)


def test_tied_weights_under_different_rules(refused: Refused, tmp_path: Path, recipe_file: Path) -> None:
    folder = tmp_path / "tied"
    make_llama(folder, make_tokenizer(folder), tie_word_embeddings=True)
    says = ("share one weight", "model.embed_tokens", "lm_head")
    refused("plan", recipe_file, "--model", folder, says=says)


def test_convolutions_in_compressed_tensors(refused: Refused, tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    folder = tmp_path / "resnet"
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(folder)
    overrides = ("export.targets=[compressed-tensors]", "rules.layers.types=[Conv2d]")
    says = ("compressed-tensors cannot hold", "convolution")
    refused("plan", "cnn_w4a4", "--model", folder, *overrides, says=says)


# ---- data ----------------------------------------------------------------------------------------------------------


def test_data_that_does_not_exist(train: Refused, tmp_path: Path) -> None:
    train("train.data=[no.txt]", says=("train.data", "no.txt", "does not exist"))
    train(says=("train.data", "empty"))
    (tmp_path / "nothing").mkdir()
    train("train.data=[nothing]", says=("train.data", "nothing"))
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    train("train.data=[x.xlsx]", says=("x.xlsx", ".jsonl"))


DATA: list[tuple[str, str, bytes, tuple[str, ...]]] = [
    ("empty text", "d.txt", b"", ("empty",)),
    ("short text", "d.txt", b"a", ("train.seq_len=16",)),
    ("text that is not UTF-8", "d.txt", b"\xff\xfe\x00" * 99, ("d.txt", "UTF-8")),
    ("empty jsonl", "d.jsonl", b"", ("d.jsonl",)),
    ("jsonl without the key", "d.jsonl", b'{"body": "text"}\n' * 9, ("train.text_key='text'", "'body'")),
    ("jsonl with another type", "d.jsonl", b'{"text": 3}\n' * 9, ("train.text_key='text'", "int")),
    ("malformed jsonl line", "d.jsonl", b'{"text": "a"}\n' * 2 + b'{"text": \n' + b'{"text": "b"}\n', ("d.jsonl", "line 3")),
    ("jsonl line that is no record", "d.jsonl", b'{"text": "a"}\n[1]\n', ("d.jsonl", "line 2")),
    ("broken parquet", "d.parquet", b"PAR1 or not", ("d.parquet",)),
    (
        "chat without a template",
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9,
        ("train.chat_key='messages'", "chat template"),
    ),
]


@pytest.mark.parametrize(("name", "content", "says"), [case[1:] for case in DATA], ids=[case[0] for case in DATA])
def test_data(train: Refused, tmp_path: Path, name: str, content: bytes, says: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    train(f"train.data=[{name}]", says=says)


CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user"}], ("messages", "'content'")),
        (["hello"], ("messages", "'role'")),
        ([{"role": "user", "content": "a"}], ("messages", "'assistant'")),
        ("hello", ("messages", "list")),
    ],
    ids=["no content", "no role", "no answer", "not a list"],
)
def test_chat(train: Refused, tmp_path: Path, llama: Path, messages: Any, says: tuple[str, ...]) -> None:
    words = tmp_path / "words"
    make_tokenizer(words)
    (words / "chat_template.jinja").write_text(CHAT)
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    train(f"train.tokenizer={words}", "train.data=[d.jsonl]", says=says)


# ---- training ------------------------------------------------------------------------------------------------------


def test_model_is_not_given(refused: Refused, recipe_file: Path, data: Path) -> None:
    refused("train", recipe_file, f"train.data=[{data}]", says=("train.model", "not set"))


def test_sequence_longer_than_the_model(train: Refused, data: Path) -> None:
    train(f"train.data=[{data}]", "train.seq_len=65", says=("train.seq_len=65", "64 positions"))


def test_tokenizer_of_another_model(train: Refused, tmp_path: Path, llama: Path, data: Path) -> None:
    small = tmp_path / "small"
    make_llama(small, 70)
    train(f"train.model={small}", f"train.tokenizer={llama}", f"train.data=[{data}]", says=("token", "has 70"))


def test_model_without_tokenizer(train: Refused, tmp_path: Path, data: Path) -> None:
    bare = tmp_path / "bare"
    make_llama(bare, 300)
    train(f"train.model={bare}", f"train.data=[{data}]", says=(str(bare), "no tokenizer"))


def test_resume(train: Refused, tmp_path: Path, data: Path, checkpoint: Path) -> None:
    given = f"train.data=[{data}]"
    train(given, "train.resume=no.ckpt", says=("no.ckpt",))
    (tmp_path / "noise.ckpt").write_bytes(b"noise" * 100)
    train(given, "train.resume=noise.ckpt", says=("train.resume", "noise.ckpt", "not a checkpoint"))
    train(given, f"train.resume={checkpoint}", says=("train.resume", str(checkpoint), "weights alone"))
    loaded = torch.load(checkpoint, weights_only=True)
    torch.save({**loaded, "optimizer_states": []}, tmp_path / "run.ckpt")
    other = "rules.linears.weight.bits=8"
    train(given, "train.resume=run.ckpt", other, says=("train.resume", "run.ckpt", "other rules or phases"))
    float_run = {"state_dict": {"model.lm_head.weight": torch.zeros(1)}, "optimizer_states": []}
    torch.save(float_run, tmp_path / "float.ckpt")
    train(given, "train.resume=float.ckpt", says="no quantization record")


def test_output_folder_is_in_the_way(train: Refused, tmp_path: Path, data: Path) -> None:
    (tmp_path / "out").write_text("a file")
    train(f"train.data=[{data}]", "train.out=out", says=("out",))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def export(refused: Refused, llama: Path, tmp_path: Path) -> Refused:
    """`qat export` of a checkpoint; settings may follow."""

    def run(checkpoint: Path | str, *options: object, model: Path = llama, says: str | tuple[str, ...]) -> str:
        return refused("export", checkpoint, "--model", model, "--out", tmp_path / "out", *options, says=says)

    return run


def test_checkpoint_that_is_none(export: Refused, tmp_path: Path, checkpoint: Path) -> None:
    export("no.ckpt", says=("no.ckpt", "no checkpoint"))
    export(tmp_path, says=(str(tmp_path), "no checkpoint"))
    file = tmp_path / "x.ckpt"
    for content in (b"", b"text", checkpoint.read_bytes()[:-2000], checkpoint.read_bytes()[:100]):
        file.write_bytes(content)
        export(file, says=(str(file), "is not a checkpoint"))


def test_checkpoint_that_runs_code(export: Refused, tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    torch.save({"state_dict": Bomb()}, file)
    export(file, says=(str(file), "without running code"))
    file.write_bytes(pickle.dumps(Bomb()))
    export(file, says=(str(file), "without running code"))
    assert not (tmp_path / "unpickled").exists()


def test_checkpoint_of_something_else(export: Refused, tmp_path: Path, llama: Path) -> None:
    from qat.hf import load_model

    file = tmp_path / "x.ckpt"
    torch.save([1, 2], file)
    export(file, says=(str(file), "no state dict but a list"))
    torch.save({"state_dict": 3}, file)
    export(file, says=(str(file), "no state dict but a int"))
    torch.save({"state_dict": {f"model.{k}": v for k, v in load_model(llama).state_dict().items()}}, file)
    export(file, says="no quantization record")


def test_checkpoint_of_another_model(export: Refused, tmp_path: Path, checkpoint: Path, llama: Path) -> None:
    deeper, wider, other = tmp_path / "deeper", tmp_path / "wider", tmp_path / "other"
    make_llama(deeper, make_tokenizer(deeper), num_hidden_layers=3)
    export(checkpoint, model=deeper, says=("last.ckpt", "model.layers.2"))
    make_llama(wider, make_tokenizer(wider), hidden_size=128)
    export(checkpoint, model=wider, says=("last.ckpt", "does not fit"))
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=99)).save_pretrained(other)
    export(checkpoint, model=other, says=("last.ckpt", "transformer.wte.weight"))
    smaller = tmp_path / "smaller"
    make_llama(smaller, make_tokenizer(smaller), num_hidden_layers=1)
    export(checkpoint, model=smaller, says=("last.ckpt", "model.layers.1"))


def test_checkpoint_with_a_damaged_record(export: Refused, tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "x.ckpt"
    entries = torch.load(checkpoint, weights_only=True)["state_dict"]
    key = next(key for key in entries if key.endswith("qat_state._extra_state"))
    entries[key] = entries[key][:50]
    torch.save({"state_dict": entries}, file)
    export(file, says=("record", "damaged"))


def test_checkpoint_that_diverged(export: Refused, tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "x.ckpt"
    entries = torch.load(checkpoint, weights_only=True)["state_dict"]
    entries["model.lm_head.weight"][0, 0] = float("nan")
    torch.save({"state_dict": entries}, file)
    export(file, says=("lm_head.weight", "not finite"))


def test_checkpoint_before_the_quantization_is_on(
    export: Refused, tmp_path: Path, llama: Path, recipe_file: Path
) -> None:
    import qat
    from qat.hf import load_model
    from qat.recipes import load_recipe

    model = load_model(llama)
    late = "phases={float: {steps: 10, quantize: false}, qat: {steps: -1}}"
    qat.prepare(model, load_recipe(recipe_file, [late]))
    file = tmp_path / "x.ckpt"
    torch.save(model.state_dict(), file)
    export(file, says=("step 0", "step 10"))


# ---- export folders ------------------------------------------------------------------------------------------------


def test_unknown_format(export: Refused, checkpoint: Path) -> None:
    export(checkpoint, "--format", "guff", says=("guff", "gguf", "compressed-tensors"))


def test_gguf_needs_a_tokenizer(export: Refused, tmp_path: Path, checkpoint: Path, llama: Path) -> None:
    bare = copied(llama, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    export(checkpoint, model=bare, says=("gguf cannot hold", "tokenizer"))
    export(checkpoint, "--tokenizer", bare, says=(str(bare), "no tokenizer"))
    (bare / "tokenizer.json").write_text("{")
    export(checkpoint, "--tokenizer", bare, says=("tokenizer", str(bare)))


def test_export_folder_is_in_the_way(export: Refused, tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    export(checkpoint, says=(str(out),))
    export(checkpoint, "--overwrite", says=(str(out),))
    assert (out / "thesis.tex").read_text() == "mine"
    shutil.rmtree(out)
    out.write_text("a file")
    export(checkpoint, says=(str(out),))


def test_export_folder_cannot_be_made(refused: Refused, tmp_path: Path, checkpoint: Path, llama: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    refused("export", checkpoint, "--model", llama, "--out", out, says=str(tmp_path / "file"))
    if sys.platform == "linux":
        refused("export", checkpoint, "--model", llama, "--out", "/proc/packed", says="/proc")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_export_folder_is_not_writable(refused: Refused, tmp_path: Path, checkpoint: Path, llama: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused("export", checkpoint, "--model", llama, "--out", locked / "out", says=str(locked))


def test_model_that_the_format_does_not_know(refused: Refused, tmp_path: Path) -> None:
    """GGUF names tensors by architecture: one that llama.cpp's converter does not have cannot be written."""
    from transformers import ResNetConfig, ResNetModel

    import qat
    from qat.recipes import load_recipe

    folder = tmp_path / "resnet"
    model = ResNetModel(ResNetConfig(embedding_size=32, hidden_sizes=[32], depths=[1]))
    model.save_pretrained(folder)
    qat.prepare(model, load_recipe("cnn_w4a4", ["rules.layers.input=null"]))
    torch.save(model.state_dict(), tmp_path / "x.ckpt")
    command = ("export", tmp_path / "x.ckpt", "--model", folder, "--out", tmp_path / "out")
    refused(*command, says=("0 export targets", "--format"))
    refused(*command, "--format", "gguf", says="gguf cannot hold this model")


# ---- verify --------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(exported: Path, tmp_path: Path) -> Path:
    return copied(exported, tmp_path / "packed")


def test_verify_what_is_no_export(refused: Refused, tmp_path: Path) -> None:
    refused("verify", "no", says="no folder no")
    refused("verify", tmp_path, says=("qat_receipt.json", str(tmp_path)))


def test_verify_tampered(refused: Refused, packed: Path) -> None:
    file = packed / "model.gguf"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    refused("verify", packed, says=("model.gguf",))


def test_verify_cut_short(refused: Refused, packed: Path) -> None:
    file = packed / "model.gguf"
    file.write_bytes(file.read_bytes()[:-100])
    refused("verify", packed, says=("model.gguf",))


def test_verify_missing(refused: Refused, packed: Path) -> None:
    (packed / "model.gguf").unlink()
    refused("verify", packed, says=("model.gguf",))


def forged(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "qat_receipt.json"
    receipt = json.loads(file.read_text())
    change(receipt)
    file.write_text(json.dumps(receipt))


RECEIPTS: list[tuple[str, Callable[[dict[str, Any]], Any], tuple[str, ...]]] = [
    ("hash of a tensor", lambda r: r["tensors"][0].update(sha256="0" * 64), ("not the trained weight",)),
    ("a tensor too many", lambda r: r["tensors"].append({**r["tensors"][0], "name": "x"}), ("x", "not in the files")),
    ("a tensor less", lambda r: r["tensors"].pop(), ("not in the receipt",)),
    ("shape", lambda r: r["tensors"][0].update(shape=[1]), ("shape",)),
    ("file outside", lambda r: r["files"][0].update(name="../../x"), ("outside",)),
    ("unknown format", lambda r: r.update(format="guff"), ("guff",)),
    ("other version", lambda r: r.update(version=99), ("version 99",)),
    ("missing entry", lambda r: r.pop("tensors"), ("qat_receipt.json",)),
    ("not a dtype", lambda r: r["tensors"][0].update(dtype="nn"), ("qat_receipt.json", "dtype")),
    ("impossible spec", lambda r: r["tensors"][0]["spec"].update(bits=40), ("bits",)),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in RECEIPTS], ids=[case[0] for case in RECEIPTS])
def test_verify_forged_receipt(
    refused: Refused, packed: Path, change: Callable[[dict[str, Any]], Any], says: tuple[str, ...]
) -> None:
    forged(packed, change)
    refused("verify", packed, says=says)


def test_verify_receipt_that_is_no_json(refused: Refused, packed: Path) -> None:
    for text in ("", "{", "[]", "null"):
        (packed / "qat_receipt.json").write_text(text)
        refused("verify", packed, says="qat_receipt.json")
    (packed / "qat_receipt.json").unlink()
    refused("verify", packed, says="qat_receipt.json")


# ---- report --------------------------------------------------------------------------------------------------------


def test_report_of_nothing(refused: Refused, tmp_path: Path) -> None:
    refused("report", "no", says="no")
    refused("report", tmp_path, says=str(tmp_path))


def test_report_of_damaged_results(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("results.json", "report.json"):
        (folder / name).write_text("{")
    refused("report", folder, says=str(folder))


# ---- in a process of its own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "no.yaml", "--model", "."], "no.yaml"),
        (["plan", "w8a8", "--model", "."], "config.json"),
        (["verify", "."], "qat_receipt.json"),
        (["train", "w8a8"], "train.model"),
        (["nothing"], "nothing"),
    ],
    ids=["recipe", "model", "folder", "train", "command"],
)
def test_process(tmp_path: Path, arguments: list[str], says: str) -> None:
    """Warnings of libraries, logging and exit handlers would show up here only."""
    before = listing(tmp_path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "qat.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    check_refusal(done.returncode, done.stderr, says)
    assert listing(tmp_path) == before
