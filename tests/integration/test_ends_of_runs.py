"""Ends of runs that take minutes: a machine that goes down, a cancel while a checkpoint is scored."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from processes import list_processes, wait_until
from servers_up import (
    COMMAND,
    Up,
    describe_long_run,
    get_environment,
    is_committed,
    start_long_run,
    start_up,
    wait_for_training,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SAVES = {"save_strategy": "steps", "save_steps": 20}
SERVED = {"name": {"any_": ["served"]}}
HEARTBEAT_S = 30
"""The shortest that Prefect takes; the default is 180."""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with start_up(tmp_path_factory.mktemp("servers"), until="Ctrl-C stops") as started:
        yield started


@pytest.fixture
def short_watch(up: Up) -> Iterator[None]:
    """Have the server miss runs with HEARTBEAT_S after three of them, as it does with the default."""
    (automation,) = up.post("automations/filter")
    path = f"automations/{automation['id']}"
    content = {name: value for name, value in automation.items() if name not in ("id", "created", "updated")}
    shorter = {"trigger": {**automation["trigger"], "within": 3 * HEARTBEAT_S}}
    up.ask("PUT", path, {**content, **shorter}).raise_for_status()
    yield
    up.ask("PUT", path, content).raise_for_status()


def count_heartbeats(up: Up, run_id: str) -> int:
    wanted = {
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "resource": {"id": [f"prefect.flow-run.{run_id}"]},
    }
    return int(up.post("events/filter", filter=wanted)["total"])


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.fault(
    63,
    "the machine goes down while a stage trains",
    how="SIGKILL of worker, flow, supervisor and ranks at once",
    then="internvl up marks the run as Crashed; the same recipe resumes from the newest commit",
)
def test_a_run_that_dies_with_its_machine_is_marked_as_crashed_and_resumed_by_the_same_recipe(
    up: Up, tmp_path: Path
) -> None:
    run_id = start_long_run(up, tmp_path, **SAVES)
    wait_until(lambda: is_committed(tmp_path), "nothing was committed")
    # The worker first: it would mark the run itself.
    kill([*list_processes(up.directory, "prefect worker start"), *list_processes(run_id)])
    wait_until(lambda: up.get_state(run_id) == "CRASHED", "it was not marked")
    assert up.get(f"flow_runs/{run_id}")["state"]["message"] == "Its process is gone."

    def has_resumed() -> bool:
        logs = (tmp_path / "attempts").glob("stage1-*/2/trainer.log")
        return any("Resuming from step" in path.read_text() for path in logs)

    again = up.create_run("pretrain/pretrain", describe_long_run(tmp_path, **SAVES)).json()["id"]
    wait_until(has_resumed, "it did not resume", deadline_s=120)
    up.post(f"flow_runs/{again}/set_state", state={"type": "CANCELLING"})
    wait_until(lambda: up.get_state(again) == "CANCELLED", "it was not cancelled")


@pytest.mark.fault(
    63,
    "the machine of a run that nobody else looks after goes down",
    how="SIGKILL of internvl run, supervisor and ranks at once",
    then="the server marks it as Crashed when three heartbeats are missing, and not before",
)
@pytest.mark.usefixtures("short_watch")
def test_a_run_whose_heartbeats_end_is_marked_as_crashed(up: Up, tmp_path: Path) -> None:
    environment = get_environment(
        PREFECT_API_URL=up.api_url,
        PREFECT_HOME=str(tmp_path / "prefect"),
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY=str(HEARTBEAT_S),
    )
    settings = {"workspace": tmp_path, "stages.stage1.arguments.max_steps": 100_000}
    chosen = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
    command = [*COMMAND, "run", "smoke", "--stage=stage1", *chosen]
    with (tmp_path / "run.log").open("wb") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for_training(tmp_path)
        (run,) = up.post("flow_runs/filter", flow_runs={"state": {"type": {"any_": ["RUNNING"]}}})
        wait_until(lambda: count_heartbeats(up, run["id"]) == 5, "no heartbeats", deadline_s=6 * HEARTBEAT_S)
        assert up.get_state(run["id"]) == "RUNNING", "a run that lives was marked"
    finally:
        kill([running.pid, *list_processes(tmp_path)])
        running.wait()
    wait_until(lambda: up.get_state(run["id"]) == "CRASHED", "it was not marked", deadline_s=6 * HEARTBEAT_S)
    assert up.get(f"flow_runs/{run['id']}")["state"]["message"] == "Its process is gone: no heartbeat."


def test_a_cancel_of_a_served_flow_commits_and_leaves_no_rank(up: Up, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from flows.pretrain import pretrain; pretrain.serve(name='served')"]
    environment = get_environment(PREFECT_API_URL=up.api_url, PREFECT_HOME=str(tmp_path / "serving"))
    with (tmp_path / "served.log").open("wb") as log:
        serving = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: up.post("deployments/filter", deployments=SERVED), "nothing is served", deadline_s=60)
        run_id = start_long_run(up, tmp_path, deployment="pretrain/served")
        up.post(f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})
        wait_until(lambda: up.get_state(run_id) == "CANCELLED", "it was not cancelled", deadline_s=60)
        assert not list_processes(tmp_path, "--attempt_dir=")
        assert is_committed(tmp_path), "the stop did not commit"
    finally:
        serving.terminate()
        serving.wait(60)


@pytest.mark.fault(
    60,
    "a nightly finetune is cancelled while its candidate is scored",
    how="Cancelling, as the UI sets it",
    then="Cancelled when no rank is left; the next night scores it without training again",
)
def test_a_cancel_while_a_candidate_is_scored_leaves_no_rank_and_the_next_night_goes_on_there(
    up: Up, tmp_path: Path
) -> None:
    overrides = {
        "workspace": str(tmp_path),
        "launcher.nproc_per_node": 1,
        "stages.finetune.arguments.max_steps": 2,
        # Half a minute of answers.
        "stages.finetune.arguments.per_device_eval_batch_size": 1,
        "stages.finetune.arguments.eval_max_new_tokens": 32,
    }
    given = {"recipe": "smoke-nightly", "model": "digits", "overrides": overrides}

    def is_scoring() -> bool:
        logs = (tmp_path / "evaluations").glob("*/1/trainer.log")
        return any("Asking" in path.read_text() for path in logs)

    run_id = up.create_run("finetune-nightly/finetune-nightly", given).json()["id"]
    wait_until(is_scoring, "the candidate was not scored", deadline_s=300)
    up.post(f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})
    wait_until(lambda: up.get_state(run_id) == "CANCELLED", "it was not cancelled", deadline_s=60)
    assert not list_processes(tmp_path, "--attempt_dir=")
    (failure,) = (tmp_path / "evaluations").glob("*/1/failure.json")
    assert "Stopped on request during the evaluation" in json.loads(failure.read_text())["message"]

    again = up.create_run("finetune-nightly/finetune-nightly", given).json()["id"]
    wait_until(lambda: up.get_state(again) in ("COMPLETED", "FAILED", "CRASHED"), "it did not end", deadline_s=300)
    assert up.get(f"flow_runs/{again}")["state"]["name"] == "Promoted"
    assert len(list((tmp_path / "attempts").glob("finetune-*/[0-9]*"))) == 1, "it was trained again"
