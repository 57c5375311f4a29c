"""Runs whose processes are gone from this machine: marked, so that they do not keep others waiting.

The server's own watch (dead_runs.py) takes nine minutes, five after a cancel, and sees no run that was lost before its
first heartbeat. `internvl up` can look for itself: all runs of its pool are processes of its machine.
"""

import os
from pathlib import Path

from flows.live_runs import LiveRuns

_VARIABLE = b"PREFECT__FLOW_RUN_ID="
"""Of a flow that a worker has started, and of what that starts."""


class LostRuns:
    """Looks for lost runs of a work pool."""

    def __init__(self, runs: LiveRuns) -> None:
        """Look at nothing yet."""
        self._runs = runs
        self._missing: set[str] = set()

    def mark(self) -> list[str]:
        """Mark those that were missing at the last look too, for one may just begin or end; return their names.

        Raises:
            InternVLError: the server does not answer.
        """
        begun = self._runs.list_begun()
        alive = find_flow_runs()
        missing = [run for run in begun if run["id"] not in alive]
        lost = [run for run in missing if run["id"] in self._missing]
        for run in lost:
            state = "CANCELLED" if run["state_type"] == "CANCELLING" else "CRASHED"
            self._runs.set_state(run["id"], state, "Its process is gone.")
        self._missing = {run["id"] for run in missing}
        return [run["name"] for run in lost]


def find_flow_runs() -> set[str]:
    """Find the ids of the flow runs that have a process of this user on this machine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:  # Another user's, or gone.
            continue
        found |= {os.fsdecode(item.removeprefix(_VARIABLE)) for item in variables if item.startswith(_VARIABLE)}
    return found
