"""Three ways to a k-quant file, in tiny: the files hold what their names say."""

import json
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp", reason="llama.cpp, which the benchmark runs, comes with xllamacpp")


@pytest.mark.slow
@pytest.mark.consumer
def test_each_file_is_another_model(tmp_path: Path) -> None:
    """Mutation: `rewrite` leaves the file as it is (then all three tools have one figure)."""
    from benchmarks import kquants

    out = tmp_path / "kquants.json"
    assert kquants.main(["--seeds", "0", "--fast", "--out", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    for kind in kquants.TYPES:
        found = {row["tool"]: row["value"] for row in rows if row["suite"] == kquants.SUITE and row["case"] == kind}
        assert set(found) == {kquants.OWN, kquants.AGAIN, kquants.OURS}
        assert len(set(found.values())) == 3 and all(0.0 < value < 0.1 for value in found.values())
    goals = [row for row in rows if row["goal"] is not None]
    assert len(goals) == 2 * len(kquants.TYPES)
