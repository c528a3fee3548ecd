"""What GPTQ and AWQ share: codes counted from 0, integer zero points and fp16 scales of a matrix stored [in, out].

    W[o, i] = (u[i, o] - z[i // group, o]) * s[i // group, o]       rounded once, to the dtype of the loaded model

A signed grid is stored with z = 2^(bits-1), so every grid of integers without a float minimum fits that has the bits of
the format; narrow and ternary grids are subsets.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import hf_folder, process
from qat.export.format import TensorStream
from qat.export.hf_format import KEEP, HfFormat, layer_of, targets
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import QTensor
from qat.specs import QuantSpec

_TYPES = {"linear": "Linear", "transposed": "Conv1D"}
# codes less zero points, times a scale of this grid, that fp16 holds without rounding
_EXACT_IN_FP16 = {"portable": 8, "fp16": 1}


class Grouped(NamedTuple):
    """Codes [O, I] and zero points [O, G] counted from 0, int16, and fp16 scales [O, G]."""

    codes: Tensor
    zero: Tensor
    scale: Tensor


class PackedGroups(HfFormat):
    """Base of the two formats.

    widths, groups   bits and group sizes that their consumers have code for
    kinds            how the layers that they hold lie (`qat.layout`)
    """

    packages = ("transformers", "safetensors", "optimum")
    consumer = ("gptqmodel", "gptqmodel")
    mark = "qweight"
    widths: ClassVar[tuple[int, ...]]
    groups: ClassVar[tuple[int, ...]]
    kinds: ClassVar[tuple[str, ...]]

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = []
        if set(row.kinds.values()) - set(self.kinds) or set(row.kinds) - {"weight"}:
            what = " and ".join(_TYPES[kind] for kind in self.kinds)
            found.append(f"{self.name} holds quantized {what} layers, not {row.type}; {KEEP}")
        if row.input is not None:
            found.append(f"{self.name} holds no input quantization; set input: null in its rule")
        spec = row.weight
        if spec is None:
            return found
        nearest = min((bits for bits in self.widths if bits >= spec.bits), default=self.widths[-1])
        if not spec.is_int:
            return [*found, f"grid {spec.kind}: {self.name} stores integers; nearest: grid: int, bits: {nearest}"]
        if spec.bits not in self.widths:
            have = " or ".join(map(str, self.widths))
            found.append(f"bits={spec.bits}: {self.name} has {have}; nearest: bits: {nearest}")
        if spec.zero_point == "float":
            found.append(f"zero_point=float: {self.name} has integer zero points; nearest: zero_point: int")
        if spec.scale not in ("portable", "fp16"):
            found.append(f"scale={spec.scale}: {self.name} stores scales in fp16; use scale: portable (or fp16)")
        if spec.group_size is not None and spec.group_size not in self.groups:
            have = ", ".join(map(str, self.groups))
            found.append(
                f"group_size={spec.group_size}: {self.consumer[0]} has groups of {have}; use one of them or "
                "granularity: channel"
            )
        return found

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        found = super().model_reasons(bundle, tokenizer)
        head = head_of(bundle)
        outside = [name for name in map(layer_of, bundle) if name != head and not re.search(r"(^|\.)\d+\.", name)]
        if outside:
            found.append(f"{outside[0]}: loaders of {self.name} look for layers in a model's blocks only; {KEEP}")
        experts = next((name for name, module in bundle.module.named_modules() if _fused_experts(module)), None)
        if experts is not None:
            found.append(
                f"{experts}: {self.consumer[0]} takes experts that are one tensor apart and loses those of the file; "
                "use the format compressed-tensors"
            )
        if hf_folder.model_dtype(bundle.module) == torch.float32:
            wide = next((name for name, spec in bundle.specs().items() if not _exact_in_fp16(spec)), None)
            if wide is not None:
                found.append(
                    f"{wide} and a model in float32: loaders compute weights of {self.name} in float16, which would "
                    "round them; call model.to(torch.bfloat16) or model.to(torch.float16) before training"
                )
        return found

    def of_weight(self, key: str) -> bool:
        return key in ("qweight", "qzeros", "scales", "g_idx")


def stored(name: str, weight: QTensor) -> Grouped:
    """What the file holds of a tensor. Raises ExportError if fp16 does not hold its scales."""
    spec = weight.spec
    offset = offset_of(spec)
    scale = weight.scale.to(torch.float16)
    if not torch.equal(scale.float(), weight.scale.float()):
        raise ExportError(f"{name}: scales stored in fp16 would be rounded; use scale: portable")
    zero = torch.zeros_like(weight.scale, dtype=torch.int16) if weight.zero_point is None else weight.zero_point
    # one scale for the tensor is repeated for each row
    rows = weight.codes.shape[0]
    scale, zero = scale.expand(rows, -1), zero.expand(rows, -1)
    return Grouped(weight.codes.to(torch.int16) + offset, zero + offset, scale)


def restored(found: Grouped, spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
    """The inverse of `stored`."""
    offset = offset_of(spec)
    one = spec.granularity == "tensor"
    scale, zero = (t[:1] if one else t for t in (found.scale, found.zero))
    return QTensor(
        (found.codes - offset).to(spec.grid.code_dtype),
        scale.float().to(spec.scale_grid.dtype).contiguous(),
        (zero - offset).contiguous() if spec.zero_point == "int" else None,
        None,
        spec,
        layout,
        out_dtype,
    )


def _fused_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts as one tensor."""
    return "Experts" in type(module).__name__ and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _exact_in_fp16(spec: QuantSpec) -> bool:
    """Whether every weight of this grid is a number of fp16 (those that overflow are seen when the file is read)."""
    if not spec.is_int or spec.scale not in _EXACT_IN_FP16:
        return False
    grid = spec.int_grid
    farthest = grid.qmax - grid.qmin if spec.zero_point == "int" else max(-grid.qmin, grid.qmax)
    return farthest <= _EXACT_IN_FP16[spec.scale]


def unsigned_grid(bits: int, group_size: int) -> QuantSpec:
    """Of a file's codes as they are stored, whatever grid they came from."""
    return QuantSpec(bits, False, False, "group", group_size, "int", "fp16", "minmax")


def offset_of(spec: QuantSpec) -> int:
    """What turns a code into the stored number, which counts from 0."""
    return 1 << (spec.bits - 1) if spec.signed else 0


def symmetric(spec: QuantSpec) -> bool:
    """Whether every zero point is stored as 2^(bits-1)."""
    return spec.signed and spec.zero_point == "none"


def group_of(spec: QuantSpec) -> int:
    """`group_size` of a configuration: -1 for a whole row."""
    return spec.group_size or -1


def head_of(bundle: Bundle) -> str | None:
    """Name of the output head of a language model."""
    get = getattr(bundle.module, "get_output_embeddings", None)
    head = get() if get is not None else None
    return (
        next((name for name, module in bundle.module.named_modules() if module is head), None)
        if head is not None
        else None
    )


def left_in_float(stream: TensorStream) -> list[str]:
    """Layers of a kind that could be quantized and is not, the output head apart: loaders leave that alone."""
    quantized, head = targets(stream), head_of(stream.bundle)
    return [name for name in stream.bundle.linears if name not in quantized and name != head]


def exactly(layer: str) -> str:
    """A regular expression of one name."""
    return f"^{re.escape(layer)}$"


def number(config: dict[str, Any], key: str) -> int:
    """A whole number of the configuration. Raises ExportError if there is none."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ExportError(f"config.json has {key}={value!r} in its quantization_config, which is no whole number")
    return value


def check_tensor(
    layer: str, tensors: dict[str, Tensor], key: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """The tensor of this local name. Raises ExportError if it is missing or is another one."""
    found = tensors.get(key)
    if found is None:
        raise ExportError(f"{layer} has no tensor {key!r}")
    if found.dtype != dtype or tuple(found.shape) != shape:
        seen, wanted = (f"{list(s)} {d}".replace("torch.", "") for s, d in ((found.shape, found.dtype), (shape, dtype)))
        raise ExportError(f"{layer}.{key} is {seen}; its configuration asks for {wanted}")
    return found


def dtypes(config: dict[str, Any]) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the model that config.json asks for, dtype in which its weights are computed).

    Raises ExportError if no model is loaded in it.
    """
    # what transformers called it before version 5
    said = config.get("dtype", config.get("torch_dtype"))
    found = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}.get(str(said))
    if found is None:
        raise ExportError(f"config.json has dtype={said!r}; float32, float16 or bfloat16 is needed")
    return found, torch.float16 if found == torch.float32 else found


def transposed_layers(config: dict[str, Any]) -> list[str]:
    """Layers whose weight lies as [in, out] in the model (Conv1D), by config.json."""
    meta = config["quantization_config"].get("meta")
    found = meta.get("transposed") if isinstance(meta, dict) else None
    return found if isinstance(found, list) else []


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Undo what importing GPTQModel does to a process, which may be one that trains.

    It greets and logs on standard output, sets variables of the environment (caches of transformers, the allocator of
    CUDA), takes over the root logger, and gives transformers a default rotation that forgets heads rotated in part.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotations = dict(ROPE_INIT_FUNCTIONS)
    try:
        with process.undisturbed():
            yield
    finally:
        ROPE_INIT_FUNCTIONS.clear()
        ROPE_INIT_FUNCTIONS.update(rotations)
