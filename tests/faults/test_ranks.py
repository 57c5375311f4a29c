"""Faults of the ranks of a real training: they raise, die, hang, or are told to stop."""

import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rank_faults import Fault, let_go
from stage_runs import Attempt, Inputs, make_inputs, wait
from stage_runs import launch as launch_stage
from supervised import SupervisedAttempt, wait_for

from internvl_core.contract import METRICS_FILE
from internvl_core.supervision.process_tree import find_descendants
from tasks.launch import RunningStage

pytestmark = pytest.mark.integration

MANY_STEPS = 500
SETUP_S = 120
"""The first step of a training here takes 10 s, or many times that where all cores are busy."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def arguments(inputs: Inputs) -> dict[str, Any]:
    """Two steps without an evaluation."""
    return {**inputs.arguments, "eval_meta_path": None}


@pytest.fixture
def train(attempt: SupervisedAttempt) -> Callable[..., RunningStage]:
    """Launch a training with a store of its own."""
    return partial(launch_stage, attempt.directory, store=attempt.directory / "store")


def find_ranks(attempt: SupervisedAttempt) -> dict[int, int]:
    """Find the process of each rank: the leaders of a session in whose environment torchrun put a number."""
    found = {}
    for pid in attempt.find_processes():
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next((item for item in environ if item.startswith(b"RANK=")), None)
            if rank is not None and os.getsid(pid) == pid:
                found[int(rank.removeprefix(b"RANK="))] = pid
        except (OSError, ProcessLookupError):
            continue
    return found


def wait_for_step(directory: Path, step: int) -> None:
    path = directory / METRICS_FILE
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= step, f"step {step}", deadline_s=SETUP_S)


def wait_for_fault(fault: Fault, directory: Path, *ranks: int) -> None:
    wait_for(lambda: all(fault.has_happened(directory, rank) for rank in ranks or (0, 1)), fault.at, deadline_s=SETUP_S)


def stop_during(fault: Fault, attempt: SupervisedAttempt) -> float:
    """Send SIGTERM to rank 1 at the point where ranks pause, then let them go on; return when."""
    wait_for_fault(fault, attempt.directory)
    os.kill(find_ranks(attempt)[1], signal.SIGTERM)
    wait_for(lambda: attempt.read_state()["state"] == "stopping", "the stop")
    assert attempt.read_state()["reason"] == "SIGTERM to rank 1"
    let_go(attempt.directory)
    return time.monotonic()


def check_stopped(stopped: Attempt, message: str, *, steps: list[int]) -> None:
    assert (stopped.exit_code, stopped.failure.error) == (75, "Preempted"), stopped.log[-3000:]
    assert re.match(message, stopped.failure.message), stopped.failure.message
    assert [commit.step for commit in stopped.commits] == steps


# One rank only


@pytest.mark.fault(12, "one rank raises", how="exception on rank 1", then="all end, its traceback is shown once")
def test_an_exception_on_one_rank_ends_all_and_is_shown_once(attempt, train, arguments):
    fault = Fault("raise", "on_step_end", step=1, rank=1, message="only here")
    with train(arguments, faults=[fault]) as running:
        wait_for_fault(fault, attempt.directory, 1)
        raised = time.monotonic()
        ended = wait(running)
    assert time.monotonic() - raised < 15
    assert (ended.exit_code, ended.failure.error, ended.failure.rank) == (70, "InternVLError", 1)
    assert ended.failure.message == "RuntimeError: only here"
    ranks_log = ended.log.partition("torch/distributed/elastic/")[0]
    assert ranks_log.count("Traceback (most recent call last)") == 1
    assert ended.commits == []
    attempt.check_nothing_is_left()


@pytest.mark.fault(41, "a rank fails its part of a save", how="exception on rank 1", then="no commit; all end, exit 70")
def test_a_save_of_which_one_rank_fails_its_part_is_not_committed(attempt, train, arguments):
    fault = Fault("raise", "internvl_core.train.trainer:InternVLTrainer._save_rng_state", rank=1, message="no room")
    saving = {**arguments, "save_strategy": "steps", "save_steps": 1}
    with train(saving, faults=[fault]) as running:
        wait_for_fault(fault, attempt.directory, 1)
        failed = time.monotonic()
        ended = wait(running)
    assert time.monotonic() - failed < 15
    assert (ended.exit_code, ended.failure.message, ended.failure.rank) == (70, "RuntimeError: no room", 1)
    assert ended.commits == []
    attempt.check_nothing_is_left()


@pytest.mark.fault(11, "a rank is killed", how="SIGKILL at a step", then="WorkerLost names rank and step; all gone")
@pytest.mark.fault(13, "a rank crashes", how="SIGSEGV at a step", then="WorkerLost names the signal; stack in the log")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_rank_that_dies_in_a_step_is_named_and_takes_all_with_it(attempt, train, arguments, name):
    fault = Fault(name, "on_step_begin", step=1, rank=1)
    with train(arguments, faults=[fault]) as running:
        wait_for_fault(fault, attempt.directory, 1)
        died = time.monotonic()
        ended = wait(running)
    assert time.monotonic() - died < 15
    assert (ended.exit_code, ended.failure.error) == (79, "WorkerLost"), ended.log[-3000:]
    # Not rank 0, in which the collective failed.
    assert f"rank 1 was killed by {name}" in ended.failure.message
    assert (ended.failure.rank, ended.failure.step) == (1, 1)
    if name == "SIGSEGV":
        assert "Fatal Python error: Segmentation fault" in ended.log
    attempt.check_nothing_is_left()


@pytest.mark.fault(5, "a worker of the data loader is killed", how="SIGKILL", then="WorkerLost, exit 79; a retry helps")
def test_a_killed_worker_of_the_data_loader_ends_the_run(attempt, train, arguments):
    with train({**arguments, "max_steps": MANY_STEPS, "dataloader_num_workers": 1}) as running:
        wait_for_step(attempt.directory, 1)
        (worker,) = find_descendants(find_ranks(attempt)[1])
        os.kill(worker, signal.SIGKILL)
        ended = wait(running)
    assert (ended.exit_code, ended.failure.error, ended.failure.rank) == (79, "WorkerLost", 1), ended.log[-3000:]
    assert "A worker of the data loader was lost" in ended.failure.message
    attempt.check_nothing_is_left()


@pytest.mark.fault(21, "a collective hangs", how="rank 1 never joins it", then="Stalled with stacks, exit 77")
def test_a_rank_that_does_not_join_a_collective_is_a_stall(attempt, train, arguments):
    fault = Fault("hang", "internvl_core.train.callbacks:ConsensusCallback.on_step_end", call=2, rank=1)
    with train({**arguments, "stall_limit_s": 3}, faults=[fault]) as running:
        ended = wait(running)
    assert (ended.exit_code, ended.failure.error) == (77, "Stalled"), ended.log[-3000:]
    assert "in phase step, after step 2" in ended.failure.message
    _, waits, hangs = re.split(r"^rank \d, ", ended.failure.traceback, flags=re.MULTILINE)
    assert "torch/distributed/distributed_c10d.py" in waits
    assert " in carry_out\n" in hangs
    assert ended.commits == []
    attempt.check_nothing_is_left()


# Told to stop


@pytest.mark.fault(15, "one rank is told to stop", how="SIGTERM to rank 1", then="all commit at one step, exit 75")
def test_sigterm_to_one_rank_stops_all_at_the_same_step(attempt, train, arguments):
    with train({**arguments, "max_steps": MANY_STEPS}) as running:
        wait_for_step(attempt.directory, 1)
        os.kill(find_ranks(attempt)[1], signal.SIGTERM)
        stopped = wait(running)
    (commit,) = stopped.commits
    check_stopped(stopped, f"Stopped on request at step {commit.step}; a checkpoint is committed.", steps=[commit.step])
    assert attempt.read_state()["reason"] == "SIGTERM to rank 1"
    attempt.check_nothing_is_left()


@pytest.mark.fault(14, "all ranks are told to stop", how="SIGTERM to torchrun", then="one step, a save, exit 75")
def test_sigterm_to_torchrun_lets_ranks_and_their_workers_end_a_step_and_save(attempt, train, arguments):
    with train({**arguments, "max_steps": MANY_STEPS, "dataloader_num_workers": 1}) as running:
        wait_for_step(attempt.directory, 1)
        os.kill(attempt.find_torchrun(), signal.SIGTERM)
        stopped = wait(running)
    (commit,) = stopped.commits
    check_stopped(stopped, f"Stopped on request at step {commit.step}; a checkpoint is committed.", steps=[commit.step])
    attempt.check_nothing_is_left()


@pytest.mark.fault(17, "told to stop during a save", how="SIGTERM to rank 1", then="it is committed, no second one")
def test_a_stop_during_a_save_finishes_it_and_makes_no_second_one(attempt, train, arguments):
    fault = Fault("pause", "internvl_core.train.trainer:InternVLTrainer._save_checkpoint")
    saving = {**arguments, "max_steps": MANY_STEPS, "save_strategy": "steps", "save_steps": 2}
    with train(saving, faults=[fault]) as running:
        stop_during(fault, attempt)
        stopped = wait(running)
    check_stopped(stopped, "Stopped on request at step 2; a checkpoint is committed.", steps=[2])
    attempt.check_nothing_is_left()


@pytest.mark.fault(18, "told to stop early or late", how="SIGTERM to rank 1 at a point", then="75, saved or not")
@pytest.mark.parametrize(
    ("at", "message", "steps"),
    [
        ("internvl_core.train.run:build_model", r"Stopped on request.* before the first step", []),
        ("on_step_begin", "Stopped on request at step 1; a checkpoint is committed.", [1]),
        ("internvl_core.train.held_out:evaluate_held_out", "Stopped on request during the evaluation: the", [2]),
    ],
    ids=["while the model loads", "before the first step", "during the evaluation"],
)
def test_a_stop_at_any_time_leaves_within_seconds(attempt, train, inputs, at, message, steps):
    fault = Fault("pause", at)
    with train(inputs.arguments, faults=[fault]) as running:
        told = stop_during(fault, attempt)
        stopped = wait(running)
    check_stopped(stopped, message, steps=steps)
    assert time.monotonic() - told < 15
    attempt.check_nothing_is_left()
