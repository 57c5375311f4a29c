"""Finetune every night on what is new, and promote the result if it beats the champion."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as running_flow
from prefect.states import Cancelled, Completed
from pydantic import Field

from flows.console import shorten_errors
from flows.parameters import CheckpointUri, Processes, RecipeSource, StoreUri, TrackingUri, merge_overrides
from flows.recipe import Recipe, load_recipe
from flows.stages import check_recipe, make_workspace, name_run, train_stages
from internvl_core.checkpoint.store import read_manifest, resolve_checkpoint
from internvl_core.checkpoint.uri import normalize_store_uri
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointError, GateNotPassed, LeaseHeld
from tasks.cancel_watch import RunCancelled
from tasks.evaluate_checkpoint import evaluate_checkpoint
from tasks.find_news import find_news
from tasks.hold_stage import hold_stage
from tasks.model_registry import CHAMPION, ModelRegistry, ModelVersion
from tasks.notify import notify
from tasks.promote_checkpoint import Verdict, judge, promote_checkpoint
from tasks.remove_old_versions import remove_old_versions
from tasks.show_verdict import show_verdict
from tasks.stage import Gate
from tasks.stage_plan import COMPONENTS, get_cache_dir

ModelName = Annotated[str, Field(title="Registered model", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
SKIPPED = "Skipped"
"""Name of the state of a run that had nothing to do."""


@flow(name="finetune-nightly", flow_run_name=name_run)
def finetune_nightly(
    recipe: RecipeSource,
    model: ModelName = "internvl",
    start_from: CheckpointUri | None = None,
    starts_from_champion: bool = True,
    keep_last: Annotated[int, Field(ge=1)] = 7,
    # Not `| None`: the UI has no editor for that.
    overrides: Mapping[str, Any] = {},
    launcher: Processes | None = None,
    store_uri: StoreUri | None = None,
    tracking_uri: TrackingUri | None = None,
    is_fresh: bool = False,
) -> State[Any]:
    """Train a candidate on new data, score it and the champion on the same questions, promote the better one.

    Args:
        recipe: A shipped recipe, or the path of a YAML file on the machine that trains. Its last stage needs
            eval_meta_path and a gate.
        model: Name in MLflow's model registry; its alias champion is moved.
        start_from: URI of the checkpoint that the first stage starts from. Default: the champion.
        starts_from_champion: Without start_from: start from the champion once there is one, else as the recipe says.
        keep_last: Versions to keep, and the champion; older ones are removed with their checkpoints.
        overrides: Dotted path to value, such as {"stages.finetune.arguments.max_steps": 100}.
        launcher: Processes of all stages that name none of their own. Default: the recipe's.
        store_uri: Where checkpoints go, such as s3://bucket/runs. Default: the recipe's.
        tracking_uri: MLflow, such as http://127.0.0.1:5000. Default: the recipe's, or the worker's MLFLOW_TRACKING_URI.
        is_fresh: Train even if nothing is new.
    """
    given = merge_overrides(
        overrides, start_from=start_from, launcher=launcher, store_uri=store_uri, tracking_uri=tracking_uri
    )
    shorten_errors()
    try:
        return _run_night(
            recipe,
            given,
            model,
            starts_from_champion=starts_from_champion,
            keep_last=keep_last,
            is_fresh=is_fresh,
        )
    except RunCancelled as cancelled:
        return Cancelled(message=str(cancelled))
    except Exception as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        notify(f"{recipe}: the nightly finetune failed: {first}", {"model": model, "result": "failed"})
        raise


def _run_night(
    source: str, given: dict[str, Any], model: str, *, starts_from_champion: bool, keep_last: int, is_fresh: bool
) -> State[Any]:
    recipe = load_recipe(source, given)
    gate = _get_gate(recipe)
    registry = ModelRegistry(recipe.tracking, model)
    # Candidates have a place of their own: what is old of them is removed.
    given = {**given, "store_uri": f"{normalize_store_uri(recipe.store)}/{model}"}
    follows_champion = starts_from_champion and not _names_start(given, recipe)
    make_workspace(recipe.directory)
    with ExitStack() as held:
        try:
            held.enter_context(hold_stage(recipe.directory / "nightly" / model, _get_run_id(), patience_s=0))
        except LeaseHeld as error:
            return _skip(f"Another run of it is at work: {error}")
        champion = _find_champion(registry)
        if champion is not None and follows_champion:
            given["start_from"] = champion.checkpoint.uri
        recipe = load_recipe(source, given)
        data = check_recipe(recipe)
        news = find_news(
            recipe.stages,
            registry.find_last_judged(),
            start_from=resolve_checkpoint(recipe.start_from) if recipe.start_from else None,
            follows_champion=follows_champion,
            workspace=recipe.directory,
        )
        if news.reason_to_skip is not None and not is_fresh:
            return _skip(news.reason_to_skip)
        result = train_stages(recipe, data, is_fresh=is_fresh, skips_last_gate=True)
        stages = tuple(trained.checkpoint for trained in result.trained)
        version, verdict = promote_checkpoint(
            stages,
            _compare(recipe, gate, stages[-1], champion),
            registry,
            champion=champion,
            inputs=news.inputs,
            experiment=recipe.name,
            run_id=result.mlflow_run_id,
            tags={"prefect.flow_run_id": _get_run_id()},
        )
        show_verdict(recipe.name, registry.name, version, verdict, champion=champion)
        remove_old_versions(
            registry,
            keep_last=keep_last,
            protected={version.number, *([champion.number] if champion else [])},
            store_uri=recipe.store,
            cache_dir=get_cache_dir(recipe.directory),
            run_id=_get_run_id(),
        )
    if verdict.is_below_gate:
        raise GateNotPassed(f"version {version.number} of {model} is {verdict}. Train longer, or lower the gate.")
    _tell(recipe, registry, version, verdict)
    return Completed(name="Promoted" if verdict.is_promoted else "NotPromoted", message=f"{verdict}.")


def _get_run_id() -> str:
    return running_flow.id or ""


def _get_gate(recipe: Recipe) -> Gate:
    gate = recipe.stages[-1].gate
    if gate is None:
        raise ArgumentError(
            f"recipe {recipe.name}: stages.{recipe.stages[-1].name}: gate: missing. A nightly finetune is promoted by "
            "it: give it eval_meta_path and a gate such as {metric: accuracy, at_least: 0.5, better_by: 0.01}."
        )
    return gate


def _names_start(given: Mapping[str, Any], recipe: Recipe) -> bool:
    """Tell whether the caller says what the first stage starts from."""
    first = f"stages.{recipe.stages[0].name}"
    paths = ["start_from", f"{first}.start_from", *(f"{first}.arguments.{name}" for name in COMPONENTS)]
    return any(given.get(path) is not None for path in paths)


def _find_champion(registry: ModelRegistry) -> ModelVersion | None:
    """Find the champion, and make sure that it can be compared with before anything is trained."""
    champion = registry.find_champion()
    if champion is not None:
        try:
            read_manifest(champion.checkpoint)
        except CheckpointError as error:
            where = f"version {champion.number} of {registry.name}, its {CHAMPION}"
            raise type(error)(f"{where}: {error} Set the alias to another version.") from error
    return champion


def _compare(recipe: Recipe, gate: Gate, candidate: CheckpointRef, champion: ModelVersion | None) -> Verdict:
    """Score both on the held-out questions of the last stage."""
    score = evaluate_checkpoint if recipe.retry_delays_s else evaluate_checkpoint.with_options(retries=0)
    stage, workspace = recipe.stages[-1], recipe.directory
    scores = score(candidate, stage, label="candidate", workspace=workspace)
    best = score(champion.checkpoint, stage, label="champion", workspace=workspace) if champion else None
    return judge(gate, scores, best)


def _skip(reason: str) -> State[Any]:
    return Completed(name=SKIPPED, message=reason)


def _tell(recipe: Recipe, registry: ModelRegistry, version: ModelVersion, verdict: Verdict) -> None:
    notify(
        f"{recipe.name}: version {version.number} of {registry.name} {verdict}",
        {
            "model": registry.name,
            "version": version.number,
            "checkpoint": version.checkpoint.uri,
            "result": "promoted" if verdict.is_promoted else "not promoted",
            "metric": verdict.metric,
            "candidate": verdict.candidate,
            "champion": verdict.champion,
            "delta": verdict.delta,
        },
    )
