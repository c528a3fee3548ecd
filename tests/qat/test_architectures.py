"""Harmlessness on models that nobody here wrote: transformers architectures of different kinds, from their config.

Each is planned, prepared, trained one step, rehearsed, exported as compressed-tensors and read back, and taken back to
what it was: hooks, attributes, tying, training flags and state-dict keys before = after. One recipe for all: Linear
layers at 4 bits, in groups of 32 where that divides the inputs of all of them and per channel elsewhere; what is not a
Linear layer is listed with keep_float. docs/architectures.md is this table; each test compares its row with the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qat
from qat.export import export as export_model
from qat.layers import QATLayer
from qat.plan import Plan
from qat.quantizers import Quantizer
from qat.recipes import Recipe, from_dict

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 1200, generator=torch.Generator().manual_seed(0))
MEL = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Architecture:
    """A kind of model: how to build it, what to feed it, and what is expected of it."""

    kind: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    # types that the rule quantizes
    types: tuple[str, ...] = ("Linear",)
    # layers that their parents read past the layer's own forward: the rehearsal has to name one of them
    bypassed: tuple[str, ...] = ()
    # words of the reason for which compressed-tensors does not take it; empty: exported and read back
    refused: str = ""
    # layers that stay in float besides other classes
    also_float: tuple[str, ...] = field(default=())


def text(**more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": IDS, **more}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "decoder",
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **HEADS, **TOKENS, num_key_value_heads=1)),
        text(labels=IDS),
    ),
    "gpt2": Architecture(
        "decoder with transposed Conv1D layers",
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=2, **TOKENS)),
        text(labels=IDS),
        types=("Conv1D",),
        refused="compressed-tensors holds quantized Linear layers, not Conv1D",
        also_float=("lm_head",),
    ),
    "gemma": Architecture(
        "decoder with a scaled embedding tied to its head",
        lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**SMALL, **HEADS, **TOKENS, num_key_value_heads=1, head_dim=32, sliding_window=8)
        ),
        text(labels=IDS),
        also_float=("lm_head",),
    ),
    "opt": Architecture(
        "decoder with learned positions",
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=96,
                hidden_size=64,
                ffn_dim=64,
                num_hidden_layers=2,
                word_embed_proj_dim=64,
                **HEADS,
                **TOKENS,
            )
        ),
        text(labels=IDS),
        also_float=("lm_head",),
    ),
    "bert": Architecture(
        "encoder",
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **HEADS, pad_token_id=0)),
        text(labels=torch.tensor([0, 1])),
    ),
    "deberta": Architecture(
        "encoder with disentangled attention",
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(
                **SMALL,
                **HEADS,
                pad_token_id=0,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                max_relative_positions=8,
            )
        ),
        text(labels=torch.tensor([0, 1])),
    ),
    "t5": Architecture(
        "encoder-decoder",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=96,
                d_model=64,
                d_kv=32,
                d_ff=64,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
                **TOKENS,
            )
        ),
        text(labels=IDS),
        also_float=("lm_head",),
    ),
    "bart": Architecture(
        "encoder-decoder with a scaled embedding",
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=96,
                d_model=64,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=32,
                decoder_start_token_id=2,
                forced_eos_token_id=2,
                **TOKENS,
            )
        ),
        text(labels=IDS),
        also_float=("lm_head",),
    ),
    "mixtral": Architecture(
        "mixture of experts",
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**SMALL, **HEADS, **TOKENS, num_key_value_heads=1, num_local_experts=4)
        ),
        text(labels=IDS),
        types=("Linear", "Experts"),
        refused="compressed-tensors holds quantized Linear layers, not MixtralExperts",
    ),
    "vit": Architecture(
        "vision transformer",
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=64, intermediate_size=64, num_hidden_layers=2, image_size=32, patch_size=8, **HEADS
            )
        ),
        {"pixel_values": PIXELS, "labels": torch.tensor([0, 1])},
    ),
    "resnet": Architecture(
        "convnet",
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=2)
        ),
        {"pixel_values": PIXELS, "labels": torch.tensor([0, 1])},
        types=("Linear", "Conv2d"),
        refused="compressed-tensors holds quantized Linear layers, not Conv2d",
    ),
    "wav2vec2": Architecture(
        "speech encoder with a weight-normed convolution",
        lambda: hf.Wav2Vec2ForSequenceClassification(
            hf.Wav2Vec2Config(
                **SMALL,
                **HEADS,
                conv_dim=(32, 32),
                conv_stride=(5, 4),
                conv_kernel=(10, 8),
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
                num_feat_extract_layers=2,
                classifier_proj_size=64,
                mask_time_prob=0.0,
                layerdrop=0.0,
            )
        ),
        {"input_values": SOUND, "labels": torch.tensor([0, 1])},
    ),
    "whisper": Architecture(
        "speech encoder-decoder",
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                vocab_size=96,
                d_model=64,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                num_mel_bins=16,
                max_source_positions=20,
                max_target_positions=32,
                decoder_start_token_id=1,
                begin_suppress_tokens=[],
                **TOKENS,
            )
        ),
        {"input_features": MEL, "labels": IDS},
        also_float=("proj_out",),
    ),
    "mamba": Architecture(
        "state space",
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(
                vocab_size=96,
                hidden_size=64,
                state_size=8,
                num_hidden_layers=2,
                time_step_rank=32,
                use_mambapy=False,
                **TOKENS,
            )
        ),
        text(labels=IDS),
        # the mixer computes `self.dt_proj.weight @ time_step` itself
        bypassed=("dt_proj",),
        also_float=("lm_head",),
    ),
}


def recipe_for(model: nn.Module, case: Architecture, without: tuple[str, ...] = ()) -> Recipe:
    """The generic recipe: a group of 32 where it divides, else one scale per channel; the rest listed as float."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    grouped = case.types == ("Linear",) and all(m.in_features % 32 == 0 for m in linear)
    weight = {"bits": 4, "quantizer": "lsq", "granularity": "group" if grouped else "channel"}
    rules: dict[str, Any] = {
        "everything": {"match": ["*"], "keep_float": True},
        "weights": {
            "match": ["*"],
            "types": list(case.types),
            "weight": {**weight, "group_size": 32 if grouped else None},
        },
    }
    for index, name in enumerate((*case.also_float, *without)):
        rules[f"float{index}"] = {"match": [name, f"*.{name}"], "keep_float": True}
    return from_dict({"name": "generic", "strict": True, "rules": rules})


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Classes, names, identities, flags, hooks and attributes of everything that is the user's."""
    ours = [m for m in model.modules() if isinstance(m, Quantizer)]
    named = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if m not in ours and "qat_state" not in n]
    hooks = [key for key in vars(nn.Linear(1, 1)) if key.endswith("_hooks")]
    return {
        "modules": [(name, id(m)) for name, m in named],
        "training": [(name, m.training) for name, m in named],
        "hooks": [(name, key, list(getattr(m, key).items())) for name, m in named for key in hooks if getattr(m, key)],
        "attributes": [(n, sorted(k for k in vars(m) if k != "_qat" and "_quantizer" not in k)) for n, m in named],
        "tied": (getattr(model, "_tied_weights_keys", None), getattr(model, "all_tied_weights_keys", None)),
        "keys": [k for k in model.state_dict() if "quantizer" not in k and "qat_state" not in k],
        "parameters": [
            (name, id(p), p.requires_grad, p.dtype)
            for name, p in model.named_parameters(remove_duplicate=False)
            if "quantizer" not in name
        ],
    }


def built(name: str) -> tuple[nn.Module, Architecture]:
    torch.manual_seed(0)
    case = ARCHITECTURES[name]
    return case.build().eval(), case


def marked(model: nn.Module) -> list[str]:
    """Hooks and mixed flags, as a user's script would have set them; returns what the hooks see."""
    seen: list[str] = []
    module = next(m for m in model.modules() if isinstance(m, nn.Linear))
    module.register_forward_hook(lambda m, a, y: seen.append("forward"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    module.mine = "attribute"
    next(m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.Dropout | nn.Embedding | nn.BatchNorm2d)).train()
    return seen


def one_step(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loss = model(**inputs).loss
    loss.backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    optimizer.step()
    model.zero_grad()
    qat.after_optimizer_step(model)
    return float(loss.detach())


def prepared(model: nn.Module, case: Architecture) -> Plan:
    """Prepared with the generic recipe, minus the layers that the rehearsal has found to be bypassed."""
    recipe = recipe_for(model, case, case.bypassed)
    planned = qat.plan(model, recipe)
    assert qat.prepare(model, recipe).rows == planned.rows
    return planned


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_harmless(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    model, case = built(name)
    seen = marked(model)
    # the first forward comes first: transformers installs hooks of its own then
    with torch.no_grad():
        y = model(**case.inputs).loss
    before = snapshot(model)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]

    if case.bypassed:
        qat.prepare(model, recipe_for(model, case))
        with pytest.raises(qat.QATError, match="|".join(case.bypassed)):
            qat.rehearse(model, **case.inputs)
        qat.unprepare(model)
    plan = prepared(model, case)
    assert plan.rows and snapshot(model) == before
    qat.rehearse(model, **case.inputs)
    assert snapshot(model) == before
    seen.clear()
    loss = one_step(model, case.inputs)
    assert abs(loss - float(y)) < 1.0 and set(seen) == {"forward", "backward"}
    learned = [p for m in model.modules() if isinstance(m, Quantizer) for p in m.learned()]
    assert learned and any(bool(p.detach().any()) for p in learned)

    bundle = qat.convert(model)
    for key in bundle:
        layer, _, weight = key.rpartition(".")
        parameter = model.get_parameter(key)
        fake = getattr(model.get_submodule(layer), f"{weight}_quantizer")(parameter)
        assert torch.equal(bundle[key].dequantize(), fake)
    outcome = exported(model, case, tmp_path)
    row = f"| {name} | {case.kind} | {len(plan.rows)} | {plan.coverage:.1f} % | {outcome} |"
    record_property("cases", row)
    assert row in PAGE.read_text(encoding="utf-8").splitlines()

    trained = {key: value.clone() for key, value in model.state_dict().items() if key in values}
    qat.unprepare(model)
    assert snapshot(model) == before and [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
    model.load_state_dict(values)
    with torch.no_grad():
        assert torch.equal(model(**case.inputs).loss, y)
    assert not any(isinstance(m, QATLayer | Quantizer) for m in model.modules())


def exported(model: nn.Module, case: Architecture, folder: Path) -> str:
    """Write and read back with the consumer's own code (which `export` itself compares), or the reason."""
    try:
        receipt = export_model(model, folder / "out", format="compressed-tensors")
    except qat.ExportError as problem:
        assert case.refused and case.refused in str(problem), str(problem)
        assert not (folder / "out").exists()
        return f"refused: {case.refused}"
    assert not case.refused, "this is exported now: say so here and on the page"
    quantized = [record for record in receipt.tensors if record.spec is not None]
    assert len(quantized) == len(qat.convert(model))
    return "exported, read back equal"


@pytest.mark.parametrize("name", [name for name, case in ARCHITECTURES.items() if case.also_float])
def test_a_head_that_shares_its_weight_gets_no_grid_of_its_own(name: str) -> None:
    model, case = built(name)
    with pytest.raises(qat.QATError, match="share one weight but not one grid"):
        qat.plan(model, recipe_for(model, replace(case, types=("Linear",), also_float=())))


def test_experts_may_stay_in_float(tmp_path: Path) -> None:
    model, case = built("mixtral")
    case = replace(case, types=("Linear",), refused="")
    prepared(model, case)
    one_step(model, case.inputs)
    assert exported(model, case, tmp_path).startswith("exported")


def test_enough_kinds_are_covered() -> None:
    exported_ones = [name for name, case in ARCHITECTURES.items() if not case.refused]
    assert len(ARCHITECTURES) >= 10 and len(exported_ones) >= 7
    assert len({case.kind for case in ARCHITECTURES.values()}) == len(ARCHITECTURES)
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [row.split(" ")[1] for row in rows[1:]] == list(ARCHITECTURES)
