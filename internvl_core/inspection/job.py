"""The process boundary of the data tools: a folder with job.json in it, report.json or failure.json out.

`python -m internvl_core.inspection TOOL FOLDER`. Standard output carries log lines for people. Whoever
starts it as a group of its own holds the other end of its standard input: the group ends with it.
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


def run_job(tool: Tool, folder: Path) -> int:
    """Run a tool on a folder; an error of ours is written to failure.json, and its exit code returned."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("internvl_core").setLevel(logging.INFO)
    _end_with_owner()
    try:
        report = tool(json.loads((folder / JOB_FILE).read_text(encoding="utf-8")))
        write_json_atomically(folder / REPORT_FILE, report)
    except InternVLError as error:
        StageFailure.from_exception(error, rank=0).write_first(folder)
        return error.exit_code
    return 0


def _end_with_owner() -> None:
    """Kill this process's group, the workers of its pools included, when its owner is gone."""
    if os.getpgrp() != os.getpid():
        return

    def wait() -> None:
        # Not through sys.stdin: a thread that holds its lock makes the interpreter abort at its end.
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
