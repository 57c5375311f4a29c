"""Train one stage: skip it if it is finished, resume it if it is begun, else start it."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.tasks import Task

from internvl_core.checkpoint.store import StageStore, read_file
from internvl_core.checkpoint.unsent import publish_unsent
from internvl_core.contract import METRICS_FILE, CheckpointRef, StageFile, StageResult
from internvl_core.errors import ArgumentError, InternVLError, StoreUnavailable
from tasks.hold_stage import hold_stage
from tasks.launch import read_step
from tasks.run_attempt import LEAVE_S, describe_attempt, make_attempt_dir, run_attempt
from tasks.stage import Stage
from tasks.stage_plan import METAS, StagePlan, get_cache_dir, plan_stage
from tasks.stage_tries import StageTries
from tasks.track_run import RunStatus, RunTracker, TrackedData
from tasks.trained_stage import TrainedStage


def can_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry only what the error tree says can be helped by it."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, InternVLError) and error.is_retryable


@task(
    name="train stage",
    task_run_name="{stage.name}",
    # The recipe says how often and when; which failures, the error tree.
    retries=0,
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
    tries: StageTries,
    is_fresh: bool,
    may_train: bool = True,
) -> TrainedStage:
    """Bring a stage to its handover.

    Uses: the ranks of `stage.launcher` on this machine, the store, the workspace's disk.

    Args:
        stage: what to train.
        start_from: checkpoint whose weights it starts from; None if its arguments name components.
        workspace: where attempts and caches live.
        store_uri: where checkpoints live.
        tracker: told about arguments, metrics and the outcome; can neither fail nor delay.
        tries: what the tries before this one came to.
        is_fresh: train from the start even if the store has a result or a checkpoint of this stage.
        may_train: else the stage has to be finished.

    Raises:
        ArgumentError: it is not finished, and may not be trained.
        RunCancelled: somebody cancelled the run; it is committed as far as it got.
        NoProgress: it failed in ways that a retry can help, but retries brought no newer commit.
        InternVLError: it failed.
    """
    try:
        return _bring_to_handover(
            stage, start_from, workspace, store_uri, tracker, tries, is_fresh=is_fresh, may_train=may_train
        )
    except StoreUnavailable as error:  # Before there was an attempt, too.
        told = tries.note(error, reached=None, committed=None)
        if told is error:
            raise
        raise told from error


def _bring_to_handover(
    stage: Stage,
    start_from: CheckpointRef | None,
    workspace: Path,
    store_uri: str,
    tracker: RunTracker,
    tries: StageTries,
    *,
    is_fresh: bool,
    may_train: bool,
) -> TrainedStage:
    plan = plan_stage(stage, start_from, cache_dir=get_cache_dir(workspace))
    store = StageStore(store_uri, stage.name, plan.fingerprint)
    attempts_dir = workspace / "attempts" / f"{stage.name}-{plan.fingerprint[:16]}"
    run_id = flow_run.id or uuid.uuid4().hex
    handover = None if is_fresh else store.find_handover()
    if handover is None and not may_train:
        raise ArgumentError(
            f"stages: {stage.name} is not among the stages to run, and {store.uri} has no result of it with these "
            "inputs. Add it, or give start_from."
        )
    if handover is None:
        with hold_stage(attempts_dir, run_id, patience_s=stage.save_budget_s + LEAVE_S) as lock:
            # Another run may have finished it since.
            handover = None if is_fresh else store.find_handover()
            if handover is None:
                # What a run that is gone could not send any more: the lease of the next attempt would not know it.
                publish_unsent(
                    attempts_dir,
                    store,
                    cache_dir=get_cache_dir(workspace),
                    run_id=run_id if is_fresh else None,
                    must_send=True,
                )
                attempt_dir = make_attempt_dir(attempts_dir)
                stage_file = describe_attempt(
                    plan, attempt_dir, run_id, workspace, store_uri=store_uri, can_resume=not is_fresh
                )
                metrics_path, curve = attempt_dir / METRICS_FILE, run_id if is_fresh else ""
                with _track(tracker, plan, store.uri, metrics_path, curve=curve) as tracked:
                    result = _try(stage_file, attempt_dir, lock, store, tries)
                    tracked.note(result)
                return TrainedStage(
                    stage.name,
                    result,
                    is_skipped=False,
                    metrics_path=metrics_path,
                    failed_tries=tries.failed,
                )
    attempts_dir.mkdir(parents=True, exist_ok=True)
    trained = _find_trained(stage, *handover, attempts_dir)
    with _track(tracker, plan, store.uri, trained.metrics_path, curve="") as tracked:
        tracked.note(trained.result)
    return trained


@dataclass
class _Outcome:
    """What MLflow is told at the end of a stage."""

    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def note(self, result: StageResult) -> None:
        self.metrics.update(result.metrics)
        self.tags |= {
            "internvl.checkpoint": result.checkpoint.uri,
            "internvl.checkpoint_digest": result.checkpoint.digest,
        }


@contextmanager
def _track(
    tracker: RunTracker, plan: StagePlan, store_uri: str, metrics_path: Path, *, curve: str
) -> Iterator[_Outcome]:
    """Track a stage; its caller notes the result.

    A stage trained afresh is another `curve`; one that is resumed goes on with its own.
    """
    name = plan.stage.name
    tracker.start_stage(
        name,
        key=f"{name}-{plan.fingerprint}{curve}",
        params=plan.values,
        tags={"internvl.fingerprint": plan.fingerprint, "internvl.store": store_uri},
        metrics_path=metrics_path,
        data=[
            TrackedData(Path(plan.values[name]).stem, digest, plan.values[name], METAS[name])
            for name, digest in plan.inputs["data"].items()
        ],
    )
    status: RunStatus = "FAILED"
    outcome = _Outcome()
    try:
        yield outcome
        status = "FINISHED"
    except Exception:
        raise
    except BaseException:  # a cancel or Ctrl-C, not a failure
        status = "KILLED"
        raise
    finally:
        tracker.finish_stage(name, metrics=outcome.metrics, status=status, tags=outcome.tags)


def _find_trained(stage: Stage, checkpoint: CheckpointRef, result: dict[str, Any], attempts_dir: Path) -> TrainedStage:
    get_run_logger().info("%s: skipped, nothing it depends on has changed: %s", stage.name, checkpoint.uri)
    # A name of its own: the tracker goes on where it left a file, and a stage trained afresh has another curve.
    metrics_path = attempts_dir / f"metrics-{checkpoint.digest[:16]}.jsonl"
    if not metrics_path.exists():
        new = metrics_path.with_suffix(f".{os.getpid()}.new")
        new.write_bytes(read_file(checkpoint, METRICS_FILE))
        new.replace(metrics_path)
    stage_result = StageResult.from_json({**result, "checkpoint": asdict(checkpoint)})
    return TrainedStage(stage.name, stage_result, is_skipped=True, metrics_path=metrics_path)


def _try(stage_file: StageFile, attempt_dir: Path, lock: int, store: StageStore, tries: StageTries) -> StageResult:
    retry = tries.describe_retry(_find_committed_step(store))
    if retry is not None:
        get_run_logger().info("%s", retry)
    try:
        return run_attempt(stage_file, attempt_dir, lock)
    except InternVLError as error:
        # Now, for the next try may be on another machine.
        cache_dir = Path(stage_file.arguments["cache_dir"])
        publish_unsent(attempt_dir.parent, store, cache_dir=cache_dir, run_id=stage_file.run_id)
        if not error.is_retryable:
            raise
        told = tries.note(error, reached=read_step(attempt_dir), committed=_find_committed_step(store))
        if told is error:
            raise
        raise told from error


def _find_committed_step(store: StageStore) -> int | None:
    try:
        return next((commit.step for commit in store.list_committed()), None)
    except StoreUnavailable:  # It may be the very reason of a retry.
        return None
