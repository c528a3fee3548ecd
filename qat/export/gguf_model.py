"""Which transformers models a GGUF file can hold, and the header that tells llama.cpp about them.

    model_type          architecture   what differs
    llama, mistral      llama          rows of q_proj and k_proj are re-ordered: llama.cpp rotates neighbours,
                                       transformers the two halves of a head
    mixtral             llama          the same, and experts
    qwen2, qwen3        the same name
    qwen3_moe           qwen3moe       experts
    phi3                phi3           q, k and v are one matrix, as in transformers; so are gate and up
    gemma, gemma2       the same name  norms hold 1 + weight, computed in fp32 as transformers does in every forward;
    gemma3_text         gemma3         scales of attention, windows and their layers are llama.cpp's own constants

Tensor names come from the `gguf` package's own table. A re-ordering moves whole rows, so groups along a row keep their
scales: it is done on packed rows. Experts are [E, O, I] in both; their gate and up, one tensor in transformers, are two
in the file, which cuts between rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
# where llama.cpp was seen to use `.scale`; in qwen2, phi3 and gemma it leaves it out and gives NaN
_NVFP4 = ("llama", "mistral", "qwen3")
_ROTATED_PAIRS = ("llama",)
# what was seen to be computed alike; phi3, gemma and gemma2: default alone
_ROPE_TYPES = {
    "llama": ("default", "linear", "llama3", "yarn"),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3moe"), ("default", "linear", "yarn")),
    "gemma3": ("default", "linear"),
}
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
# of how many blocks the last attends to all of the context, and which number of blocks is another model to llama.cpp
_WINDOWS = {"gemma2": (2, 46), "gemma3": (6, 62)}
# transformers' parameter names of these models, relative to the module with the config
_OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_INNER = (
    *(f"self_attn.{p}_proj.{k}" for p in "qkvo" for k in ("weight", "bias")),
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    *(f"mlp.{p}_proj.{k}" for p in ("gate", "up", "down") for k in ("weight", "bias")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
_GATE_UP = "mlp.experts.gate_up_proj"
_EXPERTS = ("mlp.gate.weight", _GATE_UP, "mlp.experts.down_proj")
_NORMS = ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")
_NAMES = {
    "llama": (*_INNER, *_EXPERTS),
    "qwen3moe": (*_INNER, *_EXPERTS),
    "phi3": (
        *(f"{part}.weight" for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
        *(f"{norm}_layernorm.weight" for norm in ("input", "post_attention")),
    ),
    "gemma2": (*_INNER, *_NORMS),
    "gemma3": (*_INNER, *_NORMS),
}
ROPE_FACTORS = "rope_freqs.weight"


def model_reasons(config: Any, parameters: list[str]) -> list[str]:
    """Why a model with this config and these parameters cannot be a GGUF file; empty means it can."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return [f"GGUF files are written for the transformers models {known}, not for {kind}; use compressed-tensors"]
    found = []
    gemma = is_gemma(ARCHITECTURES[kind])
    activation, names = ("hidden_activation", ["gelu_pytorch_tanh"]) if gemma else ("hidden_act", ["silu", "swish"])
    chosen = getattr(config, activation, None) or names[0]
    if chosen not in names:
        found.append(f"{activation}={chosen!r}; llama.cpp computes this architecture with {names[0]}")
    rope = rope_settings(config)
    types = _ROPE_TYPES.get(ARCHITECTURES[kind], ("default",))
    if rope["rope_type"] not in types:
        found.append(f"rope type {rope['rope_type']!r}; GGUF export of {kind} knows {', '.join(types)}")
    if rope["rope_type"] == "yarn" and any(rope.get(word) is not None for word in _YARN):
        found.append(f"rope type yarn with {', '.join(_YARN)} other than its defaults is not known to this export")
    if kind != "phi3" and float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        found.append("partial_rotary_factor other than 1 is not known to this export")
    window, length = _window(config), config.max_position_embeddings
    if ARCHITECTURES[kind] not in _WINDOWS and window is not None and window < length:
        found.append(
            f"sliding_window={window}: llama.cpp attends to all of the context for this architecture; "
            f"set sliding_window to null or max_position_embeddings to at most {window}"
        )
    found += _gemma_reasons(config) if gemma else []
    if kind == "qwen3_moe" and (not config.norm_topk_prob or config.mlp_only_layers or config.decoder_sparse_step != 1):
        found.append("llama.cpp computes qwen3_moe with norm_topk_prob=true and experts in every block only")
    own = set(hf_names(ARCHITECTURES[kind], config.num_hidden_layers))
    unknown = [name for name in parameters if name not in own]
    if unknown:
        found.append(f"parameters that {kind} models do not have: {', '.join(unknown[:3])}; remove or merge them first")
    return found


def nvfp4_reasons(config: Any, parameters: list[str]) -> list[str]:
    """Why llama.cpp does not compute NVFP4 weights of this model with their scale of a tensor."""
    instead = "use scale: e8m0 in groups of 32 (MXFP4)"
    if config.model_type not in _NVFP4:
        known = ", ".join(_NVFP4)
        return [f"scale=nvfp4: llama.cpp uses the scale of a tensor in {known}, not in {config.model_type}; {instead}"]
    if any(name.endswith(".bias") for name in parameters):
        return [f"scale=nvfp4: llama.cpp has no place for it beside biases; {instead}"]
    return []


def is_gemma(architecture: str) -> bool:
    return architecture.startswith("gemma")


def _gemma_reasons(config: Any) -> list[str]:
    """What llama.cpp knows of these models without reading it."""
    architecture, found = ARCHITECTURES[config.model_type], []
    if not config.tie_word_embeddings:
        found.append("tie_word_embeddings=false: llama.cpp uses the embeddings of this architecture as its output head")
    if getattr(config, "use_bidirectional_attention", None):
        found.append("use_bidirectional_attention: llama.cpp looks back only")
    if architecture == "gemma":
        return found
    turns, odd = _WINDOWS[architecture]
    pattern = [
        "full_attention" if (i + 1) % turns == 0 else "sliding_attention" for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != pattern:
        found.append(
            f"layer_types: llama.cpp has full attention in the last of every {turns} blocks of {architecture} only"
        )
    by = config.hidden_size / config.num_attention_heads if config.num_hidden_layers == odd else config.head_dim
    if config.query_pre_attn_scalar != by:
        found.append(f"query_pre_attn_scalar={config.query_pre_attn_scalar}: llama.cpp computes with {by:g} here")
    caps = config.attn_logit_softcapping, config.final_logit_softcapping
    if architecture == "gemma2" and not all(caps):
        found.append("llama.cpp computes gemma2 with attn_logit_softcapping and final_logit_softcapping; set both")
    if architecture == "gemma3" and any(caps):
        found.append("llama.cpp computes gemma3 without soft caps of logits; set them to null")
    if architecture == "gemma3" and _rope_of_windows(config).get("rope_type", "default") != "default":
        found.append("rope types of sliding_attention other than default are not known to this export")
    return found


def hf_names(architecture: str, blocks: int) -> list[str]:
    """Every parameter name that a model of this architecture may have."""
    inner = _NAMES.get(architecture, _INNER)
    return [*_OUTER, *(f"model.layers.{block}.{name}" for block in range(blocks) for name in inner)]


def name_table(architecture: str, blocks: int) -> Any:
    """The gguf package's map from transformers names to GGUF names."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(arch, blocks)


def gguf_names(table: Any, name: str) -> list[str]:
    """GGUF names of a transformers parameter: of the parts that `cut` makes of it; [] if the architecture has none."""
    if name.endswith(_GATE_UP):
        block = name.removesuffix(_GATE_UP)
        return [f"{table.get_name(f'{block}mlp.experts.{part}_proj')}.weight" for part in ("gate", "up")]
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        return []
    return [found if name.endswith((".weight", ".bias")) else f"{found}.weight"]


def cut(value: Any, parts: int) -> list[Any]:
    """A tensor, or the experts' [E, 2 * I, ...] as two of [E, I, ...]."""
    return [value] if parts == 1 else list(value.chunk(parts, 1))


def heads_to_pair(architecture: str, heads: int, kv_heads: int, name: str) -> int:
    """Heads whose rows llama.cpp wants re-ordered in parameter `name`; 0: its rows stay as they are."""
    if architecture not in _ROTATED_PAIRS:
        return 0
    if ".q_proj." in name:
        return heads
    return kv_heads if ".k_proj." in name else 0


def adds_one(architecture: str, name: str) -> bool:
    """Whether the file holds 1 + this parameter."""
    return is_gemma(architecture) and name.endswith("norm.weight")


def pair_rows(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head [half 0, half 1] -> neighbours (0, half), (1, half+1), ...; any row contents, 1-D or 2-D."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def unpair_rows(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `pair_rows`."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def header(config: Any) -> Iterator[tuple[str, Any]]:
    """(method of gguf.GGUFWriter, argument) for everything that llama.cpp must know of the model."""
    head_dim = _head_dim(config)
    rope = rope_settings(config)
    yield "add_context_length", config.max_position_embeddings
    yield "add_embedding_length", config.hidden_size
    yield "add_block_count", config.num_hidden_layers
    yield "add_feed_forward_length", config.intermediate_size
    yield "add_head_count", config.num_attention_heads
    yield "add_head_count_kv", kv_heads(config)
    yield "add_key_length", head_dim
    yield "add_value_length", head_dim
    yield "add_layer_norm_rms_eps", config.rms_norm_eps
    yield "add_rope_dimension_count", int(head_dim * float(rope.get("partial_rotary_factor") or 1.0))
    yield "add_rope_freq_base", float(rope["rope_theta"])
    yield "add_vocab_size", config.vocab_size
    if rope["rope_type"] in ("linear", "yarn"):
        import gguf

        yield "add_rope_scaling_type", gguf.RopeScalingType(rope["rope_type"])
        yield "add_rope_scaling_factor", float(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        yield "add_rope_scaling_orig_ctx_len", int(original)
    architecture = ARCHITECTURES[config.model_type]
    if architecture in _WINDOWS:
        yield "add_sliding_window", config.sliding_window
    if architecture == "gemma2":
        yield "add_attn_logit_softcapping", config.attn_logit_softcapping
        yield "add_final_logit_softcapping", config.final_logit_softcapping
    if architecture == "gemma3":
        yield "add_rope_freq_base_swa", float(_rope_of_windows(config).get("rope_theta") or 10000.0)
    experts = getattr(config, "num_local_experts" if config.model_type == "mixtral" else "num_experts", None)
    if config.model_type in ("mixtral", "qwen3_moe"):
        yield "add_expert_count", experts
        yield "add_expert_used_count", config.num_experts_per_tok
    if config.model_type == "qwen3_moe":
        yield "add_expert_feed_forward_length", config.moe_intermediate_size


def rope_factors(config: Any) -> Tensor | None:
    """Divisors of the rotation frequencies, fp32 [head_dim / 2], of rope type llama3; None for the others.

    Wavelengths above `original / low_freq_factor` are stretched by `factor`, those below `original / high_freq_factor`
    are kept, and those between are interpolated (transformers' `_compute_llama3_parameters`).
    """
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = _head_dim(config)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    factors = []
    for step in range(0, head_dim, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (step / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def rope_settings(config: Any) -> dict[str, Any]:
    """rope_type, rope_theta and what the type needs, under transformers 5's name or the older ones."""
    found = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    # where windows have settings of their own
    found = dict(found["full_attention"]) if "full_attention" in found else found
    found.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    found["rope_type"] = found.get("rope_type", found.get("type", "default"))
    return found


def _rope_of_windows(config: Any) -> dict[str, Any]:
    found = dict(getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    return dict(found or {"rope_theta": getattr(config, "rope_local_base_freq", None)})


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # type: ignore[no-any-return]


def kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # type: ignore[no-any-return]


def _window(config: Any) -> int | None:
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)
