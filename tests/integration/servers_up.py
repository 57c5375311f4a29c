"""An `internvl up` of a test's own: real servers on free ports, and what is left of them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import find_free_port, wait_until

COMMAND = [sys.executable, "-m", "flows.cli"]
# Of one rank: most of what a rank takes here is its imports. Runs of two are in the end-to-end tests.
_OVERRIDES = {"launcher.nproc_per_node": 1, "stages.stage1.arguments.max_steps": 2}
QUICK = {"recipe": "smoke", "stages": ["stage1"], "overrides": _OVERRIDES}


@dataclass(frozen=True)
class Up:
    """An `internvl up` at work."""

    process: subprocess.Popen[str]
    api_url: str
    mlflow_url: str
    directory: Path

    def ask(self, method: str, path: str, content: Any = None) -> httpx.Response:
        """Ask Prefect as its own clients do: on SQLite it turns away one of two that write at once, with 503."""
        for wait_s in (0.2, 0.5, 1, 2, 5):
            answer = httpx.request(method, f"{self.api_url}/{path}", json=content, timeout=30)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(wait_s)
        return answer

    def post(self, path: str, **content: Any) -> Any:
        return self.ask("POST", path, content).raise_for_status().json()

    def get(self, path: str) -> Any:
        return self.ask("GET", path).raise_for_status().json()

    def patch(self, path: str, **content: Any) -> None:
        self.ask("PATCH", path, content).raise_for_status()

    def create_run(self, deployment: str, parameters: dict[str, Any], **more: Any) -> httpx.Response:
        found = self.get(f"deployments/name/{deployment}")
        return self.ask("POST", f"deployments/{found['id']}/create_flow_run", {"parameters": parameters, **more})

    def get_state(self, run_id: str) -> str:
        return str(self.get(f"flow_runs/{run_id}")["state_type"])


def is_committed(workspace: Path) -> bool:
    return any((workspace / "store").glob("stage1-*/commits/*.json"))


def describe_long_run(workspace: Path, **arguments: Any) -> dict[str, Any]:
    """Give the parameters of a run of one stage that would go on for hours."""
    given = {"max_steps": 100_000, "logging_steps": 1, **arguments}
    overrides = {f"stages.stage1.arguments.{name}": value for name, value in given.items()}
    return {**QUICK, "overrides": {**_OVERRIDES, "workspace": str(workspace), **overrides}}


def start_long_run(up: Up, workspace: Path, deployment: str = "pretrain/pretrain", **arguments: Any) -> str:
    """Start such a run, and wait until it trains."""
    run_id = str(up.create_run(deployment, describe_long_run(workspace, **arguments)).json()["id"])
    wait_for_training(workspace)
    assert up.get_state(run_id) == "RUNNING"
    return run_id


def wait_for_training(workspace: Path) -> None:
    def has_begun() -> bool:
        return any((workspace / "attempts").glob("stage1-*/1/metrics.jsonl"))

    wait_until(has_begun, "training did not begin", deadline_s=240)


def get_environment(**own: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return {**kept, "OMP_NUM_THREADS": "1", **own}


@contextmanager
def start_up(directory: Path, *, until: str, **variables: str) -> Iterator[Up]:
    """Start `internvl up` and wait for a line."""
    prefect_port, mlflow_port = find_free_port(), find_free_port()
    command = [*COMMAND, "up", f"--directory={directory}", f"--prefect-port={prefect_port}"]
    with subprocess.Popen(
        [*command, f"--mlflow-port={mlflow_port}"],
        env=get_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith(until):
                break
        else:
            pytest.fail("".join(printed))
        try:
            yield Up(process, f"http://127.0.0.1:{prefect_port}/api", f"http://127.0.0.1:{mlflow_port}", directory)
        finally:
            # After a test that failed it may have a run that nobody else would stop.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(90)
            process.kill()
