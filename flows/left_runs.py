"""Runs that a worker has left: it was killed, or the machine went down, and the present worker does not know them.

The server alone would mark the dead ones after nine minutes, five after a cancel, and never one that was lost before
its first heartbeat; and it would give the next run to the present worker while a live one is on the GPUs.
`internvl up` can look for itself: all runs of its pool are processes of its machine.
"""

import os
from pathlib import Path

from flows.live_runs import LiveRuns

_VARIABLE = b"PREFECT__FLOW_RUN_ID="
"""Of a flow that a worker has started, and of what that starts."""


class LeftRuns:
    """Looks after them, and keeps the queue of the pool waiting as long as there are any.

    Every method that asks the server raises InternVLError if it does not answer.
    """

    def __init__(self, runs: LiveRuns, *, processes_dir: Path = Path("/proc")) -> None:
        """Look at nothing yet; of what was before, nothing is known.

        Args:
            runs: of the pool.
            processes_dir: for tests.
        """
        self._runs = runs
        self._processes_dir = processes_dir
        self._missing: set[str] = set()
        self.may_be_there = True
        """Set it when the worker was started again."""

    def keep_queue(self) -> None:
        """Hold the queue while a run is at work that may be one of them, and release it then."""
        if self._runs.list_begun():
            self._runs.hold_queue()
        else:
            self._runs.release_queue()
            self.may_be_there = False

    def mark_lost(self) -> list[str]:
        """Mark those without a process at this look and the last one, for one may just begin or end.

        Returns:
            Their names.
        """
        begun = self._runs.list_begun()
        alive = find_flow_runs(self._processes_dir)
        missing = [run for run in begun if run["id"] not in alive]
        lost = [run for run in missing if run["id"] in self._missing]
        for run in lost:
            state = "CANCELLED" if run["state_type"] == "CANCELLING" else "CRASHED"
            self._runs.set_state(run["id"], state, "Its process is gone.")
        self._missing = {run["id"] for run in missing}
        return [run["name"] for run in lost]


def find_flow_runs(processes_dir: Path) -> set[str]:
    """Find the ids of the flow runs that have a process of this user."""
    found = set()
    for path in processes_dir.glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:  # Another user's, or gone.
            continue
        found |= {os.fsdecode(item.removeprefix(_VARIABLE)) for item in variables if item.startswith(_VARIABLE)}
    return found
