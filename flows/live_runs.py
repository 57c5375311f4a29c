"""The flow runs at work on this machine's pool, asked of the Prefect server without importing Prefect."""

import time
from collections.abc import Callable

import httpx

_AT_WORK = ["RUNNING", "PENDING", "CANCELLING"]
_POLL_S = 0.5


class LiveRuns:
    """The runs of a work pool that have begun and not ended."""

    def __init__(self, api_url: str, pool: str) -> None:
        self._api_url = api_url
        self._pool = pool

    def find(self) -> dict[str, str]:
        """List them: id to name."""
        wanted = {
            "work_pools": {"name": {"any_": [self._pool]}},
            "flow_runs": {"state": {"type": {"any_": _AT_WORK}}},
        }
        return {run["id"]: run["name"] for run in self._post("flow_runs/filter", wanted)}

    def cancel(self) -> None:
        """Ask each to stop: it saves and commits first."""
        for run_id in self.find():
            self._post(f"flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})

    def wait(self, give_up: Callable[[], bool]) -> bool:
        """Wait until none is left; say whether that came."""
        while self.find():
            if give_up():
                return False
            time.sleep(_POLL_S)
        return True

    def _post(self, path: str, content: dict[str, object]) -> list[dict[str, str]]:
        answer = httpx.post(f"{self._api_url}/{path}", json=content, timeout=30)
        answer.raise_for_status()
        found: list[dict[str, str]] = answer.json()
        return found
