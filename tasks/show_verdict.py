"""Show in the Prefect UI what came of a nightly finetune."""

import logging

from prefect.artifacts import create_markdown_artifact

from tasks.model_registry import ModelVersion
from tasks.promote_checkpoint import Verdict
from tasks.show_stages import write_key

logger = logging.getLogger(__name__)


def show_verdict(
    recipe: str,
    model: str,
    version: ModelVersion,
    verdict: Verdict,
    *,
    champion: ModelVersion | None,
) -> None:
    """Make an artifact of the flow run, `nightly-<recipe>`; one that cannot be made is no reason to fail.

    Args:
        recipe: its name.
        model: name of the registered model.
        version: the candidate's.
        verdict: on it.
        champion: that it was compared with; None for the first.
    """
    rows = [
        ("candidate", f"version {version.number}: `{version.checkpoint.uri}`"),
        ("champion before", f"version {champion.number}: `{champion.checkpoint.uri}`" if champion else "none"),
        ("verdict", str(verdict)),
    ]
    lines = [f"| {model} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    try:
        create_markdown_artifact(
            key=write_key("nightly", recipe), markdown="\n".join(lines), description=f"Nightly finetune of {model}"
        )
    except Exception as error:  # noqa: BLE001  whatever Prefect throws: the verdict stands
        logger.warning("The verdict is not in the Prefect UI: %s: %s", type(error).__name__, error)
