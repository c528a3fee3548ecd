"""OpenVINO IR, `model.xml` and `model.bin`: weights of 8 or 4 bits, nf4, or 8-bit floats; inputs with a fixed range.

The graph is that of `onnx`, read by OpenVINO's own frontend, which keeps the integers:

    Constant (i8 u8 i4 u4 nf4) -> Convert f32 -> Subtract zero point -> Multiply scale -> Reshape -> MatMul

nf4 goes through ONNX as 4-bit codes; its constants get their type here. An input is a FakeQuantize that gives codes,
and the same Subtract and Multiply: its codes are those of training but where a number lies on the border of two.

On CPUs OpenVINO computes in bf16 and quantizes activations of 4- and 8-bit layers, unless it is told otherwise:
INFERENCE_PRECISION_HINT=f32, DYNAMIC_QUANTIZATION_GROUP_SIZE=0. These are used here to read weights back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import onnx_reader, onnx_tensors
from qat.export.format import TensorStream, versions_of
from qat.export.formats.onnx import FILE as ONNX_FILE
from qat.export.formats.onnx import Onnx
from qat.plan import PlanRow
from qat.specs import QuantSpec

FILE = "model.xml"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_TOLD = ["qat", "tensors"]
_PACKAGES = ("openvino", "onnx", "onnxscript")


class OpenVino(Onnx):
    """For OpenVINO's runtime and its GenAI tools."""

    name = "openvino"
    contents = "integers, nf4 and 8-bit floats, inputs with a fixed range of 8 bits; any traced model"
    consumers = ("openvino",)
    # its ONNX frontend knows no types of 2 bits
    least = 4

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = super().row_reasons(row)
        if row.input is not None and not found and row.input.bits != 8:
            found.append(f"input of {row.input.bits} bits: openvino rounds inputs to 8 bits; use bits: 8")
        return found

    def _weight_reasons(self, spec: QuantSpec) -> list[str]:
        if spec.kind in onnx_tensors.LEVELS:
            return []
        return super()._weight_reasons(spec)

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        if find_spec("openvino") is None:
            return ["openvino is not installed; pip install 'lightning-qat[openvino]'"]
        return super().model_reasons(bundle, tokenizer)

    def write(self, stream: TensorStream, folder: Path, tokenizer: Any) -> None:
        import openvino

        super().write(stream, folder, tokenizer)
        model_file = folder / ONNX_FILE
        _, told = onnx_reader.load(model_file)
        model = openvino.Core().read_model(str(model_file))
        for entry in stream.entries:
            if entry.spec is not None and entry.spec.kind in onnx_tensors.LEVELS:
                _retype(model, f"{entry.name}_quantized", openvino.Type.nf4)
        told["weights"] = {name: _node_of(model, value) for name, value in told["weights"].items()}
        told["inputs"] = {name: [_node_of(model, value), zero] for name, (value, zero) in told["inputs"].items()}
        told["floats"] = {name: _constant(model, name, stream.bundle.floats[name]) for name in told["floats"]}
        model.set_rt_info(json.dumps(told), _TOLD)
        openvino.save_model(model, str(folder / FILE), compress_to_fp16=False)
        del model
        for path in folder.glob(f"{ONNX_FILE}*"):
            path.unlink()

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        path = folder / FILE
        if find_spec("openvino") is None:
            raise ExportError(
                "OpenVINO's files are read with the package openvino; pip install 'lightning-qat[openvino]'"
            )
        if not path.is_file():
            raise ExportError(f"{path} is missing")
        try:
            import openvino

            core = openvino.Core()
            model = core.read_model(str(path))
            told = json.loads(model.get_rt_info(_TOLD).astype(str))
            onnx_reader.check_told(told)
            nodes = {op.get_friendly_name(): op for op in model.get_ops()}
        except Exception as problem:
            raise ExportError(
                f"{path} is not an OpenVINO file of qat's that can be read ({onnx_reader.said(problem)})"
            ) from None
        for name, value in {**told["weights"], **told["floats"]}.items():
            yield name, onnx_reader.guarded(path, name, lambda v=value: _value(core, _made(nodes, v)))
        for layer, (value, asymmetric) in told["inputs"].items():
            found = onnx_reader.guarded(path, layer, lambda v=value, a=asymmetric: _range(core, _made(nodes, v), a))
            for key, tensor in found.items():
                yield f"{layer}.{key}", tensor

    def reader(self) -> str:
        installed = find_spec("openvino") is not None
        return f"openvino {version('openvino')}" if installed else "nothing: openvino is not installed"

    def versions(self) -> dict[str, str]:
        return versions_of({name: name for name in _PACKAGES})


def _node_of(model: Any, value: str) -> str:
    """The node of the IR that computes a value of the ONNX graph: it is called as the ONNX node."""
    names = {op.get_friendly_name() for op in model.get_ops()}
    for name in (f"{value}/Reshape", f"{value}/DequantizeLinear"):
        if name in names:
            return name
    raise ExportError(f"{value} was merged into another tensor when OpenVINO read the graph")


def _constant(model: Any, name: str, value: Tensor) -> str:
    """The constant that holds a float tensor: its own, or one of equal numbers, which OpenVINO keeps once.

    Raises ExportError if there is none.
    """
    wanted = value.detach().cpu()
    wanted = wanted.float() if wanted.is_floating_point() else wanted
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    constants.sort(key=lambda op: op.get_friendly_name() != name)
    for op in constants:
        if list(op.get_output_shape(0)) == list(wanted.shape) and op.get_output_element_type(0).bitwidth >= 8:
            data = op.get_data()
            if data.dtype.isbuiltin == 1 and np.array_equal(data, wanted.numpy()):
                return str(op.get_friendly_name())
    raise ExportError(f"{name} was merged into another tensor when OpenVINO read the graph")


def _retype(model: Any, name: str, kind: Any) -> None:
    """Let the bytes of a constant of 4 bits be numbers of another type."""
    import openvino

    codes = next(op for op in model.get_ops() if op.get_friendly_name() == name)
    for target in list(codes.output(0).get_target_inputs()):
        user = target.get_node()
        place = user if user.get_type_name() == "Reshape" else codes
        shape = place.output(0).get_shape()
        if user.get_type_name() == "ShapeOf":
            made = openvino.opset13.constant(np.array(shape, np.int64))
            user.output(0).replace(made.output(0))
            continue
        tensor = openvino.Tensor(kind, shape)
        tensor.data[:] = codes.get_tensor_view().data.reshape(tensor.data.shape)
        made = openvino.opset13.constant(tensor)
        made.set_friendly_name(name)
        for consumer in list(place.output(0).get_target_inputs()):
            if consumer.get_node().get_type_name() == "Convert":
                consumer.replace_source_output(made.output(0))


def _made(nodes: dict[str, Any], name: str) -> Any:
    if name not in nodes:
        raise ExportError(f"there is no node {name}")
    return nodes[name]


def _value(core: Any, node: Any) -> Tensor:
    """What OpenVINO's CPU plugin computes for a node that depends on constants alone."""
    import openvino

    alone = openvino.Model([openvino.opset13.result(node.output(0))], [], "weight")
    return torch.from_numpy(np.array(core.compile_model(alone, "CPU", EXACT)([])[0]))


def _range(core: Any, node: Any, asymmetric: bool) -> dict[str, Tensor]:
    """`input_scale` and, of an asymmetric input, `input_zero_point`, from the Multiply behind a FakeQuantize."""
    if node.get_type_name() != "Multiply":
        raise ExportError(f"its input is rounded by {node.get_type_name()}")
    found = {"input_scale": _value(core, node.input_value(1).get_node()).reshape(1)}
    into = node.input_value(0).get_node()
    zero, codes = torch.zeros(1), into
    if into.get_type_name() == "Subtract":
        zero = _value(core, into.input_value(1).get_node()).reshape(1)
        codes = into.input_value(0).get_node()
    unsigned = codes.input_value(0).get_element_type().to_string().startswith("u")
    if asymmetric or bool(zero.any()):
        found["input_zero_point"] = zero.to(torch.int16) - (128 if unsigned else 0)
    return found
