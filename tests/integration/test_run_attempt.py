"""An attempt of a task whose run is cancelled on the server."""

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger
from supervised import STAGE, launch_ranks

from internvl_core.contract import StageFile
from tasks import run_attempt as module
from tasks.cancel_watch import CancelWatch, RunCancelled
from tasks.launch import RunningStage

pytestmark = pytest.mark.integration

SHARE_OF_LEAVE = 0.02


def test_a_cancel_that_no_worker_brought_waits_for_the_save_to_its_end(attempt, launch, monkeypatch):
    def launch_fakes(_: StageFile, __: Path, *, leave_after_s: float, **___: Any) -> RunningStage:
        # The wait of a flow that its worker is about to kill, and a save that takes longer.
        return launch_ranks(
            launch, attempt, "--save_s=3", save_budget_s=600, leave_after_s=leave_after_s * SHARE_OF_LEAVE
        )

    def cancel(_: CancelWatch) -> None:
        raise RunCancelled("The run was cancelled.")

    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid.uuid4()))
    monkeypatch.setattr(module, "launch_stage", launch_fakes)
    monkeypatch.setattr(CancelWatch, "check", cancel)
    with disable_run_logger(), pytest.raises(RunCancelled):
        module.run_attempt(replace(STAGE, arguments={"use_cpu": True}), attempt.directory, lock=-1)
    assert attempt.has_saved()
    attempt.check_nothing_is_left()
