"""Changes of a float model that leave its function as it is and make it easier to quantize.

    qat.fold.rotate(model)                      random Hadamard matrices on the residual stream and the values
    qat.fold.smooth(model, recipe, batches)     SmoothQuant: the range of inputs goes over to the weights after them
    qat.fold.awq(model, recipe, batches)        AWQ: powers of the inputs' mean size, the ones that quantize best
    qat.fold.apply(model, recipe, batches)      the one that the recipe names

They come before `qat.prepare` and add nothing to the network, so any consumer of the exported files can run it. What
was done is noted on the model, in checkpoints, and never done twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any

from torch import nn

from qat.errors import QATError
from qat.fold.rotate import restructure, rotate
from qat.fold.scaling import awq, smooth
from qat.init.walk import Forward
from qat.recipes import as_recipe
from qat.recipes.schema import Recipe
from qat.state import folded, same_fold

__all__ = ["apply", "awq", "folded", "is_folded", "restructure", "rotate", "smooth"]


def is_folded(model: nn.Module, recipe: Recipe) -> bool:
    """Whether `recipe.fold` was done to the model; True if it asks for nothing."""
    method = recipe.fold.method
    return method == "none" or any(same_fold(entry, recipe.fold.__dict__) for entry in folded(model))


def apply(
    model: nn.Module,
    recipe: Recipe | str | PathLike[str],
    batches: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
) -> None:
    """Do what `recipe.fold` says, in place; nothing if it was done before.

    batches    inputs of the model, for smooth and awq; all that are given are looked at
    forward    forward(model, batch) instead of the usual call

    Raises QATError as the methods do, and for smooth and awq without batches.
    """
    recipe = as_recipe(recipe)
    fold = recipe.fold
    if is_folded(model, recipe):
        return
    if fold.method == "rotate":
        rotate(model, fold.seed, network=fold.network)
        return
    if batches is None:
        raise QATError(f"fold.method={fold.method} looks at what layers get; give qat.fold.apply batches of inputs")
    if fold.method == "smooth":
        smooth(model, recipe, batches, fold.alpha, network=fold.network, forward=forward)
    else:
        awq(model, recipe, batches, network=fold.network, forward=forward)
