"""Adapters of peft inside the rounding: found in a model, taken over by the layers below them, or refused.

peft wraps a layer: `q_proj` becomes a `lora.Linear` that holds `base_layer` and the factors `lora_A` and `lora_B`, and
computes base_layer(x) + s B A x. Here the base layer becomes the QAT layer, of codes(W0 + s * B A) (`qat.reparam`), and
the wrapper hands x to it and does no more. Names are those of rules and exported files: without `base_layer`.

peft is never imported; a model that has adapters has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from qat.errors import QATError
from qat.layers import Live, QATLayer
from qat.reparam import Lora

_BASE = ".base_layer"
# what peft puts before the names of a model that it wraps
_MODEL = "base_model.model."
_WHEN = "before qat.prepare"


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> every module of peft in `model` that stands for a layer of its own."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return {}
    other: Any = sys.modules.get("peft.utils.other")
    kinds = (peft.BaseTunerLayer, *filter(None, [getattr(other, "AuxiliaryTrainingWrapper", None)]))
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def is_peft_model(module: nn.Module) -> bool:
    """Whether a module is one of those that peft puts around a whole model."""
    return type(module).__module__.startswith("peft.")


class Adapters:
    """The adapters of one model.

    of        name of a base layer -> its wrapper
    inner     ids of the modules that belong to adapters and are no layers of the model
    parameters    ids of what these hold, which is in no exported file
    """

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[str, nn.Module] = {}
        self.inner: set[int] = set()
        self.parameters: set[int] = set()
        for name, module in wrappers(model).items():
            self.of[f"{name}{_BASE}" if name else _BASE[1:]] = module
            for child_name, child in module.named_children():
                if child_name != _BASE[1:]:
                    self.inner |= {id(part) for part in child.modules()}
                    self.parameters |= {id(p) for p in child.parameters()}

    def name(self, name: str) -> str:
        """The name that a module or parameter had without adapters, and has in an exported file."""
        if not self.of:
            return name
        return f"{name}.".replace(f"{_BASE}.", ".").replace(_MODEL, "")[:-1]

    def reasons(self, quantized: set[str]) -> list[str]:
        """Why the adapters cannot be what is trained, given the names of the layers whose weight has a grid."""
        found = []
        for base, wrapper in self.of.items():
            why = _reason(wrapper)
            if not why and base not in quantized:
                why = (
                    "it has an adapter but no grid, and the merge of a float layer is not what was trained; give it a "
                    "rule with a weight, or leave it out of target_modules"
                )
            if why:
                found.append(f"{self.name(base)}: {why}")
        return found


def _reason(wrapper: Any) -> str:
    """Why an adapter cannot be inside the rounding; empty if it can."""
    kind = original_wrapper(wrapper)
    if f"{kind.__module__}.{kind.__name__}" != "peft.tuners.lora.layer.Linear":
        return f"peft's {kind.__name__} is no LoRA of a Linear layer in float, the only adapter that can be quantized"
    active = list(wrapper.active_adapters)
    if len(active) != 1 or active[0] not in wrapper.lora_A:
        return f"{len(active)} adapters are active ({', '.join(active) or 'none'}); call set_adapter with one {_WHEN}"
    name = active[0]
    if wrapper.merged or wrapper.disable_adapters:
        what = "merged" if wrapper.merged else "disabled"
        return f"its adapter is {what}; call {'unmerge_adapter' if wrapper.merged else 'enable_adapters'} {_WHEN}"
    if not isinstance(wrapper.lora_dropout[name], nn.Identity):
        return (
            "lora_dropout drops inputs of the adapter alone, which no weight can do, and the adapter is in the weight; "
            "use lora_dropout=0"
        )
    if name in getattr(wrapper, "lora_variant", {}) or getattr(wrapper, "use_dora", {}).get(name):
        return "its adapter is a variant of LoRA (DoRA for one); use plain LoRA"
    if getattr(wrapper, "lora_bias", {}).get(name):
        return "its adapter has a bias of its own; use lora_bias=False"
    return ""


def original_wrapper(wrapper: nn.Module) -> type[nn.Module]:
    """The class of peft that a wrapper has or had."""
    mro = type(wrapper).__mro__
    # sharding puts a class of its own in front
    return mro[mro.index(Inside) + 1] if Inside in mro else type(wrapper)


def take_in(wrapper: Any) -> Lora:
    """The adapter as a part of the weight of its base layer, which the wrapper calls from now on and does no more."""
    if not isinstance(wrapper, Inside):
        wrapper.__class__ = inside_class(type(wrapper))
    name = wrapper.active_adapters[0]
    a, b = wrapper.lora_A[name], wrapper.lora_B[name]
    return Lora(a, b, float(wrapper.scaling[name]), bool(wrapper.fan_in_fan_out))


def let_go(model: nn.Module) -> None:
    """Undo `take_in` for all wrappers in a model."""
    for module in wrappers(model).values():
        if isinstance(module, Inside):
            module.__class__ = original_wrapper(module)  # type: ignore[assignment]


def refuse_later(model: nn.Module) -> None:
    """Raises QATError for adapters that were put around layers after these were prepared."""
    for name, wrapper in wrappers(model).items():
        base: Any = wrapper._modules.get(_BASE[1:])
        if isinstance(base, QATLayer) and not base._qat.reparams:
            raise QATError(
                f"{name} got its adapter after qat.prepare, so it is not in the quantized weight; call get_peft_model "
                "first and qat.prepare then"
            )


class Inside(nn.Module):
    """First base of a wrapper's swapped class."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        wrapper: Any = self
        base = wrapper.base_layer
        live: Live = base._qat
        lora: Any = live.reparams["weight"]
        if wrapper._disable_adapters or wrapper.merged_adapters or kwargs.get("adapter_names") is not None:
            self._refuse("disabled, merged or chosen by sample")
        names = wrapper.active_adapters
        if len(names) != 1 or wrapper.lora_A[names[0]] is not lora.a or wrapper.scaling[names[0]] != lora.scaling:
            self._refuse("exchanged or scaled anew")
        return base(x) if live.active else super().forward(x, *args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("merged")

    def _refuse(self, what: str) -> None:
        raise QATError(
            f"an adapter inside the rounding cannot be {what}: its weight is codes(W0 + s B A); export writes these "
            "codes, and qat.unprepare(model) gives peft its layers back"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (original_wrapper(self),), self.__dict__


_inside: dict[type[nn.Module], Any] = {}


def inside_class(original: type[nn.Module]) -> Any:
    """The class `QAT<Name>` derived from Inside and a class of peft, made once."""
    if original not in _inside:
        name = f"QATLora{original.__name__}"
        _inside[original] = type(name, (Inside, original), {"__module__": original.__module__})
    return _inside[original]


def _revive(original: type[nn.Module]) -> nn.Module:
    cls = inside_class(original)
    return cls.__new__(cls)  # type: ignore[no-any-return]
