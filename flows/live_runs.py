"""The flow runs of a work pool, asked of the Prefect server without importing Prefect."""

import time
from collections.abc import Callable
from typing import Any

from flows.prefect_api import PrefectApi

_BEGUN = ["RUNNING", "PENDING", "CANCELLING"]
_POLL_S = 0.5
_LOOK_S = 5.0


class LiveRuns:
    """The runs of a work pool that have begun and not ended, and the queue of those that have not begun."""

    def __init__(self, api_url: str, pool: str) -> None:
        self._api = PrefectApi(api_url)
        self._pool = pool

    def hold_queue(self) -> None:
        """Pause the pool: what is queued stays so, until `release_queue`."""
        self._api.send("PATCH", f"work_pools/{self._pool}", {"is_paused": True})

    def release_queue(self) -> None:
        """Let workers take what is queued."""
        self._api.send("PATCH", f"work_pools/{self._pool}", {"is_paused": False})

    def cancel(self) -> list[str]:
        """Ask each that is not asked yet to stop, which saves and commits first; return the names of all of them."""
        begun = self.list_begun()
        for run in begun:
            if run["state_type"] != "CANCELLING":
                self.set_state(run["id"], "CANCELLING", "internvl up ends.")
        return [run["name"] for run in begun]

    def wait(self, give_up: Callable[[], bool], *, look: Callable[[], None] = lambda: None) -> bool:
        """Cancel until none is left, for a worker may have taken one just before the pause; say whether that came.

        Args:
            give_up: asked at each look.
            look: called every few seconds, to see to those that nobody else ends.
        """
        next_look = 0.0
        while self.cancel():
            if give_up():
                return False
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_S
                look()
            time.sleep(_POLL_S)
        return True

    def set_state(self, run_id: str, state: str, message: str) -> None:
        """Propose a state; the server leaves a run that has ended meanwhile as it is, which is no error."""
        content = {"state": {"type": state, "message": message}}
        self._api.send("POST", f"flow_runs/{run_id}/set_state", content)

    def list_begun(self) -> list[dict[str, Any]]:
        """List the runs that have begun and not ended."""
        wanted = {
            "work_pools": {"name": {"any_": [self._pool]}},
            "flow_runs": {"state": {"type": {"any_": _BEGUN}}},
        }
        return self._api.list("flow_runs", wanted)
