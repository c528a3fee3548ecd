"""Weights that go to and fro between two codes (Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware
Training"): counted, dampened, and frozen one by one.

With q_t the code of a weight after optimizer step t, a move is q_t != q_(t-1), and it oscillates if the move before,
whenever that was, had the other direction (equations 4 and 5, algorithm 1):

    f = m * oscillates + (1 - m) * f          frequency
    a = m * q_t        + (1 - m) * a          where the code is on the average
    f > threshold: from now on the code is rint(a)

A frozen weight's latent is put onto its code after every step, at the scale of that step. So forward, integers and
export need not know about it, and its scale goes on learning.

    dampening = strength * sum over weights inside the grid of (w - w_hat)^2            (equation 6), w_hat constant

Counts are buffers in fixed point, which no cast to another float dtype touches; they move once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.codes import stays
from qat.errors import QATError
from qat.grids import FloatGrid
from qat.layers import QATLayer, weight_quantizers
from qat.node import inside
from qat.quantizers import Quantizer
from qat.schedule import State
from qat.state import require_state

MOMENTUM = 0.01
# a weight that reverses once in this many steps counts as oscillating in `share`
OSCILLATES = 0.005
_FREQUENCY, _MEAN = 2.0**30, 2.0**20
CHILD = "oscillation"


class Oscillation(nn.Module):
    """The counts of one weight, as rows [R, K]: codes int16, direction int8 (-1, 0, 1), frequency and mean int32 in
    fixed point, frozen bool; seen [1] bool: the counts are of something."""

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    mean: Tensor
    frozen: Tensor
    seen: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        kinds = {"codes": torch.int16, "direction": torch.int8, "frequency": torch.int32, "mean": torch.int32}
        for name, dtype in {**kinds, "frozen": torch.bool}.items():
            self.register_buffer(name, torch.zeros(rows, columns, dtype=dtype))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.bool))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Nothing was seen; also called on modules that were made on the meta device."""
        for buffer in self.buffers():
            buffer.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # of a float model, or of phases that counted nothing: counting begins anew
        missing: list[str] = args[2] if any(key.startswith(prefix) for key in state_dict) else []
        super()._load_from_state_dict(state_dict, prefix, args[0], args[1], missing, *args[3:])

    @torch.no_grad()
    def step(self, codes: Tensor, threshold: float) -> None:
        """Codes [R, K] after an optimizer step, integers in order; threshold 0: nothing is frozen."""
        now = torch.where(self.frozen, self.codes, codes.to(torch.int16))
        # without a look at the device: the first codes are their own predecessors
        before = torch.where(self.seen, self.codes, now)
        mean = torch.where(self.seen, self.mean / _MEAN, now.float())
        moved = torch.sign(now - before).to(torch.int8)
        turned = (moved != 0) & (moved == -self.direction)
        frequency = self.frequency / _FREQUENCY
        frequency += MOMENTUM * (turned.float() - frequency)
        mean += MOMENTUM * (now - mean)
        if threshold > 0.0:
            fresh = (frequency > threshold) & ~self.frozen
            now = torch.where(fresh, torch.round(mean).to(torch.int16), now)
            self.frozen |= fresh
        self.codes.copy_(now)
        self.direction.copy_(torch.where(moved != 0, moved, self.direction))
        self.frequency.copy_(torch.round(frequency * _FREQUENCY))
        self.mean.copy_(torch.round(mean * _MEAN))
        self.seen.fill_(True)


def tracked(model: nn.Module) -> dict[str, tuple[QATLayer, str, Quantizer, Oscillation]]:
    """Parameter name -> where its counts are; a tied weight once."""
    return _tracked(model.named_modules())


def _tracked(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[QATLayer, str, Quantizer, Oscillation]]:
    found: dict[str, tuple[QATLayer, str, Quantizer, Oscillation]] = {}
    for name, layer in modules:
        if not isinstance(layer, QATLayer):
            continue
        for key, quantizer in weight_quantizers(layer).items():
            counts = quantizer._modules.get(CHILD)
            # the layer that owns the quantizer; others only refer to it
            if isinstance(counts, Oscillation) and f"{key}_quantizer" in layer._modules:
                found[f"{name}.{key}" if name else key] = layer, key, quantizer, counts
    return found


def add_counts(quantizer: Quantizer, weight: Tensor) -> None:
    """Raises QATError where codes are in no order or a latent cannot hold them."""
    if isinstance(quantizer.spec.grid, FloatGrid):
        raise QATError(
            f"freeze_oscillating needs codes whose order is that of the numbers, and grid={quantizer.spec.kind} has "
            "none; set it to 0, or use integers or a table of levels"
        )
    if not quantizer.keeps_fields:
        raise QATError(
            f"freeze_oscillating holds weights on their codes, and scales of quantizer={quantizer.name!r} would follow "
            "them; set it to 0, or use quantizer mse or lsq"
        )
    if weight.dtype != torch.float32:
        raise QATError(
            f"freeze_oscillating puts weights onto their codes, which {str(weight.dtype)[6:]} may round to others; "
            "train float32 weights (precision 16-mixed or bf16-mixed)"
        )
    with torch.device(weight.device):
        quantizer.add_module(CHILD, Oscillation(*quantizer.layout.rows_shape))


@torch.no_grad()
def count_step(layers: Mapping[str, QATLayer], now: State) -> None:
    """After an optimizer step, before its codes are computed: move the counts, and put frozen weights onto their codes.

    While the quantization is off, or on other bits, there are no codes to follow, and counting begins anew afterwards.
    Raises QATError for sharded weights.
    """
    for name, (layer, key, quantizer, counts) in _tracked(layers.items()).items():
        weight = layer._parameters[key]
        if not stays(weight):
            raise QATError(f"freeze_oscillating needs whole weights, and {name} is sharded; set it to 0")
        assert weight is not None
        if not now.active or quantizer.live_spec is not quantizer.spec:
            counts.reset_parameters()
            continue
        rows = quantizer.layout.to_rows(weight).float()
        codes, fields = quantizer.quantize(rows, quantizer.spec)
        counts.step(codes, now.freeze_oscillating)
        held = quantizer.spec.grid.decode(counts.codes.to(codes.dtype), *fields)
        weight.data.copy_(quantizer.layout.from_rows(torch.where(counts.frozen, held, rows)))


def dampening(model: nn.Module, strength: float | None = None) -> Tensor:
    """The loss above, over all planned weights of a prepared model: an fp32 scalar, with a gradient unless it is 0.

    strength   None: that of the recipe's phase

    Raises QATError if the model is not prepared.
    """
    now = require_state(model).applied
    if strength is None:
        strength = now.dampen if now is not None and now.active else 0.0
    total = torch.zeros(())
    if not strength:
        return total
    seen: set[int] = set()
    for layer in model.modules():
        for key, quantizer in weight_quantizers(layer).items() if isinstance(layer, QATLayer) else ():
            weight = layer._parameters[key]
            if weight is None or id(weight) in seen:
                continue
            if not stays(weight):
                raise QATError("dampen needs whole weights, and these are sharded; set it to 0")
            seen.add(id(weight))
            with inside(), torch.autocast(weight.device.type, enabled=False):
                rows = quantizer.layout.to_rows(weight).float()
                with torch.no_grad():
                    grid, fields = quantizer.live_spec.grid, quantizer.fields(rows)
                    fake = grid.fake_quantize(rows, *fields)
                    needs = (True, False, False, False)
                    within, *_ = grid.vjp(torch.ones_like(rows), rows, *fields, False, needs)
                assert within is not None
                off = (rows - fake) * within
                total = total.to(weight.device) + off.square().sum()
    return strength * total


@torch.no_grad()
def share(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Parameter name -> (% of its weights that oscillate, % that are frozen), of those that are counted."""
    found = {}
    for name, (_, _, _, counts) in tracked(model).items():
        often = (counts.frequency > OSCILLATES * _FREQUENCY) & ~counts.frozen
        found[name] = 100.0 * float(often.float().mean()), 100.0 * float(counts.frozen.float().mean())
    return found
