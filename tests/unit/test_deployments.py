"""What is registered on a Prefect server; that a server takes it is tested with a real one, in tests/integration."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import yaml
from prefect.events.schemas.automations import EventTrigger
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.dead_runs import describe_automation
from flows.deployments import DEFAULT_FILE, POOL_VARIABLE, register
from internvl_core.errors import ArgumentError


def find_processes(marker: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"PREFECT_HOME={marker}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"nothing.yaml: no such file of deployments. Give its path by --file."):
        register(tmp_path / "nothing.yaml", api_url="http://127.0.0.1:1/api", pool="gpus")


@pytest.fixture
def api_url(tmp_path: Path) -> Iterator[str]:
    """Serve a version and nothing else: whatever is asked for is not there."""
    (tmp_path / "api/admin").mkdir(parents=True)
    (tmp_path / "api/admin/version").write_text('"3.8.8"')
    server = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_the_check_raises_ends_the_registering_and_its_processes(tmp_path: Path, api_url: str) -> None:
    begun: list[int] = []

    def check() -> None:
        begun.extend(find_processes(tmp_path))
        if begun:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        register(
            DEFAULT_FILE,
            api_url=api_url,
            pool="gpus",
            environment={"PREFECT_HOME": str(tmp_path)},
            check=check,
        )
    assert find_processes(tmp_path) == []


def test_every_deployment_takes_the_pool_it_is_given() -> None:
    content = yaml.safe_load(DEFAULT_FILE.read_text())
    for deployment in content["deployments"]:
        assert f"${POOL_VARIABLE}" in deployment["work_pool"]["name"], deployment["name"]


def test_no_run_writes_into_the_pipe_of_its_worker() -> None:
    for deployment in yaml.safe_load(DEFAULT_FILE.read_text())["deployments"]:
        assert deployment["work_pool"]["job_variables"]["stream_output"] is False, deployment["name"]


def test_a_run_is_dead_after_three_of_the_heartbeats_that_the_settings_ask_for() -> None:
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 60}):
        trigger = describe_automation().trigger
    assert isinstance(trigger, EventTrigger)
    assert trigger.within == timedelta(seconds=180)
