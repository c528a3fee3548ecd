"""One seed's float model and data, and the training loop of every method.

Batches come in the same order for every method of a seed, and the teacher's outputs on them are computed once.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import qat
from qat import distill
from qat.layout import Layout
from qat.qtensor import Fields
from qat.quantizers import make_quantizer
from qat.recipes import Train
from qat.specs import QuantSpec
from qat.tasks.base import learning_rate_factor

Scores = dict[str, float]
SPLITS = ("tune", "test")


class Lab(ABC):
    """A case fills in the data; `dry` asks for sizes that only show whether the code runs."""

    # metrics of which more is better
    higher: frozenset[str] = frozenset()
    # whether linears alone are quantized, all but the head: `levels` then sees that they are, in every tool
    counts_levels = True
    # where the network's parts are, in the words of a recipe's `fold.network`; None: it cannot be folded, or is known
    network: dict[str, Any] | None = None
    # words of the rule that says which layers are quantized; empty: every linear but the head
    layers: Mapping[str, Any] = MappingProxyType({})
    # whether the CPU seconds of a training are a score too; `spent` are those of the last one
    timed = False
    spent = 0.0
    # of the float model and of quantization-aware training; what a schedule does not say is `Train`'s default: AdamW
    # with betas .9/.95, warm-up over 5 % of the steps, cosine to zero, gradients clipped to norm 1
    float_schedule: Train
    steps: int

    def __init__(self, seed: int, dry: bool = False, corpus: str = "") -> None:
        self.seed, self.dry, self.corpus_name = seed, dry, corpus
        self.float_model: nn.Module

    @abstractmethod
    def fresh(self) -> nn.Module:
        """The float architecture with random weights of this seed."""

    @abstractmethod
    def batch(self, order: int, step: int) -> Any:
        """Inputs of one step; order 0 is that of the float model's training, 1 that of all methods."""

    def inputs(self, batch: Any) -> Any:
        """What of a batch the model takes; all of it if not said otherwise."""
        return batch

    @abstractmethod
    def task_loss(self, output: Tensor, batch: Any) -> Tensor:
        """The loss that the float model was trained with, of the model's output on the batch."""

    @abstractmethod
    def scores(self, model: nn.Module, split: str) -> Scores:
        """Metric -> value on a split; lower for a model that is closer to the float one, but for those of `higher`."""

    @abstractmethod
    def calibration(self) -> list[Any]:
        """Training batches for methods that look at activations without training."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """About the data, for the results' environment."""

    def settle(self, model: nn.Module) -> None:  # noqa: B027
        """What follows a method's training, or replaces it, before figures are taken; nothing if not said otherwise."""

    def pretrain(self) -> None:
        """Train the float model."""
        torch.manual_seed(self.seed)
        model = self.fresh()
        train(model, self.float_schedule, lambda step: self._supervised(model, 0, step))
        self.float_model = model.eval()

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a float model that was trained already."""
        self.float_model = self.fresh()
        self.float_model.load_state_dict(state)
        self.float_model.eval()

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.float_model)

    def loss(self, model: nn.Module, kind: str, step: int, hidden: float = 0.0, temperature: float = 1.0) -> Tensor:
        """Loss of step `step` of a method's training: `ce`, the task's own, or `kl` to the float model at a temperature
        of both, with `hidden` as the weight of the hidden states' error."""
        if kind == "ce":
            return self._supervised(model, 1, step)
        if hidden:
            tap = distill.tap_of(model) or distill.attach(
                model, self.float_model, loss=kind, temperature=temperature, hidden=hidden
            )
            with tap.open():
                model(self.inputs(self.batch(1, step)))
            return tap.take()
        output = distill.output_of(model(self.inputs(self.batch(1, step))))
        return distill.LOSSES[kind](output, self.teacher[step], None, temperature)

    @cached_property
    def teacher(self) -> list[Tensor]:
        """The float model's outputs on the batches of all steps."""
        with torch.no_grad():
            return [distill.output_of(self.float_model(self.inputs(self.batch(1, step)))) for step in range(self.steps)]

    def _supervised(self, model: nn.Module, order: int, step: int) -> Tensor:
        batch = self.batch(order, step)
        return self.task_loss(distill.output_of(model(self.inputs(batch))), batch)


def train(
    model: nn.Module,
    schedule: Train,
    loss: Callable[[int], Tensor],
    after: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
    rates: Sequence[tuple[list[nn.Parameter], float]] = (),
) -> None:
    """`schedule.max_steps` steps of AdamW on loss(step); `after` every step.

    rates   parameters whose learning rate is this multiple of the others'
    """
    apart = {id(p) for parameters, _ in rates for p in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    groups: list[dict[str, Any]] = [{"params": others}]
    groups += [{"params": parameters, "lr": factor * schedule.lr} for parameters, factor in rates]
    betas = (schedule.betas[0], schedule.betas[1])
    optimizer = torch.optim.AdamW(groups, schedule.lr, betas, weight_decay=schedule.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(schedule, step))
    model.train()
    for step in range(schedule.max_steps):
        loss(step).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        after(optimizer)
    model.eval()


def exported(model: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain`, a float copy of the network, with what leaves training: dequantized integers and the float tensors.

    Raises AssertionError where the integers are not the numbers that the last forward of a layer would use.
    """
    from qat.layers import weight_quantizers
    from qat.plan import deployed
    from qat.steps import qat_layers

    bundle = qat.convert(model)
    assert len(bundle), "nothing is quantized"
    weights = {name: tensor.dequantize() for name, tensor in bundle.items()}
    for name, layer in qat_layers(bundle.module).items():
        for key, quantizer in weight_quantizers(layer).items():
            with torch.no_grad():
                fake = quantizer(layer._parameters[key])
            assert torch.equal(weights[f"{name}.{key}"], fake), f"{name}.{key}: exported differs from trained"
    # names of a bundle are relative to the module that a deployment format knows
    inner = deployed(plain)[1]
    inner.load_state_dict({**bundle.floats, **weights})
    for name, (spec, fields) in bundle.inputs.items():
        inner.get_submodule(name).register_forward_pre_hook(_rounded(spec, fields))
    return plain.eval()


def _rounded(spec: QuantSpec, fields: Fields | None) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    """A hook that rounds a layer's input: to the range that was exported, or to each input's own."""
    own = make_quantizer(spec, Layout((1, 1), "tokens"))

    def hook(module: nn.Module, given: tuple[Tensor]) -> Tensor:
        x = given[0]
        rows = own.layout.of(x).to_rows(x)
        codes, found = own.quantize(rows, spec, fields)
        return own.layout.of(x).from_rows(spec.grid.decode(codes, *found)).to(x.dtype)

    return hook


class _Products(TorchFunctionMode):
    """Notes, for each F.linear and F.embedding, how many different numbers the fullest row of its weight holds, and how
    many numbers there are in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.embedding):
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            weight = getattr(weight, "value", weight).detach()
            self.found.append((max(int(row.unique().numel()) for row in weight), weight.shape[1]))
        return func(*args, **(kwargs or {}))


@contextmanager
def levels(expected: Callable[[int], int], count: int) -> Iterator[None]:
    """Check, in one forward inside, that the rows of `count` linears, and of no other weight, have at most
    `expected(columns)` different numbers: that the quantization is on in every tool, and on the same layers. Nothing is
    checked where some rows could hold no more. Raises AssertionError."""
    with _Products() as seen:
        yield
    if any(expected(columns) >= columns for _, columns in seen.found):
        return
    quantized = sum(found <= expected(columns) for found, columns in seen.found)
    numbers = [found for found, _ in seen.found]
    assert quantized == count, f"{quantized} of {count} weights have rows of no more numbers than codes: {numbers}"
