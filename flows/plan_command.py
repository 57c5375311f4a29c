"""`internvl plan`: what the stages of a recipe need, before a GPU is taken."""

from typing import Annotated

import typer

from internvl_core.errors import ArgumentError


def plan(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")],
) -> None:
    """Tell parameters, memory per GPU and FLOPs per step of every stage; needs no GPU and no weights."""
    raise ArgumentError("plan: not built yet.")
