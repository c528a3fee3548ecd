"""Other libraries' quantization-aware training on the same model, at the scheme of theirs that is nearest to ours.

Each function takes a float model and a batch, and returns the model to train; it raises Missing where its library
cannot be imported or refuses. All leave the head in float, as ours do.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.common import Missing
from benchmarks.models import linears
from benchmarks.schemes import ACTIVATION, FIXED, FOLLOWING, LEARNED

Builder = Callable[[nn.Module, Any], nn.Module]


@contextlib.contextmanager
def imported(package: str) -> Iterator[None]:
    """Inside, an import that fails and a refusal become Missing; greetings of the libraries are not shown."""
    logging.disable(logging.WARNING)
    try:
        quiet = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            yield
    except ImportError as problem:
        raise Missing(f"{package} cannot be imported: {problem}") from None
    except Exception as problem:
        raise Missing(f"{package} refuses: {type(problem).__name__}: {problem}") from None
    finally:
        logging.disable(logging.NOTSET)


def torchao_builder(
    activation: tuple[Any, ...] | None, weight: tuple[Any, ...], learned_scales: bool = False
) -> Builder:
    """(dtype, granularity or group size, symmetric) of activations and of weights; learned scales are its prototype."""

    def config(dtype: Any, what: Any, symmetric: bool) -> Any:
        from torchao.quantization.qat import IntxFakeQuantizeConfig

        size = {"group_size": what} if isinstance(what, int) else {"granularity": what}
        learned = {"is_dynamic": False, "range_learning": True} if learned_scales else {}
        return IntxFakeQuantizeConfig(dtype, **size, is_symmetric=symmetric, **learned)

    def build(model: nn.Module, batch: Any) -> nn.Module:
        with imported("torchao"):
            from torchao.quantization import quantize_
            from torchao.quantization.qat import QATConfig, initialize_fake_quantizers

            acts = None if activation is None else config(*activation)
            step = QATConfig(activation_config=acts, weight_config=config(*weight), step="prepare")
            chosen = set(linears(model))
            quantize_(model, step, filter_fn=lambda module, name: name in chosen)
            if learned_scales:
                initialize_fake_quantizers(model, (batch,))
        return model

    return build


def _in_blocks(config: Any, size: int, more: dict[str, Any]) -> Any:
    """A configuration of ModelOpt's with the sizes of its blocks changed, and more said of what is in blocks."""
    if isinstance(config, dict):
        found = {k: _in_blocks(v, size, more) for k, v in config.items()}
        return {**found, "block_sizes": {-1: size}, **more} if config.get("block_sizes") else found
    return [_in_blocks(each, size, more) for each in config] if isinstance(config, list) else config


def modelopt_builder(config: str | dict[str, Any], block: int | None = None, **more: Any) -> Builder:
    """A configuration or the name of one of the library's own, in blocks of this size (and with `more`) where given,
    calibrated on the batch."""

    def build(model: nn.Module, batch: Any) -> nn.Module:
        with imported("nvidia-modelopt"):
            import modelopt.torch.quantization as mtq

            chosen = getattr(mtq, config) if isinstance(config, str) else config
            chosen = chosen if block is None else _in_blocks(chosen, block, more)
            quantized: nn.Module = mtq.quantize(model, chosen, lambda m: m(batch))
        return quantized

    return build


def brevitas_builder(**settings: str | int) -> Builder:
    """QuantLinear in place of each linear; a setting that ends in _quant names a class of brevitas.quant."""

    def build(model: nn.Module, batch: Any) -> nn.Module:
        with imported("brevitas"):
            import brevitas.nn as qnn
            import brevitas.quant as quant

            options = {k: getattr(quant, str(v)) if k.endswith("_quant") else v for k, v in settings.items()}
            for name, linear in linears(model).items():
                fresh = qnn.QuantLinear(linear.in_features, linear.out_features, bias=False, **options)
                fresh = fresh.to(linear.weight.device, linear.weight.dtype)
                fresh.weight.data.copy_(linear.weight.data)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, fresh)
        return model.train()

    return build


# tool -> (family, builder)
PEERS: dict[str, tuple[str, Builder]] = {
    "torchao W4 g32": (FOLLOWING, torchao_builder(None, (torch.int4, 32, True))),
    "torchao W4 g32 learned": (LEARNED, torchao_builder(None, (torch.int4, 32, True), learned_scales=True)),
    # the gradient goes to every number unless it is told to leave out those that are clipped, as ours does
    "ModelOpt W4 g32": (FIXED, modelopt_builder("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 32)),
    "ModelOpt W4 g32 clipped": (
        FIXED,
        modelopt_builder("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 32, pass_through_bwd=False),
    ),
    "Brevitas W4 row": (FOLLOWING, brevitas_builder(weight_quant="Int8WeightPerChannelFloat", weight_bit_width=4)),
    "torchao 8da4w": (ACTIVATION, torchao_builder((torch.int8, "per_token", False), (torch.int4, 32, True))),
    # symmetric scales per token are refused by torchao 0.18: asymmetric ones are its nearest
    "torchao W8A8": (
        ACTIVATION,
        torchao_builder((torch.int8, "per_token", False), (torch.int8, "per_channel", True)),
    ),
    "ModelOpt W8A8": (ACTIVATION, modelopt_builder("INT8_DEFAULT_CFG")),
    "Brevitas W8A8": (
        ACTIVATION,
        brevitas_builder(weight_quant="Int8WeightPerChannelFloat", input_quant="Int8ActPerTensorFloat"),
    ),
}
# compiled ones that are tried: Brevitas' own modules break the graph at every layer
COMPILED = tuple(tool for tool in PEERS if not tool.startswith("Brevitas"))
