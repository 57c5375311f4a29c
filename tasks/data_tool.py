"""Run a data tool of the trainer in a process of its own, so that the control plane does without torch."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from internvl_core.contract import StageFailure, write_json_atomically
from internvl_core.errors import InternVLError
from internvl_core.inspection.job import JOB_FILE, REPORT_FILE

Tool = Literal["lint", "show", "plan", "convert"]

_MODULE = "internvl_core.inspection"
_ERRORS_FILE = "errors.log"


def run_data_tool(tool: Tool, job: Mapping[str, Any], *, log: Callable[[str], None]) -> dict[str, Any]:
    """Run a tool and return its report.

    The process and its workers end with this one, however it ends.

    Args:
        job: content of job.json.
        log: given the tool's own lines as they come.

    Raises:
        InternVLError: of the class that the tool says; or, where it said nothing, with the last line of its errors.
    """
    with tempfile.TemporaryDirectory(prefix="internvl-data-") as folder:
        directory = Path(folder)
        write_json_atomically(directory / JOB_FILE, job)
        with (directory / _ERRORS_FILE).open("wb") as errors, _start(tool, directory, errors) as process:
            assert process.stdout is not None
            for line in process.stdout:
                log(line.rstrip("\n"))
            process.wait()
        failure = StageFailure.find(directory)
        if failure is not None:
            raise failure.to_exception()
        if process.returncode:
            raise InternVLError(
                f"{_MODULE} {tool}: ended with code {process.returncode}: {_find_last_line(directory / _ERRORS_FILE)}"
            )
        report: dict[str, Any] = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
        return report


@contextmanager
def _start(tool: Tool, directory: Path, errors: BinaryIO) -> Iterator[subprocess.Popen[str]]:
    """Start the tool as a group of its own, and end the group when this is left early."""
    process = subprocess.Popen(
        [sys.executable, "-m", _MODULE, tool, str(directory)],
        # Never written to: its end is how the tool learns that this process died.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def _find_last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
