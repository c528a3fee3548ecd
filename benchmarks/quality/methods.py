"""The widths and the methods, as plain data, and how a method makes its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

import qat
from benchmarks.common import FLOAT, Missing
from benchmarks.models import linears
from benchmarks.peers import Builder
from benchmarks.quality import peers
from benchmarks.quality.lab import SPLITS, Lab, Scores, exported, levels, train
from benchmarks.schemes import Slot, recipe
from qat import distill
from qat.errors import QATError
from qat.recipes import Train
from qat.steps import learned_scales

# the same for every method that trains; one is chosen on the tuning split of the first seed
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
QUICK_RATES = (3e-4, 1e-3)


@dataclass(frozen=True)
class Width:
    """bits and narrow: the codes (`qat.grids.IntGrid`); goal: largest KL over GPTQ's."""

    bits: int
    narrow: bool = False
    goal: float = 0.65

    @property
    def levels(self) -> int:
        return (1 << self.bits) - self.narrow


# one scale per output channel in all of them; 0.7 and 0.65 are the goals of the issue
WIDTHS = {"W4": Width(4, goal=0.7), "W3": Width(3), "W2": Width(2), "ternary": Width(2, narrow=True)}
# of the best other library's trained model
PEER_GOAL = 0.5


@dataclass(frozen=True)
class Method:
    """loss    of the training: `ce`, `kl`, or none for methods that do not train
    peer       another library's builder for a width; None: ours, from `slot`
    slot       words of the weight's slot at every width, `at` those that replace them at one width. The word `init` is
               ours alone: how the weights start, "search" (as they are), "gptq" or "gptq latent"
    recipe     more words of the recipe, like phases
    hidden     weight of the hidden states' error (`qat.distill.hidden`)
    scale_rate learning rate of learned scales over that of the weights
    judge      the score by which the learning rate is chosen
    """

    loss: str | None = None
    peer: Callable[[Width], Builder] | None = None
    slot: Slot = field(default_factory=dict)
    at: dict[str, Slot] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    hidden: float = 0.0
    scale_rate: float = 1.0
    judge: str = "kl"

    def varied(self, at: dict[str, Slot] | None = None, **slot: Any) -> Method:
        """With other words: at every width, or at some."""
        kept = {width: {k: v for k, v in words.items() if k not in slot} for width, words in self.at.items()}
        return replace(self, slot={**self.slot, **slot}, at={**kept, **(at or {})})


OURS = Method(
    "kl",
    slot={"quantizer": "lsq", "init": "gptq latent"},
    at={
        "W4": {"signed_scale": True},
        "W3": {"signed_scale": True},
        "W2": {"grid": "seq"},
        "ternary": {"init": "search"},
    },
    # one for each block of the case
    hidden=3.0,
)
CONTROL = "float trained on"
GPTQ = "GPTQ"
# reported in this order; those with a peer are other libraries'
METHODS: dict[str, Method] = {
    FLOAT: Method(),
    # what the learning rate's second warm-up alone costs or gains
    CONTROL: Method("ce", judge="nll_gap"),
    "RTN absmax": Method(slot={"quantizer": "absmax"}),
    "RTN MSE": Method(slot={"quantizer": "mse"}),
    GPTQ: Method(slot={"quantizer": "mse", "init": "gptq"}),
    "torchao QAT": Method("ce", peers.torchao),
    "torchao QAT + KL": Method("kl", peers.torchao),
    "torchao learned QAT + KL": Method("kl", peers.torchao_learned),
    "ModelOpt QAT": Method("ce", peers.modelopt),
    "ModelOpt QAT + KL": Method("kl", peers.modelopt),
    "ModelOpt MSE QAT + KL": Method("kl", peers.modelopt_mse),
    "Brevitas QAT": Method("ce", peers.brevitas),
    "Brevitas QAT + KL": Method("kl", peers.brevitas),
    "Brevitas MSE QAT + KL": Method("kl", peers.brevitas_mse),
    # what it gains beside the others' `+ KL` without the second loss
    "qat, KL alone": replace(OURS, hidden=0.0),
    "qat": OURS,
}
PEERS = tuple(name for name, method in METHODS.items() if method.peer)
QUICK = (FLOAT, "RTN absmax", "RTN MSE", GPTQ, "torchao QAT + KL", "ModelOpt MSE QAT + KL", "qat")
# these hold the network in float: one run serves every width
WIDTHLESS = (FLOAT, CONTROL)


def gptq(model: nn.Module, lab: Lab, latent: bool) -> None:
    """GPTQ on a prepared model, on the case's calibration batches. `latent` keeps the compensated weights unrounded, so
    that training starts from GPTQ's own codes."""
    try:
        from qat.init.gptq import gptq as compensate
    except ImportError:
        raise Missing("qat.init has no GPTQ yet") from None
    compensate(model, lab.calibration(), latent=latent)


def measured(name: str, method: Method, width: str, lab: Lab, rate: float | None) -> dict[str, Scores]:
    """Split -> scores of the method at this width and learning rate (None: it does not train).

    Ours are those of the exported integers in a plain float network; another library's those of its own fake-quantized
    model. Raises Missing where the method cannot take part.
    """
    if name in WIDTHLESS:
        model = lab.copy()
        if rate is not None:
            _train(lab, method, model, rate)
    elif method.peer is not None:
        model = _peers(lab, method, width, rate)
    else:
        model = _ours(lab, method, width, rate)
    if name not in WIDTHLESS:
        with levels(WIDTHS[width].levels, len(linears(lab.float_model))):
            model(lab.batch(1, 0))
    return {split: lab.scores(model, split) for split in SPLITS}


def _train(lab: Lab, method: Method, model: nn.Module, rate: float | None, **more: Any) -> None:
    if method.loss is not None and rate is not None:
        loss = method.loss
        schedule = Train(lr=rate, max_steps=lab.steps)
        train(model, schedule, lambda step: lab.loss(model, loss, step, method.hidden), **more)
        distill.detach(model)


def _peers(lab: Lab, method: Method, width: str, rate: float | None) -> nn.Module:
    assert method.peer is not None
    model = method.peer(WIDTHS[width])(lab.copy(), lab.batch(1, 0))
    try:
        _train(lab, method, model, rate)
    except Exception as problem:
        raise Missing(f"fails in training: {type(problem).__name__}: {problem}") from None
    return model.eval()


def _ours(lab: Lab, method: Method, width: str, rate: float | None) -> nn.Module:
    words = {
        "bits": WIDTHS[width].bits,
        "narrow": WIDTHS[width].narrow,
        "granularity": "channel",
        **method.slot,
        **method.at.get(width, {}),
    }
    init = words.pop("init", "search")
    model = lab.copy()
    try:
        qat.prepare(model, recipe({"weight": words}, distill={"enabled": method.loss == "kl"}, **method.recipe))
    except QATError as problem:
        raise Missing(f"the recipe cannot be prepared: {problem}") from None
    if init != "search":
        gptq(model, lab, latent=init == "gptq latent")
    scales = list(learned_scales(model).values())
    apart = [(scales, method.scale_rate)] if scales and method.scale_rate != 1.0 else []
    _train(lab, method, model, rate, after=lambda optimizer: qat.after_optimizer_step(model, optimizer), rates=apart)
    return exported(model.eval(), lab.copy())
