"""Mark runs whose process is gone as Crashed: `python -m flows.dead_runs` tells the server to watch for them.

A worker marks a run whose process dies under it. When the worker is told to end it kills its runs without marking
them, and when it is killed together with them nobody is left who could: they would stay Running for ever. Prefect's
engine sends a heartbeat; its documentation asks for a limit of three of them, for with less a healthy run is marked
too.
"""

import asyncio
from datetime import timedelta

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.settings import get_current_settings

NAME = "internvl: mark dead runs as crashed"

_OF_THE_SERVER = {"id", "enabled", "tags", "owner_resource"}
"""What our description does not say: a person may have switched it off."""


async def watch_for_dead_runs() -> None:
    """Create the automation, or bring the server's up to date."""
    described = describe_automation()
    try:
        found = await Automation.aread(name=NAME)
    except ValueError:
        await described.acreate()
        return
    # Not without need: after an update the server has forgotten the heartbeats that came before it.
    if found.model_dump(exclude=_OF_THE_SERVER) != described.model_dump(exclude=_OF_THE_SERVER):
        described.id, described.enabled, described.tags = found.id, found.enabled, found.tags
        await described.aupdate()


def describe_automation() -> Automation:
    """Describe the watch, for runs whose machine has the same PREFECT_FLOWS_HEARTBEAT_FREQUENCY as this process."""
    heartbeat_s = get_current_settings().flows.heartbeat_frequency
    assert heartbeat_s is not None, "Only Prefect's own tests set it to None."
    return Automation(
        name=NAME,
        description="A run that sent heartbeats and is silent for three of them.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=3 * heartbeat_s),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed", state=StateType.CRASHED, message="Its process is gone: no heartbeat.", force=False
            )
        ],
    )


if __name__ == "__main__":
    asyncio.run(watch_for_dead_runs())
