import logging
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from internvl_core.train.extension_locks import clear_left_locks


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / "py311_cpu" / "deepspeed_shm_comm").mkdir(parents=True)
    return tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"


@pytest.mark.fault(
    11,
    "a rank is killed while it loads DeepSpeed's compiled part",
    how="a lock of torch's that nobody holds",
    then="removed at the next start, which would wait for it for ever",
)
def test_a_lock_that_a_killed_process_left_is_removed(
    lock: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock.touch()
    with caplog.at_level(logging.WARNING):
        assert clear_left_locks(tmp_path) == [lock]
    assert not lock.exists()
    assert str(lock) in caplog.text


def test_a_lock_that_somebody_holds_stays(lock: Path, tmp_path: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert clear_left_locks(tmp_path) == []
    assert lock.exists()
    baton.release()


def test_no_extensions_are_no_problem(tmp_path: Path) -> None:
    assert clear_left_locks(tmp_path / "nowhere") == []


def test_torchs_own_folder_is_looked_at(lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock.touch()
    assert clear_left_locks() == [lock]
