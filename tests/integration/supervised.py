"""Attempts under a supervisor with fake ranks, and the processes that they leave; the fixtures are in conftest.py."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internvl_core.contract import STATE_FILE, StageFile
from tasks.launch import RunningStage
from tasks.torchrun_command import build_command

FAKES = Path(__file__).with_name("fakes")
MARK = "INTERNVL_TEST_MARK"
DEADLINE_S = 30.0
POLL_S = 0.02

AGENT = [sys.executable, str(FAKES / "agent.py")]
TRAINER = [sys.executable, str(FAKES / "trainer.py")]

STAGE = StageFile(
    run_id="test",
    stage="one",
    attempt=1,
    fingerprint="0" * 64,
    entry="pretrain",
    arguments={},
    launcher={"kind": "local", "nnodes": 1, "nproc_per_node": 2},
    store_uri="file:///nowhere",
    start_from=None,
    resume=False,
    save_budget_s=DEADLINE_S,
)


class SupervisedAttempt:
    """One attempt's directory, the processes that bear its mark, and what they left there."""

    def __init__(self, directory: Path, mark: str) -> None:
        self.directory = directory
        self._mark = f"{MARK}={mark}".encode()

    def find_processes(self) -> dict[int, str]:
        """Find the living processes of this attempt, by the mark in their environment."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if self._mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def read_state(self) -> dict[str, Any]:
        return json.loads((self.directory / STATE_FILE).read_text())

    def get_rank_pid(self, rank: int) -> int:
        return int((self.directory / f"rank-{rank}.pid").read_text())

    def find_torchrun(self) -> int:
        start = f"{sys.executable} -m torch.distributed.run "
        (pid,) = [pid for pid, command in self.find_processes().items() if command.startswith(start)]
        return pid

    def has_saved(self) -> bool:
        return all((self.directory / f"rank-{rank}.saved").exists() for rank in (0, 1))

    def wait_for_ranks(self) -> None:
        wait_for(lambda: all((self.directory / f"rank-{rank}.pid").exists() for rank in (0, 1)), "two ranks")

    def check_nothing_is_left(self) -> None:
        wait_for(lambda: not self.find_processes(), lambda: f"no process left: {self.find_processes()}")


def wait_for(condition: Callable[[], bool], what: str | Callable[[], str], *, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {deadline_s:g} s for {what if isinstance(what, str) else what()}")
        time.sleep(POLL_S)


def launch_ranks(
    launch: Callable[..., RunningStage], attempt: SupervisedAttempt, *options: str, **limits: float
) -> RunningStage:
    running = launch(*AGENT, f"--attempt_dir={attempt.directory}", *options, **limits)
    attempt.wait_for_ranks()
    return running


def build_torchrun(attempt: SupervisedAttempt, script: str, *options: str) -> list[str]:
    """Take the very torchrun of a stage, with a fake in place of the trainer's entry."""
    command = build_command(STAGE, attempt.directory)
    start = command.index("-m", command.index("torch.distributed.run"))
    assert command[start:] == ["-m", "internvl_core.pretrain", f"--attempt_dir={attempt.directory}"]
    return [*command[:start], str(FAKES / script), command[-1], *options]


def wait_for_exit(running: RunningStage) -> int:
    return running.process.wait(DEADLINE_S)
