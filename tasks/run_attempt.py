"""Run one attempt of a stage, or of an evaluation, from a task: the part that both share."""

import os
from pathlib import Path

from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from internvl_core.contract import StageFile, StageResult
from tasks.cancel_watch import CancelWatch, RunCancelled
from tasks.hold_gpus import find_gpus, hold_gpus
from tasks.launch import RunningStage, launch_stage
from tasks.show_late_save import show_late_save
from tasks.show_progress import LogTail, StageProgress
from tasks.stage_plan import RESUME, StagePlan, get_cache_dir

LEAVE_S = 60.0
"""How long ranks take to leave once they have saved, killed ones included."""
_LEAVE_WORKER_S = 25.0
"""Of the 30 s in which a worker lets a cancelled flow end; after it there are MLflow and a report."""


def make_attempt_dir(attempts_dir: Path) -> Path:
    """Make the next numbered directory; for the holder of the stage."""
    number = 1 + max((int(path.name) for path in attempts_dir.iterdir() if path.name.isdigit()), default=0)
    attempt_dir = attempts_dir / str(number)
    attempt_dir.mkdir()
    return attempt_dir


def describe_attempt(
    plan: StagePlan, attempt_dir: Path, run_id: str, workspace: Path, *, store_uri: str = "", can_resume: bool = False
) -> StageFile:
    """Describe what the ranks of an attempt are to do; one that commits nothing needs no store."""
    return StageFile(
        run_id=run_id,
        stage=plan.stage.name,
        attempt=int(attempt_dir.name),
        fingerprint=plan.fingerprint,
        entry=plan.inputs["entry"],
        arguments={
            **{name: value for name, value in plan.values.items() if value is not None and name != RESUME},
            "output_dir": str(attempt_dir / "output"),
            "cache_dir": str(get_cache_dir(workspace)),
        },
        launcher=plan.stage.launcher.model_dump(),
        store_uri=store_uri,
        start_from=plan.start_from,
        resume=can_resume,
        save_budget_s=plan.stage.save_budget_s,
        inputs=plan.inputs,
        resume_from=plan.resume_from,
    )


def run_attempt(stage_file: StageFile, attempt_dir: Path, lock: int) -> StageResult:
    """Start the ranks of an attempt, show what they do, and stop them if somebody cancels the run.

    Args:
        stage_file: what they are to do.
        attempt_dir: new.
        lock: of `hold_stage`.

    Raises:
        RunCancelled: the server says so.
        InternVLError: of the class that the attempt ended with.
    """
    num_ranks = stage_file.launcher["nnodes"] * stage_file.launcher["nproc_per_node"]
    get_run_logger().info("%s: starting %d ranks; log in %s", stage_file.stage, num_ranks, attempt_dir)
    gpus = [] if stage_file.arguments.get("use_cpu") else find_gpus(stage_file.launcher["nproc_per_node"])
    leave_after_s = _LEAVE_WORKER_S if _has_worker() else None
    running: RunningStage | None = None
    try:
        with (
            CancelWatch(flow_run.id) as watch,
            hold_gpus(
                gpus, stage_file.run_id, patience_s=stage_file.save_budget_s + LEAVE_S, check=watch.check
            ) as gpu_locks,
            launch_stage(stage_file, attempt_dir, locks=[lock, *gpu_locks], leave_after_s=leave_after_s) as running,
        ):
            try:
                _watch(running, watch, stage_file.stage)
            except RunCancelled:
                # Of a run that has lost its worker, so that nobody ends it before it is done.
                running.stop()
                raise
            return running.result()
    finally:
        if running is not None:
            # The rest of it, at once; what a late save logs is not waited for.
            LogTail(running.read_log).show()
            if running.poll() is None:
                show_late_save(stage_file.stage, attempt_dir, stage_file.save_budget_s)


def _watch(running: RunningStage, watch: CancelWatch, stage: str) -> None:
    """Show the progress and the log of a stage until it is over."""
    progress, log = StageProgress(stage), LogTail(running.read_log)

    def look() -> None:
        watch.check()
        log.show()

    for line in running.iter_metrics(check=look):
        progress.show(line)


def _has_worker() -> bool:
    """Tell whether a worker started this flow, which kills it 30 s after a cancel."""
    return "PREFECT__FLOW_RUN_ID" in os.environ
