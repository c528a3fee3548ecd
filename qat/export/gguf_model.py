"""Which transformers models a GGUF file can hold, and the header that tells llama.cpp about them.

    model_type   architecture   rows of q_proj and k_proj
    llama        llama          re-ordered: llama.cpp rotates neighbours, transformers the two halves of a head
    mistral      llama          re-ordered
    qwen2        qwen2          as they are
    qwen3        qwen3          as they are

Tensor names come from the `gguf` package's own table. A re-ordering moves whole rows, so groups along a row keep their
scales: it is done on packed rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ROTATED_PAIRS = ("llama",)
_ROPE_TYPES = ("default", "linear", "llama3")
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
ROPE_FACTORS = "rope_freqs.weight"


def model_reasons(config: Any, parameters: list[str]) -> list[str]:
    """Why a model with this config and these parameters cannot be a GGUF file; empty means it can."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return [f"GGUF files are written for the transformers models {known}, not for {kind}; use compressed-tensors"]
    found = []
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        found.append(f"hidden_act={config.hidden_act!r}; llama.cpp computes this architecture with silu")
    rope = rope_settings(config)
    if rope["rope_type"] not in _ROPE_TYPES:
        found.append(f"rope type {rope['rope_type']!r}; GGUF export knows {', '.join(_ROPE_TYPES)}")
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        found.append("partial_rotary_factor other than 1 is not known to this export")
    window, length = _window(config), config.max_position_embeddings
    if window is not None and window < length:
        found.append(
            f"sliding_window={window}: llama.cpp attends to all of the context for this architecture; "
            f"set sliding_window to null or max_position_embeddings to at most {window}"
        )
    names = set(hf_names(config))
    unknown = [name for name in parameters if name not in names]
    if unknown:
        found.append(f"parameters that {kind} models do not have: {', '.join(unknown[:3])}; remove or merge them first")
    return found


def hf_names(config: Any) -> list[str]:
    """Every parameter name that a model of this config may have."""
    blocks = range(config.num_hidden_layers)
    return [*_OUTER, *(f"model.layers.{block}.{name}" for block in blocks for name in _INNER)]


def name_table(architecture: str, blocks: int) -> Any:
    """The gguf package's map from transformers names to GGUF names."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(arch, blocks)


def gguf_name(table: Any, name: str) -> str | None:
    """GGUF name of a transformers parameter, or None if the architecture has none."""
    return table.get_name(name, try_suffixes=(".weight", ".bias"))  # type: ignore[no-any-return]


def heads_to_pair(config: Any, name: str) -> int:
    """Heads whose rows llama.cpp wants re-ordered in parameter `name`; 0: its rows stay as they are."""
    if ARCHITECTURES[config.model_type] not in _ROTATED_PAIRS:
        return 0
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(_kv_heads(config)) if ".k_proj." in name else 0


def pair_rows(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head [half 0, half 1] -> neighbours (0, half), (1, half+1), ...; any row contents, 1-D or 2-D."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def unpair_rows(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `pair_rows`."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def header(config: Any) -> Iterator[tuple[str, Any]]:
    """(method of gguf.GGUFWriter, argument) for everything that llama.cpp must know of the model."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = rope_settings(config)
    yield "add_context_length", config.max_position_embeddings
    yield "add_embedding_length", config.hidden_size
    yield "add_block_count", config.num_hidden_layers
    yield "add_feed_forward_length", config.intermediate_size
    yield "add_head_count", config.num_attention_heads
    yield "add_head_count_kv", _kv_heads(config)
    yield "add_key_length", head_dim
    yield "add_value_length", head_dim
    yield "add_layer_norm_rms_eps", config.rms_norm_eps
    yield "add_rope_dimension_count", head_dim
    yield "add_rope_freq_base", float(rope["rope_theta"])
    yield "add_vocab_size", config.vocab_size
    if rope["rope_type"] == "linear":
        import gguf

        yield "add_rope_scaling_type", gguf.RopeScalingType.LINEAR
        yield "add_rope_scaling_factor", float(rope["factor"])


def rope_factors(config: Any) -> Tensor | None:
    """Divisors of the rotation frequencies, fp32 [head_dim / 2], of rope type llama3; None for the others.

    Wavelengths above `original / low_freq_factor` are stretched by `factor`, those below `original / high_freq_factor`
    are kept, and those between are interpolated (transformers' `_compute_llama3_parameters`).
    """
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
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
    found.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    found["rope_type"] = found.get("rope_type", found.get("type", "default"))
    return found


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # type: ignore[no-any-return]


def _window(config: Any) -> int | None:
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)
