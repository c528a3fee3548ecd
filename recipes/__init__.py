"""Recipes: which layer gets which numbers, from which step on, with what loss and for which file formats.

Pure data and pure checks; torch is not needed to read a recipe, and reading one executes nothing.
"""

from qat.recipes.checks import check
from qat.recipes.load import as_recipe, from_dict, load_recipe, preset_names, preset_text, to_dict
from qat.recipes.schema import Distill, Export, Fold, Network, Phase, Recipe, Rule, Slot, Train

__all__ = [
    "Distill",
    "Export",
    "Fold",
    "Network",
    "Phase",
    "Recipe",
    "Rule",
    "Slot",
    "Train",
    "as_recipe",
    "check",
    "from_dict",
    "load_recipe",
    "preset_names",
    "preset_text",
    "to_dict",
]
