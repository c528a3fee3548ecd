from __future__ import annotations

import os
from pathlib import Path

import pytest

from qat.errors import ExportError
from qat.export.atomic import RECEIPT, refuse_target, replaced_folder


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_all_files_appear_at_once(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with replaced_folder(target) as fresh:
        (fresh / "x").write_text("1")
        assert not target.exists()
    assert everything(tmp_path) == {"a", "a/b", "a/b/x"}


# Turned red by dropping the rmtree of the fresh folder, or the removal of created parents.
@pytest.mark.parametrize("problem", [ValueError("x"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(tmp_path: Path, problem: BaseException) -> None:
    with pytest.raises(type(problem)), replaced_folder(tmp_path / "a" / "b") as fresh:
        (fresh / "x").write_text("1")
        raise problem
    assert everything(tmp_path) == set()


def test_an_exception_keeps_the_earlier_export(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with pytest.raises(ValueError, match="x"), replaced_folder(target):
        raise ValueError("x")
    assert everything(tmp_path) == {"out", "out/old"}


# Turned red by not putting the old folder back.
def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    real = os.replace

    def fails_once(source: Path, goal: Path) -> None:
        if str(source).endswith(".part"):
            raise OSError(28, "No space left on device")
        real(source, goal)

    with pytest.raises(ExportError, match="cannot be written: No space left"), replaced_folder(target) as fresh:
        (fresh / "x").write_text("1")
        monkeypatch.setattr(os, "replace", fails_once)
    assert everything(tmp_path) == {"out", "out/old"}


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / RECEIPT).write_text("{}")
    (target / "old").write_text("1")
    refuse_target(target, overwrite=True)
    with replaced_folder(target) as fresh:
        (fresh / "x").write_text("1")
    assert everything(tmp_path) == {"out", "out/x"}


def test_what_is_in_the_way_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    refuse_target(target, overwrite=False)
    target.mkdir()
    refuse_target(target, overwrite=False)
    (target / "mine").write_text("1")
    with pytest.raises(ExportError, match="is not empty; name another folder"):
        refuse_target(target, overwrite=False)
    # a folder that no export wrote is never deleted
    with pytest.raises(ExportError, match="no export wrote it"):
        refuse_target(target, overwrite=True)
    with pytest.raises(ExportError, match="is a file"):
        refuse_target(target / "mine", overwrite=True)
