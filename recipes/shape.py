"""Does plain data have the shape of the schema? Every key known, every value of the right type.

Returns sentences that start with the full key path. OmegaConf would find the same mistakes one at a time, without the
nearest name, and would turn the text "4" into a number on the way.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from qat.recipes.schema import Phase, Recipe, Rule, Slot

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
# Trainers take a number or text here; it is kept as text.
_NUMBER_OR_TEXT = ("train.devices",)
_PARTS = ("fold", "init", "batch_norm", "distill", "export", "train")
_SHOWN = 60
_LARGEST_NUMBER = 1 << 63


def show(value: object) -> str:
    """A value as a recipe would write it, shortened."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def plain_errors(data: object, path: str = "") -> list[str]:
    """Why this is not plain data that can be read without evaluating anything; empty means it is."""
    here = path or "the recipe"
    if isinstance(data, Mapping):
        found = []
        for key, value in data.items():
            if not isinstance(key, str):
                found.append(f"{here}: the key {show(key)} is not text; put it in quotes")
            elif "${" in key:
                found.append(f"{here}: the key {show(key)} holds an interpolation; write the name itself")
            else:
                found += plain_errors(value, join(path, key))
        return found
    if isinstance(data, list):
        return [error for index, value in enumerate(data) for error in plain_errors(value, f"{path}[{index}]")]
    if isinstance(data, str):
        if "${" in data:
            return [f"{here}: {show(data)} holds an interpolation; write the value itself, a recipe evaluates nothing"]
        if data == "???":
            return [f'{here}: "???" stands for a missing value; write the value']
        return []
    if isinstance(data, float) and not math.isfinite(data):
        return [f"{here}: {data} is not a finite number"]
    if isinstance(data, int) and abs(data) >= _LARGEST_NUMBER:
        return [f"{here}: the number is too large; allowed: 64 bits"]
    if data is None or isinstance(data, bool | int | float):
        return []
    return [f"{here}: {show(data)} is neither text, number, true, false, null, list nor mapping; put it in quotes"]


def shape_errors(data: object, kind: Any = Recipe, path: str = "") -> list[str]:
    """Where plain data departs from the type `kind`; empty means nowhere."""
    options = [option for option in get_args(kind) if option is not NoneType]
    if NoneType in get_args(kind):
        return [] if data is None else shape_errors(data, options[0], path)
    here = path or "the recipe"
    if dataclasses.is_dataclass(kind):
        return _dataclass_errors(data, kind, path)
    if get_origin(kind) is list:
        if not isinstance(data, list):
            return [f"{here}: {show(data)} is not a list; write [{'' if data is None else show(data)}]"]
        return [error for i, value in enumerate(data) for error in shape_errors(value, options[0], f"{path}[{i}]")]
    if get_origin(kind) is dict:
        if not isinstance(data, Mapping):
            return [f"{here}: {show(data)} is not a mapping of names"]
        return [error for key, value in data.items() for error in shape_errors(value, options[1], join(path, key))]
    if path in _NUMBER_OR_TEXT and type(data) is int:
        return []
    fits = type(data) is kind or (kind is float and type(data) is int)
    return [] if fits else [f"{here}: {show(data)} is not allowed; give {_WORDS[kind]}"]


def _dataclass_errors(data: object, kind: Any, path: str) -> list[str]:
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(data, Mapping):
        return [f"{path or 'the recipe'}: {show(data)} is not a mapping; allowed keys: {', '.join(names)}"]
    found = []
    for key, value in data.items():
        if key in names:
            found += shape_errors(value, hints[key], join(path, key))
        else:
            found.append(f"{join(path, key)}: unknown key{nearest(key, names)}; allowed: {', '.join(names)}")
    return found


def class_errors(recipe: Recipe) -> list[tuple[str, str]]:
    """Mappings where a recipe that was put together by hand needs the classes of the schema."""
    wanted: list[tuple[str, object, type]] = [
        *((join("rules", name), rule, Rule) for name, rule in recipe.rules.items()),
        *((join("phases", name), phase, Phase) for name, phase in recipe.phases.items()),
        *((key, getattr(recipe, key), type(getattr(Recipe(), key))) for key in _PARTS),
    ]
    for name, rule in recipe.rules.items():
        for key in ("weight", "input", "output", "cache"):
            slot = getattr(rule, key, None)
            if slot is not None:
                wanted.append((join(join("rules", name), key), slot, Slot))
    return [
        (path, f"a {type(value).__name__} is not a {kind.__name__}; use qat.recipes.from_dict for plain data")
        for path, value, kind in wanted
        if not isinstance(value, kind)
    ]
