"""Wrong recipes, one mistake each: the message starts with the key path and says what is allowed."""

import copy
from pathlib import Path
from typing import Any

import pytest

from qat.errors import RecipeError
from qat.recipes import checks, from_dict

RIGHT: dict[str, Any] = {
    "name": "right",
    "rules": {
        "linears": {
            "match": ["*"],
            "types": ["Linear"],
            "weight": {"bits": 4, "granularity": "group", "group_size": 32, "quantizer": "lsq"},
            "input": {"bits": 8, "granularity": "token", "quantizer": "absmax"},
        },
        "head": {"match": ["*lm_head"], "keep_float": True, "optional": True},
    },
    "phases": {"wait": {"steps": 10, "quantize": False}, "qat": {"steps": -1}},
}
W = "rules.linears.weight"
I = "rules.linears.input"  # noqa: E741
O = "rules.linears.output"  # noqa: E741

# (what is set, the start of the message, a part of its rest)
WRONG: list[tuple[dict[str, Any], str, str]] = [
    # unknown keys
    ({"nmae": "x"}, "nmae: unknown key", 'did you mean "name"?; allowed: name, description'),
    ({"rules.linears.wieght": {}}, "rules.linears.wieght: unknown key", 'did you mean "weight"?'),
    ({f"{W}.group": 32}, f"{W}.group: unknown key", "allowed: bits, granularity, group_size"),
    ({"phases.qat.step": 3}, "phases.qat.step: unknown key", 'did you mean "steps"?'),
    ({"distill": {"teachr": "x"}}, "distill.teachr: unknown key", 'did you mean "teacher"?'),
    ({"export": {"target": []}}, "export.target: unknown key", 'did you mean "targets"?'),
    ({"train": {"learning_rate": 1}}, "train.learning_rate: unknown key", "allowed: task, model"),
    # wrong types
    ({"name": 3}, "name: 3 is not allowed", "give text"),
    ({"name": None}, "name: null is not allowed", "give text"),
    ({"strict": "yes"}, 'strict: "yes" is not allowed', "give true or false"),
    ({"rules": []}, "rules: [] is not a mapping", ""),
    ({"rules.linears": "all"}, 'rules.linears: "all" is not a mapping', "allowed keys: match"),
    ({"rules.linears.match": "*"}, 'rules.linears.match: "*" is not a list', 'write ["*"]'),
    ({"rules.linears.match": [1]}, "rules.linears.match[0]: 1 is not allowed", "give text"),
    ({W: 4}, f"{W}: 4 is not a mapping", "allowed keys: bits"),
    ({f"{W}.bits": "4"}, f'{W}.bits: "4" is not allowed', "give a whole number"),
    ({f"{W}.bits": 4.0}, f"{W}.bits: 4.0 is not allowed", "give a whole number"),
    ({f"{W}.bits": True}, f"{W}.bits: true is not allowed", "give a whole number"),
    ({f"{W}.bits": None}, f"{W}.bits: null is not allowed", "give a whole number"),
    ({f"{W}.zero_point": None}, f"{W}.zero_point: null is not allowed", "give text"),
    ({"phases": "qat"}, 'phases: "qat" is not a mapping', ""),
    ({"phases.qat.bits": {"linears": "8"}}, 'phases.qat.bits.linears: "8" is not allowed', "give a whole number"),
    ({"export": None}, "export: null is not a mapping", "allowed keys: targets"),
    ({"train": {"lr": "fast"}}, 'train.lr: "fast" is not allowed', "give a number"),
    ({"train": {"data": None}}, "train.data: null is not a list", "write []"),
    ({"train": {"data": "corpus.txt"}}, 'train.data: "corpus.txt" is not a list', 'write ["corpus.txt"]'),
    # values
    ({"name": "../up"}, 'name: "../up" is not allowed', "use letters, digits"),
    ({f"{W}.bits": 0}, f"{W}.bits: 0 is not allowed", "allowed: 1..8"),
    ({f"{W}.bits": 9}, f"{W}.bits: 9 is not allowed", "allowed: 1..8"),
    ({f"{I}.bits": 16}, f"{I}.bits: 16 is not allowed", "allowed: 1..8"),
    ({f"{W}.granularity": "groups"}, f'{W}.granularity: "groups" is not allowed', 'did you mean "group"?'),
    ({f"{W}.zero_point": "zero"}, f'{W}.zero_point: "zero" is not allowed', "allowed: none, int, float"),
    ({f"{W}.scale": "fp8"}, f'{W}.scale: "fp8" is not allowed', "allowed: portable, fp32, fp16, bf16"),
    ({f"{W}.grid": "nf5"}, f'{W}.grid: "nf5" is not allowed', "nf4"),
    ({f"{W}.grid": "nf4", f"{W}.bits": 3}, f"{W}.bits: 3 is not allowed with grid=nf4", "allowed: 4"),
    (
        {f"{W}.grid": "seq", f"{W}.bits": 2, f"{W}.signed": False},
        f"{W}.signed: false is not allowed with grid=seq",
        "true",
    ),
    (
        {f"{W}.grid": "binary", f"{W}.bits": 1, f"{W}.narrow": True},
        f"{W}.narrow: true is not allowed with grid=",
        "false",
    ),
    (
        {f"{W}.signed_scale": True, f"{W}.narrow": True},
        f"{W}.signed_scale: true is not allowed with these",
        "narrow=false",
    ),
    (
        {f"{W}.signed_scale": True, f"{W}.scale": "e8m0"},
        f"{W}.signed_scale: true is not allowed with scale=e8m0",
        "sign",
    ),
    (
        {f"{W}.percentile": 99.9, f"{W}.quantizer": "mse"},
        f"{W}.percentile: 99.9 is not allowed with quantizer=mse",
        "quantizer=lsq",
    ),
    ({f"{W}.percentile": 0.999, f"{W}.quantizer": "lsq"}, f"{W}.percentile: 0.999 is not allowed", "(50, 100]"),
    (
        {f"{W}.percentile": 99.0, f"{W}.quantizer": "lsq", f"{W}.signed_scale": True},
        f"{W}.percentile: 99.0 is not allowed with signed_scale=true",
        "null",
    ),
    (
        {f"{W}.desc_act": True, f"{W}.granularity": "channel", f"{W}.group_size": None, f"{W}.quantizer": "lsq"},
        f"{W}.desc_act: true is not allowed with granularity=channel, quantizer=lsq",
        "granularity=group",
    ),
    (
        {f"{W}.desc_act": True, f"{W}.quantizer": "absmax"},
        f"{W}.desc_act: true is not allowed with granularity=group, quantizer=absmax",
        "mse or lsq",
    ),
    ({f"{I}.desc_act": True}, f"{I}.desc_act: true is not allowed", "allowed: false"),
    ({f"{W}.quantizer": "lqs"}, f'{W}.quantizer: "lqs" is not allowed', 'did you mean "lsq"?'),
    ({f"{W}.quantizer": "ema"}, f'{W}.quantizer: "ema" is not allowed', "allowed: absmax, minmax, mse, lsq"),
    (
        {f"{I}.quantizer": "mse"},
        f'{I}.quantizer: "mse" is not allowed',
        "allowed: absmax, minmax, lsq, lsq_plus, pact, ema, local",
    ),
    ({f"{W}.group_size": 0}, f"{W}.group_size: 0 is not allowed", "allowed: 1 or more"),
    # combinations within a slot
    ({f"{W}.group_size": None}, f"{W}.group_size: null is not allowed with granularity=group", "give one"),
    ({f"{W}.granularity": "channel"}, f"{W}.group_size: 32 is not allowed with granularity=channel", "null"),
    ({f"{W}.granularity": "token"}, f'{W}.granularity: "token" is not allowed', "allowed: tensor, channel, group"),
    ({f"{I}.granularity": "channel"}, f'{I}.granularity: "channel" is not allowed', "allowed: tensor, token, group"),
    ({f"{I}.quantizer": "ema"}, f'{I}.granularity: "token" is not allowed with quantizer=ema', "allowed: tensor"),
    ({f"{I}.quantizer": "lsq"}, f'{I}.granularity: "token" is not allowed with quantizer=lsq', "allowed: tensor"),
    ({f"{W}.bits": 1, f"{W}.narrow": True}, f"{W}.bits: 1 is not allowed with narrow=true", "allowed: 2..8"),
    ({f"{W}.zero_point": "int", f"{W}.narrow": True}, f"{W}.narrow: true is not allowed for unsigned", "false"),
    ({f"{I}.signed": False, f"{I}.narrow": True}, f"{I}.narrow: true is not allowed for unsigned", "allowed: false"),
    ({f"{W}.zero_point": "float", f"{W}.signed": True}, f"{W}.signed: true is not allowed", "null, false"),
    ({f"{W}.signed": False}, f"{W}.signed: false is not allowed with zero_point=none", "zero_point=int or float"),
    ({f"{W}.quantizer": "minmax"}, f'{W}.zero_point: "none" is not allowed with quantizer=minmax', "int, float"),
    ({f"{I}.zero_point": "int"}, f'{I}.zero_point: "int" is not allowed with quantizer=absmax', "allowed: none"),
    # rules
    ({"rules": {}}, "rules: there is no rule", "add one"),
    ({"rules.linears": None}, "rules: no rule has a weight, an input or a cache", "add one"),
    ({"rules.empty": {"match": ["*"]}}, "rules.empty: the rule does nothing", "keep_float: true"),
    ({"rules.linears.keep_float": True}, "rules.linears.keep_float: true is not allowed beside", "leave one of them"),
    ({"rules.linears.match": []}, "rules.linears.match: [] matches nothing", 'write ["*"]'),
    ({"rules.linears.match": [""]}, 'rules.linears.match[0]: "" matches nothing', "glob"),
    ({"rules.linears.match": ["*", "re:("]}, 'rules.linears.match[1]: "re:(" is not a regular expression', ""),
    ({"rules.linears.types": ["nn.Linear"]}, 'rules.linears.types[0]: "nn.Linear" is not the short name', "Linear"),
    # phases
    ({"phases": {}}, "phases: there is none", "qat: {steps: -1}"),
    ({"phases.qat.steps": 100}, "phases.qat.steps: 100 is not allowed in the last phase", "allowed: -1"),
    ({"distill": {"hidden": -1.0}}, "distill.hidden: -1.0 is not allowed", "0 or more"),
    ({"distill": {"hidden": 1.0}}, "distill.hidden: 1.0 does nothing with enabled=false", "allowed: 0"),
    ({"init": {"method": "gptq2"}}, 'init.method: "gptq2" is not allowed', "none, gptq, gptq_latent"),
    ({"init": {"epochs": 0}}, "init.epochs: 0 is not allowed", "1 or more"),
    ({"init": {"lr": 0}}, "init.lr: 0.0 is not allowed", "more than 0"),
    ({"init": {"method": "blockwise"}}, "init.method: blockwise is not allowed with a first phase (wait)", "none"),
    ({"init": {"batches": 0}}, "init.batches: 0 is not allowed", "1 or more"),
    ({"init": {"weighted": True}, f"{W}.quantizer": "absmax"}, "init.weighted: true is not allowed with", "mse or lsq"),
    ({"init": {"weighted": True}}, "init.weighted: true is not allowed with a first phase (wait) in float", "false"),
    ({"init": {"weighted": True}, f"{W}.percentile": 99.0}, "init.weighted: true is not allowed with", "percentile"),
    ({"train": {"offload": True}}, "train.offload: true is not allowed with train.accelerator=", "cpu"),
    (
        {"train": {"offload": True, "accelerator": "cpu"}},
        "train.offload: true is not allowed with phases.qat.steps=-1",
        "phases.qat.steps=0",
    ),
    (
        {"init": {"file": "x", "weighted": True}},
        'init.file: "x" is not allowed with method=none, weighted=true',
        "null",
    ),
    ({"init": {"imatrix": "x.gguf"}}, 'init.imatrix: "x.gguf" is not allowed with method=none, weighted=false', "null"),
    ({"init": {"damp": -1.0}}, "init.damp: -1.0 is not allowed", "0 or more"),
    ({"init": {"method": "gptq"}}, "init.method: gptq is not allowed with a first phase (wait) in float", "none"),
    ({"init": {"method": "gptq"}, f"{W}.quantizer": "absmax"}, "init.method: gptq is not allowed with", "mse or lsq"),
    (
        {"fold": {"method": "rotat"}},
        'fold.method: "rotat" is not allowed',
        'did you mean "rotate"?; allowed: none, rotate',
    ),
    ({"fold": {"seed": 1}}, "fold.seed: 1 is not allowed with method=none", "method=rotate"),
    ({"fold": {"method": "rotate", "alpha": 0.4}}, "fold.alpha: 0.4 is not allowed with method=rotate", "smooth"),
    ({"fold": {"method": "rotate", "batches": 4}}, "fold.batches: 4 is not allowed with method=", "smooth or awq"),
    ({"fold": {"method": "rotate", "seed": -1}}, "fold.seed: -1 is not allowed", "0 or more"),
    ({"fold": {"method": "smooth", "alpha": 1.5}}, "fold.alpha: 1.5 is not allowed", "[0, 1]"),
    ({"fold": {"method": "awq", "batches": 0}}, "fold.batches: 0 is not allowed", "1 or more"),
    ({"fold": {"method": "awq"}}, "fold.method: awq is not allowed with a first phase in float", "none or rotate"),
    ({"fold": {"network": {"reads": {"a": ["b"]}}}}, "fold.network: it is not allowed with method=none", "leave it"),
    ({"fold": {"method": "rotate", "network": {"reads": {"a": ["b"]}}}}, "fold.network.writes: [] is not", "name what"),
    ({"fold": {"method": "rotate", "network": {"writes": ["a"]}}}, "fold.network.reads: {} is not", "name the norms"),
    (
        {"fold": {"method": "rotate", "network": {"writes": ["a"], "reads": {"b": []}}}},
        "fold.network.reads.b: [] is not",
        "",
    ),
    (
        {"fold": {"method": "rotate", "network": {"writes": [""], "reads": {"b": ["c"]}}}},
        'fold.network.writes: "" names nothing',
        "",
    ),
    (
        {"fold": {"method": "rotate", "network": {"writes": ["a"], "reads": {"b": ["*.c"]}}}},
        'fold.network.reads: "*.c" has more stars than "b"',
        "",
    ),
    (
        {"fold": {"method": "rotate", "network": {"writes": ["a"], "reads": {"b": ["c"]}, "head_dim": 0}}},
        "fold.network.head_dim: 0 is not allowed",
        "1 or more",
    ),
    ({"phases.wait.steps": -1}, "phases.wait.steps: -1 is not allowed before the last", "allowed: 0 or more"),
    ({"phases.wait.steps": -7}, "phases.wait.steps: -7 is not allowed before the last", "allowed: 0 or more"),
    ({"phases.qat.ramp": -1}, "phases.qat.ramp: -1 is not allowed", "allowed: 0 or more"),
    ({"phases.wait.ramp": 5}, "phases.wait.ramp: 5 is not allowed with quantize=false", "allowed: 0"),
    ({"phases.qat.dampen": -0.1}, "phases.qat.dampen: -0.1 is not allowed", "allowed: 0 or more"),
    ({"phases.qat.freeze_oscillating": 1.0}, "phases.qat.freeze_oscillating: 1.0 is not allowed", "allowed: [0, 1)"),
    ({"phases.wait.dampen": 0.1}, "phases.wait.dampen: 0.1 is not allowed with quantize=false", "allowed: 0"),
    ({"phases.qat.freeze_batch_norm": "yes!"}, "phases.qat.freeze_batch_norm:", "true"),
    ({"batch_norm": {"reestimate": -1}}, "batch_norm.reestimate: -1 is not allowed", "allowed: 0 or more"),
    (
        {"batch_norm": {"fold": True}},
        "batch_norm.fold: true is not allowed with phases.qat.freeze_batch_norm=false",
        "allowed: false, or freeze_batch_norm: true in the last phase",
    ),
    ({"batch_norm": {"pairs": {"a": "b"}}}, "batch_norm.pairs: it does nothing with fold=false", "fold: true"),
    (
        {"batch_norm": {"fold": True, "pairs": {"a.*": "b.*.*"}}},
        'batch_norm.pairs: "b.*.*" has more stars than "a.*"',
        "which it belongs to",
    ),
    ({"batch_norm": {"fold": True, "pairs": {"a": ""}}}, 'batch_norm.pairs: "" names nothing', "names of a layer"),
    (
        {"batch_norm": {"fold": True}, "phases.qat": {"dampen": 0.1, "freeze_batch_norm": True}},
        "batch_norm.fold: true is not allowed with phases.qat.dampen=0.1",
        "allowed: false, or 0 there",
    ),
    (
        {"batch_norm": {"fold": True}, "init": {"method": "gptq"}},
        'batch_norm.fold: true is not allowed with init.method="gptq"',
        "init.method: none",
    ),
    ({"batch_norm": {"batches": 5}}, "batch_norm.batches: unknown key", "allowed: reestimate"),
    ({f"{W}.quantizer": "pact"}, f'{W}.quantizer: "pact" is not allowed', "allowed: absmax"),
    ({f"{I}.quantizer": "quest"}, f'{I}.quantizer: "quest" is not allowed', "allowed: absmax"),
    ({f"{I}.quantizer": "pact"}, f'{I}.granularity: "token" is not allowed with quantizer=pact', "allowed: tensor"),
    ({f"{W}.quantizer": "lsq_plus"}, f'{W}.zero_point: "none" is not allowed with quantizer=lsq_plus', "int, float"),
    ({"phases.wait": {"steps": 4, "ramp": 5}}, "phases.wait.ramp: 5 is longer than the phase", "allowed: 0..4"),
    (
        {"phases": {"wait": None, "qat": {"steps": 0}}, f"{I}.quantizer": "local"},
        "phases.qat.steps: 0 is not allowed with rules.linears.input.quantizer=local",
        "range is seen in training",
    ),
    ({"phases.qat.quantize": False}, "phases: none of them quantizes", "quantize: true"),
    ({f"{O}": {"granularity": "tensor"}}, f'{O}.granularity: "tensor" is not allowed', "allowed: token, group"),
    ({f"{O}": {"granularity": "token", "quantizer": "ema"}}, f'{O}.quantizer: "ema" is not', "allowed: absmax, minmax"),
    ({f"{O}": {"granularity": "token", "zero_point": "int"}}, f'{O}.zero_point: "int" is not', "allowed: none"),
    (
        {"rules.head.output": {"granularity": "token"}},
        "rules.head.keep_float: true is not allowed",
        "rules.head.output",
    ),
    (
        {"rules.cache": {"cache": {"granularity": "channel"}}},
        'rules.cache.cache.granularity: "channel" is not allowed',
        "allowed: tensor, token, group",
    ),
    (
        {"rules.cache": {"cache": {"granularity": "token", "quantizer": "ema"}}},
        'rules.cache.cache.granularity: "token" is not allowed with quantizer=ema',
        "allowed: tensor, or",
    ),
    (
        {"rules.cache": {"cache": {"granularity": "tensor", "quantizer": "local"}}},
        'rules.cache.cache.quantizer: "local" is not allowed',
        "allowed: absmax",
    ),
    (
        {
            "phases": {"wait": None, "qat": {"steps": 0}},
            "rules.cache": {"cache": {"granularity": "tensor", "quantizer": "ema"}},
        },
        "phases.qat.steps: 0 is not allowed with rules.cache.cache.quantizer=ema",
        "range is seen in training",
    ),
    ({"rules.head.cache": {"granularity": "token"}}, "rules.head.keep_float: true is not allowed", "rules.head.cache"),
    (
        {"rules.cache": {"types": ["Attention"], "cache": {"granularity": "token"}, "weight": {"bits": 4}}},
        "rules.cache.types: [Attention] has no weight, input or output",
        "give rules.cache.cache a rule of its own",
    ),
    (
        {"rules.cache": {"cache": {"granularity": "token", "desc_act": True}}},
        "rules.cache.cache.desc_act: true is not allowed, it is about weights",
        "allowed: false",
    ),
    ({"phases.qat.train": "scale"}, 'phases.qat.train: "scale" is not allowed', "allowed: all, scales"),
    ({"phases.qat.train": "scales"}, 'phases.qat.train: "scales" is not allowed', "allowed: all, or scales in every"),
    ({"phases.wait.train": "scales"}, 'phases.wait.train: "scales" is not allowed', "beside phases that train weights"),
    (
        {"phases": {"wait": None, "qat": {"train": "scales", "freeze_scales": True}}},
        'phases.qat.train: "scales" is not allowed',
        "with freeze_scales=true",
    ),
    (
        {"phases": {"a": {"train": "scales", "steps": 1, "quantize": False}, "qat": {"train": "scales"}}},
        'phases.a.train: "scales" is not allowed',
        "with quantize=false",
    ),
    (
        {"phases": {"wait": None, "qat": {"train": "scales", "bits": {"linears": 3}}}},
        'phases.qat.train: "scales" is not allowed',
        'with bits={"linears": 3}',
    ),
    (
        {"phases": {"wait": None, "qat": {"train": "scales"}}, f"{W}.quantizer": "lsq_plus", f"{W}.zero_point": "int"},
        'phases.qat.train: "scales" is not allowed',
        "lsq_plus, whose zero points belong to the codes",
    ),
    (
        {"phases": {"wait": None, "qat": {"train": "scales"}}, f"{W}.quantizer": "dual_lsq"},
        'phases.qat.train: "scales" is not allowed',
        "dual_lsq, whose codes have a scale of their own",
    ),
    (
        {"phases.qat.dampen": 0.1, f"{W}.quantizer": "dual_lsq"},
        "phases.qat.dampen: 0.1 is not allowed with rules.linears.weight.quantizer=dual_lsq",
        "allowed: 0, or quantizer=lsq",
    ),
    (
        {"phases": {"wait": None, "qat": {"train": "scales"}}, f"{W}.quantizer": "mse"},
        'phases.qat.train: "scales" is not allowed',
        "where no weight has a learned scale",
    ),
    ({"phases.qat.bits": {"linear": 8}}, "phases.qat.bits.linear: there is no such rule", 'did you mean "linears"?'),
    ({"phases.qat.bits": {"head": 8}}, "phases.qat.bits.head: the rule has no weight", "allowed: linears"),
    ({"phases.qat.bits": {"linears": 12}}, "phases.qat.bits.linears: 12 is not allowed", "allowed: 1..8"),
    ({"phases.wait.bits": {"linears": 8}}, 'phases.wait.bits: {"linears": 8} is not allowed with', "quantize=false"),
    (
        {"phases.qat.bits": {"linears": 8}, f"{W}.zero_point": "int"},
        "phases.qat.bits.linears: 8 is not allowed for a weight with zero_point=int and quantizer=lsq",
        "quantizer=absmax or minmax",
    ),
    # distillation, export, training
    ({"distill": {"loss": "ce"}}, 'distill.loss: "ce" is not allowed', "allowed: kl, kl_topk, cakld, mse, cosine"),
    ({"distill": {"weight": 1.5}}, "distill.weight: 1.5 is not allowed", "allowed: [0, 1]"),
    ({"distill": {"enabled": True, "weight": 0}}, "distill.weight: 0 is not allowed with enabled=true", "(0, 1]"),
    ({"distill": {"temperature": 0}}, "distill.temperature: 0", "allowed: more than 0"),
    ({"export": {"targets": ["ggfu"]}}, 'export.targets[0]: "ggfu" is not allowed', 'did you mean "gguf"?'),
    ({"export": {"targets": ["exl3"]}}, 'export.targets[0]: "exl3" is not allowed', "the nearest format is exl2"),
    ({"export": {"targets": ["gguf", "gguf"]}}, 'export.targets[1]: "gguf" is there twice', "leave one out"),
    ({"train": {"task": "lm"}}, 'train.task: "lm" is not allowed', "allowed: causal_lm, image_classification"),
    ({"train": {"scheduler": "linear"}}, 'train.scheduler: "linear" is not allowed', "allowed: cosine, constant"),
    ({"train": {"precision": "int8"}}, 'train.precision: "int8" is not allowed', "allowed: 32-true"),
    ({"train": {"precision": 32}}, "train.precision: 32 is not allowed", "give text"),
    ({"train": {"logger": "tb"}}, 'train.logger: "tb" is not allowed', "allowed: none, csv, wandb"),
    ({"train": {"lr": 0}}, "train.lr: 0.0 is not allowed", "more than 0"),
    ({"train": {"betas": [0.9]}}, "train.betas: [0.9] is not allowed", "two numbers"),
    ({"train": {"betas": [0.9, 1.0]}}, "train.betas[1]: 1.0 is not allowed", "allowed: [0, 1)"),
    ({"train": {"val_fraction": 1}}, "train.val_fraction: 1.0 is not allowed", "allowed: [0, 1)"),
    ({"train": {"max_steps": 0}}, "train.max_steps: 0 is not allowed", "allowed: 1 or more"),
    ({"train": {"seed": -1}}, "train.seed: -1 is not allowed", "allowed: 0 or more"),
    ({"train": {"text_key": ""}}, 'train.text_key: "" is not allowed', "leave it out"),
]

# Unusual, and right.
RIGHT_TOO: list[dict[str, Any]] = [
    {},
    {f"{I}.signed": False},
    {f"{I}": {"bits": 8, "granularity": "tensor", "quantizer": "ema"}},
    {f"{I}": {"bits": 4, "granularity": "tensor", "quantizer": "lsq", "zero_point": "int"}},
    {f"{I}.quantizer": "minmax", f"{I}.zero_point": "float"},
    {f"{W}.bits": 1},
    {f"{W}.bits": 2, f"{W}.narrow": True},
    {f"{W}.zero_point": "int", f"{W}.quantizer": "minmax", "phases.qat.bits": {"linears": 8}},
    {f"{W}.zero_point": "float", f"{W}.quantizer": "mse"},
    {"phases.qat.bits": {"linears": 8}},
    {"rules.head": None},
    {"phases.wait.steps": 0},
    {"rules.cache": {"match": ["*k_proj"], "output": {"bits": 4, "granularity": "group", "group_size": 16}}},
    {"rules.cache": {"cache": {"grid": "e4m3", "granularity": "tensor", "quantizer": "ema", "scale": "e8m0"}}},
    {"rules.cache": {"cache": {"bits": 4, "granularity": "group", "group_size": 16}}},
    {"init": {"method": "blockwise"}, "phases.wait.steps": 0, f"{W}.quantizer": "absmax"},
    {"phases": {"wait": {"train": "scales", "quantize": True, "steps": 9}, "qat": {"train": "scales"}}},
    {"train": {"devices": 4, "lr": 1}},
    {"export": {"targets": ["gguf", "compressed-tensors"]}},
]


def changed(change: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(RIGHT)
    for path, value in change.items():
        *parents, last = path.split(".")
        node = data
        for part in parents:
            node = node[part]
        node[last] = value
    return data


def test_a_file_is_enough_for_a_quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(checks.quantizer_names()) == {*checks.WEIGHT_QUANTIZERS, *checks.INPUT_QUANTIZERS}
    (tmp_path / "quantizers").mkdir()
    for name in ("__init__.py", "_shared.py", "base.py", "fresh.py", "notes.md"):
        (tmp_path / "quantizers" / name).touch()
    monkeypatch.setattr(checks, "files", lambda package: tmp_path)
    assert checks.quantizer_names() == ["fresh"]
    # mutation: only the names in the tables -> red
    from_dict(changed({f"{W}.quantizer": "fresh", f"{I}.quantizer": "fresh"}))


def test_there_are_enough_of_them() -> None:
    assert len(WRONG) >= 40


@pytest.mark.parametrize("change", RIGHT_TOO, ids=str)
def test_right_recipes_pass(change: dict[str, Any]) -> None:
    from_dict(changed(change))


@pytest.mark.parametrize(("change", "start", "rest"), WRONG, ids=[start for _, start, _ in WRONG])
def test_wrong_recipes_are_refused_in_one_sentence(change: dict[str, Any], start: str, rest: str) -> None:
    with pytest.raises(RecipeError) as error:
        from_dict(changed(change))
    message = str(error.value)
    at = f"; {message.removeprefix('recipe: ')}".find(f"; {start}")
    assert at >= 0 and rest in message, message
    assert "\n" not in message
