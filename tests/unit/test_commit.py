from pathlib import Path

import pytest

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.contract import StageFile
from internvl_core.train.commit import StageCommits
from internvl_core.train.metrics import MetricsFile


def open_commits(folder: Path, *, run_id: str, resume: bool) -> StageCommits:
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
    )
    return StageCommits(stage, world_size=1, metrics=MetricsFile(folder / "metrics.jsonl"), cache_dir=folder / "cache")


@pytest.mark.parametrize(
    ("run_id", "resume", "is_found"),
    [
        pytest.param("second", True, True, id="another run goes on"),
        pytest.param("second", False, False, id="a fresh run does not"),
        pytest.param("first", False, True, id="but a retry of a fresh run does"),
    ],
)
def test_who_may_resume_from_a_checkpoint(tmp_path: Path, run_id: str, resume: bool, is_found: bool) -> None:
    saved = tmp_path / "checkpoint-3"
    saved.mkdir()
    (saved / "weights").write_text("three steps")
    checkpoint = open_commits(tmp_path, run_id="first", resume=True).publish(saved, 3, CheckpointKind.TRAINING)
    found = open_commits(tmp_path, run_id=run_id, resume=resume).find_newest()
    assert (found.checkpoint if found else None) == (checkpoint if is_found else None)
