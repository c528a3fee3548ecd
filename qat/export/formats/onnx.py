"""ONNX with the trained integers inside, for onnxruntime and whatever else reads ONNX: one file `model.onnx`.

    weights   initializers of 8, 4 or 2 bits (or 8-bit floats) behind a DequantizeLinear (`qat.export.onnx_tensors`)
    inputs    QuantizeLinear and DequantizeLinear with the range that was trained, where a layer's input has one

The graph is the user's own forward, traced in float32 (`qat.export.graph`); float tensors keep their names. 2-bit types
need opset 25, everything else 21. More than `external` bytes of tensors lie in `model.onnx.data` beside it.

`onnx-nbits` is the same file with MatMulNBits, onnxruntime's own operator, for Linear layers: 2, 4 or 8 bits.

onnxruntime divides an input by its scale where training multiplies by the reciprocal: where the two quotients fall to
different sides of a half (about one number in a million), the code of that input is one off. Weights are exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import graph, onnx_reader, onnx_tensors
from qat.export.format import Format, TensorStream, versions_of
from qat.export.hf_folder import load_tokenizer
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import Fields, QTensor
from qat.specs import QuantSpec

FILE = "model.onnx"
KEEP = "add a rule {match: [its name], keep_float: true}"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Onnx(Format):
    """A graph of standard operators."""

    name = "onnx"
    needs = "graph"
    bits = "1 to 8"
    contents = "integers and 8-bit floats behind DequantizeLinear, inputs with a fixed range; any traced model"
    consumers = ("onnxruntime",)
    # a protobuf ends at 2 GiB
    external: ClassVar[int] = 1 << 30
    # bits of a weight's code, at least
    least: ClassVar[int] = 2

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        kinds = set(row.kinds.values())
        if kinds - set(onnx_tensors.CHANNEL):
            return [f"{self.name} holds no quantized {row.type}; {KEEP}"]
        found = [] if row.weight is None else self._weight_reasons(row.weight)
        if row.weight is not None and row.weight.granularity == "group" and "deconv" in kinds:
            found.append(f"group_size={row.weight.group_size} on a transposed convolution; use granularity: channel")
        if row.input is not None:
            found += _input_reasons(row.input, self.name)
        if row.weight is not None and row.input is not None and row.weight.signed_scale:
            found.append("signed_scale=true beside a quantized input: integer kernels take positive scales; use false")
        return found

    def _weight_reasons(self, spec: QuantSpec) -> list[str]:
        if not spec.is_int and spec.kind not in onnx_tensors.FLOATS:
            return [f"grid {spec.kind}: {self.name} holds integers and 8-bit floats; nearest: grid: int, bits: 4"]
        if spec.zero_point == "float":
            return [f"zero_point=float: {self.name} has integer zero points; nearest: zero_point: int"]
        if spec.scale_grid.half:
            return [f"scale={spec.scale}: {self.name} does not round weights to fp16; use scale: fp16 (or portable)"]
        return []

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        found = graph.graph_reasons(bundle)
        dynamic = [name for name, (_, fields) in bundle.inputs.items() if fields is None]
        if dynamic:
            found.append(
                f"the input of {dynamic[0]} has a range of its own in every call; {self.name} holds fixed ones: "
                "quantizer: ema, granularity: tensor"
            )
        return found

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        return onnx_tensors.pack(weight, self.least)

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        return onnx_tensors.unpack(packed, spec, layout, out_dtype, self.least)

    # ---- the file ------------------------------------------------------------------------------------------------

    def multiplied(self, bundle: Bundle) -> frozenset[str]:
        """Parameters of layers that become one operator as a whole."""
        return frozenset()

    def opset(self, bundle: Bundle) -> int:
        own = self.multiplied(bundle)
        few = any(onnx_tensors.width(spec, self.least) == 2 for name, spec in bundle.specs().items() if name not in own)
        return 25 if few else 21

    def write(self, stream: TensorStream, folder: Path, tokenizer: Any) -> None:
        import onnx_ir as ir

        bundle = stream.bundle
        model, floats = graph.traced(bundle, self.opset(bundle), self.multiplied(bundle))
        build = Builder(model)
        for layer, norm in bundle.norms.items():
            build.without_norm(layer, norm)
        weights: dict[str, str] = {}
        for entry, value in stream:
            if isinstance(value, QTensor):
                marks = build.marks(graph.WEIGHT, entry.name), build.marks(graph.LINEAR, entry.name)
                if not any(marks):
                    raise ExportError(f"{entry.name} is not read by the graph of this model; give its layer {KEEP}")
                weights[entry.name] = self.place(build, entry.name, value, *marks)
        ranges = {name: build.range(name, *given) for name, given in stream.inputs.items()}
        # what the graph does not read (a pooler that nothing uses, a counter) is not in the file
        named = {entry.name for entry in stream.entries if entry.spec is None} - set(floats)
        stream.records[:] = [record for record in stream.records if record.name not in named]
        floats = {entry.name: floats[entry.name] for entry in stream.entries if entry.name in floats}
        told = {"weights": weights, "floats": floats, "inputs": ranges}
        build.close(json.dumps(told))
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        ir.save(model, folder / FILE, external_data=f"{FILE}.data" if size > self.external else None)
        onnx_reader.check_file(folder / FILE)
        if bundle.config is not None:
            bundle.config.save_pretrained(str(folder))
        if tokenizer is not None:
            load_tokenizer(tokenizer).save_pretrained(str(folder))

    def place(self, build: Builder, name: str, weight: QTensor, reads: list[Any], multiplied: list[Any]) -> str:
        """Put a weight where its marks are; returns the value of the graph that it is."""
        kind = onnx_tensors.element(weight.spec, self.least)
        return build.dequantized(name, weight, kind, onnx_tensors.pack(weight, self.least), reads)

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        yield from onnx_reader.read_tensors(folder / FILE)

    def reader(self) -> str:
        if not onnx_reader.installed():
            return "qat"
        # not by the distribution, which has other names (onnxruntime-gpu)
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    def versions(self) -> dict[str, str]:
        return versions_of({name: name for name in _PACKAGES})


class Builder:
    """Replaces the marks of a traced graph."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._marks: dict[tuple[str, str], list[Any]] = {}
        for node in model.graph.all_nodes():
            if node.domain == graph.DOMAIN:
                key = node.op_type, node.attributes["name"].as_string()
                self._marks.setdefault(key, []).append(node)

    def marks(self, kind: str, name: str) -> list[Any]:
        return self._marks.get((kind, name), [])

    def initializer(self, name: str, element: str, shape: Any, data: Tensor) -> Any:
        """A new initializer of raw bytes. Raises ExportError if the name is taken."""
        import onnx_ir as ir
        from onnx import TensorProto, helper

        if name in self.model.graph.initializers:
            raise ExportError(f"the graph holds a tensor called {name} already; rename that parameter")
        raw = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        tensor = ir.from_proto(
            helper.make_tensor(name, TensorProto.DataType.Value(element), list(shape), raw, raw=True)
        )
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def node(self, op: str, inputs: list[Any], output: str, before: Any = None, domain: str = "", **words: Any) -> Any:
        """The output of a new node, before another or at the start of the graph."""
        import onnx_ir as ir

        made = ir.node(op, inputs, words, domain=domain, num_outputs=1, name=f"{output}/{op}")
        made.outputs[0].name = output
        made.outputs[0].dtype = ir.DataType.FLOAT
        (self.model.graph if before is None else before.graph).insert_before(before or self.model.graph[0], made)
        return made.outputs[0]

    def replace(self, marks: list[Any], value: Any) -> str:
        """Let a value stand where marks were; returns its name."""
        import onnx_ir as ir

        for mark in marks:
            old = mark.outputs[0]
            value.shape = old.shape
            if old.is_graph_output():
                # the file's output keeps its name
                value.name = old.name
            ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
            given = mark.inputs[0]
            mark.graph.remove(mark, safe=True)
            if given.is_initializer() and not given.uses():
                self.model.graph.initializers.pop(given.name)
        return str(value.name)

    def without_norm(self, layer: str, norm: str) -> None:
        """Take out the mark of a norm that is in its layer's weight. Raises ExportError if it is not the one reader of
        what the layer gives."""
        marks = self.marks(graph.FOLDED, layer)
        for mark in marks:
            given = mark.inputs[0]
            weight = self._behind(given.producer(), graph.WEIGHT) or self._behind(given.producer(), graph.LINEAR)
            if len(given.uses()) > 1 or given.is_graph_output() or weight != f"{layer}.weight":
                raise ExportError(
                    f"{norm} is folded into {layer}, but it is not the one reader of what {layer} gives; list the "
                    "other pairs in batch_norm.pairs, or set batch_norm.fold: false"
                )
            self.replace([mark], given)
        if not marks:
            raise ExportError(f"{norm} is folded into {layer}, but the graph of this model does not call it")

    def _behind(self, node: Any, kind: str) -> str:
        """The name in the mark that a layer's output comes from, through its bias and a transposed weight."""
        while node is not None:
            if node.domain == graph.DOMAIN:
                return str(node.attributes["name"].as_string()) if node.op_type == kind else ""
            index = 1 if node.op_type in ("Conv", "Gemm", "MatMul") and kind == graph.WEIGHT else 0
            if node.op_type not in ("Conv", "Gemm", "MatMul", "Add", "Transpose"):
                return ""
            node = node.inputs[index].producer()
        return ""

    def dequantized(self, name: str, weight: QTensor, kind: str, packed: dict[str, Tensor], marks: list[Any]) -> str:
        """A DequantizeLinear, and for groups in a convolution a Reshape, whose result is called as the parameter."""
        spec, layout = weight.spec, weight.layout
        place = onnx_tensors.place_of(spec, layout)
        scale = packed[onnx_tensors.SCALE]
        codes = self.initializer(f"{name}_quantized", kind, place.shape, packed[onnx_tensors.CODES])
        inputs = [codes, self.initializer(f"{name}_scale", "FLOAT", scale.shape, scale)]
        if onnx_tensors.ZERO in packed:
            inputs.append(self.initializer(f"{name}_zero_point", kind, scale.shape, packed[onnx_tensors.ZERO]))
        words: dict[str, Any] = {"axis": place.axis, **({"block_size": place.block} if place.block else {})}
        whole = tuple(place.shape) == tuple(layout.shape)
        first = self.model.graph[0]
        value = self.node("DequantizeLinear", inputs, name if whole else f"{name}_rows", first, **words)
        if not whole:
            shape = self.initializer(f"{name}_shape", "INT64", [len(layout.shape)], torch.tensor(layout.shape))
            value = self.node("Reshape", [value, shape], name, first)
        return self.replace(marks, value)

    def range(self, layer: str, spec: QuantSpec, fields: Fields | None) -> list[Any]:
        """QuantizeLinear and DequantizeLinear for the input of a layer: [name of the rounded value, has a zero point].

        Raises ExportError if the layer is not called.
        """
        marks = self.marks(graph.INPUT, layer)
        if fields is None or not marks:
            raise ExportError(f"{layer} is not called by the graph of this model; give it {KEEP}")
        scale = self.initializer(f"{layer}.input_scale", "FLOAT", [], fields.scale.float())
        zero = torch.zeros(1) if fields.zero is None else fields.zero
        stored = zero.reshape(1).to(torch.int16) & ((1 << spec.bits) - 1)
        kind = onnx_tensors.element(spec)
        inputs = [scale, self.initializer(f"{layer}.input_zero_point", kind, [], stored.to(torch.uint8))]
        value = ""
        for number, mark in enumerate(marks):
            value = f"{layer}.input" + (f"_{number}" if number else "")
            codes = self.node("QuantizeLinear", [mark.inputs[0], *inputs], f"{value}_quantized", mark)
            codes.dtype = inputs[1].dtype
            value = self.replace([mark], self.node("DequantizeLinear", [codes, *inputs], value, mark))
        return [value, fields.zero is not None]

    def close(self, told: str) -> None:
        """No mark is left; the metadata says what is what, and nothing of where and how the graph was made."""
        self.model.opset_imports.pop(graph.DOMAIN, None)
        for part in (self.model, self.model.graph, *self.model.graph.all_nodes()):
            for key in [key for key in part.metadata_props if key != onnx_reader.TOLD]:
                del part.metadata_props[key]
            part.doc_string = None
        self.model.metadata_props[onnx_reader.TOLD] = told
        self.model.producer_name = "qat"
        self.model.ir_version = 13 if self.model.opset_imports[""] >= 25 else 10


def _input_reasons(spec: QuantSpec, name: str) -> list[str]:
    found = []
    nearest = "nearest: {bits: 8, granularity: tensor, quantizer: ema, zero_point: int}"
    if not spec.is_int or spec.bits not in (4, 8) or spec.zero_point == "float":
        found.append(f"input grid {spec}: {name} rounds inputs to integers of 8 or 4 bits; {nearest}")
    elif spec.int_grid.narrow:
        found.append(f"input grid {spec}: a QuantizeLinear gives all codes; {nearest} (narrow: false)")
    if spec.granularity != "tensor":
        found.append(f"input granularity={spec.granularity}: {name} holds one range per input; {nearest}")
    return found
