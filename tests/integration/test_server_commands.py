"""`internvl up`: a Prefect server, MLflow and a worker that really start, run a flow, and are gone after Ctrl-C.

In the order of the file: one `up` serves all tests but the last two.
"""

import os
import re
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from processes import find_ranks, list_processes, wait_until
from servers_up import COMMAND, QUICK, Up, get_environment, is_committed, start_long_run, start_up

pytestmark = pytest.mark.integration

NIGHTLY = "deployments/name/finetune-nightly/finetune-nightly"


def find_process(up: Up, word: str) -> int | None:
    return next(iter(list_processes(up.directory, word)), None)


def find_worker(up: Up) -> int | None:
    return find_process(up, "prefect worker start")


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def answers(up: Up) -> bool:
    try:
        return httpx.get(f"{up.api_url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


def read_states(directory: Path) -> dict[str, str]:
    """Read the runs' states, by their ids, from the database of a server that is gone."""
    with closing(sqlite3.connect(directory / "prefect" / "prefect.db")) as database:
        return dict(database.execute("SELECT id, state_type FROM flow_run").fetchall())


def list_schedules(up: Up, deployment: str) -> list[tuple[str, bool, dict[str, str]]]:
    schedules = up.get(deployment)["schedules"]
    return sorted((each["schedule"]["cron"], each["active"], each["parameters"]) for each in schedules)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def up(directory: Path) -> Iterator[Up]:
    # What a shell is set to is about other servers.
    elsewhere = {"PREFECT_API_URL": "http://127.0.0.1:1/api", "MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    database = "sqlite+aiosqlite:////nowhere/prefect.db"
    with start_up(
        directory, until="Ctrl-C stops", PREFECT_SERVER_DATABASE_CONNECTION_URL=database, **elsewhere
    ) as started:
        yield started


def test_the_deployments_have_a_form_that_refuses_what_is_wrong(up: Up) -> None:
    schema = up.get("deployments/name/pretrain/pretrain")["parameter_openapi_schema"]
    assert all(field.get("description") for field in schema["properties"].values())
    (shipped, _) = schema["properties"]["recipe"]["anyOf"]
    assert "smoke" in shipped["enum"]
    # The default UI cannot edit a discriminated union.
    assert "oneOf" not in str(schema)
    for wrong in ({}, {"recipe": "smokee"}, {"recipe": "smoke", "store_uri": "http://a/b"}):
        answer = up.create_run("pretrain/pretrain", wrong)
        assert answer.status_code in (409, 422), (wrong, answer.text)


def test_the_server_watches_for_runs_whose_process_is_gone(up: Up) -> None:
    names = [automation["name"] for automation in up.post("automations/filter")]
    assert names == ["internvl: mark dead runs as crashed"]


def test_deploying_again_updates_what_is_there_but_not_what_somebody_set(up: Up) -> None:
    automation = up.post("automations/filter")[0]
    old = {"trigger": {**automation["trigger"], "within": 90}, "enabled": False}
    content = {name: value for name, value in {**automation, **old}.items() if name not in ("id", "created", "updated")}
    up.ask("PUT", f"automations/{automation['id']}", content).raise_for_status()
    up.patch("work_pools/internvl", concurrency_limit=7)
    nightly = up.get(NIGHTLY)
    (schedule,) = nightly["schedules"]
    path, own = f"deployments/{nightly['id']}", {"recipe": "smoke-nightly"}
    up.patch(path, parameters={"model": "mine"}, paused=True)
    up.patch(f"{path}/schedules/{schedule['id']}", active=True, parameters=own)
    # As the UI adds them, without a slug.
    added = [{"active": True, "schedule": {"cron": f"0 {hour} * * *"}, "parameters": own} for hour in (5, 6)]
    pretraining = f"deployments/{up.get('deployments/name/pretrain/pretrain')['id']}"
    for each in (path, pretraining):
        up.ask("POST", f"{each}/schedules", added).raise_for_status()

    def deploy(*options: str) -> set[str]:
        environment = get_environment(PREFECT_API_URL=up.api_url, PREFECT_HOME=str(up.directory / "deploying"))
        subprocess.run([*COMMAND, "deploy", *options], env=environment, check=True, timeout=120)
        return {each["work_pool_name"] for each in up.post("deployments/filter")}

    assert deploy("--pool", "gpus") == {"gpus"}
    (updated,) = up.post("automations/filter")
    assert updated["id"] == automation["id"]
    assert updated["trigger"]["within"] == 540
    assert not updated["enabled"], "somebody had switched it off"
    assert deploy() == {"internvl"}
    assert up.get("work_pools/internvl")["concurrency_limit"] == 7
    found = up.get(NIGHTLY)
    assert (found["parameters"], found["paused"]) == ({"model": "mine"}, True)
    assert list_schedules(up, path) == [("0 5 * * *", True, own), ("0 6 * * *", True, own), ("30 3 * * *", True, own)]
    assert list_schedules(up, pretraining) == [("0 5 * * *", True, own), ("0 6 * * *", True, own)]
    for each in (path, pretraining):
        for schedule in up.get(each)["schedules"]:
            up.patch(f"{each}/schedules/{schedule['id']}", active=False)
    # An update would forget the heartbeats that the server has seen.
    assert up.post("automations/filter") == [updated]


def test_a_run_from_the_form_is_trained_and_recorded_in_mlflow(up: Up, tmp_path: Path) -> None:
    overrides = {**QUICK["overrides"], "workspace": str(tmp_path)}
    run_id = up.create_run("pretrain/pretrain", {**QUICK, "overrides": overrides}).json()["id"]
    wait_until(lambda: up.get_state(run_id) in ("COMPLETED", "FAILED", "CRASHED"), "it did not end", deadline_s=240)
    logs = up.post("logs/filter", logs={"flow_run_id": {"any_": [run_id]}})
    assert up.get_state(run_id) == "COMPLETED", "\n".join(log["message"] for log in logs)
    assert [path.name.partition("-")[0] for path in (tmp_path / "store").iterdir()] == ["stage1"]
    found = httpx.post(f"{up.mlflow_url}/api/2.0/mlflow/experiments/search", json={"max_results": 10}, timeout=30)
    assert "smoke" in [experiment["name"] for experiment in found.json()["experiments"]]


@pytest.mark.fault(
    60,
    "a run is cancelled while it trains",
    how="Cancelling, as the UI sets it",
    then="commits; Cancelled when no rank is left",
)
def test_a_cancelled_run_saves_and_leaves_no_rank(up: Up, tmp_path: Path) -> None:
    run_id = start_long_run(up, tmp_path)
    up.post(f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})
    wait_until(lambda: up.get_state(run_id) == "CANCELLED", "it was not cancelled", deadline_s=60)
    # Cancelled is said when the last process is gone, not before.
    assert not list_processes(tmp_path, "--attempt_dir=")
    assert is_committed(tmp_path), "the stop did not commit"


@pytest.mark.fault(
    55,
    "the Prefect server dies while a stage trains",
    how="SIGKILL; another one on its database",
    then="training goes on, and hears of a cancel",
)
@pytest.mark.fault(
    58,
    "the worker dies while a stage trains",
    how="SIGKILL; another one is started",
    then="training goes on and hears of a cancel; the other worker begins no second run",
)
def test_a_run_outlives_its_server_and_its_worker_and_hears_of_a_cancel(up: Up, tmp_path: Path) -> None:
    run_id = start_long_run(up, tmp_path)
    kill(find_process(up, "prefect server start"))
    wait_until(lambda: not answers(up), "the server outlived its death", deadline_s=10)
    # `up` starts it again, on the same database.
    wait_until(lambda: answers(up), "the server did not come back", deadline_s=120)
    assert up.get_state(run_id) == "RUNNING"
    kill(find_worker(up))
    # `up` starts another, which knows nothing of the run.
    wait_until(lambda: find_worker(up), "no other worker was started", deadline_s=30)
    assert find_ranks(tmp_path), "the run did not outlive its worker"
    # And takes no second one onto its GPUs, here one that the flow refuses, until the first has left them.
    queued = up.create_run("pretrain/pretrain", {**QUICK, "overrides": {"nothing": 1}}).json()["id"]
    up.post(f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})

    def is_cancelled() -> bool:
        is_waiting = up.get_state(queued) == "SCHEDULED"
        state = up.get_state(run_id)
        assert is_waiting or state == "CANCELLED", state
        return state == "CANCELLED"

    wait_until(is_cancelled, "it was not cancelled", deadline_s=90)
    assert not list_processes(tmp_path, "--attempt_dir=")
    assert is_committed(tmp_path), "the stop did not commit"
    wait_until(lambda: up.get_state(queued) == "FAILED", "what was queued did not begin")


@pytest.fixture(scope="module")
def queued_run() -> list[str]:
    """Carry the id of a run from one test to the next."""
    return []


def test_ctrl_c_stops_the_run_that_saves_and_leaves_no_process(up: Up, tmp_path: Path, queued_run: list[str]) -> None:
    running = start_long_run(up, tmp_path)
    overrides = {**QUICK["overrides"], "workspace": str(tmp_path / "queued")}
    queued_run.append(up.create_run("pretrain/pretrain", {**QUICK, "overrides": overrides}).json()["id"])
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(180) == 0
    assert up.process.stdout is not None
    assert re.search(r"Stopping smoke: it saves first\..*\nStopped\.\n$", up.process.stdout.read())
    assert is_committed(tmp_path), "the stop did not commit"
    wait_until(lambda: not list_processes(up.directory), lambda: f"left: {list_processes(up.directory)}", deadline_s=10)
    states = read_states(up.directory)
    assert (states[running], states[queued_run[0]]) == ("CANCELLED", "SCHEDULED")


def test_what_was_queued_at_ctrl_c_begins_with_the_next_up(directory: Path, queued_run: list[str]) -> None:
    (run_id,) = queued_run
    with start_up(directory, until="Ctrl-C stops") as up:
        wait_until(lambda: up.get_state(run_id) != "SCHEDULED", "it did not begin", deadline_s=60)
        # A terminal that is closed.
        up.process.send_signal(signal.SIGHUP)
        assert up.process.wait(180) == 0
    assert read_states(directory)[run_id] == "CANCELLED"


def test_ctrl_c_ends_a_start_but_for_a_database_that_is_being_made(tmp_path: Path) -> None:
    with start_up(tmp_path, until="Starting") as up:
        wait_until((tmp_path / "mlflow.db").exists, "MLflow did not start", deadline_s=60)
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(180) == 130
        assert up.process.stdout is not None
        assert up.process.stdout.read() == "Stopping when the servers have made their databases.\nStopped.\n"
    # MLflow refuses one that it could not finish.
    assert "Application startup complete" in (tmp_path / "mlflow.log").read_text()
    assert not (tmp_path / "worker.log").exists()
    wait_until(lambda: not list_processes(tmp_path), lambda: f"left: {list_processes(tmp_path)}", deadline_s=10)
