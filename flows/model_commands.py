"""`internvl convert`: a model from one checkpoint format to the other."""

from typing import Annotated

import typer

from internvl_core.errors import ArgumentError


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or URI of the model.")],
) -> None:
    """Convert a model between transformers' native format and OpenGVLab's chat format."""
    raise ArgumentError("convert: not built yet.")
