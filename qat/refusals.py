"""What stopped a command, in one sentence."""

from __future__ import annotations

from qat.errors import QATError

# Modules that come with an extra: what is missing says what to install.
_EXTRAS = {
    "compressed_tensors": "compressed-tensors",
    "datasets": "hf",
    "executorch": "executorch",
    "gguf": "gguf",
    "gptqmodel": "gptq",
    "jinja2": "report",
    "matplotlib": "report",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "optimum": "gptq",
    "PIL": "vision",
    "pyarrow": "hf",
    "scipy": "allocate",
    "sentence_transformers": "sentence",
    "sklearn": "vision",
    "tokenizers": "hf",
    "transformers": "hf",
    "wandb": "wandb",
    "xllamacpp": "gguf",
}


def explained(problem: Exception, debug: str) -> tuple[str, int]:
    """(sentence, exit code): 2 for what a user can put right, 1 for a mistake of ours. debug: the variable that shows
    where."""
    if isinstance(problem, QATError):
        return str(problem), 2
    if hasattr(problem, "format_message"):  # typer's usage errors
        return f"{problem.format_message()} (`qat --help` shows the commands and their arguments)", 2
    if isinstance(problem, ModuleNotFoundError) and (problem.name or "").partition(".")[0] in _EXTRAS:
        package = (problem.name or "").partition(".")[0]
        return f"this needs {package}; install it with: pip install 'lightning-qat[{_EXTRAS[package]}]'", 2
    if isinstance(problem, OSError):
        place = ": ".join(str(part) for part in (problem.filename, problem.strerror) if part)
        return place or str(problem) or type(problem).__name__, 2
    what = f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
    return f"unexpected {what}; the same command as `qat --debug ...` (or with {debug}=1) shows where", 1
