"""Show the table of a run's stages in the Prefect UI."""

import logging
import re
from collections.abc import Mapping, Sequence

from prefect.artifacts import create_markdown_artifact

from tasks.stage_table import COLUMNS, stage_rows
from tasks.trained_stage import TrainedStage

logger = logging.getLogger(__name__)


def show_stages(recipe: str, stages: Sequence[TrainedStage], *, links: Mapping[str, str]) -> None:
    """Make an artifact of the flow run, `stages-<recipe>`; one that cannot be made is no reason to fail."""
    try:
        create_markdown_artifact(
            key=write_key("stages", recipe),
            markdown=write_markdown(stages, links),
            description=f"Stages of {recipe}",
        )
    except Exception as error:  # noqa: BLE001  whatever Prefect throws: the stages are trained
        logger.warning("The table of stages is not in the Prefect UI: %s: %s", type(error).__name__, error)


def write_key(*parts: str) -> str:
    """Join names to an artifact's key, which takes lower case, digits and dashes only."""
    return re.sub("[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def write_markdown(stages: Sequence[TrainedStage], links: Mapping[str, str]) -> str:
    """Write the table, a row a stage, and the links below it."""
    rows = [
        [column.title for column in COLUMNS],
        ["---:" if column.is_number else "---" for column in COLUMNS],
        *([cell.replace("|", r"\|") for cell in row] for row in stage_rows(stages)),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([table, "", *(f"- {name}: {_write_link(target)}" for name, target in links.items())])


def _write_link(target: str) -> str:
    return f"<{target}>" if target.startswith(("http://", "https://")) else f"`{target}`"
