"""Stop a pipeline whose stage did not learn enough."""

from internvl_core.errors import GateNotPassed
from tasks.stage import Gate
from tasks.trained_stage import TrainedStage


def check_gate(trained: TrainedStage, gate: Gate | None) -> None:
    """Raise unless the stage's score reaches the gate.

    Raises:
        GateNotPassed: the score is below, or the stage has no such metric.
    """
    if gate is None:
        return
    metrics = trained.result.metrics
    if gate.metric not in metrics:
        known = ", ".join(sorted(metrics)) or "none"
        raise GateNotPassed(f"{trained.name}: gate on {gate.metric}, but it has only {known}. Correct the recipe.")
    # Not `<`: a score that is no number does not pass.
    if not metrics[gate.metric] >= gate.at_least:
        raise GateNotPassed(
            f"{trained.name}: {gate.metric} is {metrics[gate.metric]:.6g}, the gate asks for {gate.at_least}. "
            f"The checkpoint stays at {trained.checkpoint.uri}. Train longer, or lower the gate in the recipe."
        )
