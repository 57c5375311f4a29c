"""Faults of the processes around the trainer, and of ranks as the supervisor sees them; ranks without torch."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervised import build_torchrun, launch_ranks, wait_for, wait_for_exit

from internvl_core.contract import LOG_FILE, StageFailure
from internvl_core.errors import Preempted, WorkerLost

pytestmark = pytest.mark.integration

MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")
MEMORY_LIMIT_BYTES = 200 << 20


# Deaths


@pytest.mark.fault(28, "torchrun is killed", how="SIGKILL", then="no rank is left, WorkerLost, exit 79")
def test_a_killed_torchrun_leaves_no_rank(attempt, launch):
    running = launch(*build_torchrun(attempt, "rank.py"))
    attempt.wait_for_ranks()
    os.kill(attempt.find_torchrun(), signal.SIGKILL)
    died = time.monotonic()
    assert wait_for_exit(running) == 79
    assert time.monotonic() - died < 5
    attempt.check_nothing_is_left()
    assert attempt.read_state()["killed"] == 4  # two ranks, each with a data worker
    assert "the trainer's command was killed by SIGKILL" in StageFailure.get(attempt.directory).message


@pytest.mark.fault(30, "the supervisor is killed", how="SIGKILL", then="all ranks leave at the end of its socket")
def test_a_killed_supervisor_leaves_nothing(attempt, launch):
    running = launch_ranks(launch, attempt)
    os.kill(running.pid, signal.SIGKILL)
    assert wait_for_exit(running) == -signal.SIGKILL
    attempt.check_nothing_is_left()
    with pytest.raises(WorkerLost, match="The supervisor itself was killed by SIGKILL"):
        running.result()


@pytest.mark.fault(11, "a rank is killed", how="SIGKILL", then="WorkerLost names the rank; all gone")
@pytest.mark.fault(13, "a rank crashes", how="SIGSEGV, SIGABRT, SIGBUS", then="WorkerLost names rank and signal")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGABRT", "SIGBUS"])
def test_a_rank_that_dies_takes_all_with_it_and_is_named_with_its_signal(attempt, launch, name):
    running = launch(*build_torchrun(attempt, "rank.py"))
    attempt.wait_for_ranks()
    os.kill(attempt.get_rank_pid(1), signal.Signals[name])
    assert wait_for_exit(running) == 79
    culprit = ", possibly by the kernel because memory ran out" if name == "SIGKILL" else ""
    with pytest.raises(WorkerLost, match=rf"rank 1 was killed by {name}{culprit} after step 7\. Log: .*trainer\.log$"):
        running.result()
    failure = StageFailure.get(attempt.directory)
    assert (failure.rank, failure.step) == (1, 7)
    attempt.check_nothing_is_left()


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """Make a cgroup with little memory, for one rank."""
    cgroup = MEMORY_CGROUP / f"internvl-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"needs root and the memory controller of cgroup v1: {error}")
    (cgroup / "memory.limit_in_bytes").write_text(str(MEMORY_LIMIT_BYTES))
    yield cgroup
    cgroup.rmdir()


@pytest.mark.fault(26, "the kernel kills a rank for want of memory", how="memory limit of a cgroup", then="exit 71")
def test_a_rank_that_the_kernel_kills_for_want_of_memory_is_out_of_memory(attempt, launch, memory_cgroup):
    running = launch(*build_torchrun(attempt, "rank.py", "--use_memory_rank=1", f"--cgroup={memory_cgroup}"))
    assert wait_for_exit(running) == 71
    failure = StageFailure.get(attempt.directory)
    assert (failure.error, failure.rank) == ("OutOfMemory", 1)
    assert "rank 1 was killed by SIGKILL, by the kernel because the memory of" in failure.message
    assert str(memory_cgroup) in failure.message
    attempt.check_nothing_is_left()


@pytest.mark.fault(29, "a port is taken", how="bound before", then="the kernel gives torchrun another; nothing fails")
def test_a_taken_port_is_not_asked_for(attempt, launch):
    # 29400 is what torchrun takes by default, 29500 what torch.distributed does.
    with socket.socket() as first, socket.socket() as second:
        for port, taken in ((29400, first), (29500, second)):
            taken.bind(("", port))
            taken.listen()
        running = launch(*build_torchrun(attempt, "gloo_rank.py"))
        attempt.wait_for_ranks()
        running.stop()
    assert running.poll() == 75, (attempt.directory / LOG_FILE).read_text()


# Told to stop


@pytest.mark.fault(14, "all ranks are told to stop", how="SIGTERM to torchrun", then="one step, a save, exit 75")
def test_sigterm_to_torchrun_stops_all_ranks_at_the_same_step(attempt, launch):
    running = launch(*build_torchrun(attempt, "gloo_rank.py"))
    attempt.wait_for_ranks()
    os.kill(attempt.find_torchrun(), signal.SIGTERM)
    assert wait_for_exit(running) == 75
    with pytest.raises(Preempted, match="Stopped at step"):
        running.result()
    assert re.match("SIGTERM to rank [01]$", attempt.read_state()["reason"])
    attempt.check_nothing_is_left()


@pytest.mark.fault(16, "told twice to stop", how="SIGTERM twice to a rank", then="the second changes nothing")
def test_a_second_signal_to_a_rank_that_saves_changes_nothing(attempt, launch):
    running = launch_ranks(launch, attempt, "--save_s=1")
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(attempt.get_rank_pid(1), number)
        wait_for(lambda: attempt.read_state()["state"] == "stopping", "the stop")
    assert wait_for_exit(running) == 75
    assert attempt.has_saved()


@pytest.mark.fault(16, "told three times to stop", how="SIGTERM, SIGTERM, SIGINT", then="exit 75 without a commit")
def test_a_third_signal_to_a_rank_ends_all_without_a_save(attempt, launch):
    running = launch_ranks(launch, attempt, "--save_s=600")
    started = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(attempt.get_rank_pid(1), number)
    assert wait_for_exit(running) == 75
    assert time.monotonic() - started < 10
    with pytest.raises(Preempted, match=r"without a new checkpoint: .*SIG.* to rank 1: not to be waited for"):
        running.result()
    assert not attempt.has_saved()
    attempt.check_nothing_is_left()


@pytest.mark.fault(18, "told to stop early or late", how="SIGTERM to a rank in a phase", then="75 within 10 s")
@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("setup", r"Stopped on request \(SIGTERM to rank 0\): before the first step, so nothing new was to save"),
        ("evaluate", "during the evaluation: the trained weights are committed, only the evaluation is left"),
    ],
)
def test_a_stop_does_not_wait_for_ranks_that_have_nothing_to_save(attempt, launch, phase, message):
    running = launch_ranks(launch, attempt, f"--phase={phase}", save_budget_s=600)
    started = time.monotonic()
    os.kill(attempt.get_rank_pid(0), signal.SIGTERM)
    assert wait_for_exit(running) == 75
    assert time.monotonic() - started < 10
    with pytest.raises(Preempted, match=message):
        running.result()
    attempt.check_nothing_is_left()


# Standing still


def get_stack(failure: StageFailure, rank: int) -> str:
    _, _, stack = failure.traceback.partition(f"rank {rank}, ")
    return stack.partition(f"rank {rank + 1}, ")[0]


@pytest.mark.fault(19, "a rank is stopped", how="SIGSTOP", then="Stalled with the stacks of all, exit 77")
def test_a_stopped_rank_ends_the_run_and_is_named(attempt, launch):
    running = launch_ranks(launch, attempt, "--lockstep", stall_limit_s=1)
    wait_for(lambda: (attempt.directory / "rank-1.step-3").exists(), "step 3")
    os.kill(attempt.get_rank_pid(1), signal.SIGSTOP)
    assert wait_for_exit(running) == 77
    failure = StageFailure.get(attempt.directory)
    assert (failure.error, failure.rank) == ("Stalled", 1)
    assert failure.step >= 3
    assert re.match(r"No progress for [12] s in phase step, after step \d+; its limit is \d", failure.message)
    assert re.search(r"Behind the others \(step, step \d+\): rank 1 \(step, step \d+\)\.", failure.message)
    assert re.search(r"^rank 1, process \d+, stopped.*: did not answer\.$", failure.traceback, re.MULTILINE)
    # The other one waits, and says where.
    assert " in make_steps\n" in get_stack(failure, 0)
    attempt.check_nothing_is_left()


@pytest.mark.fault(20, "a rank holds its GIL", how="C sleep that keeps the GIL", then="Stalled with its stack, exit 77")
def test_a_rank_that_holds_its_gil_tells_its_stack_all_the_same(attempt, launch):
    running = launch_ranks(launch, attempt, "--lockstep", "--hold_gil_rank=1", stall_limit_s=1)
    assert wait_for_exit(running) == 77
    failure = StageFailure.get(attempt.directory)
    assert (failure.error, failure.rank) == ("Stalled", 1)
    assert " in hold_gil\n" in get_stack(failure, 1)
    attempt.check_nothing_is_left()


@pytest.mark.fault(19, "ranks never get to a first step", how="they wait", then="Stalled after setup_limit_s, exit 77")
def test_ranks_without_a_first_step_are_ended_after_the_limit_of_the_setup(attempt, launch):
    running = launch_ranks(launch, attempt, "--phase=setup", setup_limit_s=2)
    assert wait_for_exit(running) == 77
    failure = StageFailure.get(attempt.directory)
    assert re.match(r"No progress for \d+ s in phase setup, before the first step; its limit is 2 s\.", failure.message)
    assert len(re.findall(r"^rank \d, process \d+, sleeping", failure.traceback, re.MULTILINE)) == 2
    attempt.check_nothing_is_left()


@pytest.mark.fault(40, "a save takes long", how="a save of 3 s under a limit of 1 s", then="it is waited for")
def test_a_long_save_is_no_stall(attempt, launch):
    running = launch_ranks(launch, attempt, "--save_s=3", stall_limit_s=1)
    running.ask_to_stop()
    assert wait_for_exit(running) == 75
    assert attempt.has_saved()
