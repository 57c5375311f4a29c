"""Finetune an InternVL on data of one's own, from a committed checkpoint, a folder or a hub id.

As `pretrain` but for name and texts: Prefect takes a form from each flow's own signature and docstring.
"""

from collections.abc import Mapping
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.parameters import (
    CheckpointUri,
    Processes,
    RecipeSource,
    StageNames,
    StoreUri,
    TrackingUri,
    merge_overrides,
)
from flows.stages import RecipeResult, name_run, run_recipe


@flow(name="finetune", flow_run_name=name_run)
def finetune(
    recipe: RecipeSource,
    stages: StageNames | None = None,
    start_from: CheckpointUri | None = None,
    # Not `| None`: the UI has no editor for that.
    overrides: Mapping[str, Any] = {},
    launcher: Processes | None = None,
    store_uri: StoreUri | None = None,
    tracking_uri: TrackingUri | None = None,
    is_fresh: bool = False,
) -> RecipeResult | State[RecipeResult]:
    """Train the finetune stages of a recipe.

    Args:
        recipe: A shipped recipe, or the path of a YAML file on the machine that trains.
        stages: Names of the stages to train, one after another. Default: all.
        start_from: URI of the checkpoint to start from. Default: what the recipe says.
        overrides: Dotted path to value, such as {"stages.finetune.arguments.max_steps": 100}.
        launcher: Processes of all stages that name none of their own. Default: the recipe's.
        store_uri: Where checkpoints go, such as s3://bucket/runs. Default: the recipe's.
        tracking_uri: MLflow, such as http://127.0.0.1:5000. Default: the recipe's, or the worker's MLFLOW_TRACKING_URI.
        is_fresh: Train again, even if the inputs did not change.
    """
    given = merge_overrides(
        overrides, start_from=start_from, launcher=launcher, store_uri=store_uri, tracking_uri=tracking_uri
    )
    return run_recipe(recipe, given, only_stages=stages, is_fresh=is_fresh)
