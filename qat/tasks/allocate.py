"""`run(recipe, ...)`: what `qat allocate` does. Model and data by `train.task`, then `qat.allocate`, then a file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

import qat
from qat.allocate import Allocation, allocate
from qat.errors import QATError
from qat.hf import trained_dtype
from qat.recipes.schema import Recipe
from qat.recipes.write import recipe_text
from qat.report import write_text
from qat.tasks.train import build

# Devices on which a recipe's `train.accelerator` may run, of those that are used here.
_GPU = ("auto", "gpu", "cuda")


def run(
    recipe: Recipe,
    bits: float,
    out: Path,
    *,
    choices: Sequence[int] = (),
    rules: Sequence[str] = (),
    batches: int = 4,
    overwrite: bool = False,
) -> Allocation:
    """Choose bits for the layers of the recipe's model on its first training batches, and write a recipe that says so.

    Raises QATError, with nothing written, for what cannot be used.
    """
    refuse_file(out, overwrite)
    if batches < 1:
        raise QATError(f"{batches} batches measure nothing; allowed: 1 or more")
    # before model and data are loaded
    from scipy.optimize import milp  # noqa: F401

    cuda = recipe.train.accelerator in _GPU and torch.cuda.is_available()
    if recipe.train.accelerator in ("gpu", "cuda") and not cuda:
        raise QATError(f"train.accelerator={recipe.train.accelerator}: torch finds no CUDA here; use auto or cpu")
    module, data, tokenizer = build(recipe)
    device = torch.device("cuda" if cuda else "cpu")
    dtype = trained_dtype(recipe.train.precision)
    module.to(device)
    # what is no child of the module follows it
    module.on_fit_start()

    def first(count: int) -> list[Any]:
        kept = next(module.parameters()).dtype
        return [tree_map(_on(device, kept), batch) for batch in itertools.islice(data.train_dataloader(), count)]

    def forward(model: nn.Module, batch: Any) -> Any:
        return module.loss(batch)

    folded = recipe.fold.method
    qat.fold.apply(
        module, recipe, None if folded in ("none", "rotate") else first(recipe.fold.batches), forward=forward
    )
    # as the trainer casts it: formats store scales in the model's dtype
    module.to(dtype)
    given = first(batches)
    found = allocate(
        module,
        recipe,
        given,
        bits,
        choices=choices,
        rules=rules,
        loss=loss_of(recipe),
        forward=forward,
        tokenizer=tokenizer,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, header(recipe, found, bits, len(given)) + recipe_text(found.recipe))
    return found


def refuse_file(out: Path, overwrite: bool) -> None:
    """Raises QATError if a recipe cannot be written to `out`."""
    if out.suffix not in (".yaml", ".yml"):
        raise QATError(f"--out {out}: a recipe's file ends in .yaml; give it that ending")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise QATError(f"--out {out}: {folder} is a file, not a folder; name another place")
    if out.is_dir():
        raise QATError(f"--out {out} is a folder; name a file in it")
    if out.exists() and not overwrite:
        raise QATError(f"--out {out} exists; name another file, or --overwrite to replace it")


def header(recipe: Recipe, found: Allocation, bits: float, batches: int) -> str:
    """Comments: where the bits of the layers come from."""
    reached = ", ".join(f"{name} {value:.4f}" for name, value in found.reached.items())
    seen = f"on {batches} batches of {recipe.train.batch_size}"
    return (
        f"# Bits for each layer, chosen by `qat allocate {recipe.name} --bits {bits:g}` (qat {qat.__version__}).\n"
        f"# Stored bits per weight, scales included: {reached}.\n"
        f"# Measure: {loss_of(recipe)} of the outputs with one layer quantized, {seen}; its sum over the layers: "
        f"{found.loss:.4g}.\n\n"
    )


def loss_of(recipe: Recipe) -> str:
    """How outputs are compared: as in distillation; hidden states, which have no probabilities, by their error."""
    return "mse" if recipe.train.task == "sentence_embedding" else recipe.distill.loss


def _on(device: torch.device, dtype: torch.dtype) -> Any:
    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return moved
