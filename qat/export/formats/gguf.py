"""GGUF, the file of llama.cpp: one file `model.gguf`, whose tensors each have a type of their own.

Scales of two levels (`scale: q2_k` .. `q6_k`, `iq4_xs`) are the type of that name (`qat.export.ggml_kquants`). Every
other grid goes into the smallest type that holds its codes and scales exactly (`qat.export.ggml_blocks`):

    integers -1..1 and ternary, one scale for a multiple of 256 numbers    TQ1_0     1.6875 bits per weight
    integers -2..1, one scale for a multiple of 256 numbers                TQ2_0     2.0625
    fp4 with e8m0 scales                                                   MXFP4     4.25
    integers of 1..4 bits                                                  Q4_0      4.5
    iq4_nl                                                                 IQ4_NL    4.5
    fp4 with nvfp4 scales, rows of a multiple of 64 numbers                NVFP4     4.5
    integers up to 0..15, also with a minimum (zero_point: float)          Q4_1      5
    integers of 5 bits                                                     Q5_0      5.5
    integers up to 0..31, also with a minimum                              Q5_1      6
    integers up to 8 bits                                                  Q8_0      8.5

per 32 numbers where nothing else is said, or per any multiple of 32 (group, row, tensor: the scale is repeated).
Scales and minima must be fp16 numbers: portable or fp16. Matrices in float keep their dtype (F32, F16, BF16), vectors
are F32.

NVFP4's scale of a tensor is a tensor of its own, `<name>.scale`, by which llama.cpp multiplies after the sum;
gguf.quants and transformers leave it out, so `read` multiplies by it itself.

Read back with `gguf.quants`, the consumer's Python code. llama.cpp itself multiplies with activations that it rounds to
int8 per 32 numbers, so its logits differ a little from those of the same weights in PyTorch, at any bit width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import ggml_blocks, ggml_kquants, gguf_model
from qat.export.format import Entry, Format, Stored, TensorStream
from qat.export.gguf_tokenizer import add_tokenizer, compare_tokens, tokenizer_reasons
from qat.export.llama_cpp import installed
from qat.fake_quant_kernels import nvfp4
from qat.grids import GRIDS
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor, tensor_sha256
from qat.scales import TwoLevel
from qat.specs import QuantSpec

FILE = "model.gguf"
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NEAREST = "nearest: {bits: 4, granularity: group, group_size: 32, zero_point: none, scale: portable} (Q4_0)"
_SCALE, _NVFP4 = "scale", "NVFP4"


class Gguf(Format):
    """llama.cpp's file format."""

    name = "gguf"
    bits = "1 to 8"
    contents = "Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, MXFP4, NVFP4, TQ1_0, TQ2_0; Llama-like models, experts"
    consumers = ("llama.cpp", "ollama", "lm-studio")

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = []
        if row.input is not None:
            found.append("a GGUF file holds no input quantization; set input: null in its rule")
        if row.weight is None:
            return found
        kinds = set(row.kinds.values())
        if kinds - {"linear", "embedding", "experts"}:
            found.append(f"{row.type} has no place in a Llama-like GGUF file; add a rule with keep_float: true")
        if _two_levels(row.weight) or ggml_blocks.smallest_type(row.weight, row.columns):
            if row.weight.scale == "nvfp4" and kinds - {"linear"}:
                found.append(f"scale=nvfp4: llama.cpp has the scale of a tensor for Linear only, not {row.type}")
            return found
        return found + self._spec_reasons(row.weight, row.columns)

    @staticmethod
    def _spec_reasons(spec: QuantSpec, columns: int) -> list[str]:
        """Why no type holds rows of `columns` numbers on this grid."""
        found = []
        step, needs = spec.group_size or columns, 32
        if spec.kind == "fp4":
            needs = 64 if spec.scale == "nvfp4" else 32
            if spec.scale not in ("e8m0", "nvfp4"):
                found.append(f"scale={spec.scale}: GGUF holds fp4 with scale: e8m0 (MXFP4) or nvfp4 (NVFP4)")
        elif not spec.is_int and spec.kind != "iq4_nl":
            found.append(f"grid {spec.kind}: GGUF types hold integers, iq4_nl and fp4; {_NEAREST}")
        elif spec.scale not in ("portable", "fp16"):
            found.append(f"scale={spec.scale}: GGUF stores scales in fp16; use scale: portable (or fp16)")
        if spec.zero_point == "int":
            found.append(f"zero_point=int: GGUF types have none, but Q4_1 and Q5_1 a minimum (float); {_NEAREST}")
        elif spec.zero_point == "float" and spec.bits > 5:
            found.append(f"zero_point=float: GGUF types with a minimum, Q4_1 and Q5_1, have 4 or 5 bits; {_NEAREST}")
        elif spec.kind == "int" and not spec.signed and spec.bits == 8:
            found.append(f"signed=false: GGUF types hold no codes of 0..255; {_NEAREST}")
        if needs == 64 and columns % 64:
            found.append(f"rows of {columns} numbers: NVFP4 blocks are 64 numbers; use keep_float: true")
        elif needs == 32 and step % needs:
            what = f"group_size={step}" if spec.group_size else f"rows of {columns} numbers"
            found.append(f"{what}: GGUF blocks are 32 numbers; use group_size=32 or keep_float: true")
        return found

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        try:
            import gguf
        except ImportError:
            return ["the package gguf is not installed; pip install gguf"]
        del gguf
        if bundle.config is None:
            return ["the model has no transformers config; a GGUF file needs one, such as those of Llama and Qwen"]
        stream = TensorStream(bundle)
        names = [entry.name for entry in stream.entries]
        found = gguf_model.model_reasons(bundle.config, [*names, *bundle.tied])
        if any(entry.spec is not None and entry.spec.scale == "nvfp4" for entry in stream.entries):
            found += gguf_model.nvfp4_reasons(bundle.config, names)
        odd = next(((e.name, e.dtype) for e in stream.entries if e.spec is None and e.dtype not in _FLOATS), None)
        if odd:
            found.append(f"{odd[0]} is {odd[1]}, which GGUF does not hold; cast the model to float32")
        return found + tokenizer_reasons(tokenizer, getattr(bundle.config, "vocab_size", 0))

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """{ggml type: uint8 [R, bytes of a row]}, and for NVFP4 "scale": fp32 [1]."""
        spec, columns = weight.spec, weight.codes.shape[1]
        kind = self._type(spec, columns)
        if _two_levels(spec):
            return {kind: ggml_kquants.encode_super_blocks(kind, weight.codes, weight.parts)}
        if kind == _NVFP4:
            return {
                kind: ggml_blocks.encode_blocks(kind, weight.codes, weight.parts["block"]),
                _SCALE: weight.parts["tensor"],
            }
        stored = ggml_blocks.TYPES[kind].stored
        for field in (weight.scale, weight.minimum):
            if field is not None and not torch.equal(field.to(stored).float(), field.float()):
                raise ExportError(f"{name}: scales stored in fp16 would be rounded; use scale: portable")
        codes, scale = _signed(kind, spec, weight.codes, weight.scale)
        return {kind: ggml_blocks.encode_blocks(kind, codes, scale, weight.minimum)}

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """Raises ExportError if the blocks of one group carry different scales."""
        (kind, data), *_ = packed.items()
        grid = spec.scale_grid
        if isinstance(grid, TwoLevel):
            if kind == _NVFP4:
                codes, block, _ = ggml_blocks.decode_blocks(kind, data)
                parts = {"block": block, "tensor": packed[_SCALE]}
            else:
                codes, parts = ggml_kquants.decode_super_blocks(kind, data)
            scale, minimum = grid.decode(parts)
            return QTensor(codes, scale, None, minimum, spec, layout, out_dtype, parts)
        codes, scale, minimum = ggml_blocks.decode_blocks(kind, data)
        codes, stored = _signed(kind, spec, codes, _of_groups(scale, spec, codes.shape[1]))
        minimum = _of_groups(minimum, spec, codes.shape[1]) if spec.zero_point == "float" else None
        return QTensor(codes.to(spec.grid.code_dtype), stored, None, minimum, spec, layout, out_dtype)

    @staticmethod
    def _type(spec: QuantSpec, columns: int) -> str:
        kind = spec.scale.upper() if _two_levels(spec) else ggml_blocks.smallest_type(spec, columns)
        if kind is None:
            raise ExportError(f"no GGUF type holds rows of {columns} numbers on the grid {spec}; they would be rounded")
        return kind

    # ---- the file ------------------------------------------------------------------------------------------------

    def write(self, stream: TensorStream, folder: Path, tokenizer: Any) -> None:
        import gguf

        config = stream.bundle.config
        architecture = gguf_model.ARCHITECTURES[config.model_type]
        path = folder / FILE
        writer = gguf.GGUFWriter(path, architecture)
        try:
            for method, value in gguf_model.header(config):
                getattr(writer, method)(value)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_tokenizer(writer, tokenizer, config.vocab_size)
            table = gguf_model.name_table(architecture, config.num_hidden_layers)
            for entry in stream.entries:
                self._announce(writer, entry, gguf_model.gguf_names(table, entry.name))
            factors = gguf_model.rope_factors(config)
            if factors is not None:
                _announce_floats(writer, gguf_model.ROPE_FACTORS, tuple(factors.shape))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry, value in stream:
                if gguf_model.adds_one(architecture, entry.name):
                    assert isinstance(value, Tensor)
                    # 1 + w in fp32 is what the model computes with; the w that gives it may be another one
                    value = 1.0 + value.float()
                    seen = tensor_sha256((value - 1.0).to(entry.dtype))
                    stream.records[-1] = replace(stream.records[-1], sha256=seen)
                count = len(gguf_model.gguf_names(table, entry.name))
                for part in self._parts(config, entry, value, count):
                    writer.write_tensor_data(part)
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
        finally:
            writer.close()
        compare_tokens(path, tokenizer)

    def _announce(self, writer: Any, entry: Entry, names: list[str]) -> None:
        """Name, shape and type of the tensors that will be written in this order."""
        import gguf

        kind = self._stored(entry)
        ggml = gguf.GGMLQuantizationType[kind]
        for name in names:
            shape = entry.shape if len(names) == 1 else (entry.shape[0], entry.shape[1] // len(names), *entry.shape[2:])
            if entry.spec is not None:
                shape = gguf.quant_shape_to_byte_shape(shape, ggml)
            count = int(np.prod(shape)) * {"F32": 4, "F16": 2, "BF16": 2}.get(kind, 1)
            dtype = np.dtype(np.uint8) if entry.spec is not None else np.dtype(np.float32)
            writer.add_tensor_info(name, shape, dtype, count, raw_dtype=ggml)
            if kind == _NVFP4:
                _announce_floats(writer, _name_of_scale(name), (1,))

    def _stored(self, entry: Entry) -> str:
        """The ggml type of a tensor."""
        if entry.spec is not None:
            return self._type(entry.spec, entry.shape[-1])
        return "F32" if len(entry.shape) < 2 else _FLOATS[entry.dtype]

    def _parts(self, config: Any, entry: Entry, value: QTensor | Tensor, count: int) -> Iterator[Any]:
        """What was announced, as numpy data in the file's order of rows."""
        architecture = gguf_model.ARCHITECTURES[config.model_type]
        heads = gguf_model.heads_to_pair(
            architecture, config.num_attention_heads, gguf_model.kv_heads(config), entry.name
        )
        packed: dict[str, Tensor] = {}
        if isinstance(value, QTensor):
            packed = self.pack(entry.name, value)
            value = next(iter(packed.values())).reshape(*entry.shape[:-1], -1)
        elif (kind := self._stored(entry)) == "BF16":
            value = value.contiguous().view(torch.int16)
        else:
            value = value.to(torch.float32 if kind == "F32" else torch.float16)
        rows = gguf_model.pair_rows(value, heads) if heads else value
        for part in gguf_model.cut(rows, count):
            yield part.contiguous().numpy()
            if _SCALE in packed:
                yield packed[_SCALE].numpy()

    def knows(self, folder: Path) -> bool:
        return (folder / FILE).is_file()

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        return ((entry.name, entry.weight) for entry in self.entries(folder))

    def entries(self, folder: Path) -> Iterator[Stored]:
        try:
            import gguf
        except ImportError:
            raise ExportError("GGUF files are read with the package gguf; pip install gguf") from None

        path = folder / FILE
        if not path.is_file():
            raise ExportError(f"{path} is missing")
        try:
            reader: Any = gguf.GGUFReader(path)
            stored = {tensor.name: tensor for tensor in reader.tensors}
            architecture = reader.get_field("general.architecture").contents()
            fields = ("block_count", "attention.head_count", "attention.head_count_kv")
            blocks, *heads = (int(reader.get_field(f"{architecture}.{field}").contents()) for field in fields)
            # a damaged number would make a table as long
            if not 0 < blocks <= len(stored) or min(heads) < 1:
                raise ValueError(f"{blocks} blocks of {heads[0]} and {heads[1]} heads")
            table = gguf_model.name_table(architecture, blocks)
            names = {name: gguf_model.gguf_names(table, name) for name in gguf_model.hf_names(architecture, blocks)}
        except Exception as problem:  # whatever a reader that trusts its file makes of a damaged one
            raise ExportError(f"{path} is not a GGUF file that can be read ({_said(problem)})") from None
        names = {name: parts for name, parts in names.items() if parts and all(part in stored for part in parts)}
        known = {gguf_model.ROPE_FACTORS, *(part for parts in names.values() for part in parts)}
        scales = {_name_of_scale(name) for name in known if name in stored and _is_nvfp4(stored[name])}
        odd = next((name for name in stored if name not in known | scales), None)
        if odd is not None:
            raise ExportError(f"{path}: tensor {odd!r} has no counterpart in transformers")
        for name, parts in names.items():
            try:
                pairs = gguf_model.heads_to_pair(architecture, heads[0], heads[1], name)
                scale = stored.get(_name_of_scale(parts[0]))
                weight = _joined([_dequantized(stored[part], scale) for part in parts], pairs)
                weight = weight - 1.0 if gguf_model.adds_one(architecture, name) else weight
                packed = None
                if (kind := stored[parts[0]].tensor_type.name) not in _FLOATS.values():
                    data = _joined([torch.from_numpy(np.array(stored[part].data)) for part in parts], pairs)
                    packed = {kind: data.reshape(-1, data.shape[-1])}
                    packed |= {} if scale is None else {_SCALE: torch.from_numpy(np.array(scale.data)).reshape(1)}
            except Exception as problem:
                raise ExportError(f"{path}: {name} cannot be read ({_said(problem)})") from None
            yield Stored(name, weight, packed)

    def reader(self) -> str:
        return f"gguf {_version('gguf')}" if find_spec("gguf") is not None else "nothing: gguf is not installed"

    def versions(self) -> dict[str, str]:
        found = {"gguf": _version("gguf")}
        return {**found, "xllamacpp": _version("xllamacpp")} if installed() else found


def _two_levels(spec: QuantSpec) -> bool:
    """Whether the scales are a super-block's, which also says the type."""
    return spec.scale.upper() in ggml_kquants.SIZES


def _signed(kind: str, spec: QuantSpec, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales as the type holds them, and back."""
    return (-codes, -scale) if ggml_blocks.TYPES[kind].mirrors(spec) else (codes, scale)


def _of_groups(field: Tensor | None, spec: QuantSpec, columns: int) -> Tensor:
    """A field [R, runs] of blocks -> [R, G] or [1, 1], in the dtype of the spec's scales."""
    assert field is not None
    if spec.granularity == "tensor":
        field = field.reshape(1, -1)
    bits = field.view(torch.uint8).reshape(*field.shape, -1)
    grouped = bits.reshape(field.shape[0], spec.groups(columns), -1, bits.shape[-1])
    if not torch.equal(grouped, grouped[:, :, :1].expand_as(grouped)):
        raise ExportError("blocks of one group carry different scales; these bytes do not come from this grid")
    first = grouped[:, :, 0].contiguous().view(field.dtype).squeeze(-1)
    return first.float().to(spec.scale_grid.dtype)


def _joined(parts: list[Tensor], pairs: int) -> Tensor:
    """The parts that `gguf_model.cut` made, in transformers' order of rows."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return gguf_model.unpair_rows(whole, pairs) if pairs else whole


def _name_of_scale(name: str) -> str:
    return f"{name.removesuffix('.weight')}.{_SCALE}"


def _announce_floats(writer: Any, name: str, shape: tuple[int, ...]) -> None:
    single = np.dtype(np.float32)
    writer.add_tensor_info(name, shape, single, int(np.prod(shape)) * 4)


def _is_nvfp4(tensor: Any) -> bool:
    return bool(tensor.tensor_type.name == _NVFP4)


def _dequantized(tensor: Any, scale: Any) -> Tensor:
    """A tensor of a file in float, by the consumer's own code where that is all."""
    import gguf

    if scale is None or not _is_nvfp4(tensor):
        return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
    codes, block, _ = ggml_blocks.decode_blocks(_NVFP4, torch.from_numpy(np.array(tensor.data)))
    whole = torch.from_numpy(np.array(scale.data)).reshape(1)
    return GRIDS["fp4"].decode(codes, nvfp4.values_of(block, whole, False), None, None)


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
