"""A schedule is a pure function of recipe and step: a table says it all."""

from __future__ import annotations

from typing import Any

import pytest

from qat.schedule import Schedule, State

PHASES = {
    "nothing": {"steps": 0, "quantize": False},
    "float": {"steps": 3, "quantize": False},
    "eight": {"steps": 2, "bits": {"all": 8}},
    "ramp": {"steps": 5, "ramp": 4},
    "same": {"steps": 2, "bits": {"all": 4}},
    "frozen": {"steps": -1, "freeze_scales": True},
}
TABLE = [
    (0, State("float", False, 0.0)),
    (2, State("float", False, 0.0)),
    (3, State("eight", True, 1.0, False, {"all": 8})),
    (4, State("eight", True, 1.0, False, {"all": 8})),
    (5, State("ramp", True, 0.2)),
    (8, State("ramp", True, 0.8)),
    (9, State("ramp", True, 1.0)),
    (10, State("same", True, 1.0)),
    (12, State("frozen", True, 1.0, True)),
    (10**9, State("frozen", True, 1.0, True)),
]


@pytest.mark.parametrize(("step", "state"), TABLE)
def test_at(step: int, state: State, recipe: Any) -> None:
    schedule = Schedule(recipe(phases=PHASES))
    assert schedule.at(step) == state == Schedule(recipe(phases=PHASES)).at(step)


def test_final_is_what_an_export_packs(recipe: Any) -> None:
    schedule = Schedule(recipe(phases=PHASES))
    assert [step for step in range(14) if schedule.at(step).final] == [9, 10, 11, 12, 13]
    assert schedule.first_final_step() == 9
    assert Schedule(recipe()).first_final_step() == 0
    never = {"qat": {"steps": 2}, "low": {"bits": {"all": 2}}}
    assert Schedule(recipe(phases=never)).first_final_step() is None
    ends_in_float = {"qat": {"steps": 4}, "off": {"quantize": False}}
    assert Schedule(recipe(phases=ends_in_float)).first_final_step() is None


def test_a_last_phase_of_no_steps_before_it(recipe: Any) -> None:
    schedule = Schedule(recipe(phases={"off": {"steps": 0, "quantize": False}, "qat": {"ramp": 1}}))
    assert [schedule.at(step).strength for step in range(3)] == [0.5, 1.0, 1.0]
    assert schedule.first_final_step() == 1
