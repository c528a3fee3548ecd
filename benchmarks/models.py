"""The networks that are timed: a transformer block, a Llama in plain torch, and transformers' own Llama.

Each takes a batch and returns a loss, so that a step is `model(batch).backward()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import Missing


class Block(nn.Module):
    """A transformer block of six linears; batch = (x, target), both [B, S, D]; mean squared error."""

    def __init__(self, width: int = 512, hidden: int = 2048, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = batch
        shape = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        h = self.norm1(x)
        q, k, v = (linear(h).view(shape).transpose(1, 2) for linear in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.o(mixed)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return F.mse_loss(x, target)


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of Llama-3-8B's layers unless said otherwise."""

    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    layers: int = 1


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, and SwiGLU (Touvron et al. 2023, Ainslie et al. 2023)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.head = shape.width // shape.heads
        kv = self.head * shape.kv_heads
        self.input_norm, self.post_norm = RMSNorm(shape.width), RMSNorm(shape.width)
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(shape.width, kv, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        h = self.input_norm(x)
        q = self.q_proj(h).view(batch, length, self.heads, self.head).transpose(1, 2)
        k, v = (p(h).view(batch, length, self.kv_heads, self.head).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        h = self.post_norm(x)
        y: Tensor = x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return y


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021); x [B, H, S, D], cos and sin [S, D]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class PlainLlama(nn.Module):
    """Blocks without embedding and head; batch = (x, target), both [B, S, width]; mean squared error."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(LlamaBlock(shape) for _ in range(shape.layers))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = batch
        head = self.shape.width // self.shape.heads
        rates = 5e5 ** (-torch.arange(0, head, 2, device=x.device, dtype=torch.float32) / head)
        angles = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=torch.float32), rates).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.mse_loss(x, target)


class HfLlama(nn.Module):
    """transformers' LlamaForCausalLM; batch = token ids [B, S], next-token cross entropy."""

    def __init__(
        self, width: int = 512, hidden: int = 1408, heads: int = 8, layers: int = 4, vocab: int = 2048
    ) -> None:
        super().__init__()
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as problem:
            raise Missing(f"transformers is not installed ({problem})") from None
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=1024,
            use_cache=False,
        )
        self.model: Any = LlamaForCausalLM(config)

    def forward(self, batch: Tensor) -> Tensor:
        # logits and not `labels=`: its loss reads a number on the host
        logits = self.model(input_ids=batch).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> linear that every tool quantizes: all but the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
