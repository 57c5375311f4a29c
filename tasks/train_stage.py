"""Train one stage: skip it if it is finished, resume it if it is begun, else start it."""

import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.tasks import Task

from internvl_core.checkpoint.store import StageStore, read_file
from internvl_core.contract import METRICS_FILE, CheckpointRef, StageFile, StageResult
from internvl_core.errors import InternVLError
from tasks.launch import RunningStage, launch_stage
from tasks.stage import Stage
from tasks.stage_plan import StagePlan, plan_stage
from tasks.track_run import RunStatus, RunTracker
from tasks.trained_stage import TrainedStage

PROGRESS_INTERVAL_S = 4.0


def can_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry only what the error tree says can be helped by it."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, InternVLError) and error.is_retryable


@task(
    name="train stage",
    task_run_name="{stage.name}",
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_condition_fn=can_retry,
    # The committed handover is the cache, and it knows whether its checkpoint still exists.
    cache_policy=NO_CACHE,
    persist_result=False,
)
def train_stage(
    stage: Stage,
    *,
    start_from: CheckpointRef | None,
    workspace: Path,
    store_uri: str,
    tracker: RunTracker,
    is_fresh: bool,
) -> TrainedStage:
    """Bring a stage to its handover.

    Uses: the ranks of `stage.launcher` on this machine, the store, the workspace's disk.

    Args:
        stage: what to train.
        start_from: checkpoint whose weights it starts from; None if its arguments name components.
        workspace: where attempts and caches live.
        store_uri: where checkpoints live.
        tracker: told about arguments, metrics and the outcome; can neither fail nor delay.
        is_fresh: train from the start even if the store has a result or a checkpoint of this stage.
    """
    plan = plan_stage(stage, start_from)
    store = StageStore(store_uri, stage.name, plan.fingerprint)
    attempts_dir = workspace / "attempts" / f"{stage.name}-{plan.fingerprint[:16]}"
    handover = None if is_fresh else store.find_handover()
    attempt_dir = attempts_dir if handover is not None else _make_attempt_dir(attempts_dir)
    tracker.start_stage(
        stage.name,
        key=f"{stage.name}-{plan.fingerprint}" + (f"-{uuid.uuid4().hex[:8]}" if is_fresh else ""),
        params=plan.values,
        tags={"internvl.fingerprint": plan.fingerprint, "internvl.store": store.uri},
        metrics_path=attempt_dir / METRICS_FILE,
    )
    if handover is not None:
        trained = _find_trained(stage, *handover, attempts_dir)
        tracker.finish_stage(
            stage.name, metrics=trained.result.metrics, status="FINISHED", tags={"internvl.skipped": "true"}
        )
        return trained
    status: RunStatus = "FAILED"
    metrics: Mapping[str, float] = {}
    try:
        result = _run_attempt(plan, attempt_dir, store_uri=store_uri, workspace=workspace, can_resume=not is_fresh)
        status, metrics = "FINISHED", result.metrics
    except Exception:
        raise
    except BaseException:  # a cancel or Ctrl-C, not a failure
        status = "KILLED"
        raise
    finally:
        tracker.finish_stage(stage.name, metrics=metrics, status=status)
    return TrainedStage(stage.name, result, is_skipped=False, metrics_path=attempt_dir / METRICS_FILE)


def _find_trained(stage: Stage, checkpoint: CheckpointRef, result: dict[str, Any], attempts_dir: Path) -> TrainedStage:
    get_run_logger().info("%s: skipped, nothing it depends on has changed: %s", stage.name, checkpoint.uri)
    metrics_path = attempts_dir / METRICS_FILE
    metrics_path.parent.mkdir(parents=True, exist_ok=True)
    metrics_path.write_bytes(read_file(checkpoint, METRICS_FILE))
    stage_result = StageResult.from_json({**result, "checkpoint": asdict(checkpoint)})
    return TrainedStage(stage.name, stage_result, is_skipped=True, metrics_path=metrics_path)


def _make_attempt_dir(attempts_dir: Path) -> Path:
    """Make the next numbered directory; two runs at once get different ones."""
    attempts_dir.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name) for path in attempts_dir.iterdir() if path.name.isdigit()), default=0)
    while True:
        try:
            (attempts_dir / str(number)).mkdir()
        except FileExistsError:
            number += 1
        else:
            return attempts_dir / str(number)


def _run_attempt(
    plan: StagePlan, attempt_dir: Path, *, store_uri: str, workspace: Path, can_resume: bool
) -> StageResult:
    stage = plan.stage
    stage_file = StageFile(
        run_id=uuid.uuid4().hex,
        stage=stage.name,
        attempt=int(attempt_dir.name),
        fingerprint=plan.fingerprint,
        entry=stage.entry,
        arguments={
            **{name: value for name, value in plan.values.items() if value is not None},
            "output_dir": str(attempt_dir / "output"),
            "cache_dir": str(workspace / "cache"),
        },
        launcher=stage.launcher.model_dump(),
        store_uri=store_uri,
        start_from=plan.start_from,
        resume=can_resume,
        save_budget_s=stage.save_budget_s,
    )
    logger = get_run_logger()
    logger.info("%s: starting %d ranks; log in %s", stage.name, stage.launcher.world_size, attempt_dir)
    with launch_stage(stage_file, attempt_dir) as running:
        _report_progress(stage.name, running)
        return running.result()


def _report_progress(name: str, running: RunningStage) -> None:
    """Log a line every few seconds, and one at the last step."""
    last_time = 0.0
    for line in running.iter_metrics():
        if time.monotonic() - last_time < PROGRESS_INTERVAL_S and line["step"] < line["max_steps"]:
            continue
        last_time = time.monotonic()
        get_run_logger().info(
            "%-9s step %4d/%d   loss %.4f   %6.0f tokens/s   eta %d s",
            name,
            line["step"],
            line["max_steps"],
            line["loss"],
            line["tokens_per_s"],
            line["eta_s"],
        )
