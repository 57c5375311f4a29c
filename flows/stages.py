"""What both flows do: take a recipe's stages in order, each from the checkpoint of the one before."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prefect.context import FlowRunContext

from flows.recipe import Recipe
from internvl_core.checkpoint.store import resolve_checkpoint
from internvl_core.contract import CheckpointRef
from tasks.build_smoke_inputs import build_smoke_inputs
from tasks.check_gate import check_gate
from tasks.check_inputs import check_inputs, check_stage_arguments
from tasks.stage import PREVIOUS, Stage
from tasks.track_run import RunTracker
from tasks.train_stage import train_stage
from tasks.trained_stage import TrainedStage
from tasks.write_report import write_report


@dataclass
class RecipeResult:
    """What a run leaves behind."""

    recipe: Recipe
    trained: list[TrainedStage] = field(default_factory=list)
    report_path: Path | None = None


def run_stages(recipe: Recipe, *, is_fresh: bool) -> RecipeResult:
    """Check everything, then train stage after stage; the report is written however it ends."""
    check_stage_arguments(recipe.stages, starts_from_checkpoint=recipe.start_from is not None)
    if recipe.smoke_inputs:
        build_smoke_inputs(recipe.directory)
    check_inputs(recipe.stages, recipe.store)
    result = RecipeResult(recipe)
    checkpoint = resolve_checkpoint(recipe.start_from) if recipe.start_from else None
    with _track(recipe) as tracker, _report(result):
        for stage in recipe.stages:
            trained = train_stage(
                stage,
                start_from=_find_start(stage, checkpoint),
                workspace=recipe.directory,
                store_uri=recipe.store,
                tracker=tracker,
                is_fresh=is_fresh,
            )
            result.trained.append(trained)
            check_gate(trained, stage.gate)
            checkpoint = trained.checkpoint
    return result


def _find_start(stage: Stage, previous: CheckpointRef | None) -> CheckpointRef | None:
    if stage.brings_own_weights:
        return None
    if stage.start_from in (None, PREVIOUS):
        return previous
    return resolve_checkpoint(stage.start_from)


@contextmanager
def _track(recipe: Recipe) -> Iterator[RunTracker]:
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    run_name = flow_run.name if flow_run else recipe.name
    with RunTracker(
        recipe.tracking,
        experiment=recipe.name,
        run_name=run_name,
        key=str(flow_run.id) if flow_run else recipe.name,
        tags={"prefect.flow_run_id": str(flow_run.id)} if flow_run else {},
        params={"recipe": recipe.name, "store": recipe.store, "stages": ", ".join(s.name for s in recipe.stages)},
        spool_dir=recipe.directory / "tracking" / run_name,
    ) as tracker:
        yield tracker


@contextmanager
def _report(result: RecipeResult) -> Iterator[None]:
    try:
        yield
    finally:
        if result.trained:
            recipe = result.recipe
            result.report_path = write_report(
                recipe.directory / "report.html",
                title=f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name,
                stages=result.trained,
                gates={s.name: (s.gate.metric, s.gate.at_least) for s in recipe.stages if s.gate},
                links={"Store": recipe.store, "MLflow": recipe.tracking},
            )
