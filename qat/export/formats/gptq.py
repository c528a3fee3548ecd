"""GPTQ: 2, 3, 4 or 8 bits in groups, the format of AutoGPTQ and GPTQModel, read by transformers, vLLM and exllamav2.

    qweight   int32 [ceil(I * bits / 32), O]   codes, a dense stream down the rows
    qzeros    int32 [G, ceil(O * bits / 32)]   zero points, a dense stream along the columns
    scales    fp16 [G, O]
    g_idx     int32 [I]                        group of each input: i // group_size but for desc_act
    bias      as in the model

`gptq` (version 1) stores zero points less one, in `bits` bits: no zero point of 0. `gptq_v2` stores them as they are. A
file is of version 1 where it can be, symmetric grids (z = 2^(bits-1)) always, since every loader knows that one.

Layers of other grids than most are listed in `dynamic`, those left in float in `dynamic` and
`modules_in_block_to_quantize`: GPTQModel and vLLM read the first, transformers the second and no mixed grids.
"""

from __future__ import annotations

import json
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import hf_folder
from qat.export.format import Stored, TensorStream
from qat.export.hf_format import KEEP, layer_of, targets
from qat.export.packed_groups import (
    Grouped,
    PackedGroups,
    check_tensor,
    dtypes,
    exactly,
    group_of,
    head_of,
    left_in_float,
    number,
    restored,
    stored,
    symmetric,
    transposed_layers,
    undisturbed,
    unsigned_grid,
)
from qat.export.packing import pack_bits, unpack_bits, words_per_row
from qat.layout import Layout
from qat.plan import PlanRow
from qat.qtensor import Fields, QTensor
from qat.specs import QuantSpec

V1, V2 = "gptq", "gptq_v2"
# by which GPTQModel knows that asymmetric zero points of version 1 were stored without wrapping around
_NO_WRAP = "gptqmodel:0.9.0"
# Letters of a pattern in `dynamic` that are read, and that an error shows.
_LONGEST, _SHOWN = 4096, 60


class Gptq(PackedGroups):
    """The format of GPTQModel."""

    name = "gptq"
    bits = "2, 3, 4 or 8"
    contents = "int and ternary by tensor, channel or group (desc_act), zero points; mixed layers; Conv1D"
    consumers = ("gptqmodel",)
    widths = (2, 3, 4, 8)
    groups = (16, 32, 64, 128, 256, 512, 1024)
    kinds = ("linear", "transposed")
    desc_act = True

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        # of the file that is being written: a zero point of 0 went into it; layers whose weight lies as [in, out]
        self._zero_seen = False
        self._transposed: list[str] = []

    # ---- what fits -----------------------------------------------------------------------------------------------

    def row_reasons(self, row: PlanRow) -> list[str]:
        found = super().row_reasons(row)
        if row.weight is not None and row.weight.bits == 3 and row.columns % 32:
            found.append(f"rows of {row.columns} numbers: 3 bits come by 32 in gptq; bits: 4, or {KEEP}")
        return found

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        found = super().model_reasons(bundle, tokenizer)
        if getattr(bundle.module, "main_input_name", "input_ids") != "input_ids":
            found.append("transformers loads gptq models of text only; use the format compressed-tensors")
        stacks = _stacks([layer_of(name) for name in bundle])
        if len(stacks) > 1:
            found.append(
                f"layers in {' and '.join(stacks)}: transformers finds gptq layers in one stack of blocks only"
            )
        rows = [row for row in bundle.plan.rows if row.weight is not None and row.weight.bits == 3 and row.columns]
        odd = next((row for row in rows if row.params // row.columns % 32), None)
        if odd is not None:
            found.append(f"{odd.name} has {odd.params // odd.columns} outputs: 3 bits come by 32 in gptq; {KEEP}")
        return found

    # ---- one tensor ----------------------------------------------------------------------------------------------

    def pack(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """Local names -> tensors, zero points as in version 2."""
        codes, zero, scale = stored(name, weight)
        bits, columns = weight.spec.bits, codes.shape[1]
        groups = torch.arange(columns, dtype=torch.int32, device=codes.device) // (columns // scale.shape[1])
        return {
            "qweight": pack_bits(weight.layout.unordered(codes), bits).T.contiguous(),
            "qzeros": pack_bits(zero.T.contiguous(), bits),
            "scales": scale.T.contiguous(),
            "g_idx": weight.layout.unordered(groups),
        }

    def unpack(self, packed: dict[str, Tensor], spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
        """The layout of the result has the order of g_idx, which is as `weight` wants it."""
        rows, columns = layout.rows_shape
        order = torch.argsort(packed["g_idx"], stable=True)
        layout = replace(layout, order=None if torch.equal(order, torch.arange(columns)) else order)
        codes = layout.ordered(unpack_bits(packed["qweight"].T.contiguous(), spec.bits, columns))
        zero = unpack_bits(packed["qzeros"], spec.bits, rows).T.contiguous()
        return restored(Grouped(codes, zero, packed["scales"].T), spec, layout, out_dtype)

    # ---- the files -----------------------------------------------------------------------------------------------

    def layer_tensors(
        self, name: str, weight: QTensor, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        tensors = self.pack(name, weight)
        outputs, bits = tensors["scales"].shape[1], weight.spec.bits
        self._zero_seen |= bool((unpack_bits(tensors["qzeros"], bits, outputs) == 0).any())
        if weight.layout.kind == "transposed":
            self._transposed.append(layer_of(name))
        return tensors | {"qzeros": _moved(tensors["qzeros"], bits, outputs, -1)}

    def write(self, stream: TensorStream, folder: Path, tokenizer: Any) -> None:
        self._begin()
        super().write(stream, folder, tokenizer)

    def quantization_config(self, stream: TensorStream) -> dict[str, Any]:
        """The grid of most layers, and what differs from it by name."""
        quantized = targets(stream)
        grids = {layer: _grid(spec) for layer, spec in quantized.items()}
        base = json.loads(Counter(json.dumps(grid) for grid in grids.values()).most_common(1)[0][0])
        floats = left_in_float(stream)
        dynamic = {f"+:{exactly(layer)}": grid for layer, grid in grids.items() if grid != base}
        dynamic |= {f"-:{exactly(layer)}": {} for layer in floats}
        every = all(map(symmetric, quantized.values()))
        found: dict[str, Any] = {
            "quant_method": "gptq",
            **base,
            "checkpoint_format": V2 if self._zero_seen else V1,
            "desc_act": any(spec.desc_act for spec in quantized.values()),
            "pack_dtype": "int32",
            "lm_head": head_of(stream.bundle) in quantized,
            "meta": {"quantizer": ["qat"] if every or self._zero_seen else ["qat", _NO_WRAP]},
        }
        if self._transposed:
            # a weight does not say which way it lay
            found["meta"]["transposed"] = self._transposed
        if dynamic:
            found["dynamic"] = dynamic
        for stack in _stacks(list(quantized)):
            found["block_name_to_quantize"] = stack
        if floats:
            found["modules_in_block_to_quantize"] = [sorted(quantized)]
        return found

    def extra_files(self, stream: TensorStream, folder: Path) -> None:
        config = hf_folder.read_config(folder)["quantization_config"]
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "quantize_config.json").write_text(text, encoding="utf-8")
        if self._zero_seen:
            bits = {f"{layer}.qzeros": spec.bits for layer, spec in targets(stream).items()}
            for path in sorted(folder.glob("*.safetensors")):
                _to_version_2(path, bits)

    def entries(self, folder: Path) -> Iterator[Stored]:
        """With zero points as `unpack` has them, whichever version the file is of."""
        config = hf_folder.read_config(folder).get("quantization_config")
        for entry in super().entries(folder):
            if entry.packed is not None and isinstance(config, dict):
                bits, _, version = _settings(layer_of(entry.name), config)
                qzeros, outputs = entry.packed["qzeros"], entry.packed["scales"].shape[1]
                moved = _moved(qzeros, bits, outputs, 1) if version == V1 else qzeros
                entry = entry._replace(packed=entry.packed | {"qzeros": moved})
            yield entry

    def weight(self, layer: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
        bits, size, version = _settings(layer, config["quantization_config"])
        g_idx = tensors.get("g_idx")
        inputs = 0 if g_idx is None else g_idx.numel()
        outputs = tensors["scales"].shape[-1] if "scales" in tensors else 0
        if size > 0 and inputs % size:
            raise ExportError(f"{layer} has {inputs} inputs, which are no whole groups of {size}")
        groups = inputs // size if size > 0 else 1
        words = words_per_row(outputs, bits)
        order = check_tensor(layer, tensors, "g_idx", torch.int32, (inputs,))
        known = not inputs or 0 <= int(order.min()) <= int(order.max()) < groups
        if not known or bool((torch.bincount(order, minlength=groups) != inputs // groups).any()):
            raise ExportError(f"{layer}.g_idx does not put {inputs // groups} inputs into each of {groups} groups")
        check_tensor(layer, tensors, "scales", torch.float16, (groups, outputs))
        check_tensor(layer, tensors, "qweight", torch.int32, (words_per_row(inputs, bits), outputs))
        check_tensor(layer, tensors, "qzeros", torch.int32, (groups, words))
        dtype, computed = dtypes(config)
        if self.installed():
            weight = _by_gptqmodel(tensors, bits, size, version, computed)
        else:
            if version == V1:
                tensors = tensors | {"qzeros": _moved(tensors["qzeros"], bits, outputs, 1)}
            spec = unsigned_grid(bits, inputs // groups)
            weight = self.unpack(tensors, spec, Layout((outputs, inputs)), computed).dequantize()
        return (weight.T.contiguous() if layer in transposed_layers(config) else weight).to(dtype)


def _settings(layer: str, config: dict[str, Any]) -> tuple[int, int, str]:
    """(bits, group size, version) of a layer. Raises ExportError for a configuration that says nothing of the kind."""
    settings = {**config, **_override(layer, config.get("dynamic") or {})}
    bits, size, version = number(settings, "bits"), number(settings, "group_size"), config.get("checkpoint_format", V1)
    if bits not in Gptq.widths or (size < 1 and size != -1):
        raise ExportError(f"config.json has bits={bits} and group_size={size} for {layer}, which GPTQ has not")
    if version not in (V1, V2):
        raise ExportError(f"config.json has checkpoint_format={version!r}; gptq and gptq_v2 are known")
    return bits, size, version


def _override(layer: str, dynamic: Any) -> dict[str, Any]:
    """The settings of the first pattern that matches the start of a layer's name, as GPTQModel and vLLM take them."""
    if not isinstance(dynamic, dict):
        raise ExportError(f"config.json has no mapping in its dynamic, but {str(dynamic)[:_SHOWN]}")
    for pattern, settings in dynamic.items():
        if not _matches(pattern[2:] if pattern.startswith(("+:", "-:")) else pattern, layer):
            continue
        if pattern.startswith("-:"):
            raise ExportError(f"{layer} is packed, and {pattern!r} in the dynamic of config.json leaves it in float")
        if not isinstance(settings, dict):
            raise ExportError(f"config.json has no mapping of settings for {layer} in its dynamic")
        return settings
    return {}


def _matches(pattern: str, layer: str) -> bool:
    """Whether a pattern matches the start of a name. Raises ExportError for one that cannot be read."""
    if re.fullmatch(r"\^([^][\\.^$*+?{}()|]|\\[^a-zA-Z0-9])*\$", pattern):
        # one name, as `exactly` writes it
        return re.sub(r"\\(.)", r"\1", pattern[1:-1]) == layer
    what = f"config.json has {pattern[:_SHOWN]!r} in its dynamic"
    if len(pattern) > _LONGEST:
        raise ExportError(f"{what}, a pattern of {len(pattern)} letters; at most {_LONGEST} are read")
    if "{," in pattern:
        raise ExportError(f"{what}, with a repetition that has no lower end, which RE2 takes for letters; write {{0,")
    try:
        from pyarrow import array, compute
    except ImportError:
        raise ExportError(f"{what}, which is no plain name; pip install pyarrow, by which it is matched") from None
    try:
        re.compile(pattern)
        # RE2 takes a time linear in the name, whatever a stranger wrote; re does not
        return bool(compute.match_substring_regex(array([layer]), f"^(?:{pattern})")[0].as_py())
    except (ValueError, OverflowError, RecursionError, re.error) as problem:
        why = str(problem).removeprefix("Invalid regular expression: ")[:_SHOWN]
        raise ExportError(f"{what}, which is no regular expression that can be matched safely ({why})") from None


def _by_gptqmodel(tensors: dict[str, Tensor], bits: int, size: int, version: str, dtype: torch.dtype) -> Tensor:
    """[O, I] by the kernel in torch that GPTQModel and transformers run on a CPU."""
    inputs, outputs = tensors["g_idx"].numel(), tensors["scales"].shape[1]
    with undisturbed():
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

        kernel = TorchLinear(
            bits, size, sym=False, desc_act=False, in_features=inputs, out_features=outputs, bias=False, format=version
        ).eval()
        kernel.load_state_dict({key: tensors[key].clone() for key in ("qweight", "qzeros", "scales", "g_idx")})
        kernel.scales = kernel.scales.to(dtype)
        if version == V1:
            convert_gptq_v1_to_v2_format_module(kernel, bits, kernel.pack_dtype)
        return kernel.dequantize_weight().T.contiguous()  # type: ignore[no-any-return]


def _to_version_2(path: Path, bits: dict[str, int]) -> None:
    """Store the zero points of a shard as they are. `bits`: name of the tensor -> bits of a zero point."""
    found = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name in bits.keys() & found.keys():
        outputs = found[f"{layer_of(name)}.scales"].shape[1]
        found[name] = _moved(found[name], bits[name], outputs, 1)
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(found, path, metadata={"format": "pt"})
    path.chmod(mode)


def _moved(qzeros: Tensor, bits: int, outputs: int, by: int) -> Tensor:
    """Zero points of version 2 as version 1 stores them (by = -1), or the other way round (by = 1)."""
    return pack_bits((unpack_bits(qzeros, bits, outputs) + by) & ((1 << bits) - 1), bits)


def _stacks(layers: list[str]) -> list[str]:
    """What the names of layers have in front of the number of their block."""
    found = (re.match(r"(.+?)\.\d+\.", layer) for layer in layers)
    return sorted({match[1] for match in found if match})


def _grid(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": group_of(spec), "sym": symmetric(spec)}
