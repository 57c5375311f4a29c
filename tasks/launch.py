"""Start a stage's trainer under its supervisor, and watch it through the files of the attempt.

Invariant: whoever leaves the `with` block of a `RunningStage`, by whatever exception, leaves no
trainer behind that trains; whoever dies inside it closes a pipe, which asks the supervisor to stop.
The pipe is closed before anything is waited for: a second exception, in the wait, cuts that short,
and the supervisor alone sees to the save.
"""

import json
import logging
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from internvl_core.argument_rules import resolve_arguments
from internvl_core.contract import LOG_FILE, METRICS_FILE, STATE_FILE, StageFailure, StageFile, StageResult
from internvl_core.errors import InternVLError, WorkerLost, find_error_class, find_error_class_of_code
from internvl_core.supervision.watchdog import Limits
from tasks.line_tail import LineTail
from tasks.torchrun_command import build_command

logger = logging.getLogger(__name__)

SUPERVISOR_LOG_FILE = "supervisor.log"

_MAX_LOG_LINES = 200
_KILL_MARGIN_S = 15.0
"""Over the save budget: the supervisor itself then kills what is left, which takes seconds."""


def launch_stage(
    stage: StageFile,
    attempt_dir: Path,
    *,
    node_rank: int = 0,
    locks: Sequence[int] = (),
    leave_after_s: float | None = None,
) -> "RunningStage":
    """Write stage.json and start the stage; the attempt's directory is made if need be.

    Args:
        stage: what to train.
        attempt_dir: where the files of the process boundary go.
        node_rank: which of the launcher's nodes this is; each has an attempt's directory of its own.
        locks: descriptors that stay open until the supervisor is gone (`hold_stage`, `hold_gpus`).
        leave_after_s: see `RunningStage`.

    Raises:
        ArgumentError: see `build_command`; nothing was started.
    """
    attempt_dir = attempt_dir.resolve()
    command = build_command(stage, attempt_dir, node_rank=node_rank)
    attempt_dir.mkdir(parents=True, exist_ok=True)
    stage.write(attempt_dir)
    return launch_command(
        command, attempt_dir, get_limits(stage), locks=locks, leave_after_s=leave_after_s, joins=node_rank > 0
    )


def get_limits(stage: StageFile) -> Limits:
    """Get how long a stage may be without progress, from its arguments and their defaults."""
    names = ("setup_limit_s", "stall_limit_s")
    values = resolve_arguments({name: stage.arguments[name] for name in names if name in stage.arguments})
    setup_s, stall_s = (values[name] for name in names)
    return Limits(setup_s=setup_s, stall_s=stall_s, save_s=stage.save_budget_s)


def launch_command(
    command: Sequence[str],
    attempt_dir: Path,
    limits: Limits,
    *,
    locks: Sequence[int] = (),
    leave_after_s: float | None = None,
    joins: bool = False,
) -> "RunningStage":
    """Start a command as the trainer of an attempt, owned by a supervisor in a session of its own.

    With `joins` the result is written on another node.
    """
    supervisor = [sys.executable, "-m", "internvl_core.supervision.supervisor"]
    options = [
        f"--attempt-dir={attempt_dir}",
        f"--save-budget={limits.save_s}",
        f"--setup-limit={limits.setup_s}",
        f"--stall-limit={limits.stall_s}",
        *(["--joins"] if joins else []),
    ]
    with (attempt_dir / SUPERVISOR_LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            [*supervisor, *options, "--", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=locks,
        )
    logger.info("supervisor %d runs %s", process.pid, shlex.join(command))
    return RunningStage(process, attempt_dir, limits.save_s, leave_after_s=leave_after_s)


class RunningStage:
    """A stage at work, or just over.

    A context manager: leaving it while the trainer runs, by an exception (Prefect's
    TerminationSignal and KeyboardInterrupt are BaseExceptions) or without one, stops the trainer
    and waits for it, or for so long: then its supervisor sees to the rest. For the main thread: only
    that one is told of a cancel.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        attempt_dir: Path,
        save_budget_s: float,
        *,
        leave_after_s: float | None = None,
    ) -> None:
        """Watch a supervisor.

        Args:
            process: the supervisor.
            attempt_dir: of the attempt.
            save_budget_s: that it was given.
            leave_after_s: how long leaving the block waits for a stop; None: until it is over.
        """
        self.process = process
        self.attempt_dir = attempt_dir
        self._save_budget_s = save_budget_s
        self._leave_after_s = leave_after_s
        self._log = LineTail(attempt_dir / LOG_FILE)
        self._metrics = LineTail(attempt_dir / METRICS_FILE)

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        return self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_running = self.poll() is None
        self.ask_to_stop()
        if not is_running:
            return
        logger.warning("stopping the trainer: %s", kind.__name__ if kind else "nobody watches it any more")
        if self._leave_after_s is None:
            self.stop()
        else:
            self._has_ended_within(self._leave_after_s)

    def poll(self) -> int | None:
        """Return the exit code of the stage (errors.py), None while it runs."""
        return self.process.poll()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the metrics that were logged since the last call; never blocks."""
        return list(self._parse_metrics())

    def iter_metrics(
        self, poll_s: float = 0.2, *, check: Callable[[], None] = lambda: None
    ) -> Iterator[dict[str, Any]]:
        """Yield metrics as they are logged, until the stage is over and all are read.

        Args:
            poll_s: between two looks.
            check: called at each look; what it raises ends the watching.
        """
        while self.poll() is None:
            check()
            yield from self._parse_metrics()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(poll_s)
        yield from self._parse_metrics()

    def _parse_metrics(self) -> Iterator[dict[str, Any]]:
        for line in self._metrics.read():
            try:
                yield json.loads(line)
            except ValueError:  # A curve with a hole is better than a training that ends over it.
                logger.warning("%s: not JSON, left out: %.100s", self.attempt_dir / METRICS_FILE, line)

    def read_log(self) -> str:
        """Return what the trainer logged since the last call: whole lines, only the last of them if they are many."""
        lines: deque[str] = deque(maxlen=_MAX_LOG_LINES)
        num_lines = 0
        is_over = self.poll() is not None
        for line in self._log.read(take_unfinished=is_over):
            lines.append(line)
            num_lines += 1
        skipped = num_lines - len(lines)
        head = [f"[{skipped} lines skipped, all are in {self.attempt_dir / LOG_FILE}]"] if skipped else []
        return "\n".join([*head, *lines])

    def ask_to_stop(self) -> None:
        """Ask the trainer to save and leave, once; returns at once."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def stop(self) -> None:
        """Stop the trainer and wait until none of its processes is left; safe to repeat.

        It has the save budget to commit a checkpoint. After that and a margin the supervisor is
        told to kill, and at last is killed itself: its ranks notice and leave.
        """
        self.ask_to_stop()
        if self._has_ended_within(self._save_budget_s + _KILL_MARGIN_S):
            return
        # Three signals mean "now". Three different ones: equal ones may merge while they are pending.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.process.send_signal(number)
        if not self._has_ended_within(_KILL_MARGIN_S):
            logger.error("supervisor %d does not end: SIGKILL", self.pid)
            self.process.kill()
            self.process.wait()

    def _has_ended_within(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.poll() is not None

    def result(self) -> StageResult:
        """Return what the finished stage reports.

        Raises:
            InternVLError: of the class that failure.json names; the message ends with where the log is.
        """
        exit_code = self.poll()
        if exit_code is None:
            raise InternVLError(f"{self.attempt_dir}: the stage is still running; wait for poll() before result().")
        if exit_code == 0:
            return StageResult.get(self.attempt_dir)
        failure = StageFailure.find(self.attempt_dir)
        # With another exit code than that of failure.json, this supervisor was refused and the failure is another's.
        if failure is not None and (exit_code < 0 or exit_code == find_error_class(failure.error).exit_code):
            where = f"Log: {self.attempt_dir / LOG_FILE}"
            error = failure.to_exception()
            raise error if failure.message.endswith(where) else type(error)(f"{failure.message} {where}")
        raise self._explain_supervisor(exit_code)

    def _explain_supervisor(self, exit_code: int) -> InternVLError:
        path = self.attempt_dir / SUPERVISOR_LOG_FILE
        if exit_code < 0:
            name = signal.Signals(-exit_code).name
            return WorkerLost(f"The supervisor itself was killed by {name}, its ranks left with it. Log: {path}")
        last_line = path.read_text(errors="replace").rstrip().rpartition("\n")[2]
        # Refusals, and outcomes for whose failure.json a full disk had no room.
        kind = find_error_class_of_code(exit_code) or InternVLError
        return kind(f"The supervisor ended with {exit_code}: {last_line} Log: {path}")


def read_step(attempt_dir: Path) -> int | None:
    """Read the last step that a rank of a finished attempt told; None before the first."""
    try:
        step = json.loads((attempt_dir / STATE_FILE).read_text())["step"]
    except (FileNotFoundError, ValueError, KeyError):  # A supervisor that was killed, or a full disk.
        return None
    return int(step) if step is not None else None
