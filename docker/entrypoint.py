"""First process of the train image: end only when every save of a training has ended.

    entrypoint.py -> command (worker -> flow) -> supervisor -> torchrun -> ranks

A worker that is told to stop kills its flows. Their supervisors see that and have the ranks save and commit, which
takes minutes, but a container ends with its first process. So this one adopts the supervisors and stays for them;
`docker stop` kills all of it after compose.yaml's stop_grace_period. Standard library only, as is what it imports.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from internvl_core.supervision.process_tree import adopt_orphans, find_descendants, reap

SUPERVISOR = "internvl_core.supervision.supervisor"
_POLL_S = 0.2

logger = logging.getLogger("entrypoint")


def main(command: Sequence[str]) -> int:
    """Run a command and stay for its supervisors; return its exit code, 128 + N if signal N killed it.

    The first SIGTERM or SIGINT is passed on, once to each: to the command, and to supervisors that are left.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    adopt_orphans()
    # In a session of its own, so that a terminal's Ctrl-C reaches it from here alone.
    process = subprocess.Popen(command, start_new_session=True)
    told: set[int] = set()
    was_running = True
    while True:
        is_running = not reap(process)
        waited_for = {process.pid} if is_running else find_supervisors()
        if not waited_for:
            return process.returncode if process.returncode >= 0 else 128 - process.returncode
        if was_running and not is_running:
            logger.info("%s ended with %d; staying for %d saves", command[0], process.returncode, len(waited_for))
        was_running = is_running
        for pid in waited_for - told if asked else ():
            with suppress(ProcessLookupError):
                os.kill(pid, asked[0])
            told.add(pid)
        time.sleep(_POLL_S)


def find_supervisors() -> set[int]:
    """Find the supervisors below this process, adopted ones included."""
    found = set()
    for pid in find_descendants(os.getpid()):
        with suppress(OSError):
            if SUPERVISOR.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.add(pid)
    return found


if __name__ == "__main__":
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO)
    sys.exit(main(sys.argv[1:]))
