"""The services of one machine: a Prefect server, an MLflow server and a worker, each a child of this process.

They listen on the loopback address, keep all they know below one directory, write a log there each, and end with
this process; of one that is killed MLflow's own children stay, and hold its port.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from internvl_core.errors import ArgumentError, InternVLError
from internvl_core.supervision.process_tree import start_owned

HOST = "127.0.0.1"
POOL = "internvl"
LOCK_FILE = "lock"

_START_LIMIT_S = 180.0
"""The first start makes both databases."""
_DATABASE_LIMIT_S = 60.0
_STOP_LIMIT_S = 20.0
_MAX_REVIVALS = 5
_REVIVAL_WINDOW_S = 600.0
_POLL_S = 0.2
_SHOWN_LINES = 15

_OTHER_SERVERS = ("PREFECT_", "MLFLOW_")
_PASSWORDS = {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"}
"""For an MLflow that a recipe names."""


@dataclass(frozen=True)
class Service:
    """A process that serves."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    url: str | None = None
    """Answers when it is up; None: it is up when it runs."""


@contextmanager
def hold_directory(directory: Path) -> Iterator[None]:
    """Keep a second `up` out of a directory, whose databases are for one server each.

    Raises:
        ArgumentError: naming who holds it.
    """
    # It imports fsspec, for which no other command is to wait.
    from tasks.holder import describe_holder, read_holder, take, write_holder

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_FILE).open("a+") as file:
        if not take(file):
            holder, _ = describe_holder(read_holder(file))
            raise ArgumentError(f"--directory: {directory} is that of {holder}. Stop it, or give another one.")
        write_holder(file, "internvl up")
        yield


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

    def start(self, service: Service) -> None:
        """Start a service; returns at once. For the main thread."""
        self._directory.mkdir(parents=True, exist_ok=True)
        environment = build_environment(service.environment)
        self._services[service.name] = service
        self._running[service.name] = start_owned(service.command, self._get_log(service.name), environment)

    def wait_for(self, service: Service, *, check: Callable[[], None] = lambda: None) -> None:
        """Wait until a started service answers.

        Args:
            service: that was started.
            check: called at each look; what it raises ends the waiting.

        Raises:
            InternVLError: one of them ended, or it does not answer.
        """
        end = time.monotonic() + _START_LIMIT_S
        while not _answers(service.url):
            self.check()
            check()
            if time.monotonic() > end:
                raise InternVLError(
                    f"{service.name} does not answer at {service.url} after {_START_LIMIT_S:.0f} s. "
                    f"Log: {self._get_log(service.name)}"
                )
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Raise if one of the services has ended."""
        for name, process in self._running.items():
            if _has_ended(process):
                log = self._get_log(name)
                lines = log.read_text(errors="replace").rstrip().splitlines()[-_SHOWN_LINES:]
                shown = "\n  ".join(lines)
                raise InternVLError(f"{name} ended with {_kill_session(process)}. Log: {log}\n  {shown}")

    def revive(self) -> list[str]:
        """Start again what has ended; return a line about each.

        Raises:
            InternVLError: it has happened too often.
        """
        told = []
        for name, process in self._running.items():
            if not _has_ended(process):
                continue
            now = time.monotonic()
            self._revived_at = [*(at for at in self._revived_at if now - at < _REVIVAL_WINDOW_S), now]
            if len(self._revived_at) > _MAX_REVIVALS:
                self.check()
            # What it left behind holds its port. Runs of a worker have sessions of their own and go on.
            exit_code = _kill_session(process)
            told.append(f"{name} ended with {exit_code} and is started again. Log: {self._get_log(name)}")
            self.start(self._services[name])
        return told

    def stop(self) -> None:
        """End all of them, the last one first; one that is starting may finish that."""
        for name, process in reversed(self._running.items()):
            # MLflow, ended while it makes its tables, refuses that database ever after.
            end = time.monotonic() + _DATABASE_LIMIT_S
            while not _has_ended(process) and not _answers(self._services[name].url) and time.monotonic() < end:
                time.sleep(_POLL_S)
            _signal_session(process, signal.SIGTERM)
            end = time.monotonic() + _STOP_LIMIT_S
            while not _has_ended(process) and time.monotonic() < end:
                time.sleep(_POLL_S)
            # The leader's children too: MLflow's do not always end with it.
            _kill_session(process)
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
    return Service("worker", command, environment)


def build_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Build the environment of a process of `up`: its own variables, and what it inherits.

    It inherits no setting of Prefect or MLflow: those in a shell are about other servers, and would move a database
    or send a run elsewhere. Who wants settings of his own starts the servers himself, for `internvl deploy`.
    """
    inherited = {
        name: value for name, value in os.environ.items() if name in _PASSWORDS or not name.startswith(_OTHER_SERVERS)
    }
    # The servers are on this machine, whatever proxy is for the world outside.
    without_proxy = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), HOST]))
    return {**inherited, "NO_PROXY": without_proxy, "no_proxy": without_proxy, **own}


def check_ports(ports: Mapping[str, int]) -> None:
    """Refuse ports that do not exist, that are given twice or that somebody listens on.

    Args:
        ports: by the option that gives each.

    Raises:
        ArgumentError: naming the option.
    """
    taken: dict[int, str] = {}
    for option, port in ports.items():
        if not 1 <= port <= 65535:
            raise ArgumentError(f"{option}: {port} is no port. Give one from 1 to 65535.")
        if port in taken:
            raise ArgumentError(f"{option}: port {port} is that of {taken[port]} too. Give another one.")
        taken[port] = option
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise ArgumentError(f"{option}: port {port} of {HOST}: {error.strerror}. Give another one.") from None


@contextmanager
def count_signals(numbers: tuple[signal.Signals, ...]) -> Iterator[Callable[[], int]]:
    """Count signals in place of what they do; yields a function that returns how many have come so far.

    A SIGHUP that is ignored stays so, for that is what `nohup` asks for. Several of them are one: a
    terminal that is closed may send it twice, by the kernel and by its shell.
    """
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if number != signal.SIGHUP or number not in came:
            came.append(number)

    before = {
        number: signal.signal(number, note)
        for number in numbers
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield lambda: len(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answers(url: str | None) -> bool:
    if url is None:
        return True
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Tell without reaping it: until `wait` nobody else gets its pid, so its session can still be signalled."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_session(process: subprocess.Popen[bytes]) -> int:
    """Kill a service and its children, and reap it; return its exit code."""
    _signal_session(process, signal.SIGKILL)
    return process.wait()


def _signal_session(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a service and its children, which share its session."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
