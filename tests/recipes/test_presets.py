"""Every preset loads, explains itself and survives the way to plain data and back."""

import json
from pathlib import Path

import pytest
import yaml

from qat.errors import RecipeError
from qat.recipes import check, from_dict, load_recipe, preset_names, preset_text, to_dict
from qat.recipes.checks import format_names

PRESETS = sorted(Path(__file__).parents[2].joinpath("recipes").rglob("*.yaml"))
NAMES = [path.stem for path in PRESETS]


def test_all_presets_are_found() -> None:
    assert len(PRESETS) >= 6
    assert preset_names() == NAMES
    assert {"w8a8", "w4a16_g128", "w4_gguf_q4_0", "w2_g64", "cnn_w4a4", "mixed_w8_w4"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_returns_from_plain_data(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert check(recipe) == []
    assert recipe.train.out == f"runs/{name}"
    data = to_dict(recipe)
    assert from_dict(data) == recipe
    assert from_dict(json.loads(json.dumps(data))) == recipe
    assert list(from_dict(data).rules) == list(yaml.safe_load(preset_text(name))["rules"])


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_as_a_file_it_is_the_same(path: Path) -> None:
    assert load_recipe(path) == load_recipe(str(path)) == load_recipe(path.stem)


@pytest.mark.parametrize("name", NAMES)
def test_header_and_description_say_what_it_is_for(name: str) -> None:
    text = preset_text(name)
    header = text[: text.index("\nname:")]
    assert all(line.startswith("#") for line in header.strip().splitlines())
    assert "# Target " in header and "# Numbers " in header
    assert load_recipe(name).description


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_explained_once(name: str) -> None:
    """The first `key: value` of each key below a section has a comment above it."""
    explained: set[str] = {"name", "description"}
    lines = preset_text(name).splitlines()
    for number, line in enumerate(lines):
        key, _, value = line.strip().partition(":")
        if not value or line.strip().startswith("#") or key in explained:
            continue
        explained.add(key)
        above = lines[number - 1].strip()
        self_evident = key in ("bits", "temperature", "task", "quantize", "input", "enabled", "targets", "keep_float")
        assert above.startswith("#") or self_evident, f"{name}:{number + 1}: {line.strip()} has no comment"


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_formats_that_exist(name: str) -> None:
    assert set(load_recipe(name).export.targets) <= set(format_names())


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r'there is no recipe "w8a9"; did you mean "w8a8"\?.*presets: cnn_w4a4'):
        load_recipe("w8a9")
