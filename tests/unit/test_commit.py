from pathlib import Path

import pytest
from training_checkpoints import republish, write_training_files

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.training_files import TrainingLayout
from internvl_core.contract import CheckpointRef, StageFile
from internvl_core.errors import CheckpointCorrupt
from internvl_core.train.commit import StageCommits
from internvl_core.train.metrics import MetricsFile

LAYOUT = TrainingLayout(1)


def open_commits(
    folder: Path, *, run_id: str, resume: bool = True, resume_from: CheckpointRef | None = None
) -> StageCommits:
    stage = StageFile(
        run_id=run_id,
        stage="stage1",
        attempt=1,
        fingerprint="0123456789abcdef",
        entry="pretrain",
        arguments={},
        launcher={"kind": "local", "nnodes": 1, "nproc_per_node": 1},
        store_uri=f"file://{folder}/store",
        start_from=None,
        resume=resume,
        save_budget_s=1,
        resume_from=resume_from,
    )
    return StageCommits(stage, layout=LAYOUT, metrics=MetricsFile(folder / "metrics.jsonl"), cache_dir=folder / "cache")


@pytest.mark.parametrize(
    ("run_id", "resume", "is_found"),
    [
        pytest.param("second", True, True, id="another run goes on"),
        pytest.param("second", False, False, id="a fresh run does not"),
        pytest.param("first", False, True, id="but a retry of a fresh run does"),
    ],
)
def test_who_may_resume_from_a_checkpoint(tmp_path: Path, run_id: str, resume: bool, is_found: bool) -> None:
    saved = write_training_files(tmp_path / "checkpoint-3", 3, LAYOUT)
    checkpoint = open_commits(tmp_path, run_id="first", resume=True).publish(saved, 3, CheckpointKind.TRAINING)
    found = open_commits(tmp_path, run_id=run_id, resume=resume).find_newest()
    assert (found.checkpoint if found else None) == (checkpoint if is_found else None)


def test_an_incomplete_checkpoint_is_passed_over_for_an_older_one_and_where_there_is_none_training_does_not_begin_anew(
    tmp_path: Path,
) -> None:
    commits = open_commits(tmp_path, run_id="run", resume=True)
    older = commits.publish(write_training_files(tmp_path / "3", 3, LAYOUT), 3, CheckpointKind.TRAINING)
    newer = commits.publish(write_training_files(tmp_path / "4", 4, LAYOUT), 4, CheckpointKind.TRAINING)
    for checkpoint, expected in ((newer, older), (older, None)):
        republish(checkpoint, lambda folder: (folder / "optimizer.pt").unlink(), tmp_path)
        if expected is None:
            with pytest.raises(CheckpointCorrupt, match=r"optimizer.pt \(the optimizer state\) missing"):
                commits.find_newest()
        else:
            found = commits.find_newest()
            assert found is not None
            assert found.checkpoint == expected


def test_what_is_not_complete_is_not_committed(tmp_path: Path) -> None:
    saved = write_training_files(tmp_path / "3", 3, LAYOUT)
    (saved / "rng_state.pth").unlink()
    commits = open_commits(tmp_path, run_id="run", resume=True)
    with pytest.raises(CheckpointCorrupt, match=r"rng_state.pth \(the random state of rank 0\) missing"):
        commits.publish(saved, 3, CheckpointKind.TRAINING)
    assert commits.find_newest() is None


def test_a_told_checkpoint_comes_before_those_of_other_runs_and_after_what_its_own_run_committed_since(
    tmp_path: Path,
) -> None:
    others = open_commits(tmp_path, run_id="other")
    told = others.publish(write_training_files(tmp_path / "3", 3, LAYOUT), 3, CheckpointKind.TRAINING)
    others.publish(write_training_files(tmp_path / "5", 5, LAYOUT), 5, CheckpointKind.TRAINING)
    commits = open_commits(tmp_path, run_id="own", resume_from=told)
    found = commits.find_newest()
    assert found is not None
    assert found.checkpoint == told
    since = commits.publish(write_training_files(tmp_path / "4", 4, LAYOUT), 4, CheckpointKind.TRAINING)
    found = open_commits(tmp_path, run_id="own", resume_from=told).find_newest()
    assert found is not None
    assert found.checkpoint == since
