"""What a person sees of Prefect's logs."""

import logging
from collections.abc import Iterator
from typing import Any

import prefect
import pytest
from api_server import ApiServer, serve_api
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.console import check_server, quiet_prefect, shorten_errors
from internvl_core.errors import ArgumentError, DataError

FLOW_RUNS, TASK_RUNS = (logging.getLogger(f"prefect.{kind}_runs") for kind in ("flow", "task"))


class Screen(logging.Handler):
    """A handler that keeps its records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def lines(self) -> list[str]:
        return [logging.Formatter("%(message)s").format(record) for record in self.records]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Stand where Prefect's console handler stands, behind all filters."""
    screen = Screen()
    monkeypatch.setattr("flows.console.setup_logging", lambda: None)
    monkeypatch.setattr(logging.getLogger(), "handlers", [screen])
    monkeypatch.setattr(logging.getLogger("prefect"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("prefect"), "propagate", True)
    for logger in (FLOW_RUNS, TASK_RUNS):
        for name, value in {"handlers": [], "filters": [], "propagate": True, "disabled": False}.items():
            monkeypatch.setattr(logger, name, value)
        monkeypatch.setattr(logger, "level", logging.INFO)
        logger.manager._clear_cache()
    quiet_prefect()
    return screen


def fail_with(error: Exception, logger: logging.Logger = FLOW_RUNS) -> None:
    try:
        raise error
    except type(error):
        logger.exception("Encountered exception during execution: %r", error)


def test_progress_and_warnings_are_shown(screen: Screen) -> None:
    TASK_RUNS.info("stage1 step 5/40")
    FLOW_RUNS.warning("something is odd")
    assert screen.lines == ["stage1 step 5/40", "something is odd"]


@pytest.mark.parametrize("message", ["Beginning flow run 'smoke'", "Finished in state Completed()", "View at http://x"])
def test_bookkeeping_is_not(screen: Screen, message: str) -> None:
    FLOW_RUNS.info(message)
    assert screen.lines == []


def test_an_error_of_ours_is_left_to_the_command(screen: Screen) -> None:
    fail_with(DataError("a.jsonl:3: no image"))
    FLOW_RUNS.error("Finished in state Failed('Flow run encountered an exception: DataError: a.jsonl:3')")
    assert screen.lines == []


def test_any_other_error_keeps_its_stack(screen: Screen) -> None:
    fail_with(KeyError("step"))
    (line,) = screen.lines
    assert "Traceback" in line
    assert "KeyError: 'step'" in line


def test_a_crash_is_one_line(screen: Screen) -> None:
    for logger in (TASK_RUNS, FLOW_RUNS):
        logger.error("Crash detected! Execution was aborted by a termination signal.")
        logger.error("Finished in state Crashed('Execution was aborted by a termination signal.')")
    assert screen.lines == ["Crash detected! Execution was aborted by a termination signal."]


def test_where_no_command_tells_it_an_error_of_ours_is_one_line_without_its_stack(screen: Screen) -> None:
    api = Screen()
    FLOW_RUNS.addHandler(api)
    shorten_errors()
    fail_with(DataError("a.jsonl:3: 100 % wrong"))
    assert api.lines == ["DataError: a.jsonl:3: 100 % wrong"]


def test_filters_are_added_once(screen: Screen) -> None:
    num_filters = len(FLOW_RUNS.filters)
    # Not all of `quiet_prefect`: pytest's own handlers, which are there by now, would keep its filter.
    shorten_errors()
    assert len(FLOW_RUNS.filters) == num_filters


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with serve_api() as server:
        yield server


def test_without_a_server_in_the_settings_nobody_is_asked(server: ApiServer) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        check_server()
    assert server.asked == []


def test_a_server_that_answers_is_enough(server: ApiServer) -> None:
    server.answers = {"/api/health": (200, True), "/api/admin/version": (200, prefect.__version__)}
    with temporary_settings({PREFECT_API_URL: f"{server.url}/api"}):
        check_server()
    assert server.asked == ["GET /api/health", "GET /api/admin/version"]


@pytest.mark.parametrize(
    ("path", "answers", "problem"),
    [
        ("/api", {}, r"does not answer as a Prefect server \(Client error '404"),
        ("", {"/health": (200, "page"), "/admin/version": (404, "")}, "does not answer as a Prefect server"),
        (
            "/api",
            {"/api/health": (200, True), "/api/admin/version": (401, "")},
            r"wants a password\. Set PREFECT_API_AUTH_STRING to user:password",
        ),
        (
            "/api",
            {"/api/health": (200, True), "/api/admin/version": (200, "1.0.0")},
            r"does not .*incompatible versions",
        ),
    ],
)
def test_a_server_that_is_none_or_wants_a_password_is_said_in_one_line(
    server: ApiServer, path: str, answers: dict[str, tuple[int, Any]], problem: str
) -> None:
    server.answers = answers
    address = server.url.replace("//", "//me:secret@")
    with (
        temporary_settings({PREFECT_API_URL: f"{address}{path}"}),
        pytest.raises(
            ArgumentError, match=rf"^PREFECT_API_URL: {server.url}{path} {problem}.*embedded one\.$"
        ) as caught,
    ):
        check_server()
    assert "secret" not in str(caught.value)


def test_an_address_that_is_none_is_said_without_its_password() -> None:
    with (
        temporary_settings({PREFECT_API_URL: "http://me:secret@127.0.0.1:abc/api"}),
        pytest.raises(ArgumentError, match=r"PREFECT_API_URL: http://127\.0\.0\.1:abc/api .*Invalid port") as caught,
    ):
        check_server()
    assert "secret" not in str(caught.value)
