"""What people set of deployments on a server, kept while the deployments are registered again.

Prefect writes schedules and parameters as the file has them, switches deployments on, and where a person has added a
schedule, which has no slug, it removes all of them and makes those of the file. The shipped file cannot know which
schedule somebody has switched on, with which recipe.
"""

from typing import Any

from flows.prefect_api import PrefectApi

_OF_DEPLOYMENT = ("parameters", "paused")
_OF_SCHEDULE = ("active", "schedule", "parameters", "max_scheduled_runs")


class KeptSettings:
    """Schedules, parameters and pauses of all deployments of a server, as they were at a time."""

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
            changed = {name: before[name] for name in _OF_DEPLOYMENT if before[name] != now[name]}
            if changed:
                self._api.send("PATCH", path, changed)
            self._restore_schedules(path, before["schedules"], now["schedules"])

    def _restore_schedules(self, path: str, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
        known = {_name(schedule): schedule for schedule in now}
        for schedule in before:
            own = {name: schedule[name] for name in _OF_SCHEDULE}
            found = known.get(_name(schedule))
            if found is None:
                self._api.send("POST", f"{path}/schedules", [{**own, "slug": schedule["slug"]}])
            elif own != {name: found[name] for name in _OF_SCHEDULE}:
                self._api.send("PATCH", f"{path}/schedules/{found['id']}", own)

    def _list_deployments(self) -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in self._api.list("deployments", {})}


def _name(schedule: dict[str, Any]) -> str:
    """Name a schedule: by its slug, which it keeps when it is made anew; by its id if a person added it."""
    return str(schedule["slug"] or schedule["id"])
