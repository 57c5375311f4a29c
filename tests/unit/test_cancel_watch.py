"""The flow hears of a cancel from a server that may err, hang and be gone meanwhile."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks import cancel_watch
from tasks.cancel_watch import CancelWatch, RunCancelled

DEADLINE_S = 30.0
RUN_ID = str(uuid4())


class FakeServer(ThreadingHTTPServer):
    """A Prefect server that knows one flow run and gives the answers that it is told, the last one for ever."""

    daemon_threads = True

    def __init__(self, *answers: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answers = list(answers)
        self.given: list[str] = []
        self.is_over = threading.Event()

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.shutdown()
        self.server_close()

    def take_answer(self) -> str:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.given.append(answer)
        return answer


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        assert self.path == f"/api/flow_runs/{RUN_ID}"
        answer = self.server.take_answer()
        if answer == "hang":
            self.server.is_over.wait(DEADLINE_S)
            return
        body = answer if answer == "no JSON" else json.dumps(describe_run(answer))
        self.send_response(500 if answer == "error" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


def describe_run(state: str) -> dict[str, Any]:
    return {"id": RUN_ID, "name": "run", "flow_id": str(uuid4()), "state": {"type": state, "name": state.title()}}


@pytest.fixture(autouse=True)
def _ask_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel_watch, "POLL_S", 0.01)
    monkeypatch.setattr(cancel_watch, "TIMEOUT_S", 1.0)


def watch_run(port: int) -> CancelWatch:
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
        return CancelWatch(RUN_ID)


def wait_for_cancel(watch: CancelWatch) -> None:
    with pytest.raises(RunCancelled, match="The run was cancelled"):
        check_for(DEADLINE_S, watch)


def check_for(seconds: float, watch: CancelWatch) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watch.check()
        threading.Event().wait(0.01)


@pytest.mark.parametrize("state", ["CANCELLING", "CANCELLED"])
def test_a_cancel_is_heard_from_a_server_that_erred_hung_and_said_nonsense_before(state: str) -> None:
    answers = ["RUNNING", "error", "hang", "no JSON", "RUNNING", state]
    with FakeServer(*answers) as server, watch_run(server.server_port) as watch:
        wait_for_cancel(watch)
        assert server.given[: len(answers)] == answers


def test_one_look_is_not_enough_for_a_worker_s_signal_comes_first() -> None:
    with FakeServer("CANCELLING", "RUNNING", "CANCELLING", "RUNNING") as server, watch_run(server.server_port) as watch:
        wait_until_asked(server, 6)
        watch.check()


def test_a_cancel_is_heard_from_a_server_that_was_gone_meanwhile() -> None:
    with FakeServer("RUNNING") as server:
        port = server.server_port
        with watch_run(port) as watch:
            wait_until_asked(server, 2)
            server.__exit__()
            watch.check()
            with FakeServer("CANCELLED", port=port):
                wait_for_cancel(watch)


@pytest.mark.parametrize("state", ["RUNNING", "CRASHED", "FAILED", "error", "hang"])
def test_nothing_but_a_cancel_stops_a_run(state: str) -> None:
    with FakeServer(state) as server, watch_run(server.server_port) as watch:
        wait_until_asked(server, 3)
        watch.check()


def test_a_server_that_hangs_holds_nobody_up() -> None:
    with FakeServer("hang") as server:
        began = time.monotonic()
        with watch_run(server.server_port) as watch:
            watch.check()
        assert time.monotonic() - began < DEADLINE_S


def test_without_a_flow_nobody_is_asked() -> None:
    before = set(threading.enumerate())
    with CancelWatch(None) as watch:
        watch.check()
        assert set(threading.enumerate()) <= before


def wait_until_asked(server: FakeServer, times: int) -> None:
    end = time.monotonic() + DEADLINE_S
    while len(server.given) < times:
        assert time.monotonic() < end, "not asked in time"
        threading.Event().wait(0.01)
