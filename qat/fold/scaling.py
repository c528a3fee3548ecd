"""Factors that go over from the inputs of linears to their weights, input channel by input channel.

    y = W x = (W diag(s)) (x / s)      x / s is folded into what makes x: the gain (and bias) of a norm, or the rows of
                                       the linear before (the values of attention, or the one half of a gated MLP)

    smooth   s_j = max |x_j|^a / max |w_j|^(1-a)            SmoothQuant, Xiao et al. 2023, equation 4
    awq      s_j = (mean |x_j|)^a, a = 0, 1/20, ... 19/20   AWQ, Lin et al. 2024, equation 5: the a with the least error
             of the outputs, with weights and inputs quantized as the recipe says

Layers that read the same input share s. Weights are computed in fp32 and rounded once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.distill import output_of
from qat.errors import QATError
from qat.fold.network import Found, find, gain_reasons
from qat.init.walk import Forward, call_model
from qat.layers import QATLayer
from qat.layout import Layout
from qat.plan import PlanRow, make_plan
from qat.quantizers import make_quantizer
from qat.recipes import as_recipe
from qat.recipes.schema import Network, Recipe
from qat.state import folded, mark_folded, state_of
from qat.steps import apply_schedule, initialize

log = logging.getLogger(__name__)
# powers that AWQ tries, and rows of each input on which it tries them
STEPS = 20
ROWS = 512
# factors further apart than this would leave the numbers of fp16
_LARGEST = 1e4
# of the output, or of this size where it is smaller: rounding in fp32, and in what a caller's own forward computes in
_ALLOWED, _ALLOWED_OWN, _SMALL = 1e-3, 0.02, 0.05


@dataclass(eq=False)
class Group:
    """Linears that read one input, and what makes it; `rows`: their rows of the plan, None for those in float."""

    name: str
    before: nn.Module
    readers: list[nn.Linear]
    rows: list[PlanRow | None]
    largest: Tensor | None = None
    total: Tensor | None = None
    count: int = 0
    sample: list[Tensor] = field(default_factory=list)

    def see(self, wanted: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add one input [..., K] to the statistics, and `wanted` of its rows, evenly spread, to the sample."""
        x = (args[0] if args else next(iter(kwargs.values()))).detach().flatten(0, -2).float()
        largest, total = x.abs().amax(0), x.abs().double().sum(0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.total = total if self.total is None else self.total + total
        self.count += len(x)
        if wanted:
            self.sample.append(x[torch.linspace(0, len(x) - 1, min(wanted, len(x))).long()])


def smooth(
    model: nn.Module,
    recipe: Recipe | str | PathLike[str],
    batches: Iterable[Any],
    alpha: float = 0.5,
    *,
    network: Network | None = None,
    forward: Forward | None = None,
) -> None:
    """SmoothQuant, in place, for the inputs of norms that a layer of the recipe's plan reads.

    alpha      how much of the range goes over: 0 leaves the weights as smooth as they can be, 1 the inputs
    network, forward, batches    as in `awq`

    Raises QATError as `awq`.
    """

    def factors(group: Group) -> Tensor:
        assert group.largest is not None
        weights = torch.stack([layer.weight.detach().float().abs().amax(0) for layer in group.readers]).amax(0)
        tiny = 1e-5
        return group.largest.clamp_min(tiny) ** alpha / weights.clamp_min(tiny) ** (1 - alpha)

    _scale(model, as_recipe(recipe), list(batches), network, forward, factors, {"method": "smooth", "alpha": alpha}, 0)


def awq(
    model: nn.Module,
    recipe: Recipe | str | PathLike[str],
    batches: Iterable[Any],
    *,
    network: Network | None = None,
    forward: Forward | None = None,
) -> None:
    """AWQ, in place, for what norms, values and products feed into layers of the recipe's plan.

    batches    a mapping -> model(**b), a tuple -> model(*b), else model(b); all are kept
    network    where the parts are; None: known by the architecture
    forward    forward(model, batch) instead of the call above

    The model may be prepared already; it computes in float meanwhile. Its output on the first batch is compared before
    and after. Raises QATError for no batches, an architecture that is not known, a norm that does more than multiply by
    its gain, an output that changed (the network is not as it was described), sharded weights.
    """
    _scale(model, as_recipe(recipe), list(batches), network, forward, _searched, {"method": "awq"}, ROWS)


def _scale(
    model: nn.Module,
    recipe: Recipe,
    batches: list[Any],
    network: Network | None,
    forward: Forward | None,
    factors: Callable[[Group], Tensor],
    entry: dict[str, Any],
    rows: int,
) -> None:
    method = entry["method"]
    if any(old["method"] == method for old in folded(model)):
        raise QATError(f"{method} was done to this model already; doing it again would undo nothing and gain nothing")
    if not batches:
        raise QATError(f"{method} was given no batches; pass inputs of the model, 128 sequences for one")
    state = state_of(model)
    if state is not None and state.record.step:
        raise QATError(
            f"{method} is for weights that were not trained yet, and this model is at step {state.record.step}"
        )
    found = find(model, network)
    groups = _groups(model, recipe, found, method == "awq")
    run = partial(forward or call_model, model)
    with torch.no_grad(), _in_float(model):
        handles = [
            group.readers[0].register_forward_pre_hook(partial(group.see, -(-rows // len(batches))), with_kwargs=True)
            for group in groups
        ]
        try:
            before = _repeatable(run, batches[0])
            for batch in batches[1:]:
                run(batch)
        finally:
            for handle in handles:
                handle.remove()
        for group in groups:
            if group.count:
                _fold(group, factors(group))
            else:
                log.warning("%s: %s did not run on these batches; it stays as it is", method, group.name)
            group.sample.clear()
        after = _repeatable(run, batches[0])
        if before is not None and after is not None:
            moved = float((after - before).abs().max())
            plain = forward is None and next(model.parameters()).dtype == torch.float32
            if not moved <= (_ALLOWED if plain else _ALLOWED_OWN) * max(float(before.abs().max()), _SMALL):
                raise QATError(
                    f"{method} changed what the model computes by {moved:.3g}: something else reads what these norms "
                    "and linears give; describe the network anew (fold.network), and load its weights again"
                )
    mark_folded(model, found.module, entry)
    if state is not None:
        # the scales were searched on other weights
        initialize(model)


def _groups(model: nn.Module, recipe: Recipe, found: Found, linears: bool) -> list[Group]:
    """Those with a layer of the plan, in the order of the description. Raises QATError for norms that cannot."""
    planned = {id(model.get_submodule(row.name)): row for row in make_plan(model, recipe).rows}
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    wanted = [(norm, readers) for norm, readers in found.reads.items()]
    if linears:
        wanted += [(first, [second]) for first, second in (*found.values.items(), *found.products.items())]
    groups: list[Group] = []
    for name, readers in wanted:
        before, after = found.module.get_submodule(name), [found.linear(reader) for reader in readers]
        rows = [planned.get(id(reader)) for reader in after]
        parts = (before, *after)
        if not any(rows):
            continue
        if any(p.is_meta or hasattr(p, "placements") for m in parts for p in m.parameters()):
            raise QATError(f"{found.prefix}{name} is sharded or not loaded; fold the whole model, before sharding")
        if any(owners[id(m._parameters["weight"])] > 1 for m in parts):
            log.info("%s%s shares a weight with another layer; its inputs stay as they are", found.prefix, name)
            continue
        if isinstance(before, nn.Linear) and before.out_features != after[0].in_features:
            log.info("%s%s feeds several heads of %s; it stays as it is", found.prefix, name, readers[0])
            continue
        reasons = [] if isinstance(before, nn.Linear) else gain_reasons(before, f"{found.prefix}{name}")
        if reasons:
            raise QATError(f"the model cannot be scaled: {'; '.join(reasons)}")
        groups.append(Group(f"{found.prefix}{name}", before, after, rows))
    if not groups:
        raise QATError("no layer of the recipe reads the output of a norm; there is nothing to scale")
    return groups


def _searched(group: Group) -> Tensor:
    """s of the power with the least squared error of the outputs on the sample; power 0 is s = 1."""
    assert group.total is not None
    x = torch.cat(group.sample)
    size = (group.total / group.count).float().clamp_min(1e-8)
    targets = [F.linear(x, reader.weight.float()) for reader in group.readers]
    best, least = torch.ones_like(size), float("inf")
    for step in range(STEPS):
        factors = _bounded(size ** (step / STEPS))
        error = 0.0
        for reader, row, target in zip(group.readers, group.rows, targets, strict=True):
            w, given = reader.weight.detach().float() * factors, x / factors
            if row is not None and row.weight is not None:
                quantizer = make_quantizer(row.weight, Layout(tuple(w.shape), row.kinds["weight"])).to(w.device)
                quantizer.init_from(w)
                w = quantizer(w)
            if row is not None and row.input is not None:
                given = make_quantizer(row.input, Layout((1, 1), "tokens")).to(w.device)(given)
            error += float((F.linear(given, w) - target).square().sum())
        if error < least:
            best, least = factors, error
    return best


def _bounded(factors: Tensor) -> Tensor:
    """Around 1, so that neither the gains nor the weights run away."""
    middle = (factors.amax() * factors.amin()).sqrt()
    return (factors / middle).clamp(1 / _LARGEST, _LARGEST)


def _fold(group: Group, factors: Tensor) -> None:
    factors = _bounded(factors)
    for reader in group.readers:
        reader.weight.copy_(reader.weight.float() * factors)
    for key in ("weight", "bias"):
        part = getattr(group.before, key, None)
        if isinstance(part, Tensor):
            part.copy_(part.float() / (factors.unsqueeze(1) if part.dim() == 2 else factors))


def _repeatable(run: Callable[[Any], Any], batch: Any) -> Tensor | None:
    """The output or loss on a batch, with the same random numbers each time; None where there is no such tensor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = run(batch)
    loss = found.get("loss") if isinstance(found, dict) else None
    with contextlib.suppress(QATError):
        return (loss if isinstance(loss, Tensor) else output_of(found)).detach().float()
    return None


@contextlib.contextmanager
def _in_float(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode, nothing compiled, no caches of keys, prepared layers in float. After: as before."""
    training = {module: module.training for module in model.modules()}
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in found if getattr(config, "use_cache", None) is True]
    state = state_of(model)
    try:
        model.eval()
        for config in configs:
            config.use_cache = False
        for layer in model.modules():
            if isinstance(layer, QATLayer):
                layer._qat.active = False
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for config in configs:
            config.use_cache = True
        for module, was in training.items():
            module.training = was
        if state is not None:
            state.applied = None
            apply_schedule(model)
