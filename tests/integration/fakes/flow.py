"""A flow that watches a stage: killed, interrupted, or ended by an exception of its own."""

import sys
from pathlib import Path

from internvl_core.supervision.watchdog import Limits
from tasks.launch import launch_command


class TerminationSignal(BaseException):
    """What Prefect raises in the main thread on a cancel; not an Exception."""


def main() -> None:
    attempt_dir, ending, *command = Path(sys.argv[1]), *sys.argv[2:]
    with launch_command(command, attempt_dir, Limits(setup_s=60, stall_s=60, save_s=30)) as running:
        if ending == "raise":
            while not (attempt_dir / "rank-1.pid").exists():
                running.read_metrics()
            raise TerminationSignal
        for _ in running.iter_metrics():
            pass


if __name__ == "__main__":
    main()
