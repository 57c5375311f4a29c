"""The loss curves of a run, as its stages logged them."""

import math
from collections.abc import Sequence

from tasks.report_figures import LossCurve
from tasks.tracking_spool import read_rows
from tasks.trained_stage import TrainedStage


def find_curves(stages: Sequence[TrainedStage]) -> tuple[LossCurve, ...]:
    """Find the curves of those stages whose log is on this machine, in their order."""
    return tuple(curve for stage in stages if (curve := _find_curve(stage)))


def _find_curve(stage: TrainedStage) -> LossCurve | None:
    """Read the losses of a stage; of a step that was logged twice, after a resume, the later one."""
    rows, _ = read_rows(stage.metrics_path, 0)
    logged = [(int(row["step"]), row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]
    losses = {step: float(loss) for step, loss in logged if math.isfinite(loss)}
    steps = tuple(sorted(losses))
    return LossCurve(stage.name, steps, tuple(losses[step] for step in steps)) if steps else None
