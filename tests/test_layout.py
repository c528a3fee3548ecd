"""The folders, the links between them and what pyproject.toml says about them agree."""

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
LINKED = ("callbacks", "fake_quant_kernels", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folders_with_code() -> set[str]:
    """Import names of all folders that hold a Python file."""
    found = set()
    for name in ("qat", *LINKED):
        for path in (ROOT / name).rglob("*.py"):
            parts = path.parent.relative_to(ROOT).parts
            if not (set(parts) & {"__pycache__", "benchmarks"}) and parts[:2] not in [("qat", link) for link in LINKED]:
                found.add(".".join(parts if parts[0] == "qat" else ("qat", *parts)))
    return found


def test_every_package_is_in_the_wheel() -> None:
    found = folders_with_code()
    assert len(found) >= 8
    assert set(SETUPTOOLS["packages"]) == found
    assert SETUPTOOLS["packages"] == sorted(SETUPTOOLS["packages"])


def test_every_package_has_an_init() -> None:
    mapping = SETUPTOOLS["package-dir"]
    assert set(mapping) == {f"qat.{name}" for name in LINKED}
    for package in SETUPTOOLS["packages"]:
        top = next((mapped for mapped in mapping if package == mapped or package.startswith(mapped + ".")), None)
        folder = ROOT / (mapping[top] + package[len(top) :].replace(".", "/") if top else package.replace(".", "/"))
        assert (folder / "__init__.py").is_file(), folder


def test_package_data_is_there() -> None:
    assert SETUPTOOLS["package-data"]["qat"] == ["py.typed"]
    assert (ROOT / "qat" / "py.typed").is_file()
    assert len(list((ROOT / "recipes").rglob("*.yaml"))) >= 6


@pytest.mark.parametrize("name", LINKED)
def test_links_resolve(name: str) -> None:
    link = ROOT / "qat" / name
    if link.is_file():
        pytest.skip("this checkout has no symbolic links; only type checking needs them")
    assert link.is_symlink()
    assert link.resolve() == (ROOT / name).resolve()
    assert not Path(link.readlink()).is_absolute()


def test_tests_are_no_packages_and_are_found() -> None:
    tests = ROOT / "tests"
    assert not list(tests.rglob("__init__.py"))
    files = [path for path in tests.rglob("*.py") if "__pycache__" not in path.parts]
    assert len(files) >= 5


def test_file_length_and_relative_imports() -> None:
    paths = [path for name in ("qat", *LINKED) for path in (ROOT / name).rglob("*.py")]
    assert len(paths) >= 30
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, f"{path} is longer than 400 lines"
        assert not re.search(r"^\s*from \.", text, re.MULTILINE), f"{path} imports relatively"


def test_versions_agree() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in constraints.splitlines() if "==" in line}
    assert "torch==2.13.0\n" in constraints
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(r for e, rs in extras.items() for r in rs)]
    for extra in ("gpu", "deepspeed", "bench"):
        wanted = [requirement for requirement in wanted if requirement not in extras[extra]]
    names = {re.split(r"[\[<>=!]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names - {"lightning-qat"} <= pinned, f"no tested version of {names - pinned} in constraints.txt"


def test_extra_all_holds_every_extra_for_any_machine() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(everything.removeprefix("lightning-qat[").removesuffix("]").split(","))
    # gptq pins numpy to one version, which nothing else should have to
    assert named == set(extras) - {"all", "dev", "gpu", "deepspeed", "bench", "gptq"}
