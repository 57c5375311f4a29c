"""Show how far a stage is: lines in the log, a progress bar in the Prefect UI, and there too what its ranks log."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from tasks.show_stages import write_key

LINE_INTERVAL_S = 4.0
BAR_INTERVAL_S = 5.0
LOG_INTERVAL_S = 5.0

logger = logging.getLogger(__name__)


class StageProgress:
    """The progress of one attempt, told at a bounded rate."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._began = time.time()
        self._earlier_step: int | None = None
        self._next_line = 0.0
        self._next_bar = 0.0
        self._artifact_id: UUID | None = None

    def show(self, line: Mapping[str, Any]) -> None:
        """Tell a line of metrics.jsonl, unless the last was told just now; the last step is always told."""
        if line["time"] < self._began:
            # Of an earlier attempt, and brought along by the checkpoint that is resumed from.
            self._earlier_step = line["step"]
            return
        if self._earlier_step is not None:
            get_run_logger().info("%s: resumed from step %d", self._stage, self._earlier_step)
            self._earlier_step = None
        now, is_last = time.monotonic(), line["step"] >= line["max_steps"]
        if now >= self._next_line or is_last:
            self._next_line = now + LINE_INTERVAL_S
            get_run_logger().info(
                "%-9s step %4d/%d   loss %.4f   %6.0f tokens/s   eta %d s",
                self._stage,
                *(line[name] for name in ("step", "max_steps", "loss", "tokens_per_s", "eta_s")),
            )
        if now >= self._next_bar or is_last:
            self._next_bar = now + BAR_INTERVAL_S
            self._draw_bar(100 * line["step"] / line["max_steps"])

    def _draw_bar(self, percent: float) -> None:
        try:
            if self._artifact_id is None:
                key = write_key("progress", self._stage)
                found = create_progress_artifact(percent, key=key, description=f"Steps of {self._stage}")
                self._artifact_id = found if isinstance(found, UUID) else None
            else:
                update_progress_artifact(self._artifact_id, progress=percent)
        except Exception as error:  # noqa: BLE001  whatever Prefect throws: the stage trains on, without a bar
            logger.warning("No progress bar in the Prefect UI: %s: %s", type(error).__name__, error)
            self._next_bar = float("inf")


class LogTail:
    """What the ranks of an attempt log, sent to Prefect in few records: its server takes some hundred a second."""

    def __init__(self, read_log: Callable[[], str]) -> None:
        """Send nothing yet.

        Args:
            read_log: gives what is new since the last call, of a bounded length.
        """
        self._read_log = read_log
        self._next = 0.0

    def show(self) -> None:
        """Send what is new, unless something was sent just now."""
        if time.monotonic() < self._next:
            return
        text = self._read_log()
        if text:
            self._next = time.monotonic() + LOG_INTERVAL_S
            # All of it is in the trainer's log: the terminal of a person who runs a recipe is not for it (console.py).
            get_run_logger().info("%s", text, extra={"is_told_elsewhere": True})
