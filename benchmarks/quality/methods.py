"""What a case measures, as plain data, and how a method makes its model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

import qat
from benchmarks.common import FLOAT, Missing
from benchmarks.models import linears
from benchmarks.peers import Builder
from benchmarks.quality.lab import SPLITS, Lab, Scores, exported, levels, train
from benchmarks.schemes import Slot, recipe
from qat import distill
from qat.batch_norm import hold_batch_norm
from qat.errors import QATError
from qat.recipes import Train
from qat.steps import learned_scales

# the same for every method that trains; one is chosen on the tuning split of the first seed
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
CONTROL = "float trained on"
# these hold the network in float: one run serves every width
WIDTHLESS = (FLOAT, CONTROL)
OURS = "qat"
GPTQ = "GPTQ"


@dataclass(frozen=True)
class Width:
    """A grid on which every method of a case works.

    bits, narrow   the codes (`qat.grids.IntGrid`), for other libraries and for the count of levels
    slot, input    words of recipes for the weight and the input that every method of ours has here; input None: float
    goals          metric of our method -> what it should reach
    ggml           llama.cpp's type for this grid
    """

    bits: int
    narrow: bool = False
    slot: Slot = field(default_factory=dict)
    input: Slot | None = None
    goals: dict[str, float] = field(default_factory=dict)
    ggml: str | None = None

    def levels(self, columns: int) -> int:
        """The most different numbers that a row of `columns` weights can hold."""
        codes = (1 << self.bits) - self.narrow
        return codes * (columns // int(self.slot.get("group_size") or columns))


@dataclass(frozen=True)
class Method:
    """loss    of the training: `ce`, `kl`, or none for methods that do not train
    peer       another library's builder for a width
    ptq        a format's own rounding of a network, in place: of the float one, or with a loss of what ours made;
               neither this nor peer: ours, from `slot`
    slot       words of the weight's slot at every width, `at` those that replace them at one width. Two words are ours
               alone: `init`, how the weights start, "search" (as they are), "gptq" or "gptq latent", both with scales
               that are searched for the inputs' error if "weighted" follows; and `scale_rate`, in place of the method's
    input      words of the input's slot, where the width has one
    fold       words of the recipe's `fold`; where the network's parts are is the lab's to say
    recipe     more words of the recipe, like phases
    temperature  of both models in that KL
    hidden     weight of the hidden states' error (`qat.distill.hidden`)
    scale_rate learning rate of learned scales over that of the weights
    times      of the case's steps its training takes
    judge      the score by which the learning rate is chosen, lower is better
    only       widths at which it takes part; none: all
    """

    loss: str | None = None
    peer: Callable[[Width], Builder] | None = None
    ptq: Callable[[Width, nn.Module, Lab], nn.Module] | None = None
    slot: Slot = field(default_factory=dict)
    at: dict[str, Slot] = field(default_factory=dict)
    input: Slot = field(default_factory=dict)
    fold: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    hidden: float = 0.0
    scale_rate: float = 1.0
    times: int = 1
    judge: str = "kl"
    only: tuple[str, ...] = ()

    def varied(self, at: dict[str, Slot] | None = None, **slot: Any) -> Method:
        """With other words: at every width, or at some."""
        kept = {width: {k: v for k, v in words.items() if k not in slot} for width, words in self.at.items()}
        return replace(self, slot={**self.slot, **slot}, at={**kept, **(at or {})})


@dataclass(frozen=True)
class Case:
    """lab     what is trained, on what data
    widths     name -> grid
    methods    name -> method, in the order of the tables; `OURS` is the one that goals are for
    quick      (widths, methods) of `--quick`
    ratios     metric -> the tools of which the best is divided by
    trials     variants of `OURS` (`--try`)
    rates      learning rates that are tried
    lost       metric -> (metric, tool): how much less of it ours has than the tool
    """

    lab: type[Lab]
    widths: Mapping[str, Width]
    methods: Mapping[str, Method]
    quick: tuple[tuple[str, ...], tuple[str, ...]]
    ratios: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    trials: Mapping[str, Method] = field(default_factory=dict)
    rates: tuple[float, ...] = RATES
    lost: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def gptq(model: nn.Module, lab: Lab, latent: bool, weighted: bool) -> None:
    """GPTQ on a prepared model, on the case's calibration batches. `latent` keeps the compensated weights unrounded, so
    that training starts from GPTQ's own codes."""
    from qat.init.gptq import gptq as compensate

    compensate(model, lab.calibration(), latent=latent, weighted=weighted)


def measured(name: str, method: Method, width: str, grid: Width, lab: Lab, rate: float | None) -> dict[str, Scores]:
    """Split -> scores of the method at this width and learning rate (None: it does not train).

    Ours are those of the exported integers in a plain float network, whose inputs are rounded where the width says so;
    another library's those of its own fake-quantized model. Raises Missing where the method cannot take part.
    """
    if name in WIDTHLESS:
        model = lab.copy()
        if rate is not None:
            _train(lab, method, model, rate)
    elif method.ptq is not None:
        start = lab.copy() if method.loss is None else _ours(lab, method, width, grid, rate)
        model = method.ptq(grid, start, lab)
    elif method.peer is not None:
        model = _peers(lab, method, grid, rate)
    else:
        model = _ours(lab, method, width, grid, rate)
    if name not in WIDTHLESS and lab.counts_levels:
        with levels(grid.levels, len(linears(lab.float_model))):
            model(lab.inputs(lab.batch(1, 0)))
    spent = {"training CPU seconds": lab.spent} if lab.timed and rate is not None else {}
    return {split: {**lab.scores(model, split), **spent} for split in SPLITS}


def _train(lab: Lab, method: Method, model: nn.Module, rate: float | None, **more: Any) -> None:
    if method.loss is not None and rate is not None:
        loss = method.loss
        schedule = Train(lr=rate, max_steps=method.times * lab.steps)

        def of_step(step: int) -> Tensor:
            found = lab.loss(model, loss, step, method.hidden, method.temperature)
            return found + qat.dampening(model) if qat.is_prepared(model) else found

        began = time.process_time()
        train(model, schedule, of_step, **more)
        lab.spent = time.process_time() - began
        distill.detach(model)


def _peers(lab: Lab, method: Method, grid: Width, rate: float | None) -> nn.Module:
    assert method.peer is not None
    model = method.peer(grid)(lab.copy(), lab.inputs(lab.batch(1, 0)))
    try:
        _train(lab, method, model, rate)
    except Exception as problem:
        raise Missing(f"fails in training: {type(problem).__name__}: {problem}") from None
    return model.eval()


def _ours(lab: Lab, method: Method, width: str, grid: Width, rate: float | None) -> nn.Module:
    coded = {"bits": grid.bits, "narrow": grid.narrow, "granularity": "channel"}
    words = {**coded, **method.slot, **grid.slot, **method.at.get(width, {})}
    init, scale_rate = words.pop("init", "search"), words.pop("scale_rate", method.scale_rate)
    rule = {"weight": words} if grid.input is None else {"weight": words, "input": {**grid.input, **method.input}}
    more = {**method.recipe, "fold": {**method.fold, "network": lab.network}} if method.fold else method.recipe
    model = lab.copy()
    try:
        made = recipe({**rule, **lab.layers}, distill={"enabled": method.loss == "kl"}, **more)
        qat.fold.apply(model, made, lab.calibration())
        folded = copy.deepcopy(model)
        qat.prepare(model, made)
    except QATError as problem:
        raise Missing(f"the recipe cannot be prepared: {problem}") from None
    if init != "search":
        gptq(model, lab, latent="latent" in init, weighted="weighted" in init)
    if method.fold and method.hidden and method.loss:
        # hidden states are compared in one basis
        distill.attach(model, distill.freeze(folded), loss=method.loss, hidden=method.hidden)
    scales = list(learned_scales(model).values())
    apart = [(scales, scale_rate)] if scales and scale_rate != 1.0 else []
    _train(lab, method, model, rate, after=lambda optimizer: qat.after_optimizer_step(model, optimizer), rates=apart)
    if method.loss is None and grid.input is not None:
        _show(model, lab)
    lab.settle(model)
    return exported(model.eval(), lab.copy())


def _show(model: nn.Module, lab: Lab) -> None:
    """Calibration inputs to a model that is not trained, for ranges that stay; batch norms keep their statistics."""
    hold_batch_norm(model.train(), True)
    for inputs in lab.calibration():
        model(inputs)
    qat.after_optimizer_step(model)
    hold_batch_norm(model, False)
