"""Wrong recipes, overrides and arguments, and recipes that do not fit the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tiny import RECIPE, make_llama, make_tokenizer

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
    ("unknown fold", RECIPE + "fold: {method: rotat}\n", ("fold.method", "rotat", '"rotate"')),
    ("deep nesting", "[" * 5000, ("nested too deeply",)),
]


@pytest.mark.parametrize(("text", "says"), [case[1:] for case in RECIPES], ids=[case[0] for case in RECIPES])
def test_recipe(refused: Refused, tmp_path: Path, llama: Path, text: str | bytes, says: tuple[str, ...]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused("plan", file, "--model", llama, says=("wrong.yaml", *says))
    refused("train", file, f"train.model={llama}", "train.data=[x.txt]", says=("wrong.yaml", *says))


def test_fold_of_a_network_that_is_another_one(train: Refused, data: Path) -> None:
    network = "fold.network={writes: [wte], reads: {ln_f: [lm_head]}}"
    train("fold.method=rotate", network, f"train.data=[{data}]", says=("fold.network.writes", "'wte' names nothing"))


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
def test_override(refused: Refused, llama: Path, recipe_file: Path, override: str, says: tuple[str, ...]) -> None:
    refused("plan", recipe_file, "--model", llama, override, says=says)


# ---- arguments -----------------------------------------------------------------------------------------------------

ARGUMENTS = [
    (["plna"], "plna"),
    (["plan"], "RECIPE"),
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
    ("8 bits in AWQ", ["export.targets=[awq]", "rules.linears.weight.bits=8"], ("awq", "q_proj", "bits=8", "bits: 4")),
    (
        "5 bits in GPTQ",
        ["export.targets=[gptq]", "rules.linears.weight.bits=5"],
        ("gptq", "q_proj", "bits=5", "nearest: bits: 8"),
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
