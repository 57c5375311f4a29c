"""What people set of deployments on a server, kept while the deployments are registered again.

Prefect writes schedules and parameters as the file has them. The shipped file cannot know which schedule
somebody has switched on, with which recipe.
"""

from typing import Any

from flows.prefect_api import PrefectApi

_OF_SCHEDULE = ("active", "schedule", "parameters")


class KeptSettings:
    """Parameters and schedules of all deployments of a server, as they were at a time."""

    def __init__(self, api: PrefectApi) -> None:
        """Read them.

        Raises:
            InternVLError: the server does not answer.
        """
        self._api = api
        self._before = self._list_deployments()

    def restore(self) -> None:
        """Set them again where they are others now; deployments and schedules that are new are left."""
        for deployment_id, now in self._list_deployments().items():
            before = self._before.get(deployment_id)
            if before is None:
                continue
            path = f"deployments/{deployment_id}"
            if before["parameters"] != now["parameters"]:
                self._api.send("PATCH", path, {"parameters": before["parameters"]})
            known = {schedule["slug"]: schedule for schedule in before["schedules"]}
            for schedule in now["schedules"]:
                kept = {name: known.get(schedule["slug"], schedule)[name] for name in _OF_SCHEDULE}
                if kept != {name: schedule[name] for name in _OF_SCHEDULE}:
                    self._api.send("PATCH", f"{path}/schedules/{schedule['id']}", kept)

    def _list_deployments(self) -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in self._api.list("deployments", {})}
