"""Score a committed checkpoint on the held-out questions of a stage."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from internvl_core.contract import RESULT_FILE, CheckpointRef, StageResult
from tasks.hold_stage import hold_stage
from tasks.run_attempt import LEAVE_S, describe_attempt, make_attempt_dir, run_attempt
from tasks.stage import Stage
from tasks.stage_plan import get_cache_dir, plan_evaluation
from tasks.train_stage import can_retry


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
    plan = plan_evaluation(stage, checkpoint, cache_dir=get_cache_dir(workspace))
    folder = workspace / "evaluations" / f"{stage.name}-{plan.fingerprint[:16]}"
    run_id = flow_run.id or ""
    with hold_stage(folder, run_id, patience_s=plan.stage.save_budget_s + LEAVE_S) as lock:
        for path in folder.glob(f"*/{RESULT_FILE}"):
            get_run_logger().info("%s: scored before", label)
            return StageResult.get(path.parent).metrics
        attempt_dir = make_attempt_dir(folder)
        get_run_logger().info("%s: scoring %s", label, checkpoint.uri)
        return run_attempt(describe_attempt(plan, attempt_dir, run_id, workspace), attempt_dir, lock).metrics
