"""The process boundary of the data tools: a folder with job.json in it, report.json or failure.json out.

`python -m internvl_core.inspection TOOL FOLDER`. Standard output carries log lines for people. Whoever
starts it as a group of its own holds the other end of its standard input: a line says that job.json is
there, and with its end the group ends.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internvl_core.contract import StageFailure, write_json_atomically
from internvl_core.errors import InternVLError

JOB_FILE = "job.json"
REPORT_FILE = "report.json"

Tool = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From the content of job.json to that of report.json."""

_MOMENT_S = 0.05
"""In which a job comes that was given when the process was started."""


def run_job(tool: Tool, folder: Path, *, preload: Callable[[], None] | None = None) -> int:
    """Run a tool on a folder; an error of ours is written to failure.json, and its exit code returned.

    With `preload`, what a job needs is imported while there is none yet.
    """
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("internvl_core").setLevel(logging.INFO)
    has_job = _follow_owner()
    if (folder / JOB_FILE).exists():
        has_job.set()
    if preload is not None and not has_job.wait(_MOMENT_S):
        preload()
    has_job.wait()
    try:
        report = tool(json.loads((folder / JOB_FILE).read_text(encoding="utf-8")))
        write_json_atomically(folder / REPORT_FILE, report)
    except InternVLError as error:
        StageFailure.from_exception(error, rank=0).write_first(folder)
        return error.exit_code
    return 0


def _follow_owner() -> threading.Event:
    """Kill this process's group, the workers of its pools included, when its owner is gone.

    Returns:
        Set when the owner says that the job is there; at once where there is no owner.
    """
    has_job = threading.Event()
    if os.getpgrp() != os.getpid():
        has_job.set()
        return has_job

    def wait() -> None:
        # Not through sys.stdin: a thread that holds its lock makes the interpreter abort at its end.
        while os.read(0, 1):
            has_job.set()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
    return has_job
