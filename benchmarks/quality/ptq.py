"""Formats' own rounding, by the code of those who made them: llama.cpp with an importance matrix, and bitsandbytes.

Each function rounds the linears of a network in place, all but the head, and raises Missing where it cannot.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.common import Missing
from benchmarks.models import linears

if TYPE_CHECKING:
    from benchmarks.quality.lab import Lab
    from benchmarks.quality.methods import Width


def llama_cpp(grid: Width, model: nn.Module, lab: Lab) -> nn.Module:
    """Blocks of the type `grid.ggml`; importance: the mean square of each input on the case's calibration batches, what
    llama-imatrix collects."""
    if grid.ggml is None:
        raise Missing("llama.cpp has no such type")
    layers = linears(model)
    means = importance(layers, lambda: [model(batch) for batch in lab.calibration()])
    ggml = gguf_type(grid.ggml)
    with torch.no_grad():
        for name, layer in layers.items():
            blocks = super_blocks(grid.ggml, layer.weight, means[name])
            layer.weight.copy_(torch.from_numpy(_gguf().quants.dequantize(blocks.numpy(), ggml)))
    return model


def importance(layers: dict[str, nn.Linear], run: Callable[[], object]) -> dict[str, Tensor]:
    """The mean square of each input of the layers in what `run` computes, fp32 [K]."""
    with squares(layers) as found, torch.no_grad():
        run()
    return found


@contextmanager
def squares(layers: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Inside, forwards add up the squares of each layer's inputs; afterwards their means, fp32 [K]."""
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).double()
            sums[name] += rows.square().sum(0)
            counts[name] += rows.shape[0]

        return hook

    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    means: dict[str, Tensor] = {}
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()
        means |= {name: (sums[name] / max(1, counts[name])).float() for name in layers}


@functools.lru_cache(1)
def _library() -> Any:
    """The compiled llama.cpp inside xllamacpp."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise Missing("xllamacpp is not installed; pip install xllamacpp")
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    try:
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
    except AttributeError:
        raise Missing("this build of xllamacpp does not export ggml_quantize_chunk") from None
    return library


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise Missing("gguf is not installed; pip install gguf") from None
    return gguf


def gguf_type(kind: str) -> Any:
    return _gguf().GGMLQuantizationType[kind]


def super_blocks(kind: str, weight: Tensor, means: Tensor) -> Tensor:
    """The blocks that llama.cpp makes of rows [R, K] with importances fp32 [K], uint8 [R, bytes]."""
    import numpy as np

    library, ggml = _library(), gguf_type(kind)
    rows, columns = weight.shape
    block, size = _gguf().GGML_QUANT_SIZES[ggml]
    if columns % block:
        raise Missing(f"{kind} needs rows of a multiple of {block} numbers, not {columns}")
    source = np.ascontiguousarray(weight.detach().float().numpy())
    weights = np.ascontiguousarray(means.numpy())
    out = np.zeros((rows, columns // block * size), np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    written = library.ggml_quantize_chunk(
        ctypes.c_int(int(ggml)),
        source.ctypes.data_as(floats),
        out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        weights.ctypes.data_as(floats),
    )
    if written != out.nbytes:
        raise Missing(f"llama.cpp wrote {written} bytes of {kind} instead of {out.nbytes}")
    return torch.from_numpy(out)


def bitsandbytes(grid: Width, model: nn.Module, lab: Lab) -> nn.Module:
    """NF4 in blocks of 64 with double quantization, as bitsandbytes rounds and reads it."""
    if grid.slot.get("grid") != "nf4":
        raise Missing("bitsandbytes has no such grid")
    try:
        from bitsandbytes import functional
    except ImportError:
        raise Missing("bitsandbytes is not installed; pip install bitsandbytes") from None
    with torch.no_grad():
        for layer in linears(model).values():
            packed, state = functional.quantize_4bit(
                layer.weight, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            layer.weight.copy_(functional.dequantize_4bit(packed, state))
    return model
