"""Codes of a weight are computed once and used until the weight changes: by micro-batches, recomputation, validation.

Whoever changes a weight says so: `torch.optim` by its global step hook, a load by the layer's own hook, `qat.prepare`,
`qat.initialize` and the schedule by calling `forget`; anything else by `qat.weights_changed(model)`. In eager mode a
changed version counter or address is noticed as well, but that is a second net only: fused AdamW, FSDP and
ZeRO change weights without touching the counter.

In eager mode codes are computed in the first forward that needs them; for layers that were compiled `refresh_codes`
does it at the end of a step, because compiled code only reads `entries`.

Where one forward and its backward are all that a weight is used for between two steps, a CPU rounds it in both sooner
than it makes codes (`CodeCache.once`, `qat.layers.rounds_directly`); in a graph, which rounds in one pass, always.

A weight whose storage comes and goes (FSDP, ZeRO-3) or that is not the layer's own Parameter (`functional_call`) has no
codes here: its layer quantizes anew in forward and backward, and keeps nothing that is as large as the weight.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from qat.fake_quant_kernels import rowwise4
from qat.fake_quant_kernels.dispatch import no_grad, uses_triton
from qat.fake_quant_kernels.pack import HALVES, PLAIN, ROWS
from qat.quantizers import Quantizer
from qat.reparam import Reparam

if TYPE_CHECKING:
    from qat.slot import Slot
    from qat.specs import QuantSpec

# codes, scale, zero, minimum; no codes where the weight is rounded where it is used
Entry = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]


class CodeCache:
    """The codes of one layer's weights; `entries` is all that compiled code reads.

    enabled   codes may be kept (False: the memory budget of `qat.prepare(..., code_cache=)` is spent)
    entries   codes and fields, until a weight changes or anything that they were made of
    once      a weight is used by one forward and its backward before it changes, until a step shows otherwise: on a
              CPU, making codes for them takes longer than rounding twice
    """

    def __init__(self) -> None:
        self.enabled = True
        self.once = True
        # weight -> backwards since the last step, and those that are counted
        self._backwards: Counter[str] = Counter()
        self._counted: dict[str, weakref.ref[Tensor]] = {}
        # the weight, its codes and fields, their form
        self.entries: dict[str, tuple[Tensor, Entry, str]] = {}
        self._owners: dict[str, weakref.ref[Tensor]] = {}
        # the parameters, weights, factors and learned scales, that codes come from
        self._sources: dict[str, dict[int, weakref.ref[Tensor]]] = {}
        self._tokens: dict[str, Any] = {}
        _caches.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of a layer has other weights
        return CodeCache, ()

    def __deepcopy__(self, memo: Any) -> CodeCache:
        made = CodeCache()
        made.enabled = self.enabled
        return made

    def own(self, key: str, w: Tensor, quantizer: Quantizer, reparam: Reparam | None) -> None:
        """w is the layer's Parameter, and stays where it is."""
        self._owners[key] = weakref.ref(w)
        factors = () if reparam is None else reparam.factors
        self._count(key, w)
        self._sources[key] = {id(t): weakref.ref(t) for t in (w, *factors, *quantizer.learned())}

    def _count(self, key: str, w: Tensor) -> None:
        """Count backwards by those that reach w."""
        known = self._counted.get(key)
        if not (w.requires_grad and w.is_leaf) or (known is not None and known() is w):
            return
        self._counted[key], cache = weakref.ref(w), weakref.ref(self)

        def count(_: Tensor) -> None:
            if (found := cache()) is not None:
                found._backwards[key] += 1

        w.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        """An optimizer stepped: what was counted says what is likely of the next step. Not at any other change, or a
        forward that is run again between two steps (checkpointing) would save something else."""
        if self._backwards:
            self.once = max(self._backwards.values()) == 1
            self._backwards.clear()

    def spared(self, w: Tensor, traced: bool = False) -> bool:
        """Whether codes would not pay before w changes. traced: a graph uses it."""
        return (self.once or traced) and w.requires_grad and not uses_triton(w.device)

    def disown(self, key: str) -> None:
        """No codes of this weight are kept."""
        self._owners.pop(key, None)

    def knows(self, key: str) -> bool:
        """Whether this weight stays where it is."""
        return key in self._owners

    def comes_from(self, moved: set[int]) -> bool:
        """Whether codes here come from a parameter whose id is among `moved`."""
        return any(i in moved and ref() is not None for refs in self._sources.values() for i, ref in refs.items())

    def forget(self) -> None:
        self.entries.clear()
        self._tokens.clear()

    def owns(self, key: str, w: Tensor, reparam: Reparam | None) -> bool:
        """Whether codes of w may be kept."""
        owner = self._owners.get(key)
        if not self.enabled or owner is None or owner() is not w or not stays(w):
            return False
        return reparam is None or all(id(t) in self._sources[key] and stays(t) for t in reparam.factors)

    def quantized(
        self,
        key: str,
        w: Tensor,
        quantizer: Quantizer,
        reparam: Reparam | None,
        direct: Callable[[], bool] = lambda: False,
    ) -> tuple[Entry, str, bool]:
        """(codes and fields, their form, whether they are kept); eager mode only. direct(): codes can be done
        without.

        Whether there are codes is the same in all forwards with gradients between two changes: a recomputed one has to
        save what the first one saved."""
        found, spared = self.entries.get(key), self.spared(w) and torch.is_grad_enabled()
        held = found if found is not None and found[0] is w else None
        if held and not spared and self._tokens.get(key) == _token(w, quantizer, reparam):
            return held[1], held[2], True
        if not self.owns(key, w, reparam):
            make = fields_alone if direct() else quantize
            return make(quantizer, rows_of(w, quantizer, reparam)), PLAIN, False
        if spared and direct():
            return fields_alone(quantizer, rows_of(w, quantizer, reparam)), PLAIN, True
        token = _token(w, quantizer, reparam)
        if held is None or self._tokens.get(key) != token:
            # in inference mode too: they are saved for backward next
            with torch.inference_mode(False):
                self.entries[key] = (w, *_kept(quantizer, rows_of(w, quantizer, reparam)))
            self._tokens[key] = token
        return *self.entries[key][1:], True

    @property
    def nbytes(self) -> int:
        """Bytes that the entries hold."""
        return sum(t.nbytes for _, entry, _ in self.entries.values() for t in entry if t is not None)


_caches: weakref.WeakSet[CodeCache] = weakref.WeakSet()


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # Not all caches: another model's optimizer (a discriminator's, a peer's) leaves these weights as they are. Of one
    # that moves copies of the weights (fp32 masters) its engine tells, or `qat.after_optimizer_step`.
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for cache in _caches:
        if cache.comes_from(moved):
            cache.settle()
            cache.forget()


def _steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # it moves weights and runs forwards in turn; compiled code would not notice
    if isinstance(optimizer, torch.optim.LBFGS):
        for cache in _caches:
            cache.enabled = False
            cache.forget()


register_optimizer_step_pre_hook(_steps)
register_optimizer_step_post_hook(_stepped)


def forget_codes_of(module: nn.Module) -> None:
    """Its weights change: their codes go, also those of other layers that are tied to it."""
    changed = {id(p) for p in module.parameters()}
    for cache in _caches:
        if cache.comes_from(changed):
            cache.forget()


def rows_of(w: Tensor, quantizer: Quantizer, reparam: Reparam | None) -> Tensor:
    """Rows [R, K] of what is quantized: the weight, or what its `Reparam` makes of it."""
    return quantizer.layout.to_rows(w.detach() if reparam is None else reparam.weight(w, *reparam.factors))


def quantize(quantizer: Quantizer, w_RK: Tensor, form: str = PLAIN) -> Entry:
    """Codes and fields as the forward uses them."""
    codes, fields = quantizer.quantize(w_RK, quantizer.live_spec, form=form)
    return codes, fields.scale, fields.zero, fields.minimum


def fields_alone(quantizer: Quantizer, w_RK: Tensor) -> Entry:
    """The fields of `quantize`, of a quantizer that is `direct`."""
    with no_grad():
        return None, *quantizer.fields(w_RK)


def _kept(quantizer: Quantizer, w_RK: Tensor) -> tuple[Entry, str]:
    spec = quantizer.live_spec
    if not packs(spec, w_RK.shape[1]):
        return quantize(quantizer, w_RK), PLAIN
    fp16 = spec.is_int and spec.scale_grid.name in ("portable", "fp16") and spec.zero_point == "none"
    # ROWS keeps the scale that the codes were made with
    fp16 = fp16 and not quantizer.codes_fixed
    if fp16 and spec.granularity != "tensor" and rowwise4.fits(w_RK, spec.groups(w_RK.shape[1])):
        entry = quantize(quantizer, w_RK, ROWS)
        if rowwise4.holds(entry[1]):
            return entry, ROWS
    return quantize(quantizer, w_RK, HALVES), HALVES


def packs(spec: QuantSpec, columns: int) -> bool:
    """Whether two codes of rows of `columns` fit into a byte."""
    return spec.bits <= 4 and columns % 2 == 0


def bytes_of(spec: QuantSpec, shape: tuple[int, int]) -> int:
    """What an entry for rows [R, K] = shape takes at most."""
    rows, columns = shape
    scales = 1 if spec.granularity == "tensor" else rows * spec.groups(columns)
    fields = 1 if spec.zero_point == "none" else 2
    if packs(spec, columns):
        return rows * columns // 2 + 4 * scales * (fields + 1)
    return rows * columns + 4 * scales * fields


def _token(w: Tensor, quantizer: Quantizer, reparam: Reparam | None) -> Any:
    """Changes with the weight, its place, its factors, and all that the quantizer reads."""
    states = [*quantizer._parameters.values(), *quantizer._buffers.values()]
    if reparam is not None:
        states += reparam.factors
    return (
        w.data_ptr(),
        w.dtype,
        _version(w),
        quantizer.live_spec,
        quantizer.frozen,
        tuple((id(t), _version(t)) for t in states if t is not None),
    )


def _version(t: Tensor) -> int:
    # tensors made in inference mode have no counter
    return -1 if t.is_inference() else t._version


def stays(w: Tensor | None) -> bool:
    """Whether a layer's parameter keeps its storage between forwards: not a shard, not on the meta device."""
    return w is not None and not w.is_meta and not hasattr(w, "placements") and not hasattr(w, "ds_id")


class RecentCodes(threading.local):
    """Layers that read the same tensor (q, k and v; gate and up) share its codes."""

    def __init__(self) -> None:
        self.key: Any = None
        self.x: weakref.ref[Tensor] | None = None
        self.found: Any = None

    def quantized(self, x: Tensor, slot: Slot) -> Any:
        if x.is_inference():
            # nothing tells whether it was changed in place
            return slot.quantizer.quantize(slot.rows(x.detach()), slot.spec)
        key = (slot.quantizer.name, slot.spec, x._version)
        if self.x is None or self.x() is not x or self.key != key:
            # gone with x, so that nothing outlives the layers that share it
            self.x, self.key = weakref.ref(x, self._gone), key
            # in inference mode too: the same tensor may be trained on next
            with torch.inference_mode(False):
                self.found = slot.quantizer.quantize(slot.rows(x.detach()), slot.spec)
        return self.found

    def _gone(self, ref: Any) -> None:
        if self.x is ref:
            self.x = self.key = self.found = None
