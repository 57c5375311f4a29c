"""Explain a trainer that died without a failure.json, from what it left behind.

torchrun turns every failure into exit code 1, so the cause is looked for in its error file (a
rank's exception), then in its report at the end of the log (rank and signal), and last in the
exit status of the command. Standard library only.
"""

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from internvl_core.contract import FAILURE_FILE, LOG_FILE, RESULT_FILE, StageFailure
from internvl_core.errors import InternVLError, WorkerLost

TORCHELASTIC_FILE = "torchelastic_error.json"
"""Where torchrun copies the error file of the first failing rank, if that rank could write one."""

_NO_RANK = -1
_NUM_LAST_LINES = 5
_LOG_TAIL_BYTES = 256 * 1024
# torch 2.13: "E1121 11:36:12.304000 7556 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9)"
_TORCHRUN_SPEAKS = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic/", re.MULTILINE)
_FIRST_FAILURE = re.compile(
    r"^Root Cause \(first observed failure\):.*?^\s*rank\s*: (?P<rank>\d+).*?^\s*exitcode\s*: (?P<code>-?\d+)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class _Death:
    """Who died first, and how."""

    who: str
    rank: int
    exit_code: int

    def __str__(self) -> str:
        if self.exit_code >= 0:
            return f"{self.who} ended with exit code {self.exit_code}"
        name = _name_signal(-self.exit_code)
        culprit = ", possibly by the kernel because memory ran out" if name == "SIGKILL" else ""
        return f"{self.who} was killed by {name}{culprit}"


def explain_exit(attempt_dir: Path, exit_code: int) -> StageFailure:
    """Describe a command that ended by itself without having met the contract.

    An exit code of 0 counts as a fault of ours: then a rank returned without its result.json.
    """
    log = _read_tail(attempt_dir / LOG_FILE)
    where = f"Log: {attempt_dir / LOG_FILE}"
    if exit_code == 0:
        message = f"The trainer ended without an error, but wrote no {RESULT_FILE}. {where}"
        return _describe(InternVLError, message, _NO_RANK, log)
    death = _find_first_death(log, exit_code)
    said = _find_exception(attempt_dir / TORCHELASTIC_FILE)
    cause = f" ({said})" if said else ""
    return _describe(WorkerLost, f"No {FAILURE_FILE} was left: {death}{cause}. {where}", death.rank, log)


def explain_stop(attempt_dir: Path, exit_code: int, kill_reason: str | None) -> StageFailure:
    """Describe a command that was asked to stop and had committed nothing when it was gone.

    `kill_reason` says why it was not waited for; None if it ended by itself.
    """
    log = _read_tail(attempt_dir / LOG_FILE)
    message = (
        f"Stopped on request before a checkpoint was committed: {kill_reason or _find_first_death(log, exit_code)}. "
        f"A retry resumes from the newest committed checkpoint. Log: {attempt_dir / LOG_FILE}"
    )
    return _describe(WorkerLost, message, _NO_RANK, log)


def _describe(error: type[InternVLError], message: str, rank: int, log: str) -> StageFailure:
    return StageFailure(error=error.__name__, message=message, rank=rank, traceback=_find_last_words(log))


def _find_first_death(log: str, exit_code: int) -> _Death:
    report = _FIRST_FAILURE.search(log)
    if report is None:
        return _Death("the trainer's command", _NO_RANK, exit_code)
    return _Death(f"rank {report['rank']}", int(report["rank"]), int(report["code"]))


def _find_exception(path: Path) -> str | None:
    """Take the first line of the exception in torchrun's error file; its format is not promised, so any may do."""
    try:
        message = json.loads(path.read_text())["message"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    text = message.get("message") if isinstance(message, dict) else message
    return text.strip().splitlines()[0] if isinstance(text, str) and text.strip() else None


def _find_last_words(log: str) -> str:
    """Cut off torchrun's own report, which names no cause, and keep the last lines with words in them."""
    report = _TORCHRUN_SPEAKS.search(log)
    lines = (log[: report.start()] if report else log).splitlines()
    return "\n".join([line.rstrip() for line in lines if re.search(r"\w", line)][-_NUM_LAST_LINES:])


def _read_tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
