from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qat.errors import ExportError
from qat.export import atomic
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


# Turned red by catching OSError alone, by the first rename outside the try, or by not moving a renamed folder back.
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("suffix", [".part", "out"])
def test_an_interrupted_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, when: str
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    real, interrupts = os.replace, [KeyboardInterrupt()]

    def interrupted(source: Path, goal: Path) -> None:
        now = interrupts and str(source).endswith(suffix)
        if not now or when == "after":
            real(source, goal)
        if now:
            raise interrupts.pop()

    with pytest.raises(KeyboardInterrupt), replaced_folder(target) as fresh:
        (fresh / "x").write_text("1")
        monkeypatch.setattr(os, "replace", interrupted)
    assert not interrupts and everything(tmp_path) == {"out", "out/old"}


# Turned red by dropping resolve().
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_folder_is_replaced(tmp_path: Path, there: bool) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    link.symlink_to(real, target_is_directory=True)
    if there:
        real.mkdir(parents=True)
        (real / "old").write_text("1")
    with replaced_folder(link) as fresh:
        (fresh / "x").write_text("1")
    assert link.is_symlink() and everything(tmp_path) == {"link", "disk", "disk/real", "disk/real/x"}


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ExportError), replaced_folder(tmp_path / "a"):
        pass
    assert everything(tmp_path) == {"a", "b"}


# Turned red by leaving the parents out of what is flushed, or by flushing them before the renames.
def test_the_rename_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[Path, bool]] = []
    target = tmp_path / "a" / "out"
    monkeypatch.setattr(atomic, "_fsync", lambda path: flushed.append((path, target.exists())))
    with replaced_folder(target):
        pass
    assert {(tmp_path / "a", True), (tmp_path, True)} <= set(flushed)


# Turned red by wrapping every OSError of the block.
def test_only_errors_of_the_disk_are_reported_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), replaced_folder(tmp_path / "out"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(ExportError, match="out cannot be written: No space"), replaced_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(ExportError, match="out cannot be written: No such file"),
        replaced_folder(tmp_path / "out") as f,
    ):
        (f / "no" / "x").write_text("1")
    assert everything(tmp_path) == set()


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
