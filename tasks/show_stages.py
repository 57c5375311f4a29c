"""Show the table of a run's stages in the Prefect UI."""

import logging
import re
from collections.abc import Mapping, Sequence

from prefect.artifacts import create_markdown_artifact

from tasks.loss_curves import find_curves
from tasks.report_figures import draw_losses, write_picture
from tasks.stage_table import COLUMNS
from tasks.trained_stage import TrainedStage

logger = logging.getLogger(__name__)


def show_stages(recipe: str, stages: Sequence[TrainedStage], *, links: Mapping[str, str]) -> None:
    """Make an artifact of the flow run, `stages-<recipe>`; one that cannot be made is no reason to fail."""
    try:
        create_markdown_artifact(
            key=write_key("stages", recipe),
            markdown=write_markdown(stages, links, picture=_draw(stages)),
            description=f"Stages of {recipe}",
        )
    except Exception as error:  # noqa: BLE001  whatever Prefect throws: the stages are trained
        logger.warning("The table of stages is not in the Prefect UI: %s: %s", type(error).__name__, error)


def write_key(*parts: str) -> str:
    """Join names to an artifact's key, which takes lower case, digits and dashes only."""
    return re.sub("[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def write_markdown(stages: Sequence[TrainedStage], links: Mapping[str, str], *, picture: str | None = None) -> str:
    """Write the table, a row a stage, the picture of the losses if there is one, and the links."""
    shown = [column for column in COLUMNS if not column.is_wide]
    rows = [
        [column.title for column in shown],
        ["---:" if column.is_number else "---" for column in shown],
        *([column.write_cell(stage).replace("|", r"\|") for column in shown] for stage in stages),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    figure = [f"![Training loss]({picture})", ""] if picture else []
    # Not in the table, which would run over what stands beside it in the page.
    checkpoints = [f"- {stage.name}: `{stage.checkpoint.uri}`" for stage in stages]
    others = [f"- {_write_link(name, target)}" for name, target in links.items()]
    return "\n".join([table, "", *figure, *checkpoints, *others])


def _draw(stages: Sequence[TrainedStage]) -> str | None:
    curves = find_curves(stages)
    return write_picture(draw_losses(curves, is_narrow=False)) if curves else None


def _write_link(name: str, target: str) -> str:
    return f"[{name}]({target})" if target.startswith(("http://", "https://")) else f"{name}: `{target}`"
