"""What the tasks hand on about a stage that is trained: the row of every table and report."""

from dataclasses import dataclass
from pathlib import Path

from internvl_core.contract import CheckpointRef, StageResult
from tasks.stage_tries import FailedTry


@dataclass(frozen=True)
class TrainedStage:
    """A finished stage, trained just now or found finished in the store."""

    name: str
    result: StageResult
    is_skipped: bool
    """Nothing was trained: a committed result with the same fingerprint was in the store."""
    metrics_path: Path
    """metrics.jsonl of the stage, local; the loss curve."""
    failed_tries: tuple[FailedTry, ...] = ()
    """Those of this run that came before the one that finished it."""

    @property
    def checkpoint(self) -> CheckpointRef:
        return self.result.checkpoint
