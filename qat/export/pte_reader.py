"""What is in an ExecuTorch file, tensor by tensor, by ExecuTorch's own serialization code.

The program is deserialized by `executorch.exir`. Of XNNPACK's payloads the package holds the parser of their header,
their schema and flatc, but no deserializer in Python: flatc turns a payload into JSON by that schema. Their constants
are named data of the file. Nothing is loaded into the runtime, which trusts its files.

A weight is the filter of a fully connected node, a float tensor any constant; which of them is which is said by their
sha256 in a method of the program, `qat_tensors`.

    XNNPACK's type   codes                                              scale
    qbint4           uint8 [O, I / 2]: code + 8, low nibble first       bf16 [O, G]
    qcint4           uint8 [O, I / 2]: the same                         fp32 [O]
    qcint8           int8 [O, I]                                        fp32 [O]

Files may be damaged: everything that goes wrong while they are read is an ExportError.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import ExportError
from qat.export.format import present
from qat.export.onnx_reader import guarded, said
from qat.export.process import silent, undisturbed

# the method that says what the tensors are called
TOLD = "qat_tensors"
METHOD = "forward"
_SECONDS = 60
_INFINITE = re.compile(rb":\s*(-?(?:inf|nan))\b")
_TYPES = {
    "xnn_datatype_fp32": torch.float32,
    "xnn_datatype_fp16": torch.float16,
    "xnn_datatype_bf16": torch.bfloat16,
}
_KEPT = (torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# where the dimensions of a kept tensor went: nowhere, or as XNNPACK stores filters of convolutions
_ORDERS = {4: ((0, 1, 2, 3), (0, 3, 1, 2), (3, 0, 1, 2))}

Lazy = Callable[[], Tensor]


def installed() -> bool:
    """Whether ExecuTorch is there."""
    return present("executorch", "executorch")


def digest(*tensors: Tensor) -> str:
    """sha256 of the bytes of tensors, row-major, one behind the other."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(_bytes(tensor))
    return found.hexdigest()


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every parameter; codes times scales in fp32."""
    told, filters, constants = load(path)
    for name, (key, turned) in told["weights"].items():
        weight = guarded(path, name, _found(filters, key))
        yield name, weight.t().contiguous() if turned else weight
    for name, (key, shape) in told["floats"].items():
        yield name, guarded(path, name, lambda k=key, s=shape: _found(constants, k)().reshape(s))


def load(path: Path) -> tuple[dict[str, Any], dict[str, Lazy], dict[str, Lazy]]:
    """(what the file says of its tensors, weights by the digest of codes and scales, other constants by theirs).

    Raises ExportError for a file that is no such.
    """
    if not path.is_file():
        raise ExportError(f"{path} is missing")
    if not installed():
        raise ExportError(
            "ExecuTorch's files are read with the package executorch; pip install 'lightning-qat[executorch]'"
        )
    try:
        with undisturbed(), silent():
            from executorch.exir._serialize._program import deserialize_pte_binary

            file = deserialize_pte_binary(path.read_bytes())
            plans = {plan.name: plan for plan in file.program.execution_plan}
            told = _check_told(json.loads(plans[TOLD].values[0].val.string_val))
            named = file.named_data
            blobs = {key: named.buffers[entry.buffer_index] for key, entry in named.pte_data.items()} if named else {}
            filters: dict[str, Lazy] = {}
            constants = dict(_of_program(plans[METHOD], file.program.constant_buffer))
            for delegate in plans[METHOD].delegates:
                graph = _graph(bytes(file.program.backend_delegate_data[delegate.processed.index].data))
                data = [blobs.get(entry["named_key"], b"") for entry in graph["constant_data"]]
                filters |= _filters(graph, data)
                constants |= dict(_of_delegate(graph, data))
    except Exception as problem:
        raise ExportError(f"{path} is not an ExecuTorch file of qat's that can be read ({said(problem)})") from None
    return told, filters, constants


def _check_told(told: Any) -> dict[str, Any]:
    """Raises an exception unless `told` names weights and floats."""
    for key, turned in told["weights"].values():
        if not isinstance(key, str) or not isinstance(turned, bool):
            raise TypeError(f"{TOLD}.weights")
    for key, shape in told["floats"].values():
        if not isinstance(key, str) or not all(type(size) is int and size >= 0 for size in shape):
            raise TypeError(f"{TOLD}.floats")
    return told  # type: ignore[no-any-return]


def _found(places: dict[str, Lazy], key: str) -> Lazy:
    def missing() -> Tensor:
        raise ExportError("no tensor of the file has the numbers that the file says it has")

    return places.get(key, missing)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _tensor(data: bytes, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Raises ValueError if the bytes are not those of such a tensor, up to 15 bytes of padding."""
    size = math.prod(shape) * dtype.itemsize
    if not size <= len(data) < size + 16:
        raise ValueError(f"{len(data)} bytes for {dtype} {shape}")
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data[:size]), dtype=dtype).reshape(shape)


# ---- constants -------------------------------------------------------------------------------------------------------


def _of_program(plan: Any, buffers: list[Any]) -> Iterator[tuple[str, Lazy]]:
    """Constants that ExecuTorch's own kernels read: tables of embeddings, norms, buffers."""
    from executorch.exir.tensor import scalar_type_enum

    types = {scalar_type_enum(dtype): dtype for dtype in _KEPT}
    for value in plan.values:
        tensor = value.val
        if type(tensor).__name__ != "Tensor" or tensor.data_buffer_idx <= 0 or tensor.scalar_type not in types:
            continue
        if list(tensor.dim_order) == list(range(len(tensor.sizes))):
            stored = bytes(buffers[tensor.data_buffer_idx].storage)
            yield from _keyed(_tensor(stored, types[tensor.scalar_type], list(tensor.sizes)))


def _of_delegate(graph: dict[str, Any], data: list[bytes]) -> Iterator[tuple[str, Lazy]]:
    """Constants of XNNPACK that are no codes."""
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"]
        if value["xvalue_union_type"] == "XNNTensorValue" and tensor["constant_buffer_idx"]:
            dtype = _TYPES[tensor["datatype"]]
            yield from _keyed(_tensor(data[tensor["constant_buffer_idx"]], dtype, tensor["dims"]))


def _keyed(tensor: Tensor) -> Iterator[tuple[str, Lazy]]:
    for order in _ORDERS.get(tensor.dim(), (tuple(range(tensor.dim())),)):
        turned = tensor.permute(order)
        yield digest(turned), lambda t=turned: t.contiguous()  # type: ignore[misc]


# ---- weights ---------------------------------------------------------------------------------------------------------


def _graph(payload: bytes) -> dict[str, Any]:
    """XNNPACK's graph as plain data, by flatc and its schema."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _get_flatc_path

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    end = header.flatbuffer_offset + header.flatbuffer_size
    if end > len(payload):
        raise ValueError(f"a payload of {len(payload)} bytes whose graph ends at {end}")
    with (
        tempfile.TemporaryDirectory(prefix="qat-xnnpack-") as folder,
        resources.as_file(resources.files(serialization).joinpath("schema.fbs")) as schema,
    ):
        place = Path(folder, "graph.bin")
        place.write_bytes(payload[header.flatbuffer_offset : end])
        words = ["--json", "--defaults-json", "--strict-json", "-o", folder, str(schema), "--", str(place)]
        # its words about a damaged graph are for the exception, not for the terminal
        subprocess.run([_get_flatc_path(), *words], check=True, capture_output=True, timeout=_SECONDS)
        # bounds of an activation may be infinite, for which JSON has no word
        text = _INFINITE.sub(rb': "\1"', Path(folder, "graph.json").read_bytes())
        return json.loads(text)  # type: ignore[no-any-return]


def _filters(graph: dict[str, Any], data: list[bytes]) -> dict[str, Lazy]:
    """Quantized filters whose inputs XNNPACK rounds token by token: by the digest of their codes and scales.

    Raises ValueError for one whose inputs it does not round: what it computes then is wrong.
    """
    unions = [v["xvalue_union"] for v in graph["xvalues"] if v["xvalue_union_type"] == "XNNQuantizedTensorValue"]
    values = {value["tensor_value"]["id_out"]: value for value in unions}
    found: dict[str, Lazy] = {}
    for node in graph["xnodes"]:
        union = node["xnode_union"]
        if node["xnode_union_type"] == "XNNFullyConnected" and union["filter_id"] in values:
            rounded = values.get(union["input1_id"], {})
            by_token = rounded.get("quant_params_type") == "PerTokenDynamicQuant"
            if not by_token or rounded["quant_params"]["num_nonbatch_dims"] != 1:
                raise ValueError("a layer of integers whose inputs are not rounded token by token")
            key, weight = _filter(values[union["filter_id"]], data)
            found[key] = weight
    return found


def _filter(value: dict[str, Any], data: list[bytes]) -> tuple[str, Lazy]:
    tensor, params = value["tensor_value"], value["quant_params"]
    rows, columns = tensor["dims"]
    kind, by_group = tensor["datatype"], value["quant_params_type"] == "PerChannelGroupQuant"
    if kind not in ("xnn_datatype_qbint4", "xnn_datatype_qcint4", "xnn_datatype_qcint8"):
        raise ValueError(f"a filter of {kind}")
    if by_group != (kind == "xnn_datatype_qbint4") or params["channel_dim"] != 0:
        raise ValueError(f"a filter of {kind} with {value['quant_params_type']} along {params['channel_dim']}")
    groups = columns // params["group_size"] if by_group else 1
    if groups < 1 or columns % groups or params["num_scales"] != rows * groups:
        raise ValueError(f"{params['num_scales']} scales for a filter of {rows} x {columns}")
    eight = kind == "xnn_datatype_qcint8"
    shape = [rows, columns] if eight else [rows, -(-columns // 2)]
    codes = _tensor(data[tensor["constant_buffer_idx"]], torch.int8 if eight else torch.uint8, shape)
    stored = data[params["scale_buffer_idx"]]
    scale = _tensor(stored, torch.bfloat16 if by_group else torch.float32, [rows, groups] if by_group else [rows])
    return digest(codes, scale), lambda: decoded(codes, scale, columns)


def unpacked(codes: Tensor, columns: int) -> Tensor:
    """Codes int8 [O, I] from stored ones."""
    if codes.dtype == torch.int8:
        return codes
    return (torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :columns].to(torch.int8) - 8).contiguous()


def decoded(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Codes times scales, fp32 [O, I]."""
    fields = scale.float().reshape(len(scale), -1)
    return unpacked(codes, columns).float() * fields.repeat_interleave(columns // fields.shape[1], 1)
