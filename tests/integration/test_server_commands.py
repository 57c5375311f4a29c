"""`internvl up`: a Prefect server, MLflow and a worker that really start, run a flow, and are gone after Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.integration

COMMAND = [sys.executable, "-m", "flows.cli"]
QUICK = {"recipe": "smoke", "stages": ["stage1"], "overrides": {"stages.stage1.arguments.max_steps": 2}}


@dataclass(frozen=True)
class Up:
    """An `internvl up` at work."""

    process: subprocess.Popen[str]
    api_url: str
    mlflow_url: str
    directory: Path

    def post(self, path: str, **content: Any) -> Any:
        answer = httpx.post(f"{self.api_url}/{path}", json=content, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def get(self, path: str) -> Any:
        answer = httpx.get(f"{self.api_url}/{path}", timeout=30)
        answer.raise_for_status()
        return answer.json()

    def create_run(self, deployment: str, parameters: dict[str, Any]) -> httpx.Response:
        found = self.get(f"deployments/name/{deployment}")
        path = f"{self.api_url}/deployments/{found['id']}/create_flow_run"
        return httpx.post(path, json={"parameters": parameters}, timeout=30)

    def get_state(self, run_id: str) -> str:
        return str(self.get(f"flow_runs/{run_id}")["state_type"])


def wait_until(condition: Callable[[], Any], message: str, *, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.2)


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def list_processes(marker: Path, word: str = "") -> dict[int, str]:
    """List living processes whose command line or environment names a directory, and their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
                if command and str(marker).encode() in command + (entry / "environ").read_bytes():
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return {pid: command for pid, command in found.items() if word in command}


def find_worker(up: Up) -> int:
    return next(iter(list_processes(up.directory, "prefect worker start")), 0)


def find_ranks(workspace: Path) -> list[int]:
    return list(list_processes(workspace, f"--attempt_dir={workspace}"))


def is_committed(workspace: Path) -> bool:
    return any((workspace / "store").glob("stage1-*/commits/*.json"))


def start_long_run(up: Up, workspace: Path) -> str:
    """Start a run that would go on for hours, and wait until it trains."""
    overrides = {
        "workspace": str(workspace),
        "stages.stage1.arguments.max_steps": 100_000,
        "stages.stage1.arguments.logging_steps": 1,
    }
    run_id = str(up.create_run("pretrain/pretrain", {**QUICK, "overrides": overrides}).json()["id"])

    def has_begun() -> bool:
        return any((workspace / "attempts").glob("stage1-*/1/metrics.jsonl"))

    wait_until(has_begun, "training did not begin", deadline_s=240)
    assert up.get_state(run_id) == "RUNNING"
    return run_id


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    directory = tmp_path_factory.mktemp("servers")
    prefect_port, mlflow_port = find_free_port(), find_free_port()
    command = [*COMMAND, "up", f"--directory={directory}", f"--prefect-port={prefect_port}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    with subprocess.Popen(
        [*command, f"--mlflow-port={mlflow_port}"],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("Ctrl-C stops"):
                break
        else:
            pytest.fail("".join(printed))
        yield Up(process, f"http://127.0.0.1:{prefect_port}/api", f"http://127.0.0.1:{mlflow_port}", directory)
        process.kill()


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


def test_a_run_from_the_form_is_trained_and_recorded_in_mlflow(up: Up, tmp_path: Path) -> None:
    overrides = {**QUICK["overrides"], "workspace": str(tmp_path)}
    run_id = up.create_run("pretrain/pretrain", {**QUICK, "overrides": overrides}).json()["id"]
    wait_until(lambda: up.get_state(run_id) in ("COMPLETED", "FAILED", "CRASHED"), "it did not end", deadline_s=240)
    logs = up.post("logs/filter", logs={"flow_run_id": {"any_": [run_id]}})
    assert up.get_state(run_id) == "COMPLETED", "\n".join(log["message"] for log in logs)
    assert [path.name.partition("-")[0] for path in (tmp_path / "store").iterdir()] == ["stage1"]
    found = httpx.post(f"{up.mlflow_url}/api/2.0/mlflow/experiments/search", json={"max_results": 10}, timeout=30)
    assert "smoke" in [experiment["name"] for experiment in found.json()["experiments"]]


def test_a_cancelled_run_saves_and_leaves_no_rank(up: Up, tmp_path: Path) -> None:
    run_id = start_long_run(up, tmp_path)
    up.post(f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})
    wait_until(lambda: up.get_state(run_id) == "CANCELLED", "it was not cancelled", deadline_s=60)
    # Cancelled is said when the last process is gone, not before.
    assert find_ranks(tmp_path) == []
    assert is_committed(tmp_path), "the stop did not commit"


def test_a_cancel_reaches_a_run_whose_worker_was_killed(up: Up, tmp_path: Path) -> None:
    run_id = start_long_run(up, tmp_path)
    os.kill(find_worker(up), signal.SIGKILL)
    # `up` starts another, which knows nothing of the run.
    wait_until(lambda: find_worker(up), "no other worker was started", deadline_s=30)
    assert find_ranks(tmp_path), "the run did not outlive its worker"
    up.post(f"flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})
    wait_until(lambda: up.get_state(run_id) == "CANCELLED", "it was not cancelled", deadline_s=90)
    assert find_ranks(tmp_path) == []
    assert is_committed(tmp_path), "the stop did not commit"


def test_ctrl_c_stops_the_run_that_saves_and_leaves_no_process(up: Up, tmp_path: Path) -> None:
    start_long_run(up, tmp_path)
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(90) == 0
    assert up.process.stdout is not None
    assert re.search(r"Stopping smoke: it saves first\..*\nStopped\.\n$", up.process.stdout.read())
    assert is_committed(tmp_path), "the stop did not commit"
    wait_until(lambda: not list_processes(up.directory), f"left: {list_processes(up.directory)}", deadline_s=10)
