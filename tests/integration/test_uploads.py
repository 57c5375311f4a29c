"""The uploader as a real process: what it sends, keeps and removes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from training_checkpoints import republish, write_training_files
from upload_attempts import LAYOUT, Attempt

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.errors import CheckpointCorrupt

pytestmark = pytest.mark.integration


def test_a_save_is_committed_read_back_and_gone_from_the_disk(
    start_attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    attempt = start_attempt(f"file://{tmp_path}/store")
    assert attempt.acquire() is None
    save = attempt.save(10)
    assert save.record_path.exists()
    attempt.await_all()
    assert attempt.uploads.find_committed(save) == attempt.store.find_newest()
    assert attempt.read_step(10) == 10
    assert not save.directory.exists()
    assert not save.record_path.exists()


def test_the_next_attempt_need_not_wait_for_the_lease_of_one_that_closed(
    start_attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    first = start_attempt(f"file://{tmp_path}/store")
    first.acquire()
    first.save(10)
    first.await_all()
    first.commits.close()
    found = start_attempt(f"file://{tmp_path}/store", number=2).acquire()
    assert found is not None
    assert found.step == 10
    assert found.size_bytes > 1000


def test_superseded_checkpoints_go_and_two_stay(start_attempt: Callable[..., Attempt], tmp_path: Path) -> None:
    attempt = start_attempt(f"file://{tmp_path}/store")
    attempt.acquire()
    for step in (10, 20, 30, 40):
        attempt.save(step)
        attempt.await_all()
    assert attempt.list_steps() == [40, 30]


@pytest.mark.parametrize(
    ("run_id", "resume", "is_found"),
    [
        pytest.param("second", True, True, id="another run goes on"),
        pytest.param("second", False, False, id="a fresh run does not"),
        pytest.param("first", False, True, id="but a retry of a fresh run does"),
    ],
)
def test_who_may_resume_from_a_checkpoint(
    start_attempt: Callable[..., Attempt], tmp_path: Path, run_id: str, resume: bool, is_found: bool
) -> None:
    first = start_attempt(f"file://{tmp_path}/store", run_id="first")
    first.acquire()
    checkpoint = first.commit(3)
    first.commits.close()
    found = start_attempt(f"file://{tmp_path}/store", number=2, run_id=run_id, resume=resume).acquire()
    assert (found.checkpoint if found else None) == (checkpoint if is_found else None)


def lose_optimizer(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def test_an_incomplete_checkpoint_is_passed_over_for_an_older_one(
    start_attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    first = start_attempt(f"file://{tmp_path}/store")
    first.acquire()
    older, newer = first.commit(3), first.commit(4)
    first.commits.close()
    republish(newer, lose_optimizer, tmp_path)
    found = start_attempt(f"file://{tmp_path}/store", number=2).acquire()
    assert found is not None
    assert found.checkpoint == older


def test_where_no_checkpoint_is_complete_training_does_not_begin_anew(
    start_attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    first = start_attempt(f"file://{tmp_path}/store")
    first.acquire()
    only = first.commit(3)
    first.commits.close()
    republish(only, lose_optimizer, tmp_path)
    with pytest.raises(CheckpointCorrupt, match=r"optimizer.pt \(the optimizer state\) missing"):
        start_attempt(f"file://{tmp_path}/store", number=2).acquire()


def test_what_is_not_complete_is_not_committed(start_attempt: Callable[..., Attempt], tmp_path: Path) -> None:
    attempt = start_attempt(f"file://{tmp_path}/store")
    attempt.acquire()
    directory = write_training_files(tmp_path / "3", 3, LAYOUT)
    (directory / "rng_state.pth").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"rng_state.pth \(the random state of rank 0\) missing"):
        attempt.commits.submit(directory, 3, CheckpointKind.TRAINING)
    assert attempt.list_steps() == []


def test_a_told_checkpoint_comes_before_those_of_other_runs_and_after_what_its_own_run_committed_since(
    start_attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    others = start_attempt(f"file://{tmp_path}/store", run_id="other")
    others.acquire()
    told = others.commit(3)
    others.commit(5)
    others.commits.close()
    own = start_attempt(f"file://{tmp_path}/store", number=2, run_id="own", resume_from=told)
    found = own.acquire()
    assert found is not None
    assert found.checkpoint == told
    # What was trained behind it is history now.
    assert own.list_steps() == [3]
    since = own.commit(4)
    own.commits.close()
    found = start_attempt(f"file://{tmp_path}/store", number=3, run_id="own", resume_from=told).acquire()
    assert found is not None
    assert found.checkpoint == since


def test_a_told_checkpoint_of_another_store_begins_a_history_of_its_own(
    start_attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    others = start_attempt(f"file://{tmp_path}/other-store")
    others.acquire()
    told = others.commit(3)
    own = start_attempt(f"file://{tmp_path}/store", number=2, resume_from=told)
    found = own.acquire()
    assert found is not None
    assert (found.checkpoint, own.list_steps()) == (told, [])
