"""Runs that a worker has left are waited for, or marked; asked of a real HTTP server that knows of runs only."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pool_server import FakeServer, serve_pool

from flows.left_runs import LeftRuns
from flows.live_runs import LiveRuns


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serve_pool() as server:
        yield server


@pytest.fixture
def processes_dir(tmp_path: Path) -> Path:
    """Describe two processes as /proc does: one of the flow run `alive`, and one of none."""
    for number, variables in ((17, b"HOME=/root\0PREFECT__FLOW_RUN_ID=alive\0"), (18, b"HOME=/root\0")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "environ").write_bytes(variables)
    # One that ends just now.
    (tmp_path / "19").mkdir()
    return tmp_path


@pytest.fixture
def left(server: FakeServer, processes_dir: Path) -> LeftRuns:
    return LeftRuns(LiveRuns(server.url, "gpus"), processes_dir=processes_dir)


def test_a_run_without_a_process_is_marked_at_the_second_look(server: FakeServer, left: LeftRuns) -> None:
    others = {"alive": "RUNNING", "queued": "SCHEDULED", "done": "COMPLETED"}
    server.states = {**others, "gone": "RUNNING", "unborn": "PENDING", "stopped": "CANCELLING"}
    assert left.mark_lost() == []
    assert server.asked == []
    server.states["late"] = "PENDING"
    assert left.mark_lost() == ["name of gone", "name of unborn", "name of stopped"]
    marked = {"gone": "CRASHED", "unborn": "CRASHED", "stopped": "CANCELLED", "late": "PENDING"}
    assert server.states == {**others, **marked}
    assert left.mark_lost() == ["name of late"]


def test_a_run_that_ends_between_two_looks_is_not_marked(server: FakeServer, left: LeftRuns) -> None:
    server.states = {"ends": "RUNNING"}
    left.mark_lost()
    server.states = {"ends": "COMPLETED", "alive": "RUNNING"}
    assert left.mark_lost() == []
    assert server.asked == []


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "CANCELLING"])
def test_the_queue_waits_for_a_run_that_was_left(server: FakeServer, left: LeftRuns, state: str) -> None:
    server.states = {"alive": state}
    left.keep_queue()
    assert server.is_paused
    assert left.may_be_there
    server.states = {"alive": "CANCELLED", "queued": "SCHEDULED"}
    left.keep_queue()
    assert not server.is_paused
    assert not left.may_be_there
