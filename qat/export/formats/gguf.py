"""GGUF, the file of llama.cpp: Q4_0, Q8_0 and k-quant weights of Llama-like models, one file `model.gguf`.

Scales of two levels (`scale: q2_k` .. `q6_k`, `qat.scales`) are the k-quant of that name (`qat.export.ggml_kquants`). A
signed grid without zero point goes into the smallest type that holds its codes, exactly (`qat.export.ggml_blocks`):

    bits 1..4   Q4_0    4.5 bits per weight
    bits 5..8   Q8_0    8.5 bits per weight

per 32 numbers, or per any multiple of 32 (group, row, tensor: the scale is repeated). Scales must be fp16 numbers:
portable or fp16. Matrices in float keep their dtype (F32, F16, BF16), vectors are F32.

Read back with `gguf.quants`, the consumer's Python code. llama.cpp itself multiplies with activations that it rounds to
int8 per 32 numbers, so its logits differ a little from those of the same weights in PyTorch, at any bit width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import ggml_blocks, ggml_kquants, gguf_model
from qat.export.format import Entry, Format, TensorStream
from qat.export.gguf_tokenizer import add_tokenizer, compare_tokens, tokenizer_reasons
from qat.export.llama_cpp import installed
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor
from qat.scales import TwoLevel
from qat.specs import QuantSpec

FILE = "model.gguf"
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NEAREST = "nearest: {bits: %d, granularity: group, group_size: 32, zero_point: none, scale: portable} (%s)"


class Gguf(Format):
    """llama.cpp's file format."""

    name = "gguf"
    bits = "2 to 8"
    contents = "Q4_0, Q8_0 and the k-quants Q2_K to Q6_K, of Llama-like models"
    consumers = ("llama.cpp", "ollama", "lm-studio")

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = []
        if row.input is not None:
            found.append("a GGUF file holds no input quantization; set input: null in its rule")
        if row.weight is None:
            return found
        if set(row.kinds.values()) - {"linear", "embedding"}:
            found.append(f"{row.type} has no place in a Llama-like GGUF file; add a rule with keep_float: true")
        found += self._spec_reasons(row.weight)
        step = row.weight.group_size or row.columns
        if step % ggml_blocks.BLOCK and not _kquant(row.weight):
            what = f"group_size={step}" if row.weight.group_size else f"rows of {row.columns} numbers"
            found.append(f"{what}: GGUF blocks are {ggml_blocks.BLOCK} numbers; use group_size=32 or keep_float: true")
        return found

    @staticmethod
    def _spec_reasons(spec: QuantSpec) -> list[str]:
        found = []
        bits = 4 if spec.bits <= 4 else 8
        nearest = _NEAREST % (bits, f"Q{bits}_0")
        if _kquant(spec):
            return []
        if not spec.is_int:
            return [f"grid {spec.kind}: Q4_0 and Q8_0 hold integers; {nearest}"]
        if spec.zero_point != "none":
            found.append(f"zero_point={spec.zero_point}: Q4_0 and Q8_0 have none; {nearest}")
        elif not spec.signed:
            found.append(f"signed=false: Q4_0 and Q8_0 codes are signed; {nearest}")
        if spec.scale not in ("portable", "fp16"):
            found.append(f"scale={spec.scale}: GGUF stores scales in fp16; use scale: portable (or fp16)")
        return found

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        try:
            import gguf
        except ImportError:
            return ["the package gguf is not installed; pip install gguf"]
        del gguf
        if bundle.config is None:
            return ["the model has no transformers config; a GGUF file needs one (llama, mistral, qwen2 or qwen3)"]
        stream = TensorStream(bundle)
        names = [entry.name for entry in stream.entries]
        found = gguf_model.model_reasons(bundle.config, [*names, *bundle.tied])
        odd = next(((e.name, e.dtype) for e in stream.entries if e.spec is None and e.dtype not in _FLOATS), None)
        if odd:
            found.append(f"{odd[0]} is {odd[1]}, which GGUF does not hold; cast the model to float32")
        return found + tokenizer_reasons(tokenizer, getattr(bundle.config, "vocab_size", 0))

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """{ggml type: uint8 [R, bytes of a row]}."""
        kind = self._type(weight.spec)
        if _kquant(weight.spec):
            return {kind: ggml_kquants.encode_super_blocks(kind, weight.codes, weight.parts)}
        if not torch.equal(weight.scale.to(torch.float16).float(), weight.scale.float()):
            raise ExportError(f"{name}: scales stored in fp16 would be rounded; use scale: portable")
        return {kind: ggml_blocks.encode_blocks(kind, weight.codes, weight.scale)}

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """Raises ExportError if the blocks of one group carry different scales."""
        (kind, data), *_ = packed.items()
        grid = spec.scale_grid
        if isinstance(grid, TwoLevel):
            codes, parts = ggml_kquants.decode_super_blocks(kind, data)
            scale, minimum = grid.decode(parts)
            return QTensor(codes, scale, None, minimum, spec, layout, out_dtype, parts)
        codes, scale = ggml_blocks.decode_blocks(kind, data)
        if spec.granularity == "tensor":
            scale = scale.reshape(1, -1)
        repeats = scale.shape[1] // spec.groups(codes.shape[1])
        grouped = scale.reshape(scale.shape[0], -1, repeats)
        if not torch.equal(grouped, grouped[..., :1].expand_as(grouped)):
            raise ExportError("blocks of one group carry different scales; these bytes do not come from this grid")
        stored = grouped[..., 0].float().to(spec.scale_grid.dtype)
        return QTensor(codes.to(spec.grid.code_dtype), stored, None, None, spec, layout, out_dtype)

    @staticmethod
    def _type(spec: QuantSpec) -> str:
        if _kquant(spec):
            return spec.scale.upper()
        kind = ggml_blocks.smallest_type(spec.int_grid.qmin, spec.int_grid.qmax)
        if kind is None:
            raise ExportError(f"{spec} has codes beyond 8 signed bits")
        return kind

    # ---- the file ------------------------------------------------------------------------------------------------

    def write(self, stream: TensorStream, folder: Path, tokenizer: Any) -> None:
        import gguf

        config = stream.bundle.config
        path = folder / FILE
        writer = gguf.GGUFWriter(path, gguf_model.ARCHITECTURES[config.model_type])
        try:
            for method, value in gguf_model.header(config):
                getattr(writer, method)(value)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_tokenizer(writer, tokenizer, config.vocab_size)
            table = gguf_model.name_table(gguf_model.ARCHITECTURES[config.model_type], config.num_hidden_layers)
            for entry in stream.entries:
                self._announce(writer, entry, table)
            factors = gguf_model.rope_factors(config)
            if factors is not None:
                single = np.dtype(np.float32)
                writer.add_tensor_info(gguf_model.ROPE_FACTORS, tuple(factors.shape), single, factors.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry, value in stream:
                writer.write_tensor_data(self._bytes(config, entry, value))
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
        finally:
            writer.close()
        compare_tokens(path, tokenizer)

    def _announce(self, writer: Any, entry: Entry, table: Any) -> None:
        """Name, shape and type of a tensor that will be written in this order."""
        import gguf

        kind = self._stored(entry)
        ggml = gguf.GGMLQuantizationType[kind]
        shape = gguf.quant_shape_to_byte_shape(entry.shape, ggml) if entry.spec is not None else entry.shape
        width = {"F32": 4, "F16": 2, "BF16": 2}.get(kind, 1)
        count = int(np.prod(shape)) * width
        dtype = np.dtype(np.uint8) if entry.spec is not None else np.dtype(np.float32)
        writer.add_tensor_info(gguf_model.gguf_name(table, entry.name), shape, dtype, count, raw_dtype=ggml)

    def _stored(self, entry: Entry) -> str:
        """The ggml type of a tensor."""
        if entry.spec is not None:
            return self._type(entry.spec)
        return "F32" if len(entry.shape) < 2 else _FLOATS[entry.dtype]

    def _bytes(self, config: Any, entry: Entry, value: QTensor | Tensor) -> Any:
        """The tensor as numpy data in the file's order of rows."""
        heads = gguf_model.heads_to_pair(config, entry.name)
        if isinstance(value, QTensor):
            (rows,) = self.pack(entry.name, value).values()
            return (gguf_model.pair_rows(rows, heads) if heads else rows).contiguous().numpy()
        rows = gguf_model.pair_rows(value, heads) if heads else value
        kind = self._stored(entry)
        if kind == "BF16":
            return rows.contiguous().view(torch.int16).numpy()
        return rows.to(torch.float32 if kind == "F32" else torch.float16).contiguous().numpy()

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        try:
            import gguf
        except ImportError:
            raise ExportError("GGUF files are read with the package gguf; pip install gguf") from None

        path = folder / FILE
        if not path.is_file():
            raise ExportError(f"{path} is missing")
        try:
            reader: Any = gguf.GGUFReader(path)
            architecture = reader.get_field("general.architecture").contents()
            blocks = reader.get_field(f"{architecture}.block_count").contents()
            config = SimpleNamespace(
                model_type=next(kind for kind, arch in gguf_model.ARCHITECTURES.items() if arch == architecture),
                num_hidden_layers=blocks,
                num_attention_heads=reader.get_field(f"{architecture}.attention.head_count").contents(),
                num_key_value_heads=reader.get_field(f"{architecture}.attention.head_count_kv").contents(),
            )
            table = gguf_model.name_table(architecture, blocks)
        except (OSError, ValueError, KeyError, IndexError, AttributeError, StopIteration) as problem:
            what = f"{type(problem).__name__}: {problem}"
            raise ExportError(f"{path} is not a GGUF file that can be read ({what})") from None
        names = {gguf_model.gguf_name(table, name): name for name in gguf_model.hf_names(config)}
        for tensor in reader.tensors:
            if tensor.name == gguf_model.ROPE_FACTORS:
                continue
            name = names.get(tensor.name)
            if name is None:
                raise ExportError(f"{path}: tensor {tensor.name!r} has no counterpart in transformers")
            weight = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
            heads = gguf_model.heads_to_pair(config, name)
            yield name, gguf_model.unpair_rows(weight, heads) if heads else weight

    def reader(self) -> str:
        return f"gguf {_version('gguf')}"

    def versions(self) -> dict[str, str]:
        found = {"gguf": _version("gguf")}
        return {**found, "xllamacpp": _version("xllamacpp")} if installed() else found


def _kquant(spec: QuantSpec) -> bool:
    """Whether the scales are a k-quant's, which also says the type."""
    return spec.scale.upper() in ggml_kquants.SIZES


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
