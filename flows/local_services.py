"""The services of one machine: a Prefect server, an MLflow server and a worker, each a child of this process.

They listen on the loopback address, keep all they know below one directory, write a log there each, and die with
this process.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from internvl_core.errors import ArgumentError, InternVLError
from internvl_core.supervision.process_tree import start_owned

HOST = "127.0.0.1"
POOL = "internvl"

_START_LIMIT_S = 180.0
"""The first start makes both databases."""
_STOP_LIMIT_S = 20.0
_MAX_REVIVALS = 5
_REVIVAL_WINDOW_S = 600.0
_POLL_S = 0.2
_SHOWN_LINES = 15


@dataclass(frozen=True)
class Service:
    """A process that serves."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    url: str | None = None
    """Answers when it is up; None: it is up when it runs."""
    is_outlived: bool = False
    """Its children go on when it ends, and are ended with all the rest; else they are ended before its next start."""


class LocalServices:
    """What was started here, in the order of its start."""

    def __init__(self, directory: Path) -> None:
        """Start nothing yet.

        Args:
            directory: for databases and logs; made if need be.
        """
        self._directory = directory
        self._services: dict[str, Service] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._revived_at: list[float] = []
        self._outlived: list[subprocess.Popen[bytes]] = []

    def start(self, service: Service) -> None:
        """Start a service; returns at once. For the main thread."""
        self._directory.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **service.environment}
        self._services[service.name] = service
        self._running[service.name] = start_owned(service.command, self._get_log(service.name), environment)

    def wait_for(self, service: Service) -> None:
        """Wait until a started service answers.

        Raises:
            InternVLError: it ended, or does not answer.
        """
        end = time.monotonic() + _START_LIMIT_S
        while not _answers(service.url):
            self.check()
            if time.monotonic() > end:
                raise InternVLError(
                    f"{service.name} does not answer at {service.url} after {_START_LIMIT_S:.0f} s. "
                    f"Log: {self._get_log(service.name)}"
                )
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Raise if one of the services has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                log = self._get_log(name)
                lines = log.read_text(errors="replace").rstrip().splitlines()[-_SHOWN_LINES:]
                shown = "\n  ".join(lines)
                raise InternVLError(f"{name} ended with {process.returncode}. Log: {log}\n  {shown}")

    def revive(self) -> list[str]:
        """Start again what has ended; return a line about each.

        Raises:
            InternVLError: it has happened too often.
        """
        told = []
        for name, process in self._running.items():
            if process.poll() is None:
                continue
            now = time.monotonic()
            self._revived_at = [*(at for at in self._revived_at if now - at < _REVIVAL_WINDOW_S), now]
            if len(self._revived_at) > _MAX_REVIVALS:
                self.check()
            told.append(f"{name} ended with {process.returncode} and is started again. Log: {self._get_log(name)}")
            service = self._services[name]
            if service.is_outlived:
                self._outlived.append(process)
            else:
                # They hold its port.
                _signal_session(process, signal.SIGKILL)
            self.start(service)
        return told

    def stop(self) -> None:
        """End all of them, the last one first."""
        for process in [*self._outlived, *reversed(self._running.values())]:
            _signal_session(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_LIMIT_S)
            # The leader's children too: MLflow's do not always end with it.
            _signal_session(process, signal.SIGKILL)
            process.wait()
        self._running.clear()

    def _get_log(self, name: str) -> Path:
        return self._directory / f"{name}.log"


def describe_prefect(directory: Path, port: int) -> Service:
    """Describe a Prefect server on SQLite."""
    environment = {
        "PREFECT_HOME": str(directory / "prefect"),
        "PREFECT_SERVER_UI_API_URL": "/api",  # Else the UI asks port 4200, whatever the port is.
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # In memory a concurrency limit ends a live run when the server restarts.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "DO_NOT_TRACK": "1",
    }
    command = (sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port))
    return Service("prefect", command, environment, f"http://{HOST}:{port}/api/health")


def describe_mlflow(directory: Path, port: int) -> Service:
    """Describe an MLflow server on SQLite, of one worker: four of them and a job runner take 3 GB."""
    command = (
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{directory}/mlflow.db"),
        *("--artifacts-destination", f"{directory}/mlflow-artifacts"),
    )
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return Service("mlflow", command, environment, f"http://{HOST}:{port}/health")


def describe_worker(directory: Path, *, prefect_url: str, mlflow_url: str) -> Service:
    """Describe a worker that takes one run at a time and gives it both addresses."""
    command = (
        *(sys.executable, "-m", "prefect", "worker", "start", "--type", "process"),
        *("--pool", POOL, "--name", socket.gethostname(), "--limit", "1"),
    )
    environment = {
        "PREFECT_HOME": str(directory / "prefect"),
        "PREFECT_API_URL": prefect_url,
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "MLFLOW_TRACKING_URI": mlflow_url,
        "DO_NOT_TRACK": "1",
    }
    return Service("worker", command, environment, is_outlived=True)


def check_port(port: int, option: str) -> None:
    """Refuse a port that somebody listens on.

    Raises:
        ArgumentError: naming the option that gives another one.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ArgumentError(f"{option}: port {port} of {HOST}: {error.strerror}. Give another one.") from None


@contextmanager
def told_by_signals(numbers: tuple[signal.Signals, ...]) -> Iterator[Callable[[], int]]:
    """Have signals told instead of obeyed; yields what counts those that came."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield lambda: len(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answers(url: str | None) -> bool:
    if url is None:
        return True
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


def _signal_session(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a service and its children, which share its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
