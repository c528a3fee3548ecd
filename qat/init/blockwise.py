"""Block after block: the weights and scales of one block are trained until it answers as the float model's does.

EfficientQAT (Chen et al. 2024, arXiv 2407.11062), its first phase, Block-AP:

    min  mean (block_quantized(x_q) - block_float(x_f))^2        over all parameters of the block that are trained

x_f is what the block gets in the float model, x_q what it gets once the blocks before it are quantized and trained: it
makes good for their errors too. Only one block has gradients and an optimizer's state at a time; what is held beside
the model are the inputs of one block in both networks, and the wanted outputs, of all batches.

Beyond the paper: a block that ends no better than it began is put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import QATError
from qat.init.gptq import calibrating
from qat.init.walk import Forward, Shared, Stream, Survey, call_model
from qat.layers import QATLayer, weight_quantizers
from qat.quantizers import Quantizer
from qat.state import require_state
from qat.steps import latents, prepared_root, qat_layers, scales_fit, search_scales, weights_changed

# The learning rate falls to this share of itself, along a cosine (EfficientQAT: a twentieth).
_END = 0.05


@dataclass(frozen=True)
class BlockError:
    """One block.

    before, after   sum of squares of (quantized - float) over that of float, of its outputs on all batches
    steps           optimizer steps that were kept: 0 where training made it worse
    """

    name: str
    before: float
    after: float
    steps: int


@torch.no_grad()
def blockwise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int = 4,
    lr: float = 1e-4,
    forward: Forward | None = None,
) -> list[BlockError]:
    """Train a prepared model block after block, in place; returns a row for each block.

    Blocks are the outermost children of a ModuleList that hold prepared layers. Layers outside of them are quantized
    as they are. What is trained of a block: every parameter that has a gradient, and the weights too where the phases
    train scales alone; parameters shared with the rest of the model stay. Learned scales end as the scales that
    training starts from. The model is in eval mode meanwhile; its parameters are read in fp32 without autocast.

    batches   a mapping -> model(**b), a tuple -> model(*b), else model(b); each is one optimizer step of an epoch
    lr        of AdamW, for weights; learned scales move by ten times that, relatively (`qat.quantizers.lsq`)
    forward   forward(model, batch) instead of the call above

    Raises QATError for a model without such blocks, one whose blocks cannot run alone (more than once in a forward, or
    with arguments that are no plain data) or do not hand their outputs straight to the next, weights that are not fp32
    or are sharded, and a loss that is not finite.
    """
    state = require_state(model)
    layers = qat_layers(model)
    given = list(batches)
    if not given:
        raise QATError("blockwise was given no batches; pass inputs of the model, 128 sequences for one")
    search_scales(layers, force=False)
    found: list[BlockError] = []
    with calibrating(model, state, layers, []):
        runs = [partial(forward or call_model, model, batch) for batch in given]
        survey = Survey(model, _weights(layers))
        _switch(layers, False)
        survey.run(runs)
        blocks = _blocks(model, survey)
        for quantizer in _quantizers(layers.values()):
            quantizer.codes_fixed = False
        plain, quantized = Stream(survey, runs), Stream(survey, runs)
        outputs: list[Any] = []
        for name, block in blocks.items():
            _switch(layers, False)
            # by the outputs of the block before as it was in float: it has changed since
            plain.enter(block, outputs)
            outputs = [plain.alone(block, call)() for call in plain.calls]
            wanted = [_hidden(output, name) for output in outputs]
            _switch(layers, True)
            quantized.enter(block)
            alone = [quantized.alone(block, call) for call in quantized.calls]
            found.append(_train(model, name, block, alone, wanted, epochs, lr))
    for layer in layers.values():
        for key, quantizer in weight_quantizers(layer).items():
            scales_fit(quantizer, latents(layer, key))
    state.record.initialized = True
    weights_changed(model)
    return found


def _weights(layers: dict[str, QATLayer]) -> list[Shared]:
    shared: dict[int, Shared] = {}
    for name, layer in layers.items():
        for key in weight_quantizers(layer):
            shared.setdefault(id(layer._parameters[key]), Shared(name, [])).layers.append(layer)
    return list(shared.values())


def _blocks(model: nn.Module, survey: Survey) -> dict[str, nn.Module]:
    """Name -> block, in the order in which they run."""
    names = {module: name for name, module in model.named_modules()}
    found = {names[block]: block for block, _ in survey.stages() if block is not None}
    odd = next((names[block] for block in survey.blocks if block not in found.values()), None)
    if odd is not None:
        raise QATError(
            f"{odd} cannot be trained alone: it does not run exactly once in a forward, or its arguments are no plain "
            "tensors; use init.method gptq_latent or none"
        )
    for (before, first), (name, block) in pairwise(found.items()):
        if survey.links.get(block, (None,))[0] is not first:
            raise QATError(
                f"between {before} and {name} the model does something else, so the float inputs of {name} are not "
                "known once the blocks before it have changed; use init.method gptq_latent or none"
            )
    if not found:
        raise QATError(
            "the model has no blocks (children of a ModuleList that hold prepared layers) to train one by one; use "
            "init.method gptq_latent or none"
        )
    return found


def _switch(layers: dict[str, QATLayer], active: bool) -> None:
    for layer in layers.values():
        layer._qat.active = active


def _quantizers(layers: Iterable[QATLayer]) -> list[Quantizer]:
    return list({id(q): q for layer in layers for q in weight_quantizers(layer).values()}.values())


def _hidden(output: Any, name: str) -> Tensor:
    """What a block hands on: its output, or the first tensor of it."""
    values = output if isinstance(output, (tuple, list)) else (output,)
    first = next((t for t in values if isinstance(t, Tensor) and t.is_floating_point()), None)
    if first is None:
        raise QATError(f"{name} returns a {type(output).__name__} without a tensor to compare; use init.method none")
    return first


def _trained(model: nn.Module, block: nn.Module) -> list[nn.Parameter]:
    """The block's own parameters that training moves, each with a gradient from now on."""
    inner = set(block.modules())
    outside = {id(p) for module in model.modules() if module not in inner for p in module._parameters.values()}
    layers = [module for module in inner if isinstance(module, QATLayer)]
    learned = {id(p) for q in _quantizers(layers) for p in q.learned()}
    scales_of_inputs = {
        id(p) for m in inner if isinstance(m, Quantizer) and m.layout.kind == "tokens" for p in m.learned()
    }
    names = require_state(model).stilled
    stilled = {id(p) for key, p in prepared_root(model).named_parameters() if key in names}
    found = []
    for key, p in model.named_parameters():
        ours = p.requires_grad or id(p) in stilled | learned
        if ours and id(p) not in outside and id(p) not in scales_of_inputs:
            if p.dtype != torch.float32 or hasattr(p, "placements"):
                state = "sharded" if hasattr(p, "placements") else f"in {str(p.dtype)[6:]}"
                raise QATError(f"blockwise trains weights in float32, and {key} is {state}; use init.method none")
            found.append(p)
    return found


def _train(
    model: nn.Module,
    name: str,
    block: nn.Module,
    alone: list[Callable[[], Any]],
    wanted: list[Tensor],
    epochs: int,
    lr: float,
) -> BlockError:
    parameters = _trained(model, block)
    had = [p.requires_grad for p in parameters]
    kept = [p.detach().clone() for p in parameters]
    size = sum(float(t.double().square().sum()) for t in wanted) or 1.0

    def error() -> float:
        pairs = zip(alone, wanted, strict=True)
        return sum(float((_hidden(run(), name).double() - t).square().sum()) for run, t in pairs) / size

    before = error()
    steps = epochs * len(alone)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _END + (1 - _END) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            for step in range(steps):
                i = step % len(alone)
                output = _hidden(alone[i](), name)
                loss = (output.float() - wanted[i].float()).square().mean()
                if not math.isfinite(float(loss.detach())):
                    raise QATError(f"{name}: the loss is not finite at step {step}; use a smaller init.lr")
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    finally:
        for p, was in zip(parameters, had, strict=True):
            p.requires_grad_(was)
        for p in block.parameters():
            p.grad = None
    after = error()
    if after > before:
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    for quantizer in _quantizers(m for m in block.modules() if isinstance(m, QATLayer)):
        if quantizer.learned():
            quantizer.freeze()
            for p in quantizer.learned():
                p.zero_()
    weights_changed(model)
    return BlockError(name, before, min(before, after), steps if after <= before else 0)
