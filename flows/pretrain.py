"""Pretrain an InternVL: stage 1 (projector), 1.5 (vision tower), 2 (everything), then finetune."""

from typing import Any

from prefect import flow

from flows.recipe import load_recipe
from flows.stages import RecipeResult, name_run, run_stages


@flow(name="pretrain", flow_run_name=name_run)
def pretrain(recipe: str, overrides: dict[str, Any] | None = None, is_fresh: bool = False) -> RecipeResult:
    """Train all stages of a recipe, each from the checkpoint of the one before.

    Args:
        recipe: Name of a shipped recipe, or path of a YAML file.
        overrides: Dotted path to value, such as {"stages.stage2.arguments.max_steps": 100}.
        is_fresh: Train every stage again, even those whose inputs did not change.
    """
    return run_stages(load_recipe(recipe, overrides), is_fresh=is_fresh)
