"""What folding needs to know of a network, by names of modules, and finding it in a model.

    writes      what adds to the residual stream: embeddings, linears, parameters [..., width]
    reads       norm -> the linears that read what it gives, all of them
    values      linear that makes the values of attention -> the linear that reads the heads' outputs
    products    linear -> the linear that reads its output, multiplied with something else, feature by feature

A "*" stands for one part of a dotted name, the same one in names that belong together. Names are those within the
outermost module that has them all. Architectures of transformers are known by the model_type of their config.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.errors import QATError
from qat.fold.hadamard import Rotation
from qat.plan import deployed, has_config
from qat.recipes.schema import Network

_BLOCK = "model.layers.*."
_LLAMA = Network(
    writes=["model.embed_tokens", f"{_BLOCK}self_attn.o_proj", f"{_BLOCK}mlp.down_proj"],
    reads={
        f"{_BLOCK}input_layernorm": [f"{_BLOCK}self_attn.{p}_proj" for p in "qkv"],
        f"{_BLOCK}post_attention_layernorm": [f"{_BLOCK}mlp.gate_proj", f"{_BLOCK}mlp.up_proj"],
        "model.norm": ["lm_head"],
    },
    values={f"{_BLOCK}self_attn.v_proj": f"{_BLOCK}self_attn.o_proj"},
    products={f"{_BLOCK}mlp.up_proj": f"{_BLOCK}mlp.down_proj"},
)
KNOWN = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}


@dataclass(frozen=True)
class Found:
    """The description with the names that there are, in the order of the modules.

    module      what they are relative to
    prefix      its name in the model, with a dot
    """

    module: nn.Module
    prefix: str
    writes: list[str]
    reads: dict[str, list[str]]
    values: dict[str, str]
    products: dict[str, str]
    head_dim: int | None

    def linear(self, name: str) -> nn.Linear:
        """Raises QATError for a module of another class."""
        layer = self.module.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise QATError(f"{self.prefix}{name} is a {type(layer).__name__}; what is folded has to be an nn.Linear")
        return layer


def find(model: nn.Module, network: Network | None = None) -> Found:
    """The network in `model`. Raises QATError for an unknown architecture and for names that are not there."""
    known = network
    if known is None:
        _, inner = deployed(model)
        kind = getattr(inner.config, "model_type", None) if has_config(inner) else None
        if kind not in KNOWN:
            what = f"the architecture {kind}" if kind else type(model).__name__
            raise QATError(
                f"nothing is known of {what}, so it cannot be folded (known: {', '.join(KNOWN)}); describe it in "
                "fold.network: which modules write to the residual stream (writes) and which norms it goes through, "
                "each with the linears after it (reads)"
            )
        known = KNOWN[kind]
    problems: list[str] = []
    for name, module in model.named_modules():
        names = [*dict(module.named_modules()), *dict(module.named_parameters(remove_duplicate=False))]
        try:
            return _resolved(module, f"{name}." if name else "", known, names)
        except QATError as problem:
            problems.append(str(problem))
    # the first is about the model itself, or about the module inside that has a config
    place = next((i for i, (_, module) in enumerate(model.named_modules()) if has_config(module)), 0)
    raise QATError(problems[place])


def _resolved(module: nn.Module, prefix: str, network: Network, names: list[str]) -> Found:
    writes = [name for pattern in network.writes for name, _ in _matched(pattern, names, "writes")]
    reads = {
        norm: [_bound(reader, parts, names, "reads") for reader in readers]
        for pattern, readers in network.reads.items()
        for norm, parts in _matched(pattern, names, "reads")
    }
    values = _pairs(network.values, names, "values")
    head_dim = network.head_dim or _head_dim(module)
    return Found(module, prefix, writes, reads, values, _pairs(network.products, names, "products"), head_dim)


def _pairs(pairs: dict[str, str], names: list[str], key: str) -> dict[str, str]:
    return {
        name: _bound(second, parts, names, key)
        for first, second in pairs.items()
        for name, parts in _matched(first, names, key)
    }


def _matched(pattern: str, names: list[str], key: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, what its stars stand for); raises QATError if there is none."""
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"([^.]+)"))
    found = [(name, match.groups()) for name in names if (match := wanted.fullmatch(name))]
    if not found:
        raise QATError(f"fold.network.{key}: {pattern!r} names nothing in this model")
    yield from found


def _bound(pattern: str, parts: tuple[str, ...], names: list[str], key: str) -> str:
    name = pattern
    for part in parts:
        name = name.replace("*", part, 1)
    if name not in names:
        raise QATError(f"fold.network.{key}: {name!r} names nothing in this model")
    return name


def _head_dim(module: nn.Module) -> int | None:
    if not has_config(module):
        return None
    config = module.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # type: ignore


@torch.no_grad()
def gain_reasons(norm: nn.Module, name: str) -> list[str]:
    """Why the gain of a norm cannot be moved into other layers; empty means it can. The norm is tried, whatever its
    class: its output has to be proportional to weight, and shifted by bias if there is one."""
    norm = copy.deepcopy(norm)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return [f"{name} has no weight that scales every channel"]
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    factors = torch.linspace(0.5, 2.0, len(weight)).to(weight)
    before = norm(x)
    weight.data = weight.data * factors
    if isinstance(bias, Tensor):
        bias.data = bias.data * factors
    if _close(norm(x), before * factors):
        return []
    return [f"{name} ({type(norm).__name__}) does not multiply by its weight alone"]


@torch.no_grad()
def rotation_reasons(norm: nn.Module, name: str, rotation: Rotation) -> list[str]:
    """Why a rotation cannot be moved through a norm; empty means it can."""
    norm = copy.deepcopy(norm)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if isinstance(bias, Tensor):
        return [
            f"{name} ({type(norm).__name__}) has a bias, and subtracts the mean in most cases; rotation needs RMSNorm"
        ]
    if isinstance(weight, Tensor):
        reasons = gain_reasons(norm, name)
        if reasons:
            return reasons
        weight.data = torch.ones_like(weight)
    like = weight if isinstance(weight, Tensor) else torch.zeros(())
    x = torch.randn(4, rotation.size, generator=torch.Generator().manual_seed(0)).to(like)
    if _close(norm(rotation(x.double()).to(like)), rotation(norm(x).double()).to(like)):
        return []
    return [f"{name} ({type(norm).__name__}) is no RMSNorm: it changes more than the length of what it is given"]


def _close(a: Tensor, b: Tensor) -> bool:
    allowed = 0.05 if a.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((a - b).abs().max() <= allowed * b.abs().max())
