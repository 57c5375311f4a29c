"""The runs of a pool are cancelled, waited for, and left; asked of a real HTTP server that knows of runs only."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from pool_server import FakeServer, serve_pool

from flows.left_runs import LeftRuns
from flows.live_runs import LiveRuns
from flows.local_services import count_signals
from flows.server_commands import _stop_runs
from internvl_core.errors import ArgumentError, InternVLError


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serve_pool() as server:
        yield server


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


def test_the_end_of_up_pauses_the_pool_before_it_cancels(
    server: FakeServer, runs: LiveRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    server.states = {"a": "RUNNING", "queued": "SCHEDULED"}
    with count_signals((signal.SIGINT,)) as count:
        _stop_runs(runs, LeftRuns(runs), count)
    assert server.is_paused
    assert server.states == {"a": "CANCELLED", "queued": "SCHEDULED"}
    assert capsys.readouterr().out == "Stopping name of a: it saves first. Ctrl-C again does not wait for it.\n"


def test_a_second_ctrl_c_does_not_wait_for_a_run_that_saves(server: FakeServer, runs: LiveRuns) -> None:
    server.states, server.ends_when_asked = {"a": "RUNNING"}, False
    with count_signals((signal.SIGINT,)) as count:
        os.kill(os.getpid(), signal.SIGINT)
        second = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        second.start()
        _stop_runs(runs, LeftRuns(runs), count)
        second.join()
        assert count() == 2
    assert server.states == {"a": "CANCELLING"}


def test_a_server_that_is_gone_does_not_keep_up_from_ending(capsys: pytest.CaptureFixture[str]) -> None:
    runs = LiveRuns("http://127.0.0.1:1/api", "gpus")
    _stop_runs(runs, LeftRuns(runs), lambda: 1)
    assert "Runs are not waited for, and save when the worker ends: http://127.0.0.1:1/api" in capsys.readouterr().err
