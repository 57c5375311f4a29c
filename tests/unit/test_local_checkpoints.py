import logging
from pathlib import Path

import pytest

from internvl_core.checkpoint.local_checkpoints import LocalCheckpoint, LocalCheckpoints
from internvl_core.errors import LeaseHeld


def save(checkpoints: LocalCheckpoints, step: int, body: str = "weights") -> Path:
    """Write a save as all ranks together do, without its MANIFEST."""
    folder = checkpoints.saves_dir / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model").write_text(body)
    (folder / "shards" / "0").write_text(f"step {step}")
    return folder


def commit(checkpoints: LocalCheckpoints, step: int, *, fence: int = 1, body: str = "weights") -> LocalCheckpoint:
    return checkpoints.commit(
        save(checkpoints, step, body), entry="finetune", fingerprint="ab", step=step, fence=fence, info={}
    )


def list_steps(checkpoints: LocalCheckpoints) -> list[int]:
    return [checkpoint.manifest.step for checkpoint in checkpoints.iter_verified()]


@pytest.fixture
def checkpoints(tmp_path: Path) -> LocalCheckpoints:
    return LocalCheckpoints(tmp_path)


def test_a_checkpoint_appears_whole(checkpoints: LocalCheckpoints, tmp_path: Path) -> None:
    saved = save(checkpoints, 2)
    assert list_steps(checkpoints) == []
    assert not checkpoints.has_any()
    committed = checkpoints.commit(saved, entry="finetune", fingerprint="ab", step=2, fence=1, info={})
    assert committed.path == tmp_path / "checkpoint-2"
    assert {path.name for path in committed.path.iterdir()} == {"MANIFEST", "model", "shards"}
    assert list_steps(checkpoints) == [2]


def test_what_a_dead_run_left_half_written_is_removed_and_what_it_had_finished_is_kept(
    checkpoints: LocalCheckpoints, tmp_path: Path
) -> None:
    commit(checkpoints, 2)
    finished = commit(checkpoints, 4)
    finished.path.rename(checkpoints.saves_dir / "checkpoint-4")
    save(checkpoints, 6)
    after = LocalCheckpoints(tmp_path)
    after.hold()
    assert list_steps(after) == [4, 2]
    assert list(after.saves_dir.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "add", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(
    checkpoints: LocalCheckpoints, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(checkpoints, 2)
    newest = commit(checkpoints, 4).path
    match damage:
        case "flip":
            (newest / "model").write_text("weightz")
        case "truncate":
            (newest / "model").write_text("weight")
        case "add":
            (newest / "optimizer.pt").write_text("planted")
        case "remove":
            (newest / "shards" / "0").unlink()
        case "manifest":
            (newest / "MANIFEST").write_bytes((newest / "MANIFEST").read_bytes().replace(b"finetune", b"finetunf"))
        case _:
            (newest / "MANIFEST").unlink()
    with caplog.at_level(logging.WARNING):
        assert list_steps(LocalCheckpoints(tmp_path)) == [2]
    assert f"Passed over a checkpoint: {newest}" in caplog.text


def test_what_a_later_run_wrote_is_newer_whatever_its_step(checkpoints: LocalCheckpoints) -> None:
    for step in (2, 4, 6):
        commit(checkpoints, step)
    commit(checkpoints, 3, fence=2)
    assert list_steps(checkpoints) == [3, 6, 4, 2]


def test_a_checkpoint_takes_the_place_of_an_earlier_one_of_its_step(checkpoints: LocalCheckpoints) -> None:
    commit(checkpoints, 2, body="first try")
    newer = commit(checkpoints, 2, fence=2, body="second try")
    assert (newer.path / "model").read_text() == "second try"
    assert list_steps(checkpoints) == [2]


def test_only_what_enough_newer_ones_that_verify_supersede_is_removed(
    checkpoints: LocalCheckpoints, tmp_path: Path
) -> None:
    paths = {step: commit(checkpoints, step).path for step in (2, 4, 6, 8)}
    (paths[6] / "model").write_text("weightz, and longer")
    # One is not enough, even if asked for.
    removed = checkpoints.prune(1)
    assert removed == [paths[2]]
    assert list_steps(LocalCheckpoints(tmp_path)) == [8, 4]
    assert paths[6].is_dir()


def test_fewer_verified_ones_than_are_kept_remove_nothing(checkpoints: LocalCheckpoints) -> None:
    paths = {step: commit(checkpoints, step).path for step in (2, 4, 6)}
    for step in (4, 6):
        (paths[step] / "model").write_text("short")
    assert checkpoints.prune(2) == []
    assert all(path.is_dir() for path in paths.values())


def test_folders_of_others_are_never_removed(checkpoints: LocalCheckpoints, tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-1"
    foreign.mkdir()
    (foreign / "optimizer.pt").write_text("of another trainer")
    for step in (2, 4, 6):
        commit(checkpoints, step)
    checkpoints.prune(2)
    assert foreign.is_dir()
    assert checkpoints.has_any()


def test_two_runs_cannot_use_one_output_dir(checkpoints: LocalCheckpoints, tmp_path: Path) -> None:
    checkpoints.hold()
    with pytest.raises(LeaseHeld, match="in use by another run"):
        LocalCheckpoints(tmp_path).hold()
