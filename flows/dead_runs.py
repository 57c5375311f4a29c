"""Mark runs whose process is gone as Crashed: `python -m flows.dead_runs` tells the server to watch for them.

A worker that ends marks what it ran; when the worker is killed with it, nobody does, and the run would stay Running
for ever. Prefect's engine sends a heartbeat; its documentation asks for a limit of three of them, for with less a
healthy run is marked too.
"""

import asyncio
from datetime import timedelta

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

NAME = "internvl: mark dead runs as crashed"
HEARTBEAT_S = 180
"""Prefect's PREFECT_FLOWS_HEARTBEAT_FREQUENCY."""


async def watch_for_dead_runs() -> None:
    """Create the automation, unless the server has it."""
    try:
        await Automation.aread(name=NAME)
    except ValueError:
        await _describe().acreate()


def _describe() -> Automation:
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
            within=timedelta(seconds=3 * HEARTBEAT_S),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed", state=StateType.CRASHED, message="Its process is gone: no heartbeat.", force=False
            )
        ],
    )


if __name__ == "__main__":
    asyncio.run(watch_for_dead_runs())
