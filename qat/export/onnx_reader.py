"""What is in an ONNX file, value by value: by onnxruntime where it is installed, else by the same arithmetic here.

A weight is a value of the graph that depends on initializers alone. The nodes that make it become a graph of their own
and onnxruntime runs it: DequantizeLinear (and Reshape), or MatMulNBits on the rows of an identity matrix.

Files may be damaged: everything that goes wrong while they are read is an ExportError.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.errors import ExportError

# entry of the file's metadata: what the tensors are called
TOLD = "qat.tensors"
# nodes between an initializer and a weight
_DEEPEST = 4
# rows of the identity that go through a MatMulNBits at a time
_PROBES = 512
_KINDS = {"weights": str, "floats": str, "inputs": list}


def installed() -> bool:
    """Whether onnxruntime is there."""
    return find_spec("onnxruntime") is not None


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every parameter and static range, as `qat.export.format.Format.read` names them."""
    model, told = load(path)
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    for name, value in told["weights"].items():
        yield name, guarded(path, name, lambda v=value: _weight(model, makers, known, v))
    for name, value in told["floats"].items():
        yield name, guarded(path, name, lambda v=value: _tensor(known[v]))
    for layer, entry in told["inputs"].items():
        found = guarded(path, layer, lambda e=entry: _range(makers, known, *e))
        for key, tensor in found.items():
            yield f"{layer}.{key}", tensor


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    """(ModelProto with its external data, what its metadata says). Raises ExportError for a file that is no such."""
    if not path.is_file():
        raise ExportError(f"{path} is missing")
    try:
        import onnx
    except ImportError:
        raise ExportError("ONNX files are read with the package onnx; pip install 'lightning-qat[onnx]'") from None
    try:
        model = onnx.load(str(path))
        text = {entry.key: entry.value for entry in model.metadata_props}[TOLD]
        told = check_told(json.loads(text))
    except Exception as problem:
        raise ExportError(f"{path} is not an ONNX file of qat's that can be read ({said(problem)})") from None
    return model, told


def check_told(told: Any) -> dict[str, Any]:
    """Raises an exception unless `told` names weights, floats and inputs."""
    for key, kind in _KINDS.items():
        if not all(isinstance(value, kind) for value in told[key].values()):
            raise TypeError(f"{TOLD}.{key}")
    if not all(len(value) == 2 and isinstance(value[0], str) for value in told["inputs"].values()):
        raise TypeError(f"{TOLD}.inputs")
    return told  # type: ignore[no-any-return]


def check_file(path: Path) -> None:
    """Raises ExportError unless onnx finds the file well-formed and onnxruntime, where it is there, takes all of it."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
        if installed():
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.log_severity_level = 4
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as problem:
        raise ExportError(f"{path.name}: the graph of this model does not load ({said(problem)})") from None


def guarded(path: Path, name: str, compute: Any) -> Any:
    """`compute()`, whose every exception is an ExportError that names the tensor."""
    try:
        return compute()
    except ExportError as problem:
        raise ExportError(f"{path}: {name}: {problem}") from None
    except Exception as problem:
        raise ExportError(f"{path}: {name} cannot be decoded ({said(problem)})") from None


def said(problem: Exception) -> str:
    """An exception of a library in a few words."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


def _tensor(proto: Any) -> Tensor:
    """An initializer as a tensor of torch's; codes below 8 bits as int8 or uint8, floats of 8 bits as fp32."""
    from onnx import numpy_helper

    array = numpy_helper.to_array(proto)
    if array.dtype.isbuiltin != 1:
        # one of ml_dtypes'
        array = array.astype(np.float32 if "float" in str(array.dtype) else np.int16)
    return torch.from_numpy(np.array(array))


def _weight(model: Any, makers: Any, known: Any, value: str) -> Tensor:
    node = makers[value]
    if node.op_type == "MatMulNBits":
        return _probed(model, known, node)
    nodes: list[Any] = []
    todo, used = [value], set()
    while todo:
        name = todo.pop()
        if name in known:
            used.add(name)
        elif len(nodes) == _DEEPEST:
            raise ExportError("it is no value of initializers alone")
        else:
            nodes.insert(0, makers[name])
            todo += list(makers[name].input)
    if installed():
        return _run(model, nodes, [known[name] for name in sorted(used)], value)
    values = {name: _tensor(known[name]) for name in used}
    for node in nodes:
        values[node.output[0]] = _computed(node, [values[name] for name in node.input])
    return values[value]


def _computed(node: Any, inputs: list[Tensor]) -> Tensor:
    """DequantizeLinear or Reshape, by the words of the ONNX specification."""
    if node.op_type == "Reshape":
        return inputs[0].reshape(inputs[1].tolist())
    if node.op_type != "DequantizeLinear":
        raise ExportError(f"a weight comes out of {node.op_type}, which qat does not write")
    words = {attribute.name: attribute.i for attribute in node.attribute}
    axis, block = words.get("axis", 1), words.get("block_size", 0)
    codes, scale = inputs[0].float(), inputs[1]
    zero = inputs[2].float() if len(inputs) > 2 else torch.zeros(())

    def spread(field: Tensor) -> Tensor:
        if not field.dim():
            return field
        if block:
            return field.repeat_interleave(block, axis).narrow(axis, 0, codes.shape[axis])
        return field.reshape([-1 if dim == axis else 1 for dim in range(codes.dim())])

    return (codes - spread(zero)) * spread(scale)


def _run(model: Any, nodes: list[Any], initializers: list[Any], value: str, feed: Any = None) -> Tensor:
    """What onnxruntime makes of `nodes`."""
    import onnxruntime
    from onnx import TensorProto, helper

    inputs = [] if feed is None else [helper.make_tensor_value_info(feed[0], TensorProto.FLOAT, [None, feed[1]])]
    output = helper.make_tensor_value_info(value, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "weight", inputs, [output], initializers)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if feed is None:
        return torch.from_numpy(np.array(session.run(None, {})[0]))
    name, size = feed
    parts = []
    for start in range(0, size, _PROBES):
        rows = np.zeros((min(_PROBES, size - start), size), np.float32)
        rows[np.arange(len(rows)), start + np.arange(len(rows))] = 1.0
        parts.append(session.run(None, {name: rows})[0])
    return torch.from_numpy(np.concatenate(parts))


def _probed(model: Any, known: Any, node: Any) -> Tensor:
    """The weight [N, K], or [K, N] if the node's metadata says that its layer keeps it so, of a MatMulNBits."""
    words = {attribute.name: attribute.i for attribute in node.attribute}
    columns, outputs, bits, block = (int(words[key]) for key in ("K", "N", "bits", "block_size"))
    turned = any(entry.key == TOLD and entry.value == "transposed" for entry in node.metadata_props)
    found = [known[name] for name in node.input[1:]]
    if bits not in (2, 4, 8) or not 0 < block <= columns or columns % block:
        raise ExportError(f"a MatMulNBits of {bits} bits, block_size {block}, K {columns}")
    sizes = [outputs * columns * bits // 8, outputs * (columns // block)]
    if [int(np.prod(list(proto.dims))) for proto in found[:2]] != sizes:
        raise ExportError("the sizes of its tensors do not belong together")
    if installed():
        rows = _run(model, [node], found, node.output[0], (node.input[0], columns))
        return rows if turned else rows.t().contiguous()
    weight = _by_hand([_tensor(proto) for proto in found], columns, outputs, bits, block)
    return weight.t().contiguous() if turned else weight


def _by_hand(tensors: list[Tensor], columns: int, outputs: int, bits: int, block: int) -> Tensor:
    """B, scales and maybe zero points of a MatMulNBits -> [N, K] fp32."""
    codes = _bits(tensors[0].reshape(outputs, -1), bits, columns).reshape(outputs, -1, block)
    zero = torch.full((), 1 << (bits - 1))
    if len(tensors) > 2:
        zero = _bits(tensors[2].reshape(outputs, -1), bits, columns // block).unsqueeze(-1)
    scale = tensors[1].reshape(outputs, -1, 1)
    return ((codes - zero).float() * scale).reshape(outputs, columns)


def _bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """Bytes [R, B] -> numbers [R, count] of `bits` bits, the lowest first."""
    parts = torch.arange(0, 8, bits)
    return ((stream.to(torch.int16).unsqueeze(-1) >> parts) & ((1 << bits) - 1)).flatten(1)[:, :count]


def _range(makers: Any, known: Any, value: str, asymmetric: bool) -> dict[str, Tensor]:
    """`input_scale` and, of an asymmetric input, `input_zero_point`; the QuantizeLinear and the DequantizeLinear that
    round an input have to agree."""
    back = makers[value]
    into = makers[back.input[0]]
    if back.op_type != "DequantizeLinear" or into.op_type != "QuantizeLinear" or into.input[1:] != back.input[1:]:
        raise ExportError("its input is not rounded by a QuantizeLinear and a DequantizeLinear of one range")
    scale, zero = (known[name] for name in into.input[1:])
    found = {"input_scale": _tensor(scale).reshape(1)}
    stored = _tensor(zero).to(torch.int16).reshape(1)
    from onnx import TensorProto

    half = {TensorProto.UINT8: 128, TensorProto.UINT4: 8}.get(zero.data_type, 0)
    if asymmetric or bool(stored.any()):
        found["input_zero_point"] = stored - half
    return found
