import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from internvl_core.checkpoint.manifest import CheckpointKind, Manifest
from internvl_core.checkpoint.training_files import TrainingLayout
from internvl_core.contract import CheckpointRef
from internvl_core.deepspeed_config import resolve_deepspeed
from internvl_core.errors import ArgumentError
from internvl_core.train.commit import Committed
from internvl_core.train.reshard import needs_resharding
from internvl_core.train.resume import build_layout, describe_resume

VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.23.1"}
CHECKPOINT = CheckpointRef("s3://runs/stage-ab/data/4", "cd")


def build_committed(**info: Any) -> Committed:
    manifest = Manifest("stage", "ab", 4, 1, CheckpointKind.TRAINING, None, {"counters": {}, **info}, ())
    return Committed.describe(CHECKPOINT, manifest, Path("checkpoint"))


def test_the_same_versions_are_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    described = describe_resume(build_committed(versions={"torch": "2.13.1", "peft": "0.21.0"}), VERSIONS)
    assert described == {"resumed_from": {"uri": CHECKPOINT.uri, "digest": "cd", "step": 4}, "version_changes": []}
    assert caplog.text == ""


@pytest.mark.fault(
    67,
    "other versions of the libraries on resume",
    how="a manifest of another transformers",
    then="the state is loaded, the log warns, and every later manifest lists the change",
)
def test_other_versions_are_warned_of_and_stay_in_every_later_manifest(caplog: pytest.LogCaptureFixture) -> None:
    earlier = [{"step": 2, "change": "torch 2.12.0 -> 2.13.0"}]
    found = build_committed(versions={"torch": "2.13.0", "transformers": "5.22.0"}, version_changes=earlier)
    with caplog.at_level(logging.WARNING):
        described = describe_resume(found, VERSIONS)
    assert described["version_changes"] == [*earlier, {"step": 4, "change": "transformers 5.22.0 -> 5.23.1"}]
    assert "transformers 5.22.0 -> 5.23.1" in caplog.text


@pytest.mark.parametrize(
    ("deepspeed", "decay_all", "fp16", "expected"),
    [
        (None, True, False, TrainingLayout(2)),
        (None, True, True, TrainingLayout(2, has_scaler=True)),
        ("zero1", True, False, TrainingLayout(2, 1, has_scheduler_file=False)),
        ("zero2", False, True, TrainingLayout(2, 2)),
        ("zero3_offload", True, False, TrainingLayout(2, 3, has_scheduler_file=False)),
    ],
)
def test_the_layout_follows_from_the_arguments(
    deepspeed: str | None, decay_all: bool, fp16: bool, expected: TrainingLayout
) -> None:
    config = resolve_deepspeed(deepspeed, decay_all=decay_all) if deepspeed else None
    assert build_layout(SimpleNamespace(world_size=2, deepspeed=config, fp16=fp16)) == expected


ZERO2 = TrainingLayout(2, 2, has_scheduler_file=False)
ZERO3 = TrainingLayout(2, 3, has_scheduler_file=False)


@pytest.mark.parametrize(
    ("written", "present", "expected"),
    [
        (TrainingLayout(2), TrainingLayout(1), False),
        (ZERO2, ZERO2, False),
        (ZERO2, replace(ZERO2, zero_stage=1), False),
        (ZERO2, replace(ZERO2, world_size=3), True),
        (replace(ZERO2, has_scheduler_file=True), TrainingLayout(1, 1), True),
        (ZERO3, replace(ZERO3, world_size=1), True),
    ],
)
def test_only_shards_on_another_number_of_ranks_are_converted(
    written: TrainingLayout, present: TrainingLayout, expected: bool
) -> None:
    assert needs_resharding(written, present, where="here") is expected


def test_what_cannot_be_converted_is_refused_with_the_ranks_that_can_go_on(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"written under ZeRO-2, .* Resume with zero2"):
        needs_resharding(ZERO2, ZERO3, where=str(tmp_path))
    groups = replace(ZERO3, has_scheduler_file=True)
    with pytest.raises(ArgumentError, match=r"written by 2 ranks under ZeRO-3 .* Resume on 2 ranks"):
        needs_resharding(groups, replace(groups, world_size=4), where=str(tmp_path))
