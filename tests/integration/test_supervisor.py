"""The supervisor against every way to die: what is left alive, what was saved, which exit code."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from supervised import (
    AGENT,
    DEADLINE_S,
    FAKES,
    POLL_S,
    TRAINER,
    build_torchrun,
    launch_ranks,
    wait_for,
    wait_for_exit,
)

from internvl_core.contract import LOG_FILE, SUPERVISOR_SOCKET_VARIABLE, StageFailure
from internvl_core.errors import InternVLError, LeaseHeld, NonFinite, Preempted, WorkerLost
from internvl_core.supervision.ranks import Ranks

pytestmark = pytest.mark.integration


# Real torchrun


def test_torchrun_ranks_that_are_stopped_agree_on_a_step_and_leave_as_preempted(attempt, launch):
    tricky = "--text=--a 'b' \"c\" $(touch pwned) `d` ; e\n--f=g"
    running = launch(*build_torchrun(attempt, "gloo_rank.py", tricky))
    attempt.wait_for_ranks()

    running.stop()

    assert running.poll() == 75
    with pytest.raises(Preempted, match=f"committed. Log: {attempt.directory / LOG_FILE}$"):
        running.result()
    saved = [json.loads((attempt.directory / f"rank-{rank}.saved").read_text()) for rank in (0, 1)]
    assert saved[0]["step"] == saved[1]["step"]
    assert saved[0]["argv"] == [f"--attempt_dir={attempt.directory}", tricky]
    attempt.check_nothing_is_left()


# Being asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_long_save_completes_and_a_second_signal_changes_nothing(attempt, launch, number):
    running = launch_ranks(launch, attempt, "--save_s=1.5")

    os.kill(running.pid, number)
    wait_for(lambda: attempt.read_state()["state"] == "stopping", "the stop")
    os.kill(running.pid, signal.SIGTERM)

    assert wait_for_exit(running) == 75
    assert attempt.has_saved()
    attempt.check_nothing_is_left()


def test_a_third_signal_kills_at_once(attempt, launch):
    running = launch_ranks(launch, attempt, "--save_s=600")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(running.pid, number)

    assert wait_for_exit(running) == 75
    with pytest.raises(Preempted, match=r"Stopped on request without a new checkpoint: SIG.* not to be waited"):
        running.result()
    attempt.check_nothing_is_left()


def test_a_save_beyond_its_budget_is_killed(attempt, launch):
    running = launch_ranks(launch, attempt, "--save_s=600", save_budget_s=0.5)

    running.stop()

    assert running.poll() == 79
    with pytest.raises(WorkerLost, match=r"before a checkpoint was committed: .* budget of 0\.5 s"):
        running.result()
    attempt.check_nothing_is_left()


def test_a_rank_that_hangs_does_not_outlive_a_stop(attempt, launch):
    running = launch_ranks(launch, attempt, save_budget_s=0.5)
    os.kill(attempt.get_rank_pid(1), signal.SIGSTOP)

    running.stop()

    assert running.poll() == 79
    attempt.check_nothing_is_left()


def test_a_stop_before_any_rank_is_up_does_not_wait(attempt, launch):
    running = launch_ranks(launch, attempt, "--never_connect", save_budget_s=600)

    running.ask_to_stop()

    assert wait_for_exit(running) == 75
    assert "no rank was up yet" in StageFailure.get(attempt.directory).message
    attempt.check_nothing_is_left()


def test_a_rank_that_connects_after_the_stop_hears_of_it(attempt, launch):
    running = launch_ranks(launch, attempt, "--late_rank=1")

    running.stop()

    assert running.poll() == 75
    assert attempt.has_saved()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_another_user_is_no_rank(attempt, launch):
    running = launch_ranks(launch, attempt, "--save_s=1")
    environ = Path(f"/proc/{attempt.get_rank_pid(0)}/environ").read_text().split("\0")
    (name,) = [item.partition("=")[2] for item in environ if item.startswith(SUPERVISOR_SOCKET_VARIABLE)]
    code = f"""
import os, socket
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.settimeout({DEADLINE_S})
connection.connect("\\0{name}")
print(connection.recv(9))
"""
    stranger = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert stranger.stdout.strip() == "b''"
    running.stop()
    assert running.poll() == 75


# Owners that die


def test_a_command_without_ranks_dies_with_its_supervisor(attempt, launch):
    running = launch(*TRAINER, attempt.directory, "hang")
    wait_for(lambda: len(attempt.find_processes()) == 2, "the trainer")

    os.kill(running.pid, signal.SIGKILL)

    attempt.check_nothing_is_left()


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGINT", "raise"])
def test_a_flow_that_dies_or_leaves_stops_its_trainer_after_a_save(attempt, ending):
    command = [*AGENT, f"--attempt_dir={attempt.directory}", "--save_s=0.5"]
    flow = subprocess.Popen(
        [sys.executable, str(FAKES / "flow.py"), str(attempt.directory), ending, *command], stderr=subprocess.PIPE
    )
    attempt.wait_for_ranks()
    if ending != "raise":
        flow.send_signal(signal.Signals[ending])
    _, stderr = flow.communicate(timeout=DEADLINE_S)

    if ending == "SIGKILL":
        assert flow.returncode == -signal.SIGKILL
    else:
        # It waited for the trainer, and then went on with its own exception.
        assert not attempt.find_processes()
        assert (b"KeyboardInterrupt" if ending == "SIGINT" else b"TerminationSignal") in stderr
    attempt.check_nothing_is_left()
    assert attempt.has_saved()
    assert attempt.read_state()["exit_code"] == 75


def test_a_second_signal_to_the_flow_cuts_the_wait_and_not_the_save(attempt):
    command = [*AGENT, f"--attempt_dir={attempt.directory}", "--save_s=3"]
    flow = subprocess.Popen(
        [sys.executable, str(FAKES / "flow.py"), str(attempt.directory), "SIGINT", *command], stderr=subprocess.PIPE
    )
    attempt.wait_for_ranks()
    flow.send_signal(signal.SIGINT)
    wait_for(lambda: attempt.read_state()["state"] == "stopping", "the stop")
    flow.send_signal(signal.SIGINT)
    _, stderr = flow.communicate(timeout=DEADLINE_S)

    assert stderr.count(b"KeyboardInterrupt") > 1
    assert not attempt.has_saved()
    attempt.check_nothing_is_left()
    assert attempt.has_saved()
    assert attempt.read_state()["exit_code"] == 75


def test_a_rank_in_a_group_of_others_kills_only_itself(attempt):
    rank = (
        "from internvl_core.train.supervisor_link import SupervisorLink; import signal; "
        "SupervisorLink.connect(); signal.pause()"
    )
    parent = f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {rank!r}]).returncode)"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0internvl-test-{uuid.uuid4().hex}")
        server.listen()
        environment = os.environ | {SUPERVISOR_SOCKET_VARIABLE: server.getsockname()[1:].decode()}
        process = subprocess.Popen(
            [sys.executable, "-c", parent], env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
        )
        server.settimeout(DEADLINE_S)
        server.accept()[0].close()
    stdout, _ = process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 0
    assert int(stdout) == -signal.SIGKILL


def test_a_supervisor_that_is_held_up_holds_up_no_rank(tmp_path):
    code = """
import time
from internvl_core.supervision.progress import Phase
from internvl_core.train.supervisor_link import SupervisorLink
link = SupervisorLink.connect()
started = time.monotonic()
for step in range(20_000):
    link.tell(Phase.STEP, step)
print(time.monotonic() - started, flush=True)
time.sleep(60)
"""
    ranks = Ranks()
    environment = os.environ | {SUPERVISOR_SOCKET_VARIABLE: ranks.name, "RANK": "3"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as rank:
        assert float(rank.stdout.readline()) < DEADLINE_S
        messages = ranks.read()
        rank.kill()
    ranks.close()
    # Lines that did not fit are left out whole, the first is that of the connection.
    assert {message.rank for message in messages} == {3}
    assert [message.step for message in messages[1:]] == list(range(len(messages) - 1))
    assert len(messages) > 100


# How it ended


def test_a_finished_stage_returns_its_result_and_all_whole_metrics(attempt, launch):
    running = launch(*TRAINER, attempt.directory, "finish")

    steps = [metrics["step"] for metrics in running.iter_metrics(POLL_S)]

    assert steps == [1, 2, 3]
    assert running.poll() == 0
    assert running.result().step == 3
    state = attempt.read_state()
    assert (state["version"], state["state"], state["pid"], state["exit_code"]) == (1, "done", running.pid, 0)
    assert state["killed"] == 0


def test_metrics_that_nobody_read_in_time_are_there_after_the_end(attempt, launch):
    running = launch(*TRAINER, attempt.directory, "finish")
    wait_for_exit(running)

    assert [metrics["step"] for metrics in running.iter_metrics()] == [1, 2, 3]
    assert running.read_metrics() == []


def test_a_daemon_that_the_trainer_left_behind_is_killed(attempt, launch):
    running = launch(*TRAINER, attempt.directory, "finish-with-daemon")

    assert wait_for_exit(running) == 0
    attempt.check_nothing_is_left()
    assert attempt.read_state()["killed"] == 1


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [("NonFinite", 78), ("OutOfMemory", 71), ("Preempted", 75), ("ArgumentError", 64), ("Odd", 70)],
)
def test_the_class_in_failure_json_decides_the_exit_code(attempt, launch, error, exit_code):
    running = launch(*TRAINER, attempt.directory, "fail", error)

    assert wait_for_exit(running) == exit_code
    with pytest.raises(InternVLError, match=f"step 3: no luck. Log: {attempt.directory / LOG_FILE}$") as raised:
        running.result()
    assert raised.value.exit_code == exit_code


def test_a_failure_of_one_rank_does_not_wait_for_those_that_hang(attempt, launch):
    running = launch_ranks(launch, attempt, "--fail_rank=1")
    start = time.monotonic()

    assert wait_for_exit(running) == 78

    assert time.monotonic() - start < 10  # 5 s are granted; torchrun's own 30 s would be too long
    with pytest.raises(NonFinite, match="loss is nan"):
        running.result()
    attempt.check_nothing_is_left()


def test_a_trainer_that_returns_without_a_result_is_a_fault_of_ours(attempt, launch):
    running = launch(*TRAINER, attempt.directory, "return")

    assert wait_for_exit(running) == 70
    with pytest.raises(InternVLError, match=r"wrote no result\.json"):
        running.result()
    assert StageFailure.get(attempt.directory).traceback == "nothing to do"


@pytest.mark.parametrize(
    ("ending", "cause"),
    [
        (("die", "SIGSEGV"), "the trainer's command was killed by SIGSEGV. Log"),
        (("die", "SIGKILL"), "killed by SIGKILL, possibly by the kernel because memory ran out"),
        (("exit", "3"), "the trainer's command ended with exit code 3"),
    ],
)
def test_a_death_without_a_word_is_a_lost_worker_with_its_cause(attempt, launch, ending, cause):
    running = launch(*TRAINER, attempt.directory, *ending)

    assert wait_for_exit(running) == 79
    with pytest.raises(WorkerLost, match=cause):
        running.result()


def test_a_second_supervisor_is_told_who_holds_the_attempt(attempt, launch):
    first = launch_ranks(launch, attempt)

    second = launch(*TRAINER, attempt.directory, "finish")

    assert wait_for_exit(second) == 73
    with pytest.raises(LeaseHeld, match=f"is being run by pid {first.pid} on "):
        second.result()
    first.stop()
    assert first.poll() == 75


@pytest.mark.parametrize("ending", [("finish",), ("fail", "NonFinite")])
def test_an_attempt_that_is_over_is_not_run_again(attempt, launch, ending):
    wait_for_exit(launch(*TRAINER, attempt.directory, *ending))

    again = launch(*TRAINER, attempt.directory, "finish")

    assert wait_for_exit(again) == 64
    with pytest.raises(InternVLError, match="that attempt is over"):
        again.result()


def test_a_command_that_does_not_exist_is_refused_with_its_name(attempt, launch):
    running = launch(attempt.directory / "no-such-program")

    assert wait_for_exit(running) == 64
    with pytest.raises(InternVLError, match=r"Cannot start .*no-such-program"):
        running.result()


# The log and the arguments


def test_a_log_of_20000_lines_arrives_whole(attempt, launch):
    running = launch(*TRAINER, attempt.directory, "chatter", 20_000)
    seen, skipped = [], 0

    def read() -> None:
        nonlocal skipped
        for line in running.read_log().splitlines():
            if line.startswith("["):
                skipped += int(line[1:].split()[0])
            else:
                seen.append(int(line.split()[1]))

    while running.poll() is None:
        read()
    read()

    assert running.poll() == 0
    assert len(seen) + skipped == 20_000
    assert seen == sorted(seen)
    assert seen[-1] == 19_999
    lines = (attempt.directory / LOG_FILE).read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(20_000))


def test_every_argument_reaches_the_command_literally(attempt, launch):
    items = [
        "a b",
        "'q'",
        '"dq"',
        "$(id)",
        "`id`",
        "--",
        "-x",
        "--save-budget=1",
        "",
        "*",
        "~",
        "\n",
        "é",
        "#",
        "a;b|c&d",
    ]
    running = launch(*TRAINER, attempt.directory, "echo", *items)

    assert wait_for_exit(running) == 0
    assert json.loads((attempt.directory / "argv.json").read_text()) == items


def test_a_save_that_outlasts_the_flow_is_finished_without_it(attempt, launch):
    running = launch_ranks(launch, attempt, "--save_s=3", save_budget_s=600, leave_after_s=0.5)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), running:
        raise KeyboardInterrupt
    assert running.poll() is None
    assert time.monotonic() - began < 3
    assert not attempt.has_saved()
    wait_for(lambda: running.poll() is not None, "the supervisor ends")
    assert running.poll() == Preempted.exit_code
    assert attempt.has_saved()
    attempt.check_nothing_is_left()
