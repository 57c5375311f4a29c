"""One run at a time trains a stage."""

import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from internvl_core.errors import LeaseHeld
from internvl_core.supervision.watchdog import Limits
from tasks.hold_stage import hold_stage as hold_stage_of_run
from tasks.launch import launch_command


def hold_stage(attempts_dir: Path, patience_s: float = 0.0) -> AbstractContextManager[int]:
    return hold_stage_of_run(attempts_dir, "pretrain-1", patience_s=patience_s)


def test_a_stage_that_is_held_is_refused_with_its_holder(tmp_path: Path) -> None:
    attempts_dir = tmp_path / "attempts/stage1-0"
    with (
        hold_stage(attempts_dir),
        pytest.raises(LeaseHeld, match=rf"stage1-0 is being .* run pretrain-1 \(process {os.getpid()} on .*\) since 2"),
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
        "with hold_stage(Path(sys.argv[1]), '', patience_s=0): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    with hold_stage(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_a_stage_stays_held_while_the_supervisor_of_a_lost_flow_works(tmp_path: Path) -> None:
    attempt_dir = tmp_path / "1"
    attempt_dir.mkdir()
    with hold_stage(tmp_path) as lock:
        running = launch_command(["sleep", "60"], attempt_dir, Limits(setup_s=60, stall_s=60, save_s=5), locks=[lock])
    with running:
        # Its flow, this process, is alive: nobody waits for it.
        began = time.monotonic()
        with pytest.raises(LeaseHeld), hold_stage(tmp_path, patience_s=60):
            pytest.fail("the stage was free")
        assert time.monotonic() - began < 30
        running.stop()
    with hold_stage(tmp_path):
        assert running.poll() is not None


def test_the_ranks_of_a_flow_that_was_killed_are_waited_for(tmp_path: Path) -> None:
    attempt_dir = tmp_path / "1"
    attempt_dir.mkdir()
    program = (
        "import os, signal, sys; from pathlib import Path; from tasks.hold_stage import hold_stage\n"
        "from internvl_core.supervision.watchdog import Limits; from tasks.launch import launch_command\n"
        "with hold_stage(Path(sys.argv[1]), 'pretrain-1', patience_s=0) as lock:\n"
        "    limits = Limits(setup_s=60, stall_s=60, save_s=2)\n"
        "    launch_command(['sleep', '60'], Path(sys.argv[1]) / '1', limits, locks=[lock])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    with pytest.raises(LeaseHeld), hold_stage(tmp_path):
        pytest.fail("its supervisor had already left")
    with hold_stage(tmp_path, patience_s=60):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
