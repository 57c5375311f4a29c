"""Which checkpoint `resume_from_checkpoint` means in a pipeline, and when it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.resume_point import INPUTS_KEY
from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointCorrupt, CheckpointNotFound
from tasks.check_inputs import check_inputs
from tasks.stage import Stage
from tasks.stage_plan import StagePlan, plan_stage

PARENT = CheckpointRef("s3://runs/stage0-ab/data/0", "0" * 64)


@pytest.fixture
def meta_path(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text('{"conversations": []}\n')
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"a": {"root": ".", "annotation": "a.jsonl"}}))
    return path


def build_stage(meta_path: Path, **arguments: Any) -> Stage:
    return Stage(name="stage1", entry="finetune", arguments={"meta_path": str(meta_path), **arguments})


def plan(stage: Stage, parent: CheckpointRef = PARENT) -> StagePlan:
    return plan_stage(stage, parent, cache_dir=Path(str(stage.arguments["meta_path"])).parent / "cache")


def commit(
    planned: StagePlan, store: Path, *, step: int = 4, kind: CheckpointKind = CheckpointKind.TRAINING
) -> CheckpointRef:
    save = store / f"save-{step}"
    save.mkdir(parents=True)
    (save / "optimizer.pt").write_bytes(b"state")
    stage_store = StageStore(f"file://{store}", planned.stage.name, planned.fingerprint)
    info = {INPUTS_KEY: planned.inputs, "world_size": 1}
    return stage_store.publish(save, step=step, fence=1, kind=kind, parent=None, info=info)


def resume(meta_path: Path, where: object, parent: CheckpointRef = PARENT, **arguments: Any) -> StagePlan:
    return plan(build_stage(meta_path, resume_from_checkpoint=where, **arguments), parent)


@pytest.fixture
def committed(meta_path: Path, tmp_path: Path) -> CheckpointRef:
    return commit(plan(build_stage(meta_path)), tmp_path / "elsewhere")


def test_a_checkpoint_of_the_very_same_training_is_resumed_from_in_any_store(
    meta_path: Path, committed: CheckpointRef
) -> None:
    planned = resume(meta_path, committed.uri)
    assert planned.resume_from == committed
    # It is the same stage, and finds the same directory.
    assert planned.fingerprint == plan(build_stage(meta_path)).fingerprint
    assert resume(meta_path, committed.uri.removeprefix("file://")).resume_from == committed


def test_the_directory_of_a_stage_stands_for_its_newest_training_checkpoint(meta_path: Path, tmp_path: Path) -> None:
    planned = plan(build_stage(meta_path))
    for step in (4, 6):
        newest = commit(planned, tmp_path / "elsewhere", step=step)
    commit(planned, tmp_path / "elsewhere", step=8, kind=CheckpointKind.FINAL)
    assert resume(meta_path, newest.uri.rpartition("/data/")[0]).resume_from == newest


@pytest.mark.parametrize("where", [True, "True", "latest", None, False])
def test_the_newest_of_the_stage_itself_needs_no_asking(meta_path: Path, where: object) -> None:
    assert resume(meta_path, where).resume_from is None


@pytest.mark.fault(
    67,
    "other arguments, data or parent on an explicit resume",
    how="a changed recipe",
    then="refused with each difference shown (64); without the flag the stage starts afresh",
)
def test_other_arguments_are_refused_with_each_difference_and_without_the_flag_it_is_another_stage(
    meta_path: Path, committed: CheckpointRef
) -> None:
    changed = {"learning_rate": 0.1, "freeze_llm": True, "per_device_train_batch_size": 16}
    with pytest.raises(ArgumentError) as caught:
        resume(meta_path, committed.uri, **changed)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{committed.uri} is of another training. With the arguments as they are now, stage stage1")
    assert sorted(lines) == [
        "freeze_llm: False in the checkpoint, True now",
        "global_batch_size: 8 in the checkpoint, 16 now",
        "learning_rate: 5e-05 in the checkpoint, 0.1 now",
    ]
    assert plan(build_stage(meta_path, **changed)).fingerprint != plan(build_stage(meta_path)).fingerprint


@pytest.mark.fault(
    9,
    "an annotation is rewritten before an explicit resume",
    how="another line in it",
    then="refused with its name (64)",
)
def test_other_data_and_another_parent_are_named(meta_path: Path, committed: CheckpointRef) -> None:
    (meta_path.parent / "a.jsonl").write_text('{"conversations": [1]}\n')
    with pytest.raises(ArgumentError) as caught:
        resume(meta_path, committed.uri, CheckpointRef(PARENT.uri, "1" * 64))
    lines = sorted(str(caught.value).splitlines()[1:])
    assert lines[0].startswith("meta_path: other data, ")
    assert lines[1] == "start_from: another parent, 000000000000 in the checkpoint, 111111111111 now"
    assert len(lines) == 2


def test_final_weights_are_no_state_to_resume_from(meta_path: Path, tmp_path: Path) -> None:
    final = commit(plan(build_stage(meta_path)), tmp_path / "elsewhere", kind=CheckpointKind.FINAL)
    with pytest.raises(ArgumentError, match="the final weights of step 4, without optimizer"):
        resume(meta_path, final.uri)


def test_a_save_that_was_never_committed_is_refused(meta_path: Path, committed: CheckpointRef, tmp_path: Path) -> None:
    for record in tmp_path.glob("elsewhere/*/commits/*"):
        record.unlink()
    with pytest.raises(CheckpointNotFound, match="never committed"):
        resume(meta_path, committed.uri)
    with pytest.raises(CheckpointNotFound, match="no checkpoint to resume from is committed there"):
        resume(meta_path, f"file://{tmp_path}/elsewhere")


def test_a_damaged_manifest_is_refused(meta_path: Path, committed: CheckpointRef) -> None:
    path = Path(committed.uri.removeprefix("file://")) / "MANIFEST"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CheckpointCorrupt, match="sha256"):
        resume(meta_path, committed.uri)


def test_the_check_of_all_inputs_looks_at_it_before_anything_is_trained(
    meta_path: Path, committed: CheckpointRef, tmp_path: Path
) -> None:
    def check(**arguments: Any) -> None:
        stage = build_stage(meta_path, resume_from_checkpoint=committed.uri, **arguments)
        check_inputs.fn([stage], store_uri=f"file://{tmp_path}/store", start_from=None)

    check()
    with pytest.raises(ArgumentError, match=r"learning_rate: 5e-05 in the checkpoint, 0\.1 now"):
        check(learning_rate=0.1)
