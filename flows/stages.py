"""What both flows do: take a recipe's stages in order, each from the checkpoint of the one before."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run as running_flow
from prefect.states import Cancelled

from flows.console import shorten_errors
from flows.provenance import collect_tags
from flows.recipe import Recipe, load_recipe
from internvl_core.checkpoint.store import resolve_checkpoint
from internvl_core.errors import ArgumentError
from internvl_core.inspection.lint_report import MetaReport
from tasks.build_smoke_inputs import build_smoke_inputs
from tasks.cancel_watch import RunCancelled
from tasks.check_gate import check_gate
from tasks.check_inputs import check_inputs
from tasks.data_tool import early_data_tool
from tasks.index_data import index_data
from tasks.mlflow_client import start_mlflow_import
from tasks.show_stages import show_stages
from tasks.stage_plan import check_launchers, check_stage_arguments
from tasks.stage_tries import StageTries
from tasks.track_run import RunTracker
from tasks.train_stage import train_stage
from tasks.trained_stage import TrainedStage
from tasks.write_report import write_report

logger = logging.getLogger(__name__)

INTERRUPTED = "Interrupted"
"""Name of the state, a cancelled one, of a run that a person stopped at its own terminal."""

_MAX_RETRIES = 100_000
"""Prefect wants a number; `StageTries` counts those that bring nothing."""
_DRAWN_NAME = re.compile(r"[A-Za-z]+-[A-Za-z]+")
"""Two words, such as `tasty-wombat`: what Prefect and its form call a run that nobody named."""


@dataclass
class RecipeResult:
    """What a run leaves behind."""

    recipe: Recipe
    data: list[MetaReport]
    trained: list[TrainedStage] = field(default_factory=list)
    report_path: Path | None = None
    mlflow_run_id: str | None = None
    """Of the pipeline's run; None where MLflow has not said."""


def name_run() -> str:
    """Name a flow run after its recipe: `smoke`, or the file's name without folder and ending.

    A name that a person gave stays, if it is not of the form that drawn ones have.
    """
    given = str(running_flow.name)
    return Path(running_flow.parameters["recipe"]).stem if _DRAWN_NAME.fullmatch(given) else given


def run_recipe(
    source: str, given: Mapping[str, Any], *, only_stages: Sequence[str] | None = None, is_fresh: bool = False
) -> RecipeResult | State[RecipeResult]:
    """Check everything, then train stage after stage; what was trained is reported however it ends.

    Args:
        source: name of a shipped recipe, or the path of a YAML file.
        given: overrides, by dotted paths.
        only_stages: those to train; the stages before them have to be finished. None or none: all.
        is_fresh: train even what is finished.

    Returns:
        What was trained; the state Cancelled after Ctrl-C, and if the server said so with no worker left to do it.
    """
    # Here and not only in the command: a worker runs the flow without it.
    shorten_errors()
    try:
        recipe = load_recipe(source, given, only_stages=only_stages)
        data = check_recipe(recipe)
        return train_stages(recipe, data, only_stages=only_stages, is_fresh=is_fresh)
    except RunCancelled as cancelled:
        return Cancelled(message=str(cancelled))
    except KeyboardInterrupt:
        return Cancelled(name=INTERRUPTED, message="Ctrl-C. It goes on where it is run again.")


def check_recipe(recipe: Recipe) -> list[MetaReport]:
    """Refuse what is wrong in any stage, its data and its services before a GPU is asked for.

    Returns:
        What the data are like.

    Raises:
        InternVLError: all that is wrong of one kind, a line each.
    """
    check_stage_arguments(recipe.stages, starts_from_checkpoint=recipe.start_from is not None)
    check_launchers(recipe.stages)
    make_workspace(recipe.directory)
    with early_data_tool("lint"):
        if recipe.smoke_inputs:
            build_smoke_inputs(recipe.directory)
        # This process mostly waits now; beside the first stage it would take time from the ranks.
        start_mlflow_import()
        check_inputs(recipe.stages, store_uri=recipe.store, start_from=recipe.start_from)
        return index_data(recipe.name, recipe.stages, workspace=recipe.directory, start_from=recipe.start_from)


def train_stages(
    recipe: Recipe,
    data: list[MetaReport],
    *,
    only_stages: Sequence[str] | None = None,
    is_fresh: bool = False,
    skips_last_gate: bool = False,
) -> RecipeResult:
    """Train stage after stage of a recipe that is checked; see `run_recipe`.

    With `skips_last_gate` the caller sees to that one.

    Raises:
        RunCancelled: somebody cancelled the run.
        InternVLError: a stage failed.
    """
    retries = _MAX_RETRIES if recipe.retry_delays_s else 0
    train = train_stage.with_options(retries=retries, retry_delay_seconds=recipe.retry_delays_s or 0)
    result = RecipeResult(recipe, data)
    checkpoint = resolve_checkpoint(recipe.start_from) if recipe.start_from else None
    with _track(recipe) as tracker, _report(result, tracker):
        for stage in recipe.stages:
            is_chosen = not only_stages or stage.name in only_stages
            trained = train(
                stage,
                start_from=stage.find_start(checkpoint),
                workspace=recipe.directory,
                store_uri=recipe.store,
                tracker=tracker,
                tries=StageTries(stage.name, len(recipe.retry_delays_s)),
                is_fresh=is_fresh and is_chosen,
                may_train=is_chosen,
            )
            result.trained.append(trained)
            if not (skips_last_gate and stage is recipe.stages[-1]):
                check_gate(trained, stage.gate)
            checkpoint = trained.checkpoint
    # By now, if MLflow answers at all.
    result.mlflow_run_id = tracker.run_id
    return result


def make_workspace(directory: Path) -> None:
    """Make the folder of a recipe's runs.

    Raises:
        ArgumentError: there is no place for it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"workspace: {directory} cannot be made: {error.strerror}. Name another one.") from None


@contextmanager
def _track(recipe: Recipe) -> Iterator[RunTracker]:
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    key = str(flow_run.id) if flow_run else recipe.name
    with RunTracker(
        recipe.tracking,
        experiment=recipe.name,
        run_name=flow_run.name if flow_run else recipe.name,
        key=key,
        tags=collect_tags(flow_run),
        params={"recipe": recipe.name, "store": recipe.store, "stages": ", ".join(s.name for s in recipe.stages)},
        spool_dir=recipe.directory / "tracking" / key,
    ) as tracker:
        yield tracker


@contextmanager
def _report(result: RecipeResult, tracker: RunTracker) -> Iterator[None]:
    """Report what is trained at the end, and after an error too: a report that fails must not hide it."""
    has_time = True
    try:
        yield
    except TerminationSignal:
        # A worker kills the flow 30 s after it, and the save has had most of them. The next run writes the page.
        has_time = False
        raise
    finally:
        if result.trained:
            recipe = result.recipe
            links = {"Store": recipe.store, "MLflow": tracker.address}
            if has_time:
                _keep_report(result, tracker, recipe.directory / "report.html", links)
            show_stages(recipe.name, result.trained, links=links)


def _keep_report(result: RecipeResult, tracker: RunTracker, path: Path, links: dict[str, str]) -> None:
    try:
        result.report_path = _write_report(result, path, links)
        tracker.add_file(path)
    except Exception as error:  # noqa: BLE001  whatever is wrong with a page: the stages are trained
        logger.warning("%s: the report could not be written: %s: %s", path, type(error).__name__, error)


def _write_report(result: RecipeResult, path: Path, links: dict[str, str]) -> Path:
    recipe = result.recipe
    return write_report(
        path,
        title=f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name,
        stages=result.trained,
        gates={s.name: (s.gate.metric, s.gate.at_least) for s in recipe.stages if s.gate},
        links=links,
        data=result.data,
    )
