"""Finetune an InternVL on data of one's own, from a committed checkpoint, a folder or a hub id."""

from typing import Any

from prefect import flow

from flows.recipe import load_recipe
from flows.stages import RecipeResult, name_run, run_stages


@flow(name="finetune", flow_run_name=name_run)
def finetune(
    recipe: str, start_from: str | None = None, overrides: dict[str, Any] | None = None, is_fresh: bool = False
) -> RecipeResult:
    """Train the finetune stages of a recipe.

    Args:
        recipe: Name of a shipped recipe, or path of a YAML file.
        start_from: URI of the checkpoint to start from; default: what the recipe says.
        overrides: Dotted path to value, such as {"stages.finetune.arguments.max_steps": 100}.
        is_fresh: Train again, even if the inputs did not change.
    """
    given = {**({"start_from": start_from} if start_from else {}), **(overrides or {})}
    return run_stages(load_recipe(recipe, given), is_fresh=is_fresh)
