"""One run at a time trains a stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_core.errors import LeaseHeld
from internvl_core.supervision.watchdog import Limits
from tasks.hold_stage import hold_stage
from tasks.launch import launch_command


def test_a_stage_that_is_held_is_refused_with_its_holder(tmp_path: Path) -> None:
    attempts_dir = tmp_path / "attempts/stage1-0"
    with (
        hold_stage(attempts_dir),
        pytest.raises(LeaseHeld, match=rf"stage1-0 is being trained by process {os.getpid()} since"),
        hold_stage(attempts_dir),
    ):
        pytest.fail("two runs hold one stage")
    with hold_stage(attempts_dir):
        assert (attempts_dir / "lock").is_file()


def test_another_stage_is_free(tmp_path: Path) -> None:
    with hold_stage(tmp_path / "stage1-0"), hold_stage(tmp_path / "stage1-1"):
        assert len(list(tmp_path.glob("*/lock"))) == 2


def test_a_holder_that_is_killed_lets_go(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from tasks.hold_stage import hold_stage\n"
        "with hold_stage(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    with hold_stage(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_a_stage_stays_held_while_the_supervisor_of_a_lost_flow_works(tmp_path: Path) -> None:
    attempt_dir = tmp_path / "1"
    attempt_dir.mkdir()
    with hold_stage(tmp_path) as lock:
        running = launch_command(["sleep", "60"], attempt_dir, Limits(setup_s=60, stall_s=60, save_s=5), lock=lock)
    with running:
        with pytest.raises(LeaseHeld), hold_stage(tmp_path):
            pytest.fail("the stage was free")
        running.stop()
    with hold_stage(tmp_path):
        assert running.poll() is not None
