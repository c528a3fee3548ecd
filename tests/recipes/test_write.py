"""A recipe written to a file is read as it was."""

from pathlib import Path

import pytest

from qat.recipes import from_dict, load_recipe, preset_names
from qat.recipes.write import recipe_text


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_the_way_to_a_file(name: str, tmp_path: Path) -> None:
    """Mutation: fields left out that equal those of another rule."""
    file = tmp_path / "other.yaml"
    file.write_text(recipe_text(load_recipe(name)))
    assert load_recipe(file) == load_recipe(name)


def test_what_is_written() -> None:
    recipe = from_dict(
        {
            "name": "x",
            "rules": {
                "linears": {"types": ["Linear"], "weight": {"bits": 8}},
                "few": {"match": ["a.0", "a.1"], "weight": {"bits": 3, "quantizer": "lsq"}},
            },
            "phases": {"warm": {"steps": 10, "quantize": False}, "qat": {}},
            "train": {"lr": 1e-5, "data": ["a b.txt"]},
        }
    )
    assert recipe_text(recipe).splitlines() == [
        "name: x",
        "rules:",
        "  linears:",
        "    types: [Linear]",
        "    weight: {bits: 8, granularity: channel, scale: portable, quantizer: absmax}",
        "  few:",
        "    match: [a.0, a.1]",
        "    weight: {bits: 3, granularity: channel, scale: portable, quantizer: lsq}",
        "phases:",
        "  warm: {steps: 10, quantize: false}",
        "  qat: {}",
        "train:",
        "  data: [a b.txt]",
    ]


def test_an_out_folder_of_its_own_is_written(tmp_path: Path) -> None:
    own = load_recipe("w4_exl2", ["train.out=here", "name=y"])
    text = recipe_text(own)
    assert "out: here" in text
    file = tmp_path / "z.yaml"
    file.write_text(text)
    assert load_recipe(file) == own
