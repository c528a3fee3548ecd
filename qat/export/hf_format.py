"""`HfFormat`: formats that are a transformers model folder, config.json with a quantization_config and safetensors.

A format says which tensors stand for a quantized layer, what config.json says of them, and how its consumer computes
the weight from them; everything else of the folder is the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.convert import Bundle
from qat.errors import ExportError
from qat.export import hf_folder
from qat.export.format import Format, Stored, TensorStream, present, versions_of
from qat.qtensor import Fields, QTensor
from qat.specs import QuantSpec

KEEP = "add a rule {match: [its name], keep_float: true}"
# dtypes that hold every scale of a grid exactly
HOLDS = {
    "portable": (torch.float32, torch.bfloat16, torch.float16),
    "bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float32, torch.float16),
    "fp32": (torch.float32,),
}


class HfFormat(Format):
    """Base of these formats.

    packages   distributions whose versions the receipt records
    consumer   (distribution, module) of the code that `read` decodes with where it is installed
    mark       local name of the tensor by which `read` knows a quantized layer
    method     `quant_method` of config.json; None: the format's name
    """

    shard_bytes: ClassVar[int] = 1 << 30
    packages: ClassVar[tuple[str, ...]] = ("transformers", "safetensors")
    consumer: ClassVar[tuple[str, str]]
    mark: ClassVar[str]
    method: ClassVar[str | None] = None

    def model_reasons(self, bundle: Bundle, tokenizer: Any) -> list[str]:
        if bundle.config is None:
            return [f"the model has no transformers config; {self.name} needs it as config.json"]
        dtype = hf_folder.model_dtype(bundle.module)
        found = _mixed_reasons(bundle)
        if dtype not in HOLDS["portable"]:
            found.append(f"the model's dtype is {dtype}; cast it to float32, bfloat16 or float16")
        odd = sorted({spec.scale for spec in bundle.specs().values() if dtype not in self.holds(spec)})
        if odd:
            found.append(f"scale={odd[0]} does not fit a model in {dtype}, the dtype of stored scales; use portable")
        return found

    def holds(self, spec: QuantSpec) -> tuple[torch.dtype, ...]:
        """Dtypes of a model in whose file the scales of `spec` stay what they are."""
        return HOLDS.get(spec.scale, ())

    @abstractmethod
    def layer_tensors(
        self, name: str, weight: QTensor, given: tuple[QuantSpec, Fields | None] | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Local names -> tensors of the layer whose parameter `name` is; `given` is its quantized input, `dtype` the
        model's."""

    @abstractmethod
    def quantization_config(self, stream: TensorStream) -> dict[str, Any]:
        """`quantization_config` of config.json."""

    @abstractmethod
    def weight(self, layer: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
        """The weight of `layer` as the consumer's code computes it where it is installed, else ours.

        `config` is the whole config.json. What it raises for damaged tensors is told as an ExportError.
        """

    def extra_tensors(self, stream: TensorStream, dtype: torch.dtype) -> dict[str, Tensor]:
        """Name -> tensor of what belongs to no parameter; `dtype` is the model's."""
        return {}

    def extra_files(self, stream: TensorStream, folder: Path) -> None:
        """Write what the folder holds besides config, safetensors and tokenizer."""
        return

    def metadata(self, stream: TensorStream) -> dict[str, str]:
        """Metadata of each safetensors file beside its `format`."""
        return {}

    def config(self, folder: Path) -> dict[str, Any]:
        """What `weight` is given as config. Raises ExportError if it cannot be read."""
        return hf_folder.read_config(folder)

    def aliases(self, bundle: Bundle, name: str) -> list[str]:
        """Other names of the quantized parameter `name` under which its tensors are stored again."""
        return [alias for alias, owner in bundle.tied.items() if owner == name]

    def write(self, stream: TensorStream, folder: Path, tokenizer: Any) -> None:
        bundle = stream.bundle
        dtype = hf_folder.model_dtype(bundle.module)
        shards = hf_folder.ShardWriter(folder, self.shard_bytes, self.metadata(stream))
        for entry, value in stream:
            if not isinstance(value, QTensor):
                shards.add({entry.name: value})
                continue
            for name in (entry.name, *self.aliases(bundle, entry.name)):
                layer = layer_of(name)
                tensors = self.layer_tensors(name, value, stream.inputs.get(layer), dtype)
                shards.add({f"{layer}.{key}": tensor for key, tensor in tensors.items()})
        shards.add(self.extra_tensors(stream, dtype))
        shards.close()
        hf_folder.write_config(folder, bundle.module, self.quantization_config(stream))
        self.extra_files(stream, folder)
        if tokenizer is not None:
            hf_folder.load_tokenizer(tokenizer).save_pretrained(str(folder))

    def knows(self, folder: Path) -> bool:
        try:
            found = hf_folder.read_config(folder).get("quantization_config")
        except ExportError:
            return False
        return isinstance(found, dict) and found.get("quant_method") == (self.method or self.name)

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        return ((entry.name, entry.weight) for entry in self.entries(folder))

    def entries(self, folder: Path) -> Iterator[Stored]:
        config = self.config(folder)
        if not isinstance(config.get("quantization_config"), dict):
            raise ExportError(f"{folder / 'config.json'} holds no quantization_config")
        for layer, tensors in hf_folder.read_layers(folder):
            if self.quantized(tensors):
                try:
                    weight = self.weight(layer, tensors, config)
                except ExportError as problem:
                    raise ExportError(f"{folder}: {problem}") from None
                except ImportError as problem:
                    # no word about the file: an installed package, or what it needs, is broken or too old or new
                    what, package = " ".join(str(problem).split())[:200], self.consumer[0]
                    raise ExportError(
                        f"{folder}: {self.reader()}, which reads it, is installed but cannot be imported ({what}); "
                        f"repair it (pip install -U {package}), or uninstall it: qat then reads the file itself"
                    ) from None
                except Exception as problem:  # whatever the consumer's code makes of damage
                    what = " ".join(str(problem).split())[:200]
                    kind = type(problem).__name__
                    raise ExportError(f"{folder}: {layer} cannot be decoded ({kind}: {what})") from None
                yield Stored(f"{layer}.weight", weight, tensors)
                tensors = {key: tensor for key, tensor in tensors.items() if not self.of_weight(key)}
            for key, tensor in tensors.items():
                yield Stored(f"{layer}.{key}" if layer else key, tensor, None)

    def quantized(self, tensors: dict[str, Tensor]) -> bool:
        """Whether these are the tensors of a quantized layer, by their local names."""
        return self.mark in tensors

    def of_weight(self, key: str) -> bool:
        """Whether a quantized layer's tensor of this local name is part of its weight."""
        return key.startswith("weight")

    def reader(self) -> str:
        return f"{self.consumer[0]} {version(self.consumer[0])}" if self.installed() else "qat"

    def installed(self) -> bool:
        """Whether the consumer's code is there."""
        return present(*self.consumer)

    def versions(self) -> dict[str, str]:
        return versions_of(dict((self.consumer, *((name, name) for name in self.packages))))


def layer_of(parameter: str) -> str:
    """The module of a parameter's name."""
    return parameter.rpartition(".")[0]


def expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor of a file has this dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")


def targets(stream: TensorStream) -> dict[str, QuantSpec]:
    """Quantized layer -> spec of its weight, those that are tied to another included."""
    specs = {entry.name: entry.spec for entry in stream.entries if entry.spec is not None}
    tied = {alias: specs[owner] for alias, owner in stream.bundle.tied.items() if owner in specs}
    return {layer_of(name): spec for name, spec in {**specs, **tied}.items()}


def _mixed_reasons(bundle: Bundle) -> list[str]:
    """Why a model in several float dtypes does not fit: config.json has one, and transformers casts all to it.

    The parameter of a quantized layer may differ if its weight in the forward did not (fp32 masters of a bf16 model).
    """
    model = hf_folder.model_dtype(bundle.module)
    live = bundle.parameters
    dtypes = {name: live[name].dtype for name in bundle.floats if live[name].is_floating_point()}
    first = next(((name, dtype) for name, dtype in dtypes.items() if dtype == model), None)
    for name in bundle:
        dtypes[name] = model if bundle.dtypes(name)[1] == model else live[name].dtype
        first = first or (name, model)
    odd = next(((name, dtype) for name, dtype in dtypes.items() if dtype != model), None)
    if odd is None or first is None:
        return []
    return [
        f"{first[0]} is {first[1]} but {odd[0]} is {odd[1]}: transformers loads a model in one dtype and would cast; "
        f"call model.to({model}) before training"
    ]
