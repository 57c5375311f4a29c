"""Convert a model between checkpoint formats, as a job of a process with torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.store import is_checkpoint_uri
from internvl_core.inspection.hub import check_model


def run_convert(job: Mapping[str, Any]) -> dict[str, Any]:
    """Convert; `job` holds the arguments of `convert` by name.

    Raises:
        ArgumentError: among much else, the source is neither a folder here nor a model on the hub.
    """
    # Cheap, and before seconds of imports.
    if not is_checkpoint_uri(job["source"]):
        check_model(job["source"])
    from internvl_core.model.convert import convert

    return convert(
        job["source"],
        job["target"],
        to=job["to"],
        merge=job["merge"],
        dtype=job["dtype"],
        cache_dir=Path(job["cache_dir"]).expanduser(),
    )
