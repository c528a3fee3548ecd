"""`Recipe` -> the YAML of a file that says the same."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from qat.recipes.schema import Recipe, Slot

# Of a slot these are said even where they are the defaults: without them nobody would know what it holds.
_ALWAYS = ("bits", "granularity", "scale", "quantizer")
_WIDTH = 120


def recipe_text(recipe: Recipe) -> str:
    """What differs from the defaults, in the order of the schema; `load_recipe` reads an equal recipe from it."""
    data = _said(recipe)
    if recipe.train.out == f"runs/{recipe.name}":
        # it follows the name
        del data["train"]["out"]
    data = {key: value for key, value in data.items() if value != {}}
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=_WIDTH, default_flow_style=None))


def _said(value: Any) -> Any:
    """Plain data; of a dataclass the fields that differ from the defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        usual, always = type(value)(), _ALWAYS if isinstance(value, Slot) else ()
        pairs = [(field.name, getattr(value, field.name)) for field in fields(value)]
        return {name: _said(own) for name, own in pairs if name in always or own != getattr(usual, name)}
    if isinstance(value, dict):
        return {key: _said(own) for key, own in value.items()}
    return [_said(own) for own in value] if isinstance(value, list) else value
