"""Own torchrun and every process below it, from the first to the last.

    flow -- stdin pipe --> supervisor --> torchrun --> ranks      (each in a session of its own)
                               ^---- abstract unix socket ----'

Invariant: when the supervisor is gone, so is all that it started. It is a subreaper, so orphans
of a killed torchrun come back to it and are killed; if it is killed itself, the ranks see the end
of file on their socket and leave, and the kernel kills torchrun.

A stop goes to the ranks over the socket. It is asked for by SIGTERM, SIGINT or SIGHUP, here or at
any one rank, or by end of file on stdin: whoever held the other end is dead. A second signal
changes nothing, a third one within 10 s kills at once.

A run that stands still is ended, with the stacks of all ranks (watchdog.py, stacks.py). That is
done here because this process lives when a rank holds its GIL or is stopped.

Single-threaded, and standard library only.
"""

import argparse
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from internvl_core.contract import (
    FAILURE_FILE,
    LOG_FILE,
    RESULT_FILE,
    STACKS_DIR,
    STACKS_DIR_VARIABLE,
    STATE_FILE,
    SUPERVISOR_SOCKET_VARIABLE,
    VERSION,
    StageFailure,
    write_json_atomically,
)
from internvl_core.errors import ArgumentError, InternVLError, find_error_class
from internvl_core.supervision.attempt_lock import hold_attempt
from internvl_core.supervision.oom_kills import OomKills
from internvl_core.supervision.post_mortem import (
    TORCHELASTIC_FILE,
    explain_exit,
    explain_idle_stop,
    explain_impatience,
    explain_stall,
    explain_stop,
    name_memory,
)
from internvl_core.supervision.process_tree import adopt_orphans, is_held, kill_descendants, reap, start_owned
from internvl_core.supervision.progress import Kind, Message
from internvl_core.supervision.ranks import Ranks
from internvl_core.supervision.stacks import collect_stacks
from internvl_core.supervision.stop_signals import STOP_SIGNALS, StopSignals
from internvl_core.supervision.watchdog import Limits, Watchdog

logger = logging.getLogger(__name__)

_STDIN = 0
_POLL_S = 0.1
_GRACE_AFTER_FAILURE_S = 5.0
_GRACE_OF_THE_REST_S = 2.0
"""torchrun needs a moment to notice which rank died first, and with which signal."""
_GRACE_OF_REPORT_S = 15.0
"""After a rank was lost: torchrun writes down who died of what."""
_GRACE_OF_IDLE_STOP_S = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command as the trainer of one attempt; return the exit code that its outcome has in errors.py."""
    parser = argparse.ArgumentParser(prog="python -m internvl_core.supervision.supervisor", description=main.__doc__)
    parser.add_argument("--attempt-dir", type=Path, required=True)
    for name in ("--save-budget", "--setup-limit", "--stall-limit"):
        parser.add_argument(name, type=float, required=True, metavar="SECONDS")
    parser.add_argument("--joins", action="store_true", help="Rank 0, which writes the result, is on another node.")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    limits = Limits(setup_s=options.setup_limit, stall_s=options.stall_limit, save_s=options.save_budget)
    try:
        attempt_dir = options.attempt_dir.resolve()
        with hold_attempt(attempt_dir):
            return Supervisor(attempt_dir, limits, options.command, joins=options.joins).run()
    except InternVLError as error:
        logger.error("%s", error)
        return error.exit_code


@dataclass(frozen=True)
class _Kill:
    """Why the command is not waited for."""

    reason: str
    failure: StageFailure | None = None
    """What that means; None: to be found out from what is left."""


class Supervisor:
    """One run of one command."""

    def __init__(self, attempt_dir: Path, limits: Limits, command: Sequence[str], *, joins: bool = False) -> None:
        self._attempt_dir = attempt_dir
        self._joins = joins
        self._limits = limits
        self._command = list(command)
        self._started = time.time()
        self._signals = StopSignals()
        self._impatience: str | None = None
        self._ranks = Ranks()
        self._watchdog = Watchdog(limits, time.monotonic())
        self._oom_kills = OomKills()
        self._stop_reason: str | None = None
        self._stopped = 0.0
        self._failed: float | None = None
        self._lost: float | None = None
        self._is_stdin_watched = is_held(_STDIN)

    def run(self) -> int:
        """Start the command, watch it to its end, leave nothing alive, and settle what its outcome was."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note_signal)
        adopt_orphans()
        self._oom_kills.watch(os.getpid())
        process = self._start()
        logger.info("pid %d: %s", process.pid, self._command)
        self._write_state("running")
        kill = None
        try:
            kill = self._watch(process)
            if kill is not None and kill.failure is not None:
                # Before ranks can complain of those that are killed first.
                with suppress(OSError):
                    kill.failure.write_first(self._attempt_dir)
        finally:
            num_killed = kill_descendants(process)
            self._ranks.close()
        # None: it survives SIGKILL, as a process does that hangs in a driver.
        command_exit_code = -signal.SIGKILL if process.returncode is None else process.returncode
        failure = self._settle(command_exit_code, kill)
        exit_code = find_error_class(failure.error).exit_code if failure else 0
        reason = (kill.reason if kill else self._stop_reason) or f"the command ended with {command_exit_code}"
        self._write_state("done", exit_code=exit_code, reason=reason, num_killed=num_killed)
        logger.info(
            "exit code %d, %d processes killed: %s", exit_code, num_killed, failure.message if failure else reason
        )
        return exit_code

    def _note_signal(self, number: int, _: FrameType | None) -> None:
        self._signals.note(number, time.monotonic())

    def _start(self) -> subprocess.Popen[bytes]:
        stacks_dir = self._attempt_dir / STACKS_DIR
        stacks_dir.mkdir(exist_ok=True)
        environment = os.environ | {
            SUPERVISOR_SOCKET_VARIABLE: self._ranks.name,
            STACKS_DIR_VARIABLE: str(stacks_dir),
            "TORCHELASTIC_ERROR_FILE": str(self._attempt_dir / TORCHELASTIC_FILE),
        }
        try:
            return start_owned(self._command, self._attempt_dir / LOG_FILE, environment)
        except OSError as error:
            raise ArgumentError(f"Cannot start {self._command[0]}: {error}") from error

    def _watch(self, process: subprocess.Popen[bytes]) -> _Kill | None:
        """Wait for the end of the command; return why it must be killed, or None if it ended by itself."""
        while not reap(process):
            stdin = [_STDIN] if self._is_stdin_watched else []
            readable, _, _ = select.select([*self._ranks.descriptors, *stdin], [], [], _POLL_S)
            self._watchdog.advance(time.monotonic())
            # Ranks first: whoever connected before the stop was asked for has something to save.
            for message in self._ranks.read():
                self._hear(message)
            if _STDIN in readable and not os.read(_STDIN, 4096):
                self._is_stdin_watched = False
                self._stop("end of file on stdin: its holder is gone")
            elif self._signals.first is not None:
                self._stop(self._signals.first)
            kill = self._find_end_of_failure() or self._find_end_of_stop() or self._find_stall()
            if kill is not None:
                return kill
        return None

    def _hear(self, message: Message) -> None:
        if message.rank not in self._watchdog.phases and message.rank in self._ranks.pids:
            self._oom_kills.watch(self._ranks.pids[message.rank])
        if message.kind is Kind.PROGRESS:
            self._watchdog.hear(message.rank, message.phase, message.step)
        elif message.kind is Kind.IMPATIENCE:
            self._impatience = f"{message.text} to rank {message.rank}"
        elif message.kind is Kind.SIGNAL and not (self._is_failing or self._ranks.has_leaver):
            # After a failure it is torchrun, which ends the other ranks.
            self._stop(f"{message.text} to rank {message.rank}")

    @property
    def _is_failing(self) -> bool:
        return self._ranks.lost is not None or (self._attempt_dir / FAILURE_FILE).exists()

    def _stop(self, reason: str) -> None:
        if self._stop_reason is not None:
            return
        self._stop_reason = reason
        self._stopped = time.monotonic()
        logger.info("stop asked for (%s), %d ranks are told", reason, self._ranks.stop())
        self._write_state("stopping", reason=reason)

    def _find_end_of_failure(self) -> _Kill | None:
        """End what is left after a rank failed or was lost: torchrun waits much longer for ranks that hang."""
        now = time.monotonic()
        if (self._attempt_dir / FAILURE_FILE).exists():
            self._failed = self._failed or now
            if now - self._failed > _GRACE_AFTER_FAILURE_S:
                return _Kill(f"{FAILURE_FILE} was written and others did not leave within {_GRACE_AFTER_FAILURE_S:g} s")
        elif self._ranks.lost is not None:
            self._lost = self._lost or now
            if now - self._lost > _GRACE_OF_THE_REST_S:
                for pid in self._ranks.pids.values():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            if now - self._lost > _GRACE_OF_REPORT_S:
                return _Kill(f"rank {self._ranks.lost} was lost and the command did not end")
        return None

    def _find_end_of_stop(self) -> _Kill | None:
        impatience = self._impatience or (str(self._signals) if self._signals.is_impatient else None)
        if impatience is not None:
            return _Kill(f"{impatience}: not to be waited for", explain_impatience(self._attempt_dir, impatience))
        if self._stop_reason is None or self._is_failing:
            return None
        waited_s = time.monotonic() - self._stopped
        phases = self._watchdog.phases
        if not any(phase.has_work_to_lose for phase in phases.values()):
            if not self._ranks.has_any or waited_s > _GRACE_OF_IDLE_STOP_S:
                failure = explain_idle_stop(self._attempt_dir, self._stop_reason, phases)
                return _Kill("there is nothing to save", failure)
        elif waited_s > self._limits.save_s:
            return _Kill(f"the save took longer than its budget of {self._limits.save_s:g} s")
        return None

    def _find_stall(self) -> _Kill | None:
        stall = self._watchdog.find_stall()
        # A stop has its own limit, and a failure its own.
        if stall is None or self._stop_reason is not None or self._is_failing:
            return None
        logger.warning("%s", stall)
        stacks = collect_stacks(self._attempt_dir / STACKS_DIR, self._ranks.pids)
        return _Kill(str(stall), explain_stall(self._attempt_dir, stall, stacks))

    def _settle(self, command_exit_code: int, kill: _Kill | None) -> StageFailure | None:
        """Read the outcome, or write down the failure that nobody lived to write."""
        told = StageFailure.find(self._attempt_dir)
        has_result = self._joins or (self._attempt_dir / RESULT_FILE).exists()
        if told is None and command_exit_code == 0 and has_result:
            return None
        failure = told or self._explain(command_exit_code, kill)
        cgroup = self._oom_kills.find_risen()
        if cgroup is not None:
            failure = name_memory(failure, cgroup)
        if failure != told:
            try:
                failure.write(self._attempt_dir)
            except OSError as error:  # A full disk: the exit code still tells the class.
                logger.error("%s not written: %s", FAILURE_FILE, error)
        return failure

    def _explain(self, command_exit_code: int, kill: _Kill | None) -> StageFailure:
        if kill is not None and kill.failure is not None:
            return kill.failure
        step = self._watchdog.step
        if self._stop_reason is not None:
            return explain_stop(self._attempt_dir, command_exit_code, kill.reason if kill else None, step=step)
        return explain_exit(self._attempt_dir, command_exit_code, lost=self._ranks.lost, step=step)

    def _write_state(
        self, state: str, *, exit_code: int | None = None, reason: str | None = None, num_killed: int = 0
    ) -> None:
        content = {
            "version": VERSION,
            "state": state,
            "pid": os.getpid(),
            "started": self._started,
            "step": self._watchdog.step,
            "exit_code": exit_code,
            "reason": reason,
            "killed": num_killed,
        }
        try:
            write_json_atomically(self._attempt_dir / STATE_FILE, content)
        except OSError as error:  # It is for others to look at: no reason to end a training.
            logger.error("%s not written: %s", STATE_FILE, error)


if __name__ == "__main__":
    sys.exit(main())
