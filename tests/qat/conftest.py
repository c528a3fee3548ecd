"""Small recipes for the tests of the core; makes `folded_nets` importable."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qat.recipes import Recipe, from_dict

sys.path.insert(0, str(Path(__file__).parent))

Build = Callable[..., Recipe]


@pytest.fixture(scope="session")
def recipe() -> Build:
    """`recipe(types=[...], input={...}, phases={...}, rules={...}, **weight)`: one rule, or `rules` as given."""

    def build(
        types: list[str] | None = None,
        input: dict[str, Any] | None = None,
        phases: dict[str, Any] | None = None,
        rules: dict[str, Any] | None = None,
        strict: bool = False,
        **weight: Any,
    ) -> Recipe:
        slot = {"bits": 4, "granularity": "channel", "quantizer": "lsq", **weight}
        one = {"all": {"types": types or [], "weight": slot, "input": input}}
        data: dict[str, Any] = {"name": "small", "strict": strict, "rules": rules or one}
        return from_dict({**data, "phases": phases} if phases else data)

    return build
