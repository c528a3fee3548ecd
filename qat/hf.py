"""Hugging Face folders: checked first, then loaded by their own library; nothing is downloaded or unpickled.

    empty_model(folder, meta=True)   the architecture alone: a plan of a model of any size at once
    load_model(folder)               the model with its weights (safetensors only)
    load_on_disk(folder, scratch)    the same where memory does not hold them
    load_tokenizer(folder)           its tokenizer

Everything that is wrong with a folder is a QATError that names the file. transformers is imported by the calls.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import QATError

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and notices from the libraries; the caller says what is wrong."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_config(folder: str | PathLike[str]) -> Any:
    """The folder's `PretrainedConfig`. Raises QATError for a folder that is none, or a config that cannot be read."""
    place = Path(folder)
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise QATError(f"model folder {place} {what}; give a folder that holds config.json and model.safetensors")
    file = place / "config.json"
    if not file.is_file():
        raise QATError(f"model folder {place} holds no config.json; save_pretrained of transformers writes one")
    data = _json(file)
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise QATError(f"{file} names no model_type, so it is not the config of a transformers model")
    import transformers

    if data["model_type"] not in transformers.CONFIG_MAPPING:
        own = "; code that a folder brings along is not run" if "auto_map" in data else ""
        raise QATError(
            f"{file}: model_type {data['model_type']!r} is unknown to transformers {transformers.__version__}{own}"
        )
    try:
        with _quiet():
            return transformers.AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as problem:
        raise QATError(f"{file} cannot be used: {_sentence(problem)}") from None


def empty_model(folder: str | PathLike[str], *, meta: bool = False, auto: str = "AutoModel") -> nn.Module:
    """The folder's architecture without its weights, which are undefined; on the meta device they take no memory.

    `auto` is the transformers class that chooses where the config names no architecture.
    """
    config = read_config(folder)
    wanted = _class(config, auto)
    device = torch.device("meta" if meta else "cpu")
    try:
        with _quiet(), device:
            model = wanted._from_config(config) if hasattr(wanted, "_from_config") else wanted.from_config(config)
    except Exception as problem:
        raise QATError(f"{Path(folder) / 'config.json'} describes no model: {_sentence(problem)}") from None
    return model.eval()  # type: ignore[no-any-return]


def trained_dtype(precision: str) -> torch.dtype:
    """Dtype of the parameters that a run with `train.precision` trains and exports, whatever the folder's is."""
    return {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)


def load_model(
    folder: str | PathLike[str], *, auto: str | None = None, dtype: Any = "auto", may_lack: bool = False, **config: Any
) -> nn.Module:
    """The folder's model with its weights, in eval mode; `config` entries replace those of config.json.

    `auto` is the transformers class to load it as, by default what config.json says. Raises QATError for weights that
    are missing, cut short, pickled, of other shapes or incomplete (`may_lack`: but for a head or pooler).
    """
    settings = read_config(folder)
    check_weights(folder)
    for name, value in config.items():
        setattr(settings, name, value)
    import transformers

    wanted = getattr(transformers, auto) if auto is not None else _class(settings, "AutoModel")
    try:
        with _quiet():
            model, info = wanted.from_pretrained(
                Path(folder),
                config=settings,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=may_lack,
            )
    except Exception as problem:
        raise QATError(f"model folder {folder} cannot be loaded: {_sentence(problem)}") from None
    # a key that does not fit comes as a tuple with its shapes
    unfit = {key if isinstance(key, str) else key[0] for key in (*info["missing_keys"], *info["mismatched_keys"])}
    missing = sorted(key for key in unfit if not (may_lack and _is_head(model, key)))
    if missing:
        raise QATError(
            f"model folder {folder}: its weights lack {len(missing)} entries of {type(model).__name__}, {missing[0]!r} "
            "for one; they would start at random"
        )
    return model.eval()  # type: ignore[no-any-return]


def load_on_disk(folder: str | PathLike[str], scratch: str | PathLike[str], *, auto: str = "AutoModel") -> nn.Module:
    """The folder's model in fp32 with every parameter in a file of its own, mapped into memory: what is read can be
    dropped and what is written goes back to the disk, so that memory need not hold the model. In eval mode.

    Parameters come one by one from the checkpoint. The files are made in `scratch` and lose their names at once: the
    space, 4 bytes for each parameter, is free when the process ends. Raises QATError for weights that cannot be read,
    and for parameters that the checkpoint lacks under the model's own names.
    """
    from safetensors import safe_open

    config = read_config(folder)
    files = check_weights(folder)
    wanted = _class(config, auto)
    try:
        with _quiet(), _no_parameters():
            model: nn.Module = wanted._from_config(config, dtype=torch.float32)
    except Exception as problem:
        raise QATError(f"{Path(folder) / 'config.json'} describes no model: {_sentence(problem)}") from None
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (a handle, not a dict)
                module, _, key = name.rpartition(".")
                owner = dict(model.named_modules()).get(module)
                expected = None if owner is None else owner._parameters.get(key)
                if owner is None or expected is None:
                    continue
                found = opened.get_tensor(name)
                if found.shape != expected.shape:
                    raise QATError(f"{file}: {name} is {list(found.shape)}, the model's {list(expected.shape)}")
                owner._parameters[key] = nn.Parameter(_mapped(found, Path(scratch)), expected.requires_grad)
    model.tie_weights()  # type: ignore[operator]
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise QATError(
            f"model folder {folder}: its weights lack {len(missing)} entries of {type(model).__name__} by its own "
            f"names, {missing[0]!r} for one; load it into memory"
        )
    return model.eval()


def _mapped(tensor: Tensor, scratch: Path) -> Tensor:
    """A fp32 copy whose memory is a file without a name."""
    handle, path = tempfile.mkstemp(dir=scratch, prefix="weights-")
    os.close(handle)
    try:
        copied = torch.from_file(path, shared=True, size=max(1, tensor.numel()), dtype=torch.float32)
    finally:
        os.unlink(path)
    return copied[: tensor.numel()].view(tensor.shape).copy_(tensor)


@contextlib.contextmanager
def _no_parameters() -> Iterator[None]:
    """Inside, modules that are made have their parameters on the meta device, and their buffers as ever."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_tokenizer(folder: str | PathLike[str]) -> Any:
    """The folder's tokenizer. Raises QATError if it holds none."""
    place = Path(folder)
    if not has_tokenizer(place):
        raise QATError(
            f"{place} holds no tokenizer (tokenizer.json or the like); save_pretrained of a tokenizer writes it"
        )
    import transformers

    try:
        with _quiet():
            return transformers.AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as problem:
        raise QATError(f"the tokenizer in {place} cannot be loaded: {_sentence(problem)}") from None


def has_tokenizer(folder: str | PathLike[str]) -> bool:
    """Whether the folder holds a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in _TOKENIZERS)


def check_weights(folder: str | PathLike[str]) -> list[Path]:
    """The folder's files of weights. Raises QATError unless they are whole safetensors files; reads headers only."""
    from safetensors import safe_open

    place = Path(folder)
    index = place / "model.safetensors.index.json"
    if index.is_file():
        data = _json(index)
        found = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise QATError(f"{index} holds no weight_map of file names")
        files = sorted({place / name for name in found.values()})
    else:
        files = [place / "model.safetensors"]
        pickled = sorted(file.name for pattern in _PICKLED for file in place.glob(pattern))
        if not files[0].is_file() and pickled:
            raise QATError(
                f"model folder {place} holds its weights as a pickle only ({pickled[0]}), which can run code when "
                "it is read; save them as model.safetensors where you trust them (save_pretrained does)"
            )
    for file in files:
        if not file.is_file():
            raise QATError(f"the weights {file} do not exist")
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except Exception as problem:
            raise QATError(f"{file} is not a whole safetensors file: {_sentence(problem)}") from None
    return files


def _is_head(model: Any, key: str) -> bool:
    """Whether an entry lies outside of the encoder that was pretrained."""
    base = model.base_model_prefix
    return "pooler" in key.split(".") or (hasattr(model, base) and not key.startswith(f"{base}."))


def _class(config: Any, auto: str) -> Any:
    import transformers

    names = getattr(config, "architectures", None) or []
    own = getattr(transformers, names[0], None) if names else None
    return own if own is not None else getattr(transformers, auto)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise QATError(f"{file} cannot be read as JSON: {_sentence(problem)}") from None


def _sentence(problem: Exception) -> str:
    """The first line of a library's message."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0] if lines else type(problem).__name__
