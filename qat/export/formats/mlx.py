"""MLX: a folder for mlx-lm on Apple machines, weights in groups of 32, 64 or 128 along a row.

    affine          weight  uint32 [O, I * bits / 32], a dense stream of codes u along the row; 1 to 6 or 8 bits
                    scales, biases  [O, I / group] in the model's dtype t;  W = scales * u + biases, rounded to t twice
    mxfp4, mxfp8    weight  the same stream, of e2m1 or e4m3 codes; scales uint8 [O, I / 32];  W = code * 2^(byte - 127)
    bias            as in the model

Any grid of equal steps is such a W with the numbers below, and exact if each product and each bias is a number of t: a
scale of m significant bits times an odd number of n bits needs m + n of them (n for powers of two, m for u up to 2). So
every grid fits a model in fp32, and 16 bits hold few. Nothing that is exact depends on the order in which a processor
computes it. A scale for more numbers than a group is repeated.

    integers        u = code - smallest code    scales = s      biases = (smallest code - zero point) * s
    float minima    u = code                    scales = s      biases = minimum
    binary          u = code                    scales = 2s     biases = -s
    seq             u = code                    scales = s / 2  biases = -3/4 s

config.json says mode, bits and group for all layers, and for those that differ by name, in `quantization` and once more
in `quantization_config`. Embeddings are quantized too; a head that is tied to one has no tensors of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import hf_folder
from qat.export.format import TensorStream, declared_ties
from qat.export.hf_format import HOLDS, KEEP, HfFormat, expect, layer_of
from qat.export.packing import pack_bits, unpack_bits
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import Fields, QTensor
from qat.specs import QuantSpec

GROUPS = (128, 64, 32)
BITS = (1, 2, 3, 4, 5, 6, 8)
# grid -> (mode, bits); both have groups of 32
_MODES = {"fp4": ("mxfp4", 4), "e4m3": ("mxfp8", 8)}
# significant bits of stored scales, and of the dtypes that weights are computed in
_SCALE_BITS = {"portable": 8, "bf16": 8, "fp16": 11, "fp32": 24, "e8m0": 1}
_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_NEAREST = "nearest: grid: int, granularity: group, group_size: 64"


class Stored(NamedTuple):
    """How config.json names what a layer holds."""

    mode: str
    bits: int
    group: int


class _Line(NamedTuple):
    """W = step * s * u + offset * s for u = 0..top."""

    top: int
    step: float
    offset: float


class Mlx(HfFormat):
    """The format of mlx-lm."""

    name = "mlx"
    bits = "1 to 6 or 8"
    contents = (
        "int, ternary, binary, seq, float minima, MXFP4, MXFP8; embeddings; mixed layers; 16-bit models: few grids"
    )
    consumers = ("mlx", "mlx-lm")
    packages: ClassVar[tuple[str, ...]] = ("transformers", "safetensors", "mlx_lm")
    consumer = ("mlx", "mlx")
    mark = "scales"

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = []
        if set(row.kinds.values()) - {"linear", "embedding"} or set(row.kinds) - {"weight"}:
            found.append(f"mlx holds quantized Linear and Embedding layers, not {row.type}; {KEEP}")
        if row.input is not None:
            found.append("mlx holds no input quantization; set input: null in its rule")
        spec = row.weight
        if spec is None:
            return found
        run = spec.group_size or row.columns
        if spec.group_size is not None and run % GROUPS[-1]:
            found.append(f"group_size={run}: mlx has groups of 32, 64 and 128; use one of them or a multiple")
        elif run % GROUPS[-1]:
            found.append(f"rows of {run} numbers: mlx stores them in groups of 32 or more; {KEEP}")
        if spec.kind in _MODES:
            if spec.scale != "e8m0":
                mode = _MODES[spec.kind][0]
                found.append(
                    f"scale={spec.scale} with grid {spec.kind}: mlx has {mode} only; use scale: e8m0, group_size: 32"
                )
            return found
        if _line(spec) is None:
            return [*found, f"grid {spec.kind}: mlx has steps of equal size, fp4 and e4m3; {_NEAREST}"]
        if spec.bits not in BITS:
            found.append(f"bits={spec.bits}: mlx has 1, 2, 3, 4, 5, 6 and 8; nearest: bits: 8")
        if spec.scale not in _SCALE_BITS:
            found.append(f"scale={spec.scale}: mlx stores scales in the model's dtype; use scale: portable")
        elif not self.holds(spec):
            found.append(
                f"scale={spec.scale}: mlx rounds scale * code, which such scales do not survive in any dtype; "
                "use scale: portable"
            )
        return found

    def holds(self, spec: QuantSpec) -> tuple[torch.dtype, ...]:
        if spec.kind in _MODES:
            return torch.float32, torch.bfloat16
        line, bits = _line(spec), _SCALE_BITS.get(spec.scale)
        if line is None or bits is None:
            return ()
        # of the largest odd number up to the last code
        odd = (line.top - (line.top + 1) % 2).bit_length()
        needs = bits + odd if bits > 1 < odd else max(bits, odd)
        keep = (torch.float32, torch.bfloat16) if spec.scale == "e8m0" else HOLDS[spec.scale]
        return tuple(dtype for dtype in keep if needs <= _BITS[dtype])

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        dtype = hf_folder.model_dtype(bundle.module)
        lost = [f"{name} ({spec})" for name, spec in bundle.specs().items() if dtype not in self.holds(spec)]
        found = super().model_reasons(bundle, tokenizer)
        if lost and dtype in _BITS:
            # what the base says of scales is not the reason here
            found = [why for why in found if "the dtype of stored scales" not in why]
            found.append(
                f"{lost[0]} in a model in {dtype}: mlx rounds scale * code to that dtype before it adds the bias; call "
                "model.float() before training, or use scale: e8m0 and zero_point: none with model.to(torch.bfloat16)"
            )
        if dtype != torch.bfloat16:
            layouts, specs = bundle.layouts(), bundle.specs()
            wide = [name for name in specs if specs[name].kind in _MODES and layouts[name].kind == "embedding"]
            if wide:
                found.append(
                    f"{wide[0]}: mlx looks {_MODES[specs[wide[0]].kind][0]} embeddings up in bfloat16, and the "
                    f"model is in {dtype}; use grid: int for it, or call model.to(torch.bfloat16) before training"
                )
        return found

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Local names -> tensors; scales and biases in `dtype`. Raises ExportError if it does not hold them exactly."""
        spec = weight.spec
        if not self.holds(spec):
            raise ExportError(f"{name}: {spec.scale} scales times codes would be rounded; use scale: portable")
        rows, columns = weight.codes.shape
        stored = stored_as(spec, columns)
        scale = weight.scale.float()
        if spec.kind in _MODES:
            words = pack_bits(weight.codes.view(torch.uint8), stored.bits)
            byte = _spread(weight.scale.view(torch.uint8), rows, columns // stored.group)
            return {"weight": words.view(torch.uint32), "scales": byte}
        line = _line(spec)
        assert line is not None
        step, bias = line.step * scale, line.offset * scale
        if weight.zero_point is not None:
            bias = (line.offset - weight.zero_point.float()) * scale
        elif weight.minimum is not None:
            bias = weight.minimum.float()
        fields = {"scales": step, "biases": bias}
        found = {key: value.to(dtype) for key, value in fields.items()}
        if any(not torch.equal(found[key].float(), value) for key, value in fields.items()):
            raise ExportError(f"{name}: scales and biases stored in {dtype} would be rounded; call model.float()")
        if not bool(torch.isfinite((line.top * step).to(dtype)).all()):
            raise ExportError(f"{name}: scale times code leaves the range of {dtype}; call model.float()")
        first = spec.int_grid.qmin if spec.is_int else 0
        words = pack_bits(weight.codes.to(torch.int16) - first, stored.bits)
        spread = {key: _spread(value, rows, columns // stored.group) for key, value in found.items()}
        return {"weight": words.view(torch.uint32), **spread}

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """Raises ValueError for tensors that are not those of such a weight."""
        rows, columns = layout.rows_shape
        stored = stored_as(spec, columns)
        dtype = torch.uint8 if spec.kind in _MODES else packed["scales"].dtype
        _check(packed, stored, (rows, columns), dtype)
        codes = unpack_bits(packed["weight"].view(torch.int32), stored.bits, columns)
        if spec.kind in _MODES:
            numbers = codes.to(torch.uint8).view(spec.grid.code_dtype)
            byte = _gathered(packed["scales"], spec, columns).view(spec.scale_grid.dtype)
            return QTensor(numbers, byte, None, None, spec, layout, out_dtype)
        line = _line(spec)
        if line is None:
            raise ValueError(f"mlx holds no grid {spec.kind}")
        if int(codes.max()) > line.top:
            raise ValueError(f"a code above {line.top}")
        scale = _gathered(packed["scales"].float(), spec, columns) / line.step
        bias = _gathered(packed["biases"].float(), spec, columns)
        zero = minimum = None
        if spec.zero_point == "float":
            minimum = bias.to(spec.scale_grid.dtype)
        elif spec.zero_point == "int":
            zero = (line.offset - bias / scale).to(torch.int16)
        if not bool((torch.isfinite(scale) & ((scale > 0) | spec.signed_scale)).all()):
            raise ValueError("a scale that is not positive; of files that MLX rounded itself about half are negative")
        if spec.zero_point == "none" and not torch.equal(bias, line.offset * scale):
            raise ValueError("biases that are not those of a symmetric grid")
        first = spec.int_grid.qmin if spec.is_int else 0
        codes = (codes + first).to(spec.grid.code_dtype)
        return QTensor(codes, scale.to(spec.scale_grid.dtype), zero, minimum, spec, layout, out_dtype)

    # ---- the files -----------------------------------------------------------------------------------------------

    def aliases(self, bundle: Bundle, name: str) -> list[str]:
        # its models compute a head that is tied with the embedding's own tensors
        ties = declared_ties(bundle.module)
        return [alias for alias in super().aliases(bundle, name) if alias not in ties]

    def layer_tensors(
        self, name: str, weight: QTensor, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return self.pack(name, weight, dtype)

    def in_file(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        return self.pack(name, weight, weight.out_dtype)

    def quantization_config(self, stream: TensorStream) -> dict[str, Any]:
        """What most layers hold, and by name what the others do."""
        layers = {}
        for entry in stream.entries:
            if entry.spec is not None:
                layout = stream.bundle.layouts()[entry.name]
                for name in (entry.name, *self.aliases(stream.bundle, entry.name)):
                    layers[layer_of(name)] = stored_as(entry.spec, layout.rows_shape[1])
        usual = Counter(layers.values()).most_common(1)[0][0] if layers else Stored("affine", 4, 64)
        return _said(usual) | {layer: _said(stored) for layer, stored in layers.items() if stored != usual}

    def extra_files(self, stream: TensorStream, folder: Path) -> None:
        config = hf_folder.read_config(folder)
        config["quantization"] = config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def knows(self, folder: Path) -> bool:
        try:
            config = hf_folder.read_config(folder)
        except ExportError:
            return False
        found = config.get("quantization")
        return isinstance(found, dict) and "group_size" in found and "quantization_config" in config

    def of_weight(self, key: str) -> bool:
        return key in ("weight", "scales", "biases")

    def weight(self, layer: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
        stored = _stored(layer, config)
        words, scales = tensors["weight"], tensors["scales"]
        shape = (*words.shape[:-1], words.shape[-1] * 32 // stored.bits)
        if len(shape) != 2 or shape[1] % stored.group:
            raise ValueError(f"weight is {list(words.shape)}, no rows of whole groups of {stored.group}")
        if stored.mode != "affine":
            dtype = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
            if dtype not in _BITS:
                raise ValueError(f"config.json has dtype={config.get('dtype')!r}")
            _check(tensors, stored, shape, torch.uint8)
        else:
            dtype = scales.dtype
            if dtype not in _BITS:
                raise ValueError(f"scales are {dtype}, no dtype of a model")
            _check(tensors, stored, shape, dtype)
        if self.installed():
            return _by_mlx(tensors, stored, shape, dtype)
        if stored.mode != "affine":
            kind = next(kind for kind, (mode, _) in _MODES.items() if mode == stored.mode)
            spec = QuantSpec(stored.bits, kind=kind, granularity="group", group_size=stored.group, scale="e8m0")
            return self.unpack(tensors, spec, Layout(shape), dtype).dequantize()
        codes = unpack_bits(words.view(torch.int32), stored.bits, shape[1]).to(dtype)
        # rounded twice, as it computes them
        step, bias = (tensors[key].repeat_interleave(stored.group, 1) for key in ("scales", "biases"))
        return step * codes + bias


# ---- grids -----------------------------------------------------------------------------------------------------------


def _line(spec: QuantSpec) -> _Line | None:
    """The grid as equal steps, zero points and minima left out; None if it has none."""
    if spec.is_int:
        grid = spec.int_grid
        return _Line(grid.qmax - grid.qmin, 1.0, float(grid.qmin))
    return {"binary": _Line(1, 2.0, -1.0), "seq": _Line(3, 0.5, -0.75)}.get(spec.kind)


def stored_as(spec: QuantSpec, columns: int) -> Stored:
    """Mode, bits and group of a weight with rows of `columns` numbers. Raises ValueError if there is no such group."""
    run = spec.group_size or columns
    mode, bits = _MODES.get(spec.kind, ("affine", spec.bits))
    group = next((size for size in GROUPS if run % size == 0 and (mode == "affine" or size == 32)), None)
    if group is None or bits not in BITS:
        raise ValueError(f"mlx holds no {spec} in rows of {columns}")
    return Stored(mode, bits, group)


def _spread(field: Tensor, rows: int, groups: int) -> Tensor:
    """[R, G] or [1, 1] -> [rows, groups]."""
    field = field.expand(rows, -1)
    return field.repeat_interleave(groups // field.shape[1], 1).contiguous()


def _gathered(field: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    """The inverse of `_spread`. Raises ValueError if what stands for one number differs."""
    rows, groups = field.shape
    found = field[:1, :1] if spec.granularity == "tensor" else field[:, :: groups // spec.groups(columns)]
    if not torch.equal(_spread(found, rows, groups), field):
        raise ValueError(f"scales that differ within what {spec} gives one")
    return found.contiguous()


# ---- files -----------------------------------------------------------------------------------------------------------


def _said(stored: Stored) -> dict[str, Any]:
    return {"group_size": stored.group, "bits": stored.bits, "mode": stored.mode}


def _stored(layer: str, config: dict[str, Any]) -> Stored:
    """What config.json says of a layer. Raises ExportError if that is nothing MLX has."""
    found = config.get("quantization")
    if found != config["quantization_config"] or not isinstance(found, dict):
        raise ExportError("config.json has a `quantization` that is not its `quantization_config`")
    own = found.get(layer, found)
    if not isinstance(own, dict):
        raise ExportError(f"config.json says {own!r} of {layer}, which is quantized")
    mode, bits, group = own.get("mode", "affine"), own.get("bits"), own.get("group_size")
    sizes = {"affine": (BITS, GROUPS), **{mode: ((bits,), (32,)) for mode, bits in _MODES.values()}}
    if not isinstance(mode, str) or mode not in sizes or type(bits) is not int or type(group) is not int:
        raise ExportError(f"config.json says mode={mode!r}, bits={bits!r}, group_size={group!r} of {layer}")
    if bits not in sizes[mode][0] or group not in sizes[mode][1]:
        raise ExportError(f"config.json says bits={bits}, group_size={group} of {layer}, which {mode} lacks")
    return Stored(mode, bits, group)


def _check(tensors: dict[str, Tensor], stored: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless these are the tensors of a weight of this shape."""
    rows, columns = shape
    expect("weight", tensors["weight"], torch.uint32, (rows, columns * stored.bits // 32))
    for key in ("scales", "biases") if stored.mode == "affine" else ("scales",):
        expect(key, tensors[key], dtype, (rows, columns // stored.group))
    if stored.mode != "affine" and "biases" in tensors:
        raise ValueError(f"biases, which {stored.mode} lacks")


def _by_mlx(tensors: dict[str, Tensor], stored: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    import mlx.core as mx

    def array(tensor: Tensor) -> Any:
        raw = mx.array(tensor.contiguous().view(torch.uint8).numpy())
        return raw.view(getattr(mx, str(tensor.dtype).removeprefix("torch.")))

    with mx.stream(mx.cpu):
        given = {key: array(tensors[key]) for key in ("weight", "scales", "biases") if key in tensors}
        found = mx.dequantize(
            given["weight"],
            given["scales"],
            given.get("biases"),
            group_size=stored.group,
            bits=stored.bits,
            mode=stored.mode,
            dtype=getattr(mx, str(dtype).removeprefix("torch.")),
        )
        # every number of 16 bits is one of fp32
        wide = found.astype(mx.float32)
        mx.eval(wide)
    flat: Any = wide.reshape(-1)
    return torch.frombuffer(bytearray(memoryview(flat)), dtype=torch.float32).reshape(shape).to(dtype)
