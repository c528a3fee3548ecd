"""Name or path, and overrides -> `Recipe`. Reading one executes nothing.

YAML is read by a safe loader without tags, anchors, aliases and repeated keys; interpolations (`${...}`) are refused
whole, because OmegaConf's resolvers could put an environment variable into a run's files. Then: overrides, null rules
removed, every key and type checked, merged into the structured schema, every combination checked.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.errors import RecipeError
from qat.recipes.checks import check
from qat.recipes.schema import Recipe
from qat.recipes.shape import nearest, plain_errors, shape_errors, show

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

# The largest preset has a few kilobytes; a megabyte is a wrong file.
_LARGEST_FILE = 1 << 20
# Mappings of names, in which null removes an entry and an override has to name an existing one.
_NAMED = ("rules", "phases")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's plain data only."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError(f"anchors and aliases are not allowed{event.start_mark}; write the text out")
        if getattr(event, "tag", None):
            raise yaml.YAMLError(f'the tag "{event.tag}" is not allowed{event.start_mark}; leave it out')
        return cast("yaml.Node | None", super().compose_node(parent, index))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f'the key "{key.value}" is there twice{key.start_mark}; leave one out')
                seen.add(key.value)
        return cast("dict[Any, Any]", super().construct_mapping(node, deep=deep))


# YAML 1.1 takes 1e-5 for text. A subclass's resolvers are its own: yaml.SafeLoader stays as it is.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def preset_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(entry.name[: -len(".yaml")] for entry in _presets().iterdir() if entry.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The YAML of a preset, comments included; raises RecipeError for an unknown name."""
    if name not in preset_names():
        raise RecipeError(
            f"there is no recipe {show(name)}{nearest(name, preset_names())}; presets: {', '.join(preset_names())}; "
            "a file of your own ends in .yaml"
        )
    return _presets().joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The preset of that name, or the file at that path, with overrides like `rules.linears.weight.bits=3`.

    Raises RecipeError with every mistake, each with its full key path.
    """
    name = os.fspath(name_or_path)
    if name.endswith((".yaml", ".yml")) or os.sep in name or isinstance(name_or_path, os.PathLike):
        text = _read(Path(name))
    else:
        text = preset_text(name)
    data = _parse(text, f'recipe "{name}"')
    if not isinstance(data, dict):
        raise RecipeError(f'recipe "{name}": the file holds {show(data)}; a recipe is a mapping, like name: x')
    # The defaults that an override may address.
    data.setdefault("name", Path(name).stem)
    data.setdefault("phases", {"qat": {}})
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _override(data, override)
    return _build(data, f'recipe "{name}"')


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """The inverse of `to_dict`; keys may be left out. Raises RecipeError like `load_recipe`."""
    if isinstance(data, DictConfig):
        data = cast("Mapping[str, Any]", OmegaConf.to_container(data, resolve=False))
    if not isinstance(data, Mapping):
        raise RecipeError(f"recipe: {show(data)} is not a mapping, like {{'name': 'x'}}")
    try:
        return _build(_copied(data), "recipe")
    except RecursionError:
        raise RecipeError("recipe: nested too deeply; a recipe has at most five levels") from None


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data: text, numbers, true, false, null, lists and mappings."""
    data = dataclasses.asdict(recipe)
    if recipe.fold.method == "none":
        # records of versions that did not know the word stay the same
        del data["fold"]
    for word in ("fold", "pairs"):
        if not data["batch_norm"][word]:
            del data["batch_norm"][word]
    for word in ("imatrix", "file"):
        if data["init"][word] is None:
            del data["init"][word]
    if not recipe.train.offload:
        del data["train"]["offload"]
    for rule in data["rules"].values():
        # records of versions that did not know these words stay the same
        if rule["backward"] is None:
            del rule["backward"]
        for word in ("output", "cache"):
            if rule[word] is None:
                del rule[word]
        for slot in (rule["weight"], rule["input"], rule.get("output"), rule.get("cache")):
            if slot is not None and not slot["signed_scale"]:
                del slot["signed_scale"]
            if slot is not None and slot["percentile"] is None:
                del slot["percentile"]
            if slot is not None and not slot["desc_act"]:
                del slot["desc_act"]
    for phase in data["phases"].values():
        for word, usual in (("train", "all"), ("freeze_batch_norm", False), ("freeze_oscillating", 0), ("dampen", 0)):
            if phase[word] == usual:
                del phase[word]
    return data


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str]) -> Recipe:
    """Whatever a user may hand over as a recipe, checked: a preset's name, a file, plain data or a Recipe."""
    if isinstance(recipe, str | os.PathLike):
        return load_recipe(recipe)
    return from_dict(to_dict(recipe) if isinstance(recipe, Recipe) else recipe)


def _presets() -> Traversable:
    return files("qat.recipes").joinpath("presets")


def _read(path: Path) -> str:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        presets = ", ".join(preset_names())
        raise RecipeError(f'recipe "{path}": the file {what}; presets: {presets}')
    if path.stat().st_size > _LARGEST_FILE:
        raise RecipeError(f'recipe "{path}": the file is larger than 1 MiB, so it is not a recipe')
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise RecipeError(f'recipe "{path}": the file cannot be read as UTF-8 text: {problem}') from None


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError) as problem:
        raise RecipeError(f"{where}: not YAML that a recipe may hold: {' '.join(str(problem).split())}") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply; a recipe has at most five levels") from None


def _override(data: dict[str, Any], override: str) -> None:
    """Set one value of `data`; mappings on the way are made where a key is missing or null."""
    key, equals, text = override.partition("=")
    key = key.strip()
    where = f"override {show(override)}"
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{where}: not of the form key.of.the.setting=value, like rules.linears.weight.bits=3")
    if not text.strip():
        raise RecipeError(f"{where}: the value is missing; write {key}=null for none")
    value = _parse(text, where)
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        if node.get(part) is None:
            if depth == 1 and parents[0] in _NAMED:
                known = [name for name, entry in node.items() if entry is not None]
                raise RecipeError(
                    f"{'.'.join(parents[:2])}: {where} names no entry of {parents[0]}{nearest(part, known)}; "
                    f"allowed: {', '.join(known)}; a new one is given whole, like {parents[0]}.{part}={{...}}"
                )
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            path = ".".join(parents[: depth + 1])
            raise RecipeError(f"{key}: {path} is {show(node)}, without keys; override {path} as a whole")
    node[last] = value


def _copied(data: object) -> Any:
    """Mappings and sequences as dict and list, so that the caller's own stay untouched."""
    if isinstance(data, Mapping):
        return {key: _copied(value) for key, value in data.items()}
    return [_copied(value) for value in data] if isinstance(data, list | tuple) else data


def _build(data: dict[str, Any], where: str) -> Recipe:
    errors = plain_errors(data)
    if not errors:
        for key in _NAMED:
            if isinstance(data.get(key), dict):
                data[key] = {name: entry for name, entry in data[key].items() if entry is not None}
        errors = shape_errors(data)
    if errors:
        raise RecipeError(f"{where}: " + "; ".join(errors))
    # Phases that are given replace the default one instead of following it.
    base = Recipe(phases={}) if "phases" in data else Recipe()
    try:
        recipe = cast(Recipe, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base), data)))
    except OmegaConfBaseException as problem:
        raise RecipeError(f"{where}: {getattr(problem, 'full_key', '')}: {' '.join(str(problem).split())}") from None
    if recipe.train.out is None:
        recipe.train.out = f"runs/{recipe.name}"
    errors = check(recipe)
    if errors:
        raise RecipeError(f"{where}: " + "; ".join(errors))
    return recipe
