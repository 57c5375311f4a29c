"""The parameters of the deployed flows. Their types become the fields of the form in the Prefect UI.

What the form's schema says (choices, patterns, least values) the server refuses before a run is created; the rest is
checked by the flow before anything is trained.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from flows.recipe import TRACKING_PATTERN, list_recipes
from internvl_core.checkpoint.uri import STORE_PROTOCOLS
from tasks.stage import Launcher

# Python's own check of a choice would refuse a file's path: the choices are for the form, `load_recipe` is the check.
ShippedRecipe = Annotated[str, Field(title="Shipped recipe", json_schema_extra={"enum": list_recipes()})]
RecipeFile = Annotated[str, Field(title="Recipe file", pattern=r"\.ya?ml$")]
RecipeSource = ShippedRecipe | RecipeFile

StageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.]*$")]
StageNames = list[StageName]

_STORES = "|".join(sorted(STORE_PROTOCOLS - {"memory"}))
# No user, password, query or fragment: Prefect keeps what is typed in, and shows it.
_ADDRESS = rf"^(({_STORES})://[^/@?#]*(/[^?#]*)?$|/)"
StoreUri = Annotated[str, Field(title="Store", pattern=_ADDRESS)]
CheckpointUri = Annotated[str, Field(title="Checkpoint", pattern=_ADDRESS)]
TrackingUri = Annotated[str, Field(title="MLflow", pattern=TRACKING_PATTERN)]
Processes = Annotated[Launcher, Field(title="Launcher", description="How many processes, and where.")]


def merge_overrides(
    overrides: Mapping[str, Any],
    *,
    start_from: str | None,
    launcher: Launcher | None,
    store_uri: str | None,
    tracking_uri: str | None,
) -> dict[str, Any]:
    """Put what a flow was given by fields of their own among its overrides; None: what the recipe says."""
    fields = {
        "start_from": start_from,
        "launcher": launcher.model_dump() if launcher else None,
        "store_uri": store_uri,
        "tracking_uri": tracking_uri,
    }
    # Overrides last: they are put in in this order, and one may be of a key below `launcher`.
    return {**{name: value for name, value in fields.items() if value is not None}, **overrides}
