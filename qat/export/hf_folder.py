"""A transformers model folder: config.json, tokenizer files, and safetensors written in shards, one pass."""

from __future__ import annotations

import copy
import json
import stat
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qat.errors import ExportError
from qat.hf import load_tokenizer as load_tokenizer_folder

_INDEX = "model.safetensors.index.json"
_WRAPPERS = ("FSDP", "QAT", "OptimizedModule")


class ShardWriter:
    """Tensors in, `model.safetensors` or `model-0000i-of-0000n.safetensors` and an index out.

    Holds at most one shard in memory. Tensors of one `add` stay in one shard. `metadata` goes into each.
    """

    def __init__(self, folder: Path, shard_bytes: int, metadata: dict[str, str] | None = None) -> None:
        self.folder, self.limit = folder, shard_bytes
        self._metadata = {**(metadata or {}), "format": "pt"}
        self._held: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self._held and self._size + size > self.limit:
            self._flush()
        # a copy: safetensors refuses views, and a live parameter must not change under our hands
        self._held |= {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        self._size += size

    def _flush(self) -> None:
        path = self.folder / f"part-{len(self._shards)}"
        # safetensors leaves its files readable by their owner alone; a file that is opened gets the umask's mode
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(self._held, path, metadata=self._metadata)
        path.chmod(mode)
        self._shards.append(list(self._held))
        self._total += self._size
        self._held, self._size = {}, 0

    def close(self) -> None:
        """Write the last shard and give all of them their final names."""
        if self._held or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            (self.folder / "part-0").rename(self.folder / "model.safetensors")
            return
        index: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / final)
            index |= dict.fromkeys(names, final)
        text = json.dumps({"metadata": {"total_size": self._total}, "weight_map": index}, indent=1)
        (self.folder / _INDEX).write_text(text + "\n", encoding="utf-8")


def read_layers(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(module name, {local name: tensor}) for every module with tensors of its own, shard by shard.

    Raises ExportError for a file that cannot be read.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                modules: dict[str, list[str]] = {}
                for key in file.keys():  # noqa: SIM118  (a safetensors handle, not a dict)
                    modules.setdefault(_module_of(key), []).append(key)
                for module, keys in modules.items():
                    yield module, {key.removeprefix(f"{module}."): file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as problem:
            raise ExportError(f"{path} is not a safetensors file that can be read ({problem})") from None


def _module_of(key: str) -> str:
    """Of a tensor's name; what belongs to a weight (`layer.weight.absmax`) belongs to the layer."""
    module, belongs, _ = key.partition(".weight.")
    return module if belongs else key.rpartition(".")[0]


def model_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the model's parameters: what `from_pretrained` will load them in."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def write_config(folder: Path, module: nn.Module, quantization: dict[str, Any]) -> None:
    """config.json (and generation_config.json) of a transformers model with a quantization_config.

    Rotary settings are in it under the names of transformers 4 too: exllamav2 and mlx_lm know no others.
    """
    config: Any = copy.deepcopy(module.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    data = config.to_diff_dict() if hasattr(config, "to_diff_dict") else config.to_dict()
    data["architectures"] = [class_name(module)]
    data["dtype"] = str(model_dtype(module)).removeprefix("torch.")
    data["quantization_config"] = quantization
    _add_older_rope(data)
    (folder / "config.json").write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(str(folder))


def _add_older_rope(config: dict[str, Any]) -> None:
    """Add what transformers 4 calls `rope_parameters`, to configs inside this one too; 5 reads the same from both.

    Settings by kind of layer had no older names, but for Gemma 3's.
    """
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            _add_older_rope(value)
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") == "gemma3_text" and "full_attention" in rope:
        config.setdefault("rope_local_base_freq", rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if "rope_theta" not in rope:
        return
    apart = ("rope_theta", "partial_rotary_factor")
    found = {key: rope[key] for key in apart if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in (*apart, "type")}
    if scaling != {"rope_type": "default"}:
        found["rope_scaling"] = scaling
    if scaling.get("rope_type") == "longrope" and "original_max_position_embeddings" in scaling:
        found["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    for key, value in found.items():
        config.setdefault(key, value)


def class_name(module: nn.Module) -> str:
    """Name of the model's own class, below whatever sharding put in front of it."""
    return next(c.__name__ for c in type(module).__mro__ if not c.__name__.startswith(_WRAPPERS))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; raises ExportError if it is missing or no JSON object."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ExportError(f"{path} cannot be read ({problem})") from None
    if not isinstance(found, dict):
        raise ExportError(f"{path} holds no JSON object")
    return found


def load_tokenizer(tokenizer: Any) -> Any:
    """A transformers tokenizer from itself, from a `tokenizers.Tokenizer`, or from a folder.

    Raises QATError for a folder that holds none.
    """
    if isinstance(tokenizer, (str, PathLike)):
        return load_tokenizer_folder(tokenizer)
    if type(tokenizer).__module__.partition(".")[0] == "tokenizers":
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return tokenizer
