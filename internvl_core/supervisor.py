"""Own torchrun and every process below it, from the first to the last.

    flow -- stdin pipe --> supervisor --> torchrun --> ranks      (each in a session of its own)
                               ^---- abstract unix socket ----'

Invariant: when the supervisor is gone, so is all that it started. It is a subreaper, so orphans
of a killed torchrun come back to it and are killed; if it is killed itself, the ranks see the end
of file on their socket and leave, and the kernel kills torchrun.

A stop goes to the ranks over the socket and not through torchrun, which would give them 30 s
only. Stop is asked for by SIGTERM, SIGINT or SIGHUP, or by end of file on stdin: whoever held the
other end is dead. A second signal changes nothing, a third one kills at once.

Single-threaded, and standard library only.
"""

import argparse
import fcntl
import logging
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from internvl_core.contract import (
    FAILURE_FILE,
    LOG_FILE,
    RESULT_FILE,
    SUPERVISOR_SOCKET_VARIABLE,
    VERSION,
    StageFailure,
    write_json_atomically,
)
from internvl_core.errors import ArgumentError, InternVLError, LeaseHeld, find_error_class
from internvl_core.post_mortem import TORCHELASTIC_FILE, explain_exit, explain_stop
from internvl_core.process_tree import adopt_orphans, die_with, kill_descendants, reap

logger = logging.getLogger(__name__)

LOCK_FILE = "supervisor.lock"
STATE_FILE = "supervisor.json"

_STDIN = 0
_POLL_S = 0.1
_GRACE_AFTER_FAILURE_S = 5.0
_NUM_SIGNALS_TO_KILL = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command as the trainer of one attempt; return the exit code that its outcome has in errors.py."""
    parser = argparse.ArgumentParser(prog="python -m internvl_core.supervisor", description=main.__doc__)
    parser.add_argument("--attempt-dir", type=Path, required=True)
    parser.add_argument("--save-budget", type=float, required=True, metavar="SECONDS")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    try:
        attempt_dir = options.attempt_dir.resolve()
        with _hold_attempt(attempt_dir):
            return Supervisor(attempt_dir, options.save_budget, options.command).run()
    except InternVLError as error:
        logger.error("%s", error)
        return error.exit_code


@contextmanager
def _hold_attempt(attempt_dir: Path) -> Iterator[None]:
    """Keep a second supervisor out of the attempt; the kernel lets go when this process dies.

    Raises:
        LeaseHeld: another supervisor is at work here.
        ArgumentError: there is no such directory, or its attempt is over.
    """
    if not attempt_dir.is_dir():
        raise ArgumentError(
            f"{attempt_dir} is no directory; the attempt's directory has to exist before the supervisor."
        )
    with (attempt_dir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "a supervisor that is just starting"
            raise LeaseHeld(f"{attempt_dir} is being run by {holder}. Wait for it, or stop it by SIGTERM.") from None
        for outcome in (RESULT_FILE, FAILURE_FILE):
            if (attempt_dir / outcome).exists():
                raise ArgumentError(
                    f"{attempt_dir} has a {outcome}: that attempt is over. A new one needs its own directory."
                )
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        file.flush()
        yield


class Supervisor:
    """One run of one command."""

    def __init__(self, attempt_dir: Path, save_budget_s: float, command: Sequence[str]) -> None:
        self._attempt_dir = attempt_dir
        self._save_budget_s = save_budget_s
        self._command = list(command)
        self._started = time.time()
        self._signals: list[str] = []
        self._connections: list[socket.socket] = []
        self._stop_reason: str | None = None
        self._stop_deadline = 0.0
        self._failure_deadline: float | None = None
        self._is_stdin_watched = _is_pipe(_STDIN)

    def run(self) -> int:
        """Start the command, watch it to its end, leave nothing alive, and settle what its outcome was."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note_signal)
        adopt_orphans()
        with _listen() as server:
            process = self._start(server)
            logger.info("pid %d: %s", process.pid, self._command)
            self._write_state("running")
            kill_reason = None
            try:
                kill_reason = self._watch(process, server)
            finally:
                num_killed = kill_descendants(process)
        # None: it survives SIGKILL, as a process does that hangs in a driver.
        command_exit_code = -signal.SIGKILL if process.returncode is None else process.returncode
        failure = self._settle(command_exit_code, kill_reason)
        exit_code = find_error_class(failure.error).exit_code if failure else 0
        reason = kill_reason or self._stop_reason or f"the command ended with {command_exit_code}"
        self._write_state("done", exit_code=exit_code, reason=reason, num_killed=num_killed)
        logger.info(
            "exit code %d, %d processes killed: %s", exit_code, num_killed, failure.message if failure else reason
        )
        return exit_code

    def _note_signal(self, number: int, _: FrameType | None) -> None:
        self._signals.append(signal.Signals(number).name)

    def _start(self, server: socket.socket) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            SUPERVISOR_SOCKET_VARIABLE: server.getsockname()[1:].decode(),
            "TORCHELASTIC_ERROR_FILE": str(self._attempt_dir / TORCHELASTIC_FILE),
        }
        owner = os.getpid()
        with (self._attempt_dir / LOG_FILE).open("ab") as log:
            try:
                return subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=lambda: die_with(owner),
                )
            except OSError as error:
                raise ArgumentError(f"Cannot start {self._command[0]}: {error}") from error

    def _watch(self, process: subprocess.Popen[bytes], server: socket.socket) -> str | None:
        """Wait for the end of the command.

        Returns:
            Why it must be killed, or None if it ended by itself.
        """
        while not reap(process):
            watched = [server.fileno(), _STDIN] if self._is_stdin_watched else [server.fileno()]
            readable, _, _ = select.select(watched, [], [], _POLL_S)
            # Ranks first: whoever connected before the stop was asked for has something to save.
            self._connections += self._accept(server)
            if _STDIN in readable and not os.read(_STDIN, 4096):
                self._is_stdin_watched = False
                self._stop("end of file on stdin: its holder is gone")
            elif self._signals:
                self._stop(self._signals[0])
            kill_reason = self._find_kill_reason()
            if kill_reason is not None:
                return kill_reason
        return None

    def _accept(self, server: socket.socket) -> Iterator[socket.socket]:
        with suppress(BlockingIOError):
            while True:
                connection, _ = server.accept()
                if _read_peer_uid(connection) != os.getuid():
                    connection.close()
                    continue
                if self._stop_reason is not None:
                    _send_stop(connection)
                yield connection

    def _stop(self, reason: str) -> None:
        if self._stop_reason is not None:
            return
        logger.info("stop asked for (%s), %d ranks are told", reason, len(self._connections))
        self._stop_reason = reason
        self._stop_deadline = time.monotonic() + self._save_budget_s
        for connection in self._connections:
            _send_stop(connection)
        self._write_state("stopping", reason=reason)

    def _find_kill_reason(self) -> str | None:
        now = time.monotonic()
        if self._failure_deadline is None and (self._attempt_dir / FAILURE_FILE).exists():
            # Do not wait for torchrun, which gives the ranks that hang in a collective another 30 s.
            self._failure_deadline = now + _GRACE_AFTER_FAILURE_S
        if self._failure_deadline is not None and now > self._failure_deadline:
            return f"{FAILURE_FILE} was written and others did not leave within {_GRACE_AFTER_FAILURE_S:g} s"
        if len(self._signals) >= _NUM_SIGNALS_TO_KILL:
            return f"{', '.join(self._signals[:_NUM_SIGNALS_TO_KILL])}: not to be waited for"
        if self._stop_reason is None:
            return None
        if not self._connections:
            return "no rank was up yet"
        if now > self._stop_deadline:
            return f"the save took longer than its budget of {self._save_budget_s:g} s"
        return None

    def _settle(self, command_exit_code: int, kill_reason: str | None) -> StageFailure | None:
        """Read the outcome, or write down the failure that nobody lived to write."""
        failure = StageFailure.find(self._attempt_dir)
        if failure is not None:
            return failure
        if command_exit_code == 0 and (self._attempt_dir / RESULT_FILE).exists():
            return None
        if self._stop_reason is not None:
            failure = explain_stop(self._attempt_dir, command_exit_code, kill_reason)
        else:
            failure = explain_exit(self._attempt_dir, command_exit_code)
        try:
            failure.write_first(self._attempt_dir)
        except OSError as error:  # A full disk: the exit code still tells the class.
            logger.error("%s not written: %s", FAILURE_FILE, error)
        return failure

    def _write_state(
        self, state: str, *, exit_code: int | None = None, reason: str | None = None, num_killed: int = 0
    ) -> None:
        content = {
            "version": VERSION,
            "state": state,
            "pid": os.getpid(),
            "started": self._started,
            "exit_code": exit_code,
            "reason": reason,
            "killed": num_killed,
        }
        try:
            write_json_atomically(self._attempt_dir / STATE_FILE, content)
        except OSError as error:  # It is for others to look at: no reason to end a training.
            logger.error("%s not written: %s", STATE_FILE, error)


@contextmanager
def _listen() -> Iterator[socket.socket]:
    """Listen in the abstract namespace: no file to clean up, and the name vanishes with us."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(f"\0internvl-{os.urandom(8).hex()}")
        server.listen(256)
        server.setblocking(False)
        yield server


def _read_peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


def _send_stop(connection: socket.socket) -> None:
    with suppress(OSError):  # That rank is dead already.
        connection.sendall(b"stop\n")


def _is_pipe(descriptor: int) -> bool:
    """Tell a held pipe from a terminal or /dev/null, whose end of file says nothing about a holder."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # Closed.
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


if __name__ == "__main__":
    sys.exit(main())
