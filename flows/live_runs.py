"""The flow runs of a work pool, asked of the Prefect server without importing Prefect."""

import time
from collections.abc import Callable

import httpx

from internvl_core.errors import InternVLError

_BEGUN = ["RUNNING", "PENDING", "CANCELLING"]
_POLL_S = 0.5
_WAITS_S = (0.2, 0.5, 1.0, 2.0)
"""Before further tries."""


class LiveRuns:
    """The runs of a work pool that have begun and not ended, and the queue of those that have not begun."""

    def __init__(self, api_url: str, pool: str) -> None:
        self._api_url = api_url
        self._pool = pool

    def hold_queue(self) -> None:
        """Pause the pool: what is queued stays so, until `release_queue`."""
        self._send("PATCH", f"work_pools/{self._pool}", {"is_paused": True})

    def release_queue(self) -> None:
        """Let workers take what is queued."""
        self._send("PATCH", f"work_pools/{self._pool}", {"is_paused": False})

    def cancel(self) -> list[str]:
        """Ask each that is not asked yet to stop, which saves and commits first; return the names of all of them."""
        begun = self._list_begun()
        for run in begun:
            if run["state_type"] != "CANCELLING":
                self._send("POST", f"flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING"}})
        return [run["name"] for run in begun]

    def wait(self, give_up: Callable[[], bool]) -> bool:
        """Cancel until none is left, for a worker may have taken one just before the pause; say whether that came."""
        while self.cancel():
            if give_up():
                return False
            time.sleep(_POLL_S)
        return True

    def _list_begun(self) -> list[dict[str, str]]:
        wanted = {
            "work_pools": {"name": {"any_": [self._pool]}},
            "flow_runs": {"state": {"type": {"any_": _BEGUN}}},
        }
        found: list[dict[str, str]] = self._send("POST", "flow_runs/filter", wanted).json()
        return found

    def _send(self, method: str, path: str, content: dict[str, object]) -> httpx.Response:
        """Ask the server; one on SQLite turns away one of two that write at once, with 503.

        Raises:
            InternVLError: it refuses, or does not answer.
        """
        for wait_s in (*_WAITS_S, None):
            try:
                # A proxy is for the world outside.
                answer = httpx.request(method, f"{self._api_url}/{path}", json=content, timeout=30, trust_env=False)
                return answer.raise_for_status()
            except (httpx.HTTPStatusError, httpx.TransportError) as error:
                is_busy = not isinstance(error, httpx.HTTPStatusError) or error.response.status_code == 503
                if wait_s is None or not is_busy:
                    raise InternVLError(f"the Prefect server does not take {method} {path}: {error}") from error
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")
