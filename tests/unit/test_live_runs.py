"""The runs of a pool are cancelled, waited for, and left; asked of a real HTTP server that knows of runs only."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from flows.live_runs import LiveRuns
from flows.local_services import count_signals
from flows.lost_runs import LostRuns
from flows.server_commands import _stop_runs
from internvl_core.errors import ArgumentError, InternVLError


@dataclass
class FakeServer:
    """What Prefect's server answers of one pool."""

    url: str = ""
    states: dict[str, str] = field(default_factory=dict)
    is_paused: bool = False
    wants_password: bool = False
    asked: list[str] = field(default_factory=list)
    """Runs that were told to stop."""
    ends_when_asked: bool = True
    begins_next: dict[str, str] = field(default_factory=dict)
    """What appears once the runs were listed."""

    def answer(self, method: str, path: str, content: dict[str, Any]) -> Any:
        if (method, path) == ("PATCH", "/api/work_pools/gpus"):
            self.is_paused = content["is_paused"]
            return None
        if path == "/api/flow_runs/filter":
            assert content["work_pools"] == {"name": {"any_": ["gpus"]}}
            wanted = content["flow_runs"]["state"]["type"]["any_"]
            found = [
                {"id": run, "name": f"name of {run}", "state_type": state}
                for run, state in self.states.items()
                if state in wanted
            ]
            self.states |= self.begins_next
            self.begins_next = {}
            return found
        run = path.removeprefix("/api/flow_runs/").removesuffix("/set_state")
        self.asked.append(run)
        state = content["state"]["type"]
        self.states[run] = "CANCELLED" if state == "CANCELLING" and self.ends_when_asked else state
        return {"status": "ACCEPT"}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if fake.wants_password:
                self.send_error(401)
                return
            if not self.path.startswith(("/api/work_pools/gpus", "/api/flow_runs/")):
                self.send_error(404)
                return
            answer = fake.answer(self.command, self.path, content)
            body = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(200 if body else 204)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PATCH = answer  # noqa: N815  http.server's names

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        fake.url = f"http://127.0.0.1:{listening.server_address[1]}/api"
        yield fake
        listening.shutdown()
        thread.join()


@pytest.fixture
def runs(server: FakeServer) -> LiveRuns:
    return LiveRuns(server.url, "gpus")


def test_those_that_have_begun_are_told_to_stop_and_only_once(server: FakeServer, runs: LiveRuns) -> None:
    server.states = {"a": "RUNNING", "b": "PENDING", "c": "CANCELLING", "d": "SCHEDULED", "e": "COMPLETED"}
    assert runs.cancel() == ["name of a", "name of b", "name of c"]
    assert server.asked == ["a", "b"]


def test_a_run_that_begins_after_the_others_were_cancelled_is_cancelled_too(server: FakeServer, runs: LiveRuns) -> None:
    server.states = {"a": "RUNNING"}
    server.begins_next = {"b": "PENDING"}
    assert runs.wait(lambda: False)
    assert server.states == {"a": "CANCELLED", "b": "CANCELLED"}


def test_the_wait_is_given_up_when_asked_to(server: FakeServer, runs: LiveRuns) -> None:
    server.states, server.ends_when_asked = {"a": "RUNNING"}, False
    assert not runs.wait(lambda: True)


def test_the_queue_is_held_until_it_is_released(server: FakeServer, runs: LiveRuns) -> None:
    runs.hold_queue()
    assert server.is_paused
    runs.release_queue()
    assert not server.is_paused


def test_a_refusal_of_the_server_is_an_error(server: FakeServer) -> None:
    with pytest.raises(InternVLError, match=r"/api does not take PATCH /api/work_pools/nowhere: 404"):
        LiveRuns(server.url, "nowhere").hold_queue()


def test_a_server_with_a_password_says_which_variable_it_goes_into(server: FakeServer) -> None:
    server.wants_password = True
    with pytest.raises(ArgumentError, match=r"wants a password: set PREFECT_API_AUTH_STRING to user:password\.$"):
        LiveRuns(server.url, "gpus").hold_queue()


@pytest.fixture
def live_flow() -> Iterator[str]:
    """A process of a flow run; yields the run's id."""
    run_id = f"live-{os.getpid()}"
    with subprocess.Popen(["sleep", "60"], env={"PREFECT__FLOW_RUN_ID": run_id}) as process:
        yield run_id
        process.kill()


def test_a_run_without_a_process_is_marked_at_the_second_look(
    server: FakeServer, runs: LiveRuns, live_flow: str
) -> None:
    begun = {live_flow: "RUNNING", "gone": "RUNNING", "unborn": "PENDING", "stopped": "CANCELLING"}
    server.states = {**begun, "queued": "SCHEDULED", "done": "COMPLETED"}
    lost = LostRuns(runs)
    assert lost.mark() == []
    assert server.asked == []
    server.states["late"] = "PENDING"
    assert lost.mark() == ["name of gone", "name of unborn", "name of stopped"]
    assert server.states == {
        live_flow: "RUNNING",
        "gone": "CRASHED",
        "unborn": "CRASHED",
        "stopped": "CANCELLED",
        "queued": "SCHEDULED",
        "done": "COMPLETED",
        "late": "PENDING",
    }
    assert lost.mark() == ["name of late"]


def test_a_run_that_was_missing_once_is_given_another_look(server: FakeServer, runs: LiveRuns, live_flow: str) -> None:
    server.states = {"ends": "RUNNING"}
    lost = LostRuns(runs)
    lost.mark()
    server.states = {"ends": "COMPLETED", live_flow: "RUNNING"}
    assert lost.mark() == []
    assert server.asked == []


def test_the_end_of_up_pauses_the_pool_before_it_cancels(
    server: FakeServer, runs: LiveRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    server.states = {"a": "RUNNING", "queued": "SCHEDULED"}
    with count_signals((signal.SIGINT,)) as count:
        _stop_runs(runs, count)
    assert server.is_paused
    assert server.states == {"a": "CANCELLED", "queued": "SCHEDULED"}
    assert capsys.readouterr().out == "Stopping name of a: it saves first. Ctrl-C again does not wait for it.\n"


def test_a_second_ctrl_c_does_not_wait_for_a_run_that_saves(server: FakeServer, runs: LiveRuns) -> None:
    server.states, server.ends_when_asked = {"a": "RUNNING"}, False
    with count_signals((signal.SIGINT,)) as count:
        os.kill(os.getpid(), signal.SIGINT)
        second = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        second.start()
        _stop_runs(runs, count)
        second.join()
        assert count() == 2
    assert server.states == {"a": "CANCELLING"}


def test_a_server_that_is_gone_does_not_keep_up_from_ending(capsys: pytest.CaptureFixture[str]) -> None:
    _stop_runs(LiveRuns("http://127.0.0.1:1/api", "gpus"), lambda: 1)
    assert "Runs are not waited for, and save when the worker ends: http://127.0.0.1:1/api" in capsys.readouterr().err
