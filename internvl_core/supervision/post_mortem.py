"""Explain a trainer that died without a failure.json, from what it left behind.

torchrun turns every failure into exit code 1, so the cause is looked for in its error file (a
rank's exception), then in its report at the end of the log (rank and signal), and last in the
exit status of the command. Standard library only.
"""

import json
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from internvl_core.contract import FAILURE_FILE, LOG_FILE, RESULT_FILE, StageFailure
from internvl_core.errors import InternVLError, OutOfMemory, Preempted, Stalled, WorkerLost, find_error_class_of_code
from internvl_core.supervision.progress import Phase
from internvl_core.supervision.watchdog import Stall

TORCHELASTIC_FILE = "torchelastic_error.json"
"""Where torchrun copies the error file of the first failing rank, if that rank could write one."""

_NO_RANK = -1
_NUM_LAST_LINES = 5
_LOG_TAIL_BYTES = 256 * 1024
# torch 2.13: "E1121 11:36:12.304000 7556 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9)"
_TORCHRUN_SPEAKS = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic/", re.MULTILINE)
_FAILURE = re.compile(r"^\s*rank\s*: (?P<rank>\d+).*?^\s*exitcode\s*: (?P<code>-?\d+)", re.MULTILINE | re.DOTALL)
_REPORT = re.compile(r"^Failures:$.*", re.MULTILINE | re.DOTALL)
_ROOT_CAUSE = re.compile(rf"^Root Cause \(first observed failure\):.*?{_FAILURE.pattern}", re.MULTILINE | re.DOTALL)
_POSSIBLY = "possibly by the kernel because memory ran out"


@dataclass(frozen=True)
class _Death:
    """Who died first, and how."""

    who: str
    rank: int
    exit_code: int

    def __str__(self) -> str:
        if self.exit_code == WorkerLost.exit_code:
            return f"{self.who} left because another rank was gone"
        if self.exit_code >= 0:
            return f"{self.who} ended with exit code {self.exit_code}"
        name = _name_signal(-self.exit_code)
        culprit = f", {_POSSIBLY}" if name == "SIGKILL" else ""
        return f"{self.who} was killed by {name}{culprit}"


def explain_exit(
    attempt_dir: Path, exit_code: int, *, lost: int | None = None, step: int | None = None
) -> StageFailure:
    """Describe a command that ended by itself without having met the contract.

    An exit code of 0 counts as a fault of ours: then a rank returned without its result.json.

    Args:
        attempt_dir: where the log is.
        exit_code: of the command.
        lost: the rank that was the first to go without a word, if there was one.
        step: the last that any rank told.
    """
    log = _read_tail(attempt_dir / LOG_FILE)
    where = f"Log: {attempt_dir / LOG_FILE}"
    if exit_code == 0 and lost is None:
        message = f"The trainer ended without an error, but wrote no {RESULT_FILE}. {where}"
        return _describe(InternVLError, message, _NO_RANK, log, step)
    death = _find_first_death(log, exit_code, lost)
    said = _find_exception(attempt_dir / TORCHELASTIC_FILE)
    cause = f" ({said})" if said else ""
    at = "" if step is None else f" after step {step}"
    # A full disk takes failure.json, and the rank's own exit code still tells the class.
    error = find_error_class_of_code(death.exit_code) or WorkerLost
    return _describe(error, f"No {FAILURE_FILE} was left: {death}{at}{cause}. {where}", death.rank, log, step)


def explain_stop(
    attempt_dir: Path, exit_code: int, kill_reason: str | None, *, step: int | None = None
) -> StageFailure:
    """Describe a command that was asked to stop and had committed nothing when it was gone.

    `kill_reason` says why it was not waited for; None if it ended by itself.
    """
    log = _read_tail(attempt_dir / LOG_FILE)
    message = (
        "Stopped on request before a checkpoint was committed: "
        f"{kill_reason or _find_first_death(log, exit_code, None)}. {_tell_retry(attempt_dir)}"
    )
    return _describe(WorkerLost, message, _NO_RANK, log, step)


def explain_idle_stop(attempt_dir: Path, reason: str, phases: Mapping[int, Phase]) -> StageFailure:
    """Describe a command that was asked to stop when no rank had anything to save."""
    if Phase.EVALUATE in phases.values():
        message = (
            f"Stopped on request ({reason}) during the evaluation: the trained weights are committed, only the "
            f"evaluation is left. Log: {attempt_dir / LOG_FILE}"
        )
    else:
        what = "before the first step" if phases else "no rank was up yet"
        message = f"Stopped on request ({reason}): {what}, so nothing new was to save. {_tell_retry(attempt_dir)}"
    return _describe(Preempted, message, _NO_RANK, _read_tail(attempt_dir / LOG_FILE), None)


def explain_impatience(attempt_dir: Path, signals: str, *, step: int | None = None) -> StageFailure:
    """Describe a command whose stop was not to be waited for."""
    message = (
        f"Stopped on request without a new checkpoint: {signals}: not to be waited for. {_tell_retry(attempt_dir)}"
    )
    return _describe(Preempted, message, _NO_RANK, _read_tail(attempt_dir / LOG_FILE), step)


def explain_stall(attempt_dir: Path, stall: Stall, stacks: str) -> StageFailure:
    """Describe a command that stood still."""
    rank = stall.behind[0] if len(stall.behind) == 1 else _NO_RANK
    message = f"{stall} The stacks of all ranks are in {FAILURE_FILE}. Log: {attempt_dir / LOG_FILE}"
    return StageFailure(Stalled.__name__, message, rank, step=stall.step, traceback=stacks)


def name_memory(failure: StageFailure, cgroup: str) -> StageFailure:
    """Make a lost process out of memory, where the kernel has counted a kill for want of it."""
    # Another process of the same cgroup may have been killed, days ago: only a death of that kind is explained by it.
    is_of_that_kind = _POSSIBLY in failure.message or "worker of the data loader" in failure.message
    if failure.error != WorkerLost.__name__ or not is_of_that_kind:
        return failure
    cause = f"by the kernel because the memory of {cgroup} ran out"
    told = failure.message.replace(_POSSIBLY, cause)
    if told == failure.message:
        told = f"Killed {cause}. {told}"
    advice = "Lower dataloader_num_workers, or give the run more memory."
    return replace(failure, error=OutOfMemory.__name__, message=f"{advice} {told}")


def _tell_retry(attempt_dir: Path) -> str:
    return f"A retry resumes from the newest committed checkpoint. Log: {attempt_dir / LOG_FILE}"


def _describe(error: type[InternVLError], message: str, rank: int, log: str, step: int | None) -> StageFailure:
    return StageFailure(error=error.__name__, message=message, rank=rank, step=step, traceback=_find_last_words(log))


def _find_first_death(log: str, exit_code: int, lost: int | None) -> _Death:
    report = _REPORT.search(log)
    failures = {int(each["rank"]): int(each["code"]) for each in _FAILURE.finditer(report[0])} if report else {}
    if lost in failures:
        # torchrun looks ten times a second: of several dead ranks it does not know the first.
        return _Death(f"rank {lost}", lost, failures[lost])
    root = _ROOT_CAUSE.search(log)
    if root is not None:
        return _Death(f"rank {root['rank']}", int(root["rank"]), int(root["code"]))
    if lost is not None:
        return _Death(f"rank {lost} was lost without a word; the trainer's command", lost, exit_code)
    return _Death("the trainer's command", _NO_RANK, exit_code)


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
