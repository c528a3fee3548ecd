"""Attention whose cache holds codes: keys, after their rotation, and values are rounded as they enter the cache.

    k_hat = key_quantizer(k),  v_hat = value_quantizer(v)

The attention of transformers hands both to `past_key_values.update(k, v, layer)` and goes on with what comes back. In a
prepared module something that rounds stands in that place: before the cache where there is one (generation), alone
where there is none (training). compressed-tensors puts the same scales in the same place.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qat.errors import QATError
from qat.layers import Live, QATLayer, activation_quantizers, original_class, revive, rounded, swapped_class
from qat.ops import LayerOp
from qat.quantizers import quantizer_class

if TYPE_CHECKING:
    from qat.specs import QuantSpec

_CACHE = "past_key_values"


class AttentionOp(LayerOp):
    """No weight of its own; `place` is where its forward takes the cache."""

    def __init__(self, place: int) -> None:
        self.place = place

    def kinds(self, module: nn.Module) -> dict[str, str]:
        return {}


def attention_op(module: nn.Module) -> AttentionOp | None:
    """The op of attention that keeps keys and values of its own in a transformers cache; None of any other module."""
    place = takes_cache(module)
    # one around another (BERT's) only hands the cache on, and what shares the keys of another layer keeps none
    around = place is not None and any(takes_cache(child) is not None for child in module.children())
    return None if place is None or around or getattr(module, "is_kv_shared_layer", False) else AttentionOp(place)


def takes_cache(module: nn.Module) -> int | None:
    """The place of `past_key_values` among the arguments of attention; None of any other module."""
    cls = original_class(module)
    if "attention" not in cls.__name__.lower():
        return None
    names = list(inspect.signature(cls.forward).parameters)
    return names.index(_CACHE) - 1 if _CACHE in names else None


def attention_reasons(spec: QuantSpec, module: nn.Module) -> list[str]:
    """Why the cache of this attention cannot be kept on the grid of `spec`; empty means it can."""
    cls = quantizer_class(spec.quantizer)
    found = cls.reasons(spec, activation=True)
    if spec.granularity == "tensor" and not cls.static_activations:
        found.append(
            f"quantizer={cls.name!r} finds a tensor's scale in the tokens at hand, and a cache keeps those of before; "
            "use quantizer=ema or lsq, or granularity=token"
        )
    size = getattr(module, "head_dim", None)
    if spec.granularity == "group" and isinstance(size, int):
        found += spec.shape_reasons(size)
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        found.append("attention across an encoder has a cache of another kind; take this model's `cache` rule out")
    return [f"cache: {why}" for why in found]


def no_attention(name: str, seen: list[str]) -> str:
    """What is wrong with rule `name`, whose `cache` finds nothing to quantize among modules of these classes."""
    others = sorted({kind for kind in seen if "attention" in kind.lower()})
    return (
        f"rules.{name}.cache matches no attention: it is for modules of transformers that give their keys and values "
        f"to `past_key_values` (here: {', '.join(others) or 'no attention at all'}); correct match, or leave it out"
    )


class QATAttention(QATLayer):
    """First base of a swapped attention class; never instantiated."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        live = self._qat
        op: AttentionOp = live.op  # type: ignore[assignment]
        positional = len(args) > op.place
        held = _Held(self, args[op.place] if positional else kwargs.get(_CACHE))
        if positional:
            args = (*args[: op.place], held, *args[op.place + 1 :])
        else:
            kwargs = {**kwargs, _CACHE: held}
        found = live.original.forward(self, *args, **kwargs)
        if not held.used:
            raise QATError(
                f"{live.original.__name__} gave no keys and values to `past_key_values.update`, so its cache cannot be "
                "quantized; keep it with a rule {match: [its name], keep_float: true}"
            )
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return revive, (self._qat.original, QATAttention), self.__dict__


class _Held:
    """Stands for the cache during one forward; what it has besides `update` is the cache's own."""

    def __init__(self, layer: QATAttention, cache: Any) -> None:
        self.layer, self.cache, self.used = layer, cache, False

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values that attention goes on with, [batch, heads, tokens, features] each."""
        layer, quantizers = self.layer, activation_quantizers(self.layer)
        self.used = True
        learned = quantizers["key"].learned()
        layer._qat.latent_dtype, layer._qat.out_dtype = (*learned, key)[0].dtype, key.dtype
        key, value = rounded(layer, quantizers["key"], key), rounded(layer, quantizers["value"], value)
        return (key, value) if self.cache is None else self.cache.update(key, value, *args, **kwargs)

    def get_seq_length(self, *args: Any) -> Any:
        """Tokens in the cache."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        if self.cache is None:
            raise AttributeError(
                f"{self.layer._qat.original.__name__} asks its cache for {name!r} where there is none, so its keys and "
                "values cannot be quantized; keep it with a rule {match: [its name], keep_float: true}"
            )
        return getattr(self.cache, name)


def swap_attention(module: nn.Module, op: AttentionOp) -> None:
    """Give attention, which has its quantizers, the forward that uses them."""
    original = original_class(module)
    module.__dict__["_qat"] = Live(original, op)
    swapped: Any = swapped_class(original, QATAttention)
    module.__class__ = swapped
