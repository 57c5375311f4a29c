"""What people set of deployments on a server, kept while the deployments are registered again.

Prefect writes schedules and parameters as the file has them. The shipped file cannot know which schedule
somebody has switched on, with which recipe.
"""

from collections.abc import Mapping
from typing import Any

import httpx

from internvl_core.errors import InternVLError
from tasks.address import hide_password

_AUTH_VARIABLE = "PREFECT_API_AUTH_STRING"
_OF_SCHEDULE = ("active", "schedule", "parameters")


class KeptSettings:
    """Parameters and schedules of all deployments of a server, as they were at a time."""

    def __init__(self, api_url: str, environment: Mapping[str, str]) -> None:
        """Read them.

        Args:
            api_url: of the server, ending in /api.
            environment: with the server's user and password, if it has any.

        Raises:
            InternVLError: the server does not answer.
        """
        self._api_url = api_url
        user, separator, password = environment.get(_AUTH_VARIABLE, "").partition(":")
        self._auth = (user, password) if separator else None
        self._before = self._list_deployments()

    def restore(self) -> None:
        """Set them again where they are others now; deployments and schedules that are new are left."""
        for deployment_id, now in self._list_deployments().items():
            before = self._before.get(deployment_id)
            if before is None:
                continue
            path = f"deployments/{deployment_id}"
            if before["parameters"] != now["parameters"]:
                self._send("PATCH", path, {"parameters": before["parameters"]})
            known = {schedule["slug"]: schedule for schedule in before["schedules"]}
            for schedule in now["schedules"]:
                kept = {name: known.get(schedule["slug"], schedule)[name] for name in _OF_SCHEDULE}
                if kept != {name: schedule[name] for name in _OF_SCHEDULE}:
                    self._send("PATCH", f"{path}/schedules/{schedule['id']}", kept)

    def _list_deployments(self) -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in self._send("POST", "deployments/filter", {}).json()}

    def _send(self, method: str, path: str, content: dict[str, Any]) -> httpx.Response:
        url = f"{self._api_url}/{path}"
        try:
            return httpx.request(method, url, json=content, auth=self._auth, timeout=30).raise_for_status()
        except httpx.HTTPError as error:
            raise InternVLError(hide_password(f"{self._api_url} does not take {method} {path}: {error}")) from error
