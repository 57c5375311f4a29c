"""Register a candidate, and make it the champion if it is better."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from internvl_core.contract import CheckpointRef
from tasks.model_registry import ModelRegistry, ModelVersion
from tasks.stage import Gate
from tasks.train_stage import can_retry

_DIGITS = 9
"""Of a difference of scores: 0.52 - 0.51 is a little more than 0.01 in binary."""


@dataclass(frozen=True)
class Verdict:
    """Candidate against champion, by the metric of the gate."""

    metric: str
    candidate: float
    champion: float | None
    """None: there was none."""
    gate: Gate
    overtaken_by: int | None = None
    """Version that became the champion while this candidate was compared with another."""

    @property
    def delta(self) -> float | None:
        return None if self.champion is None else round(self.candidate - self.champion, _DIGITS)

    @property
    def is_below_gate(self) -> bool:
        # Not `<`: a score that is no number does not pass.
        return not self.candidate >= self.gate.at_least

    @property
    def is_promoted(self) -> bool:
        if self.is_below_gate or self.overtaken_by is not None:
            return False
        return self.delta is None or self.delta > self.gate.better_by

    def __str__(self) -> str:
        name = f"{self.metric} {self.candidate:.4f}"
        if self.is_below_gate:
            return f"below the gate: {name}, and {self.gate.at_least} is asked for"
        if self.delta is None:
            against = f"{name}, the first champion"
        else:
            against = f"{name} against the champion's {self.champion:.4f}: {self.delta:+.4f}"
        if self.is_promoted:
            return f"promoted: {against}"
        if self.overtaken_by is not None:
            return f"not promoted: version {self.overtaken_by} became the champion meanwhile; {name}"
        return f"not promoted: {against}, and more than {self.gate.better_by:+.4f} is wanted"


def judge(gate: Gate, candidate: Mapping[str, float], champion: Mapping[str, float] | None) -> Verdict:
    """Compare the scores of both on the same questions."""
    best = None if champion is None else champion[gate.metric]
    return Verdict(gate.metric, candidate[gate.metric], best, gate)


@task(
    name="promote",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_condition_fn=can_retry,
)
def promote_checkpoint(
    stages: tuple[CheckpointRef, ...],
    verdict: Verdict,
    registry: ModelRegistry,
    *,
    champion: ModelVersion | None,
    inputs: str,
    experiment: str,
    run_id: str | None,
    tags: Mapping[str, Any],
) -> tuple[ModelVersion, Verdict]:
    """Register the candidate as a version, and move the champion's alias to it if it is better.

    That it was judged is noted last: whatever ends this in between, the next night judges it again.

    Uses: the model registry of MLflow.

    Args:
        stages: final weights of the candidate's stages, its own the last.
        verdict: on it.
        registry: of the model.
        champion: that it was compared with.
        inputs: digest of what it was trained with.
        experiment: of MLflow.
        run_id: of MLflow; None: not known.
        tags: more of the version.

    Returns:
        The version, and what became of the verdict: somebody may have set the alias meanwhile.

    Raises:
        StoreUnavailable: MLflow does not answer. Again does no harm.
    """
    now = registry.find_champion()
    # A try that was cut after its promotion finds the candidate itself there.
    if now is not None and now.number != (champion.number if champion else None) and now.checkpoint != stages[-1]:
        verdict = replace(verdict, overtaken_by=now.number)
    told = {f"internvl.score.{verdict.metric}": f"{verdict.candidate:.6f}", "internvl.verdict": str(verdict)}
    version = registry.add_version(stages, experiment=experiment, run_id=run_id, tags={**tags, **told})
    if verdict.is_promoted:
        registry.promote(version)
    if verdict.overtaken_by is None:
        registry.note_judged(version, inputs)
    get_run_logger().info("%s version %d %s", registry.name, version.number, verdict)
    return version, verdict
