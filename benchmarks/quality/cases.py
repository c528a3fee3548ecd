"""Every case of the suite; a further one is a file and a line here."""

from __future__ import annotations

from benchmarks.quality.digits import B2
from benchmarks.quality.grids import GRIDS
from benchmarks.quality.methods import Case
from benchmarks.quality.sentences import B3
from benchmarks.quality.weights import B1

CASES: dict[str, Case] = {"B1": B1, "B1 grid": GRIDS, "B2": B2, "B3": B3}
