"""ExecuTorch: one file `model.pte` for phones and other small machines, whose layers of integers XNNPACK computes.

    8da4w   weights of 4 bits in groups of a multiple of 32, bf16 scales; or by channel, fp32 scales
    8da8w   weights of 8 bits by channel, fp32 scales
    both    inputs of 8 bits, a range with a zero point for each token, found while running

The graph is the user's own forward, traced in float32 by torch.export; a layer on a grid becomes

    choose_qparams, quantize and dequantize per token -> linear(dequantize(codes, scale), bias)

in the words of `torch.ops.quantized_decomposed`, which XNNPACK's partitioner knows. How it lies in the file says
`qat.export.pte_reader`.

Weights alone are refused: XNNPACK multiplies integers with integers. It takes torchao's tensors of weights alone, and
what it computes then is wrong, without an error: 102 off where outputs are 1.4 at most (4 bits), 1530 off (8 bits).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.adapters import Adapters
from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import graph, onnx_reader, pte_reader
from qat.export.format import Format, TensorStream, versions_of
from qat.export.hf_folder import load_tokenizer
from qat.export.process import heard, silent, undisturbed
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor
from qat.specs import QuantSpec

FILE = "model.pte"
KEEP = "add a rule {match: [its name], keep_float: true}"
CODES, SCALE = "codes", "scale"
# a buffer of a traced layer
_CODES = "quantized_codes"
# XNNPACK cuts rows into blocks of this many numbers
_BLOCK = 32
# batch and tokens of inputs made from a config: memory is planned for the longest
_SIZES = (1, 512)
_INPUT = "{bits: 8, granularity: token, zero_point: int, scale: fp32, quantizer: minmax}"
_PACKAGES = ("executorch", "torchao")
_BF16 = ("portable", "bf16", "e8m0")


class Rows(NamedTuple):
    """Codes int8 [O, I], fp32 scales [O, G] or by channel [O], numbers that share a scale (0: by channel), bits."""

    codes: Tensor
    scale: Tensor
    group: int
    bits: int


class ExecuTorch(Format):
    """For ExecuTorch's runtime with the XNNPACK backend."""

    name = "executorch"
    needs = "graph"
    bits = "4, 8"
    contents = "Linear layers of int4 by group or channel or int8 by channel, inputs of int8 by token; any traced model"
    consumers = ("executorch",)

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        if set(row.kinds.values()) - {"linear", "transposed"}:
            return [f"executorch holds no quantized {row.type}; {KEEP}"]
        found = [] if row.weight is None else _weight_reasons(row.weight, row.columns)
        if row.norm:
            found.append(
                f"batch_norm.fold: nothing here proves that {row.norm} alone reads what the layer gives; use onnx or "
                "openvino, or fold: false"
            )
        if row.weight is None:
            found.append(f"weight=null with a rounded input: XNNPACK multiplies integers with integers; {KEEP}")
        if row.input is None:
            found.append(
                "input=null: XNNPACK multiplies integers with integers, of weights alone it computes wrong numbers; "
                f"use input: {_INPUT}"
            )
        elif not _by_token(row.input):
            found.append(f"input grid {row.input}: XNNPACK rounds inputs to 8 bits, a range per token; use {_INPUT}")
        return found

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        if not pte_reader.installed():
            return ["executorch is not installed; pip install 'lightning-qat[executorch]'"]
        return graph.trace_reasons(bundle)

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """codes uint8 [O, I / 2] or int8 [O, I]; scale bf16 [O, G], or fp32 [O] by channel."""
        codes, spec = weight.codes, weight.spec
        rows, columns = codes.shape
        scale = weight.scale.float().expand(rows, -1)
        scale = scale.bfloat16() if spec.granularity == "group" else scale.reshape(rows)
        if spec.bits == 4:
            nibbles = F.pad(codes, (0, columns % 2)).to(torch.int16) + 8
            codes = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
        return {CODES: codes.contiguous(), SCALE: scale.contiguous()}

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        codes = pte_reader.unpacked(packed[CODES], layout.rows_shape[1])
        one = 1 if spec.granularity == "tensor" else len(codes)
        scale = packed[SCALE].float().reshape(len(codes), -1)[:one].to(spec.scale_grid.dtype)
        return QTensor(codes, scale, None, None, spec, layout, out_dtype)

    # ---- the file ------------------------------------------------------------------------------------------------

    def write(self, stream: TensorStream, folder: Path, tokenizer: Any) -> None:
        bundle, layouts = stream.bundle, stream.bundle.layouts()
        weights: dict[str, Rows] = {}
        told: dict[str, Any] = {"weights": {}, "floats": {}}
        for entry, value in stream:
            if isinstance(value, QTensor):
                packed, spec = self.pack(entry.name, value), value.spec
                weights[entry.name] = Rows(value.codes, packed[SCALE].float(), spec.group_size or 0, spec.bits)
                turned = layouts[entry.name].kind == "transposed"
                told["weights"][entry.name] = [pte_reader.digest(*packed.values()), turned]
            else:
                value = value.float() if value.is_floating_point() else value
                told["floats"][entry.name] = [pte_reader.digest(value), list(value.shape)]
        with undisturbed(), silent():
            program, read = _traced(bundle, weights)
            # what the graph does not read (a pooler that nothing uses, a counter) is not in the file
            lost = told["floats"].keys() - read
            told["floats"] = {name: said for name, said in told["floats"].items() if name in read}
            stream.records[:] = [record for record in stream.records if record.name not in lost]
            _lowered(program, json.dumps(told), folder / FILE)
        _check(folder / FILE)
        if bundle.config is not None:
            bundle.config.save_pretrained(str(folder))
        if tokenizer is not None:
            load_tokenizer(tokenizer).save_pretrained(str(folder))

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        yield from pte_reader.read_tensors(folder / FILE)

    def reader(self) -> str:
        installed = pte_reader.installed()
        return f"executorch {version('executorch')}" if installed else "nothing: executorch is not installed"

    def versions(self) -> dict[str, str]:
        return versions_of({name: name for name in _PACKAGES})


# ---- grids -----------------------------------------------------------------------------------------------------------


def _weight_reasons(spec: QuantSpec, columns: int) -> list[str]:
    nearest = f"nearest: grid: int, bits: 4, granularity: group, group_size: {_BLOCK}"
    if spec.kind != "int" or spec.bits not in (4, 8):
        return [f"weight grid {spec}: XNNPACK multiplies integers of 4 and of 8 bits; {nearest}"]
    found, size = [], spec.group_size
    if spec.bits == 4 and columns % 2:
        found.append(
            f"rows of {columns} numbers: XNNPACK computes wrong numbers with an odd count of 4-bit codes; {KEEP}"
        )
    if not spec.signed or spec.zero_point != "none":
        found.append(f"weight grid {spec}: XNNPACK's weights are signed, without zero points; use zero_point: none")
    if spec.signed_scale:
        found.append("signed_scale=true: XNNPACK takes positive scales; use false")
    if size is not None and spec.bits == 8:
        found.append(f"bits=8 in groups: XNNPACK has groups of 4-bit codes only; {nearest}, or granularity: channel")
    if size is not None and size % _BLOCK:
        found.append(f"group_size={size}: XNNPACK's groups are of a multiple of {_BLOCK} numbers; {nearest}")
    if size is not None and spec.scale not in _BF16:
        found.append(f"scale={spec.scale}: XNNPACK rounds scales of groups to bf16; use scale: portable")
    return found


def _by_token(spec: QuantSpec) -> bool:
    """Whether this is the grid of XNNPACK's dynamic inputs."""
    whole = spec.is_int and spec.bits == 8 and not spec.int_grid.narrow
    return whole and spec.granularity == "token" and spec.zero_point == "int" and spec.scale == "fp32"


# ---- the program -----------------------------------------------------------------------------------------------------


def _traced(bundle: Bundle, weights: dict[str, Rows]) -> tuple[Any, set[str]]:
    """(the program of `torch.export`, names of the float tensors that it reads).

    Sizes are those of the example inputs; the batch may be smaller, token ids and masks shorter. Raises ExportError if
    the model cannot be traced or does not call a quantized layer.
    """
    module, layers = bundle.plain()
    for name, owner in {**{name: name for name in bundle}, **bundle.tied}.items():
        layer, rows = layers[name.rpartition(".")[0]], weights[owner]
        layer.register_buffer(_CODES, rows.codes)
        layer.register_buffer("quantized_scale", rows.scale)
        layer.register_buffer("quantized_zero", torch.zeros(rows.scale.shape, dtype=torch.int8))
        layer.forward = MethodType(_multiplied(rows), layer)
    config: Any = getattr(module, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    (args, kwargs), shapes = graph.call_of(bundle, module, _smaller, _SIZES)
    with graph.tracing(bundle):
        program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    live, rename = bundle.parameters, Adapters(bundle.module).name
    names = {rename(name) for name in graph.parameters_read(program)}
    called = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == _CODES}
    called |= {bundle.tied.get(f"{layer}.weight", "").rpartition(".")[0] for layer in called}
    lost = next((name for name in bundle if name.rpartition(".")[0] not in called), None)
    if lost is not None:
        raise ExportError(f"{lost} is not read by the graph of this model; give its layer {KEEP}")
    # a tensor that the model has under two names is read under one of them
    read = {id(live[name]) for name in names if name in live}
    return program, {name for name in bundle.floats if id(live[name]) in read}


def _smaller(value: Any) -> Any:
    dims = graph.free_dims(value)
    return dims and {dim: torch.export.Dim.AUTO(max=value.shape[dim]) for dim in dims}


def _multiplied(rows: Rows) -> Any:
    """The forward of a linear layer as XNNPACK's partitioner knows it."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

    words: Any = torch.ops.quantized_decomposed
    low, high, kind = -(1 << (rows.bits - 1)), (1 << (rows.bits - 1)) - 1, torch.int8

    def forward(layer: Any, x: Tensor) -> Tensor:
        fields = words.choose_qparams_per_token_asymmetric(x, kind)
        codes = words.quantize_per_token(x, *fields, -128, 127, kind)
        x = words.dequantize_per_token(codes, *fields, -128, 127, kind, torch.float32)
        stored = layer.quantized_codes, layer.quantized_scale, layer.quantized_zero
        if rows.group:
            w = words.dequantize_per_channel_group(*stored, low, high, kind, rows.group, torch.float32)
        else:
            w = words.dequantize_per_channel(*stored, 0, low, high, kind)
        return F.linear(x, w, layer.bias)

    return forward


def _lowered(program: Any, told: str, path: Path) -> None:
    """The file of a program. Raises ExportError if a layer of integers is left that XNNPACK does not compute, or if the
    program changes a buffer."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    methods = {pte_reader.TOLD: told}
    # a batch norm that is XNNPACK's is folded into its convolution, whose weight would then be another
    kinds = [kind for kind in ALL_PARTITIONER_CONFIGS if kind.__name__ != "BatchNormConfig"]
    try:
        xnnpack = XnnpackPartitioner(configs=kinds)
        edge = to_edge_transform_and_lower(program, partitioner=[xnnpack], constant_methods=methods)
        made = edge.to_executorch()
    except Exception as problem:
        raise ExportError(f"ExecuTorch cannot lower the graph of this model ({onnx_reader.said(problem)})") from None
    changed = sorted(set(edge.exported_program().graph_signature.buffers_to_mutate.values()))
    if changed:
        raise ExportError(
            f"the forward of this model changes its buffer {changed[0]}, which would not be a constant of the file; "
            "leave that out in eval mode"
        )
    plan = next(plan for plan in made.executorch_program.execution_plan if plan.name == pte_reader.METHOD)
    left = sorted({op.name for op in plan.operators if op.name.startswith("quantized_decomposed")})
    if left:
        raise ExportError(f"XNNPACK does not compute all layers of integers of this model: {', '.join(left)} are left")
    with path.open("wb") as file:
        made.write_to_file(file)


def _check(path: Path) -> None:
    """Raises ExportError unless ExecuTorch's runtime takes the file."""
    with undisturbed(), silent(), heard() as words:
        from executorch.runtime import Runtime

        try:
            Runtime.get().load_program(path).load_method(pte_reader.METHOD)
        except Exception as problem:
            why = " ".join([onnx_reader.said(problem), *words().splitlines()[-1:]])
            raise ExportError(f"{path.name}: ExecuTorch's runtime does not load it ({why})") from None
