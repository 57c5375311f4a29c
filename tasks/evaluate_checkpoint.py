"""Score a committed checkpoint on the held-out questions of a stage."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from internvl_core import __version__
from internvl_core.argument_rules import fingerprint_arguments
from internvl_core.contract import EVALUATION, CheckpointRef, StageFile, StageResult, digest_json
from internvl_core.data.meta import digest_meta
from tasks.hold_stage import hold_stage
from tasks.run_attempt import LEAVE_S, run_attempt
from tasks.stage import Stage
from tasks.stage_plan import COMPONENTS, RESUME, get_cache_dir, resolve_stage
from tasks.train_stage import can_retry

_STOP_BUDGET_S = 10.0
"""There is nothing to save."""


@task(
    name="evaluate checkpoint",
    task_run_name="evaluate {label}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=30,
    retry_condition_fn=can_retry,
)
def evaluate_checkpoint(checkpoint: CheckpointRef, stage: Stage, *, label: str, workspace: Path) -> dict[str, float]:
    """Score a checkpoint as the stage scores its own; what was scored before on the same questions is looked up.

    Uses: the processes of the stage's launcher, with their GPUs; the workspace.

    Args:
        checkpoint: any committed one; an adapter is merged into its base.
        stage: whose arguments and held-out questions are used.
        label: what people call the checkpoint.
        workspace: local directory for attempts and caches.

    Returns:
        `accuracy` and `accuracy/<dataset>`, 0 to 1.

    Raises:
        InternVLError: of the class that the evaluation ended with.
    """
    values = resolve_stage(_without_start(stage), has_parent=True)
    cache_dir = get_cache_dir(workspace)
    inputs = {
        "entry": EVALUATION,
        "trainer": __version__.split(".")[0],
        "arguments": fingerprint_arguments(values, world_size=stage.launcher.world_size),
        "data": {"eval_meta_path": digest_meta(values["eval_meta_path"], cache_dir)},
        "start_from": checkpoint.digest,
    }
    fingerprint = digest_json(inputs)
    folder = workspace / "evaluations" / f"{stage.name}-{fingerprint[:16]}"
    run_id = flow_run.id or ""
    with hold_stage(folder, run_id, patience_s=_STOP_BUDGET_S + LEAVE_S) as lock:
        attempts = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        for attempt in attempts:
            if (known := StageResult.find(folder / str(attempt))) is not None:
                get_run_logger().info("%s: scored before", label)
                return known.metrics
        attempt = (attempts or [0])[-1] + 1
        attempt_dir = folder / str(attempt)
        own = {"output_dir": str(attempt_dir / "output"), "cache_dir": str(cache_dir)}
        stage_file = StageFile(
            run_id=run_id,
            stage=stage.name,
            attempt=attempt,
            fingerprint=fingerprint,
            entry=EVALUATION,
            arguments={**{name: value for name, value in values.items() if value is not None}, **own},
            launcher=stage.launcher.model_dump(),
            store_uri="",
            start_from=checkpoint,
            resume=False,
            save_budget_s=_STOP_BUDGET_S,
            inputs=inputs,
        )
        get_run_logger().info("%s: scoring %s", label, checkpoint.uri)
        return run_attempt(stage_file, attempt_dir, lock).metrics


def _without_start(stage: Stage) -> Stage:
    """Leave out what names another model, and what a training resumes from."""
    arguments = {name: value for name, value in stage.arguments.items() if name not in (*COMPONENTS, RESUME)}
    return stage.model_copy(update={"arguments": arguments, "start_from": None})
