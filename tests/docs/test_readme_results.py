"""README says what the results file says, and the generator puts it there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("readme_results", ROOT / "docs" / "readme_results.py")
assert SPEC is not None and SPEC.loader is not None
generator = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generator)

# Made up; only ever written to a temporary folder.
RESULTS = {
    "environment": {"torch": "0.0.0", "cores": 2, "packages": {"left": "out"}},
    "rows": [
        {"suite": "demo", "case": "4 bits", "tool": "rtn", "metric": "kl", "value": 0.25, "better": "lower"},
        {"suite": "demo", "case": "4 bits", "tool": "rtn", "metric": "bytes", "value": 12345, "better": "lower"},
        {"suite": "demo", "case": "4 bits", "tool": "qat", "metric": "kl", "value": 0.123456, "better": "lower"},
        {"suite": "demo", "case": "2 bits", "tool": "qat", "metric": "accuracy", "value": 0.5, "better": "higher"},
        {"suite": "demo", "case": "2 bits", "tool": "qat", "metric": "note", "value": "text", "better": ""},
        {"suite": "layers", "case": "x", "tool": "qat", "metric": "kl", "value": 9.0, "better": "lower"},
    ],
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(generator, "README", tmp_path / "README.md")
    monkeypatch.setattr(generator, "RESULTS", tmp_path / "demo.json")
    monkeypatch.setattr(generator, "PICTURE", tmp_path / "results.svg")
    monkeypatch.setattr(generator, "SPEED", tmp_path / "cpu-*.json")
    monkeypatch.setattr(generator, "COST", tmp_path / "cost.md")
    monkeypatch.setattr(generator, "BACKWARD", tmp_path / "backward.json")
    monkeypatch.setattr(generator, "QUALITY_PAGE", tmp_path / "quality.md")
    monkeypatch.setattr(generator, "QUALITY", tmp_path / "quality.json")
    monkeypatch.setattr(generator, "TRIALS_PAGE", tmp_path / "experiments.md")
    monkeypatch.setattr(generator, "TRIALS", tmp_path / "trials.json")
    monkeypatch.setattr(generator, "GGUF_PAGE", tmp_path / "gguf.md")
    monkeypatch.setattr(generator, "KQUANTS", tmp_path / "kquants.json")
    (tmp_path / "gguf.md").write_text(f"d\n{generator.KQUANTS_START}\nold 4\n{generator.KQUANTS_END}\nw\n")
    second = f"{generator.SPEED_START}\nold 8\n{generator.SPEED_END}"
    third = f"{generator.BACKWARD_START}\nold 9\n{generator.BACKWARD_END}"
    (tmp_path / "cost.md").write_text(f"a\n{second}\n{third}\nz\n")
    (tmp_path / "quality.md").write_text(f"b\n{generator.QUALITY_START}\nold 6\n{generator.QUALITY_END}\ny\n")
    (tmp_path / "experiments.md").write_text(f"c\n{generator.TRIALS_START}\nold 5\n{generator.TRIALS_END}\nx\n")
    (tmp_path / "README.md").write_text(f"before\n{generator.START}\nold 7\n{generator.END}\n{second}\nafter\n")
    (tmp_path / "demo.json").write_text(json.dumps(RESULTS))
    return tmp_path


def test_readme_is_what_the_results_file_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == generator.replaced(readme, generator.block(generator.RESULTS)), "run `make docs`"
    second = generator.speed_block(generator.SPEED)
    assert readme == generator.replaced(readme, second, generator.SPEED_START, generator.SPEED_END), "run `make docs`"
    cost, details = generator.COST.read_text(encoding="utf-8"), generator.speed_details(generator.SPEED)
    assert cost == generator.replaced(cost, details, generator.SPEED_START, generator.SPEED_END), "run `make docs`"
    third = generator.backward_block(generator.BACKWARD)
    assert cost == generator.replaced(cost, third, generator.BACKWARD_START, generator.BACKWARD_END), "run `make docs`"
    quality, fourth = generator.QUALITY_PAGE.read_text(encoding="utf-8"), generator.quality_block(generator.QUALITY)
    marks = generator.QUALITY_START, generator.QUALITY_END
    assert quality == generator.replaced(quality, fourth, *marks), "run `make docs`"
    trials, fifth = generator.TRIALS_PAGE.read_text(encoding="utf-8"), generator.trials_block(generator.TRIALS)
    marks = generator.TRIALS_START, generator.TRIALS_END
    assert trials == generator.replaced(trials, fifth, *marks), "run `make docs`"
    gguf, sixth = generator.GGUF_PAGE.read_text(encoding="utf-8"), generator.kquants_block(generator.KQUANTS)
    marks = generator.KQUANTS_START, generator.KQUANTS_END
    assert gguf == generator.replaced(gguf, sixth, *marks), "run `make docs`"
    assert generator.RESULTS.is_file() == generator.PICTURE.is_file()


def test_readme_has_no_figures_of_its_own() -> None:
    """Outside the markers and the code there is no decimal number and no percentage."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    between = readme[readme.index(generator.END) : readme.index(generator.SPEED_START)]
    around = readme[: readme.index(generator.START)] + between + readme[readme.index(generator.SPEED_END) :]
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", around, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+(?!\.\d)|\d+ ?%", prose.replace("Apache-2.0", "")) == []


def test_writes_table_and_picture(tree: Path) -> None:
    assert generator.main(["--check"]) == 1
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    readme = (tree / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old 7" not in readme
    assert "| case | tool | kl ↓ | bytes ↓ | accuracy ↑ |" in readme
    assert "| 4 bits | rtn | 0.25 | 12,345 |  |" in readme
    assert "| 4 bits | qat | 0.1235 |  |  |" in readme
    assert "| 2 bits | qat |  |  | 0.5 |" in readme
    assert "with torch 0.0.0, cores 2." in readme
    picture = (tree / "results.svg").read_bytes()
    assert b"0.1235" in picture and b"9" in picture
    assert generator.main([]) == 0
    assert (tree / "results.svg").read_bytes() == picture


def test_writes_the_second_table(tree: Path) -> None:
    """A line for each case, both metrics in a cell, nothing where one is missing. README has the best others, which
    are what ours divided by its ratio is. Mutations: `read` without `suite`; the ratio turned over."""

    def row(tool: str, metric: str, value: object) -> dict[str, object]:
        fields = {"suite": "cpu", "case": "block", "tool": tool, "metric": metric, "value": value}
        return {**fields, "goal": 1.1, "better": "lower"}

    rows = [row("float", "time_ratio", 1.0), row("float", "alive_bytes", 1 << 20), row("other", "missing", "absent")]
    rows += [row("qat", "time_ratio", 1.054), row("qat", "alive_bytes", 3 << 19), row("half", "time_ratio", 2.0)]
    rows += [row("qat", "time_ratio / best peer", 0.5), row("qat", "alive_bytes / best peer", 0.25)]
    for name, threads, date in (("a", 1, "2026-02"), ("b", 2, "2026-01")):
        (tree / f"cpu-{name}.json").write_text(
            json.dumps({"environment": {"threads": threads, "date": date}, "rows": rows})
        )
    assert generator.main([]) == 0
    readme, cost = ((tree / name).read_text(encoding="utf-8") for name in ("README.md", "cost.md"))
    assert "| case | qat | best other |" in readme and "| block | 1.05, 1.5 MiB | 2.11, 6.0 MiB |" in readme
    assert "| case | float | qat | half |" in cost and "| block | 1.00, 1.0 MiB | 1.05, 1.5 MiB |  |" in cost
    assert all("threads 1, date 2026-02." in page and "old 8" not in page for page in (readme, cost))
    assert (
        "With B:" in cost
        and "vector units A" in readme
        and "threads 2" not in readme
        and cost.index("threads 1") < cost.index("threads 2")
    )
    assert generator.main(["--check"]) == 0


def test_writes_the_third_table_on_its_page(tree: Path) -> None:
    fields = {"suite": "backward", "case": "W8A8", "tool": "int8", "metric": "kl", "value": 0.5, "better": "lower"}
    other = {**fields, "suite": "backward seed 0", "value": 0.75}
    (tree / "backward.json").write_text(json.dumps({"environment": {"seeds": "0 1"}, "rows": [fields, other]}))
    assert generator.main([]) == 0
    cost = (tree / "cost.md").read_text(encoding="utf-8")
    assert "| W8A8 | int8 | 0.5 |" in cost and "old 9" not in cost and "0.75" not in cost
    assert "Mean of 2 seeds, measured by `python -m benchmarks.backward`" in cost
    assert generator.main(["--check"]) == 0
    (tree / "backward.json").unlink()
    assert generator.main(["--check"]) == 1


def test_writes_the_fourth_table_on_its_page(tree: Path) -> None:
    """A line for each tool with mean and spread, then our ratios. Mutation: rows of single seeds taken along."""

    def row(case: str, tool: str, metric: str, value: float, **more: object) -> dict[str, object]:
        fields = {"suite": "quality", "case": case, "tool": tool, "metric": metric, "value": value}
        return {**fields, "better": "lower", **more}

    rows = [
        row("B1 W4", "GPTQ", "kl", 0.5),
        row("B1 W4", "GPTQ", "kl", 0.77, seed=1),
        row("B1 W4", "GPTQ", "kl, standard deviation", 0.0123),
        row("B1 W2", "qat", "kl", 0.25),
        row("B1 W2", "qat", "nll_gap", 0.1),
        row("B1 W2", "qat", "kl / GPTQ", 0.515),
        row("B1 W2", "no distance", "nll_gap", 0.1),
        row("B2 W2A2", "qat", "kl", 0.125),
        {**row("B2 W2A2", "qat", "accuracy", 91.0), "better": "higher"},
    ]
    (tree / "quality.json").write_text(json.dumps({"environment": {"threads": 1}, "rows": rows}))
    assert generator.main([]) == 0
    page = (tree / "quality.md").read_text(encoding="utf-8")
    assert "| B1: KL to the float model ↓ | W4 | W2 |" in page and "old 6" not in page
    assert "| GPTQ | 0.5 ± 0.01 |  |" in page and "| qat |  | 0.25 |" in page and "no distance" not in page
    assert "| *qat: kl / GPTQ* |  | 0.52 |" in page or "| *qat: kl / GPTQ* |  | 0.51 |" in page
    assert "| B2: accuracy ↑ | W2A2 |" in page and "| qat | 91 |" in page and "| qat | 0.125 |" in page
    assert generator.main(["--check"]) == 0


def test_writes_variants_beside_the_default(tree: Path) -> None:
    """Mutation: the ratio turned over."""

    def row(tool: str, metric: str, value: float) -> dict[str, object]:
        return {"suite": "trials", "case": "B1 W4", "tool": tool, "metric": metric, "value": value, "better": "lower"}

    rows = [row("default", "kl", 0.5), row("another", "kl", 0.25), row("another", "learning rate", 0.1)]
    (tree / "trials.json").write_text(json.dumps({"environment": {"threads": 1}, "rows": rows}))
    assert generator.main([]) == 0
    page = (tree / "experiments.md").read_text(encoding="utf-8")
    assert "| default | 0.5 |" in page and "| another | 0.25 (0.50) |" in page and "old 5" not in page


def test_writes_what_llama_cpp_computes(tree: Path) -> None:
    fields = {"suite": "kquants", "case": "Q2_K", "tool": "qat", "metric": "kl", "value": 0.25, "better": "lower"}
    other = {**fields, "suite": "kquants seed 0", "value": 0.75}
    (tree / "kquants.json").write_text(json.dumps({"environment": {"seeds": "0 1 2"}, "rows": [fields, other]}))
    assert generator.main([]) == 0
    page = (tree / "gguf.md").read_text(encoding="utf-8")
    assert "| Q2_K | qat | 0.25 |" in page and "old 4" not in page and "0.75" not in page
    assert "Mean of 3 seeds, measured by `python -m benchmarks.kquants`" in page


def test_means_say_of_how_many_seeds() -> None:
    assert generator.source({"seeds": "0 1 2"}, "this") == "Mean of 3 seeds, measured by `this`"
    assert generator.source({"seeds": "4"}, "this").startswith("Mean of 1 seed, ")
    assert generator.source({"seed": 0}, "this") == "Measured by `make demo`"


def test_without_results_it_says_how_to_get_them(tree: Path) -> None:
    (tree / "demo.json").unlink()
    assert generator.main([]) == 0
    readme = (tree / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme and "make bench-cpu" in readme
    assert not (tree / "results.svg").exists()


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"rows": []}, "environment"),
        ({"environment": {}, "rows": []}, 'no row of suite "demo"'),
        ({"environment": {}, "rows": [{"suite": "demo"}]}, "row 0 has the keys"),
    ],
)
def test_wrong_results_are_refused(
    tree: Path, capsys: pytest.CaptureFixture[str], results: object, message: str
) -> None:
    (tree / "demo.json").write_text(json.dumps(results))
    before = (tree / "README.md").read_text()
    assert generator.main([]) == 2
    assert message in capsys.readouterr().err
    assert (tree / "README.md").read_text() == before


def test_missing_markers_are_refused(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "README.md").write_text("no markers")
    assert generator.main([]) == 2
    assert "results:start" in capsys.readouterr().err
