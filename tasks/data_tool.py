"""Run a data tool of the trainer in a process of its own, so that the control plane does without torch."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from internvl_core.contract import StageFailure, write_json_atomically
from internvl_core.errors import InternVLError
from internvl_core.inspection.job import JOB_FILE, REPORT_FILE

Tool = Literal["lint", "show", "plan", "convert"]

_MODULE = "internvl_core.inspection"
_ERRORS_FILE = "errors.log"

_started: dict[Tool, "_Process"] = {}
"""By `start_data_tool`, and not yet run."""


def start_data_tool(tool: Tool) -> None:
    """Start a tool that will be run soon, so that its imports are over by then; it ends with this process."""
    if tool not in _started:
        _started[tool] = _Process(tool)


@contextmanager
def early_data_tool(tool: Tool) -> Iterator[None]:
    """Start a tool that the block will run, unless that is done; one that it did not run is ended."""
    start_data_tool(tool)
    try:
        yield
    finally:
        unused = _started.pop(tool, None)
        if unused is not None:
            unused.close()


def run_data_tool(tool: Tool, job: Mapping[str, Any], *, log: Callable[[str], None]) -> dict[str, Any]:
    """Run a tool and return its report.

    The process and its workers end with this one, however it ends.

    Args:
        tool: the one that was started early, if it still lives, or one that is started now.
        job: content of job.json.
        log: given the tool's own lines as they come.

    Raises:
        InternVLError: of the class that the tool says; or, where it said nothing, with the last line of its errors.
    """
    early = _started.pop(tool, None)
    if early is not None and not early.is_alive:
        early.close()
        early = None
    with closing(early or _Process(tool)) as process:
        return process.run(job, log)


class _Process:
    """A tool's process, the leader of a group of its own."""

    def __init__(self, tool: Tool) -> None:
        self._name = f"{_MODULE} {tool}"
        self._folder = tempfile.TemporaryDirectory(prefix="internvl-data-")
        self._directory = Path(self._folder.name)
        with (self._directory / _ERRORS_FILE).open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, tool, str(self._directory)],
                # Its end is how the tool learns that this process died.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End what still runs, and remove its files."""
        process = self._process
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            # What the tool never read is lost with it.
            with suppress(BrokenPipeError):
                stream.close()
        self._folder.cleanup()

    def run(self, job: Mapping[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        write_json_atomically(self._directory / JOB_FILE, job)
        # One that ended before it was wanted is told of below.
        with suppress(BrokenPipeError):
            process.stdin.write("\n")
            process.stdin.flush()
        for line in process.stdout:
            log(line.rstrip("\n"))
        process.wait()
        failure = StageFailure.find(self._directory)
        if failure is not None:
            raise failure.to_exception()
        if process.returncode:
            last = _find_last_line(self._directory / _ERRORS_FILE)
            raise InternVLError(f"{self._name}: ended with code {process.returncode}: {last}")
        report: dict[str, Any] = json.loads((self._directory / REPORT_FILE).read_text(encoding="utf-8"))
        return report


def _find_last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
