import errno
from pathlib import Path

import pytest

from internvl_core.errors import DiskFull
from internvl_core.train.local_saves import LocalSaves

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "weights").write_text("sound")
    return tmp_path / "checkpoint-1"


def fail(saves: LocalSaves, folder: Path, error: Exception, *, is_begun: bool = False) -> None:
    with saves.writing(folder, is_begun=is_begun):
        folder.mkdir(exist_ok=True)
        (folder / "half").write_bytes(bytes(1024))
        raise error


def test_a_save_without_room_leaves_nothing_of_it_and_all_that_was_before(earlier: Path) -> None:
    folder = earlier.parent / "checkpoint-2"
    with pytest.raises(DiskFull, match=f"^{folder}: no room for the save: .* GiB are free") as caught:
        fail(LocalSaves(), folder, FULL)
    assert list(earlier.parent.iterdir()) == [earlier]
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is FULL


def test_it_says_how_much_the_last_save_took(tmp_path: Path) -> None:
    saves = LocalSaves()
    with saves.writing(tmp_path / "checkpoint-1"):
        (tmp_path / "checkpoint-1").mkdir()
        with (tmp_path / "checkpoint-1" / "weights").open("wb") as file:
            file.truncate(3 * 1024**3)
    with pytest.raises(DiskFull, match=r"the last save took 3\.00 GiB"):
        fail(saves, tmp_path / "checkpoint-2", FULL)


def test_a_folder_that_was_there_before_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "other").touch()
    with pytest.raises(DiskFull):
        fail(LocalSaves(), tmp_path / "output", FULL)
    assert (tmp_path / "output" / "other").exists()


def test_a_folder_of_the_save_that_was_begun_before_is_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(DiskFull):
        fail(LocalSaves(), tmp_path / "checkpoint-2", FULL, is_begun=True)
    assert list(tmp_path.iterdir()) == []


def test_another_failure_is_passed_on_and_leaves_what_there_is_to_look_at(tmp_path: Path) -> None:
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output error"):
        fail(LocalSaves(), tmp_path / "checkpoint-2", error)
    assert (tmp_path / "checkpoint-2").exists()
