"""Say in the Prefect UI that a cancelled run still saves."""

import logging
from pathlib import Path

from prefect.artifacts import create_markdown_artifact

from internvl_core.contract import LOG_FILE
from tasks.show_stages import write_key

logger = logging.getLogger(__name__)


def show_late_save(stage: str, attempt_dir: Path, save_budget_s: float) -> None:
    """Make an artifact of the flow run; one that cannot be made is no reason to fail."""
    text = (
        f"{stage} still saves: its supervisor goes on without this run, for {save_budget_s:.0f} s at the most. A run "
        f"of it that is started meanwhile waits and resumes there, and one of another stage waits for the GPUs. "
        f"Log: {attempt_dir / LOG_FILE}"
    )
    logger.warning("%s", text)
    try:
        create_markdown_artifact(key=write_key("still-saving", stage), markdown=text, description=f"Save of {stage}")
    except Exception as error:  # noqa: BLE001  whatever Prefect throws: the save goes on
        logger.warning("The Prefect UI does not tell of it: %s: %s", type(error).__name__, error)
