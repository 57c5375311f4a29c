"""What a stage commits: checkpoints to resume from, its final weights, and the handover that says it is finished.

Only rank 0 talks to the store. A stage is trained when a FINAL checkpoint is committed, and
finished when a handover names it together with its result.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from internvl_core import __version__
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.resume_point import INPUTS_KEY
from internvl_core.checkpoint.store import StageStore, read_manifest
from internvl_core.checkpoint.training_files import LAYOUT_KEY, TrainingLayout, check_training_files
from internvl_core.contract import METRICS_FILE, CheckpointRef, StageFile, StageResult
from internvl_core.errors import CheckpointCorrupt
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.resume import fetch_checked

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "deepspeed", "peft")


@dataclass(frozen=True)
class Committed:
    """A verified local copy of a committed checkpoint of this stage."""

    checkpoint: CheckpointRef
    kind: CheckpointKind
    step: int
    counters: dict[str, int]
    world_size: int
    """Ranks that wrote it."""
    path: Path


class StageCommits:
    """The commits of one stage in its store."""

    def __init__(self, stage: StageFile, *, layout: TrainingLayout, metrics: MetricsFile, cache_dir: Path) -> None:
        self._store = StageStore(stage.store_uri, stage.stage, stage.fingerprint)
        self._stage = stage
        self._metrics = metrics
        self._cache_dir = cache_dir
        self._fence: int | None = None
        self._layout = layout
        self._info: dict[str, Any] = {
            "run_id": stage.run_id,
            "attempt": stage.attempt,
            "entry": stage.entry,
            "arguments": stage.arguments,
            INPUTS_KEY: stage.inputs,
            "world_size": layout.world_size,
            LAYOUT_KEY: asdict(layout),
            "versions": {"internvl-pipeline": __version__, **{library: version(library) for library in LIBRARIES}},
        }

    def find_newest(self) -> Committed | None:
        """Fetch the newest checkpoint that this attempt may resume from; say which did not verify and why.

        Raises:
            CheckpointCorrupt: there are some, and none verifies: nobody trains a stage anew without a word.
        """
        passed_over: CheckpointCorrupt | None = None
        for checkpoint in self._iter_checkpoints():
            try:
                manifest = read_manifest(checkpoint)
                told = self._stage.resume_from
                if (told or not self._stage.resume) and manifest.info["run_id"] != self._stage.run_id:
                    continue
                path = fetch_checked(checkpoint, manifest, self._layout, self._cache_dir)
            except CheckpointCorrupt as error:
                logger.warning("Passed over a checkpoint: %s", error)
                passed_over = error
                continue
            info = manifest.info
            return Committed(checkpoint, manifest.kind, manifest.step, info["counters"], info["world_size"], path)
        if self._stage.resume_from is not None:
            return self._get_told(self._stage.resume_from)
        if passed_over is not None:
            raise passed_over
        return None

    def _get_told(self, checkpoint: CheckpointRef) -> Committed:
        """Fetch the checkpoint that the stage was told to go on from; no other takes its place."""
        manifest = read_manifest(checkpoint)
        path = fetch_checked(checkpoint, manifest, self._layout, self._cache_dir)
        info = manifest.info
        return Committed(checkpoint, manifest.kind, manifest.step, info["counters"], info["world_size"], path)

    def publish(
        self, directory: Path, step: int, kind: CheckpointKind, counters: Mapping[str, int] | None = None
    ) -> CheckpointRef:
        """Commit a directory, with the loss curve up to here beside the weights.

        Args:
            directory: what to commit; not to be changed afterwards.
            step: updates that its weights have seen.
            kind: to resume from, or the stage's final weights.
            counters: of the finished training, for an evaluation that has to be done again.
        """
        if self._fence is None:
            self._fence = self._store.next_fence()
        if self._metrics.path.exists():
            shutil.copyfile(self._metrics.path, directory / METRICS_FILE)
        if kind is CheckpointKind.TRAINING:
            check_training_files(directory, self._layout, step=step)
        started = time.monotonic()
        checkpoint = self._store.publish(
            directory,
            step=step,
            fence=self._fence,
            kind=kind,
            parent=self._stage.start_from,
            info={**self._info, "counters": dict(counters or {}), "time": time.time()},
        )
        logger.info("Committed step %d (%s) in %.1f s: %s", step, kind, time.monotonic() - started, checkpoint.uri)
        return checkpoint

    def hand_over(self, result: StageResult) -> None:
        """Declare the stage finished."""
        report = {name: value for name, value in asdict(result).items() if name != "checkpoint"}
        self._store.hand_over(result.checkpoint, report)

    def _iter_checkpoints(self) -> Iterator[CheckpointRef]:
        for commit in self._store.list_committed():
            yield commit.checkpoint
