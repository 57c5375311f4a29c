"""A local disk without room: what the trainer makes of it. Needs root, for a small disk to fill."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_disk import mounted
from stage_runs import Inputs, make_inputs, run
from step_faults import run_faulty

DISK_MIB = 100
"""Foresight wants 64 of them free before it lets a save begin."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small disk."""
    with mounted(tmp_path / "disk", f"size={DISK_MIB}m") as folder:
        yield folder


@pytest.mark.integration
@pytest.mark.fault(
    34, "the disk is full while a checkpoint is written", how="tmpfs", then="74; the commit before stays"
)
@pytest.mark.fault(51, "the local disk is full, the store is not", how="tmpfs", then="74; the stage resumes elsewhere")
@pytest.mark.parametrize(
    ("left_bytes", "way"),
    [
        # Within the weights, which safetensors writes; within the optimizer's state, which torch writes.
        pytest.param(100_000, {}, marks=pytest.mark.slow),
        (700_000, {}),
        pytest.param(700_000, {"deepspeed": "zero2", "bf16": True}, marks=pytest.mark.slow),
    ],
    ids=["weights", "optimizer", "deepspeed"],
)
def test_a_disk_that_fills_up_ends_the_stage_and_takes_nothing_with_it(
    left_bytes: int, way: dict[str, Any], inputs: Inputs, disk: Path, tmp_path: Path
) -> None:
    arguments = {**inputs.arguments, **way, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    output = disk / "output"
    faults = {"room": {"2": [[str(disk), left_bytes], [0]]}}
    attempt = run_faulty(tmp_path / "1", {**arguments, "output_dir": str(output)}, faults)
    assert (attempt.exit_code, attempt.failure.error) == (74, "DiskFull")
    assert f"{output / 'checkpoint-2'}: no room for the save: " in attempt.failure.message
    assert "of 0.10 GiB are free" in attempt.failure.message
    assert "and the last save took 0.00 GiB" in attempt.failure.message
    assert not (output / "checkpoint-2").exists()
    (commit,) = attempt.commits
    attempt.store.verify(commit.checkpoint)
    assert commit.step == 1
    resumed = run(tmp_path / "2", arguments)
    assert "Resuming from step 1" in resumed.log
    assert resumed.exit_code == 0, resumed.log[-4000:]
