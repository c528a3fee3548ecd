"""llama.cpp on exported files: tokens, log-probabilities of every position, greedy text.

Calls the C interface of llama.cpp (`llama.h`) in the library that the package `xllamacpp` carries. Its Python interface
answers one position per request; the C one hands out the logits of all positions of a sequence at once, about ten
thousand positions a second for a model of two million parameters.

Parameter structs go through as opaque bytes: only the first four numbers of `llama_context_params` (context, batch,
micro-batch, sequences), unchanged since 2023, are read and set, and they are checked before use.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qat.errors import ExportError

_POINTER = ctypes.c_void_p
_INT = ctypes.c_int32
# n_ctx, n_batch, n_ubatch, n_seq_max of llama_context_default_params
_DEFAULTS = (512, 2048, 512, 1)
_MICRO_BATCH = 512


class _Opaque(ctypes.Structure):
    """Larger than any parameter struct of llama.h: the callee reads and writes its own part at the front."""

    _fields_ = [("bytes", ctypes.c_uint8 * 1024)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", _INT),
        ("token", _POINTER),
        ("embd", _POINTER),
        ("pos", _POINTER),
        ("n_seq_id", _POINTER),
        ("seq_id", _POINTER),
        ("logits", _POINTER),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Opaque, []),
    "llama_context_default_params": (_Opaque, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, _Opaque]),
    "llama_init_from_model": (_POINTER, [_POINTER, _Opaque]),
    "llama_n_ctx": (ctypes.c_uint32, [_POINTER]),
    "llama_set_n_threads": (None, [_POINTER, _INT, _INT]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_is_eog": (ctypes.c_bool, [_POINTER, _INT]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, ctypes.c_bool]),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_get_logits": (_POINTER, [_POINTER]),
    "llama_tokenize": (
        _INT,
        [_POINTER, ctypes.c_char_p, _INT, ctypes.POINTER(_INT), _INT, ctypes.c_bool, ctypes.c_bool],
    ),
    "llama_free": (None, [_POINTER]),
    "llama_model_free": (None, [_POINTER]),
}


class _Library:
    """llama.h, loaded once; keeps the lines that llama.cpp logs so that a refusal can be explained."""

    def __init__(self) -> None:
        try:
            import xllamacpp.xllamacpp as extension
        except ImportError:
            raise ExportError("llama.cpp is not installed; pip install xllamacpp") from None
        self.lines: list[str] = []
        self._log = _LOG(self._keep)
        try:
            library = ctypes.CDLL(extension.__file__)
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        except (OSError, AttributeError) as problem:
            raise ExportError(f"this version of xllamacpp does not hand out llama.h ({problem}); update it") from None
        self.llama_log_set(self._log, None)
        self.llama_backend_init()
        if struct.unpack_from("4I", bytes(self.llama_context_default_params().bytes)) != _DEFAULTS:
            raise ExportError("this version of xllamacpp has another llama_context_params; please report its version")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def _keep(self, level: int, text: bytes | None, _: Any) -> None:
        if level >= 3 and text:
            self.lines = [*self.lines[-20:], text.decode(errors="replace").strip()]


_library: _Library | None = None


def installed() -> bool:
    """Whether llama.cpp can be called here."""
    from importlib.util import find_spec

    return find_spec("xllamacpp") is not None


def _lib() -> _Library:
    global _library
    if _library is None:
        _library = _Library()
    return _library


class LlamaCpp:
    """One GGUF file in llama.cpp, on the CPU; close it or use it in a `with`.

    context: the longest sequence it will see. Raises ExportError if llama.cpp refuses the file, with its own words.
    """

    def __init__(self, path: str | PathLike[str], context: int = 512, threads: int | None = None) -> None:
        self._model = self._context = None
        self._lib = lib = _lib()
        if not Path(path).is_file():
            raise ExportError(f"there is no file {path}")
        lib.lines = []
        self._model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        if not self._model:
            raise ExportError(f"llama.cpp does not load {path}: {'; '.join(lib.lines[-3:]) or 'no reason given'}")
        parameters = lib.llama_context_default_params()
        wanted = struct.pack("4I", context, context, min(context, _MICRO_BATCH), 1)
        ctypes.memmove(ctypes.byref(parameters), wanted, len(wanted))
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ExportError(f"llama.cpp makes no context of {context} tokens for {path}: {'; '.join(lib.lines[-3:])}")
        count = threads or min(os.cpu_count() or 1, 8)
        lib.llama_set_n_threads(self._context, count, count)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.context = context
        self.vocab_size: int = lib.llama_vocab_n_tokens(self._vocab)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; `special` adds what the file says about start and end, and parses special tokens."""
        data = text.encode()
        room = len(data) + 16
        ids = (_INT * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, special, special)
        if count < 0:
            raise ExportError(f"llama.cpp cannot tokenize {text[:40]!r}")
        return list(ids[:count])

    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Token ids [T] -> logits fp32 [T, V], a copy; every call starts from an empty memory."""
        tokens = torch.as_tensor(ids, dtype=torch.int32).contiguous()
        count = tokens.numel()
        if not 0 < count <= self.context:
            raise ExportError(f"a sequence of {count} tokens does not fit the context of {self.context}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
            reach = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ExportError(f"token ids reach from {reach}; the file has {self.vocab_size} tokens")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        wanted = torch.ones(count, dtype=torch.int8)
        batch = _Batch(count, tokens.data_ptr(), None, None, None, None, wanted.data_ptr())
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise ExportError(f"llama.cpp cannot evaluate {count} tokens (status {status})")
        found = torch.empty(count, self.vocab_size)
        ctypes.memmove(found.data_ptr(), self._lib.llama_get_logits(self._context), found.numel() * 4)
        return found

    def log_probs(self, ids: Tensor) -> Iterator[Tensor]:
        """Token ids [B, T] -> B times log-probabilities fp32 [T, V], one sequence in memory at a time."""
        for row in ids:
            yield self.logits(row).log_softmax(-1)

    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Up to `tokens` greedy tokens after `ids`, ending before an end-of-text token."""
        text = list(ids)
        for _ in range(min(tokens, self.context - len(text))):
            best = int(self.logits(text)[-1].argmax())
            if self._lib.llama_vocab_is_eog(self._vocab, best):
                break
            text.append(best)
        return text[len(ids) :]

    def close(self) -> None:
        """Free the model; the object is unusable afterwards."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
