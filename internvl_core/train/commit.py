"""What a stage commits: checkpoints to resume from, its final weights, and the handover that says it is finished.

Only rank 0 talks to the store, and only while it holds the stage's lease. A stage is trained when a FINAL
checkpoint is committed, and finished when a handover names it together with its result.
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from internvl_core import __version__
from internvl_core.checkpoint.commits import Commit
from internvl_core.checkpoint.fetch import adopt
from internvl_core.checkpoint.garbage import MIN_KEPT
from internvl_core.checkpoint.lease import Lease, Owner
from internvl_core.checkpoint.manifest import CheckpointKind, Manifest
from internvl_core.checkpoint.resume_point import INPUTS_KEY
from internvl_core.checkpoint.store import StageStore, read_manifest
from internvl_core.checkpoint.training_files import LAYOUT_KEY, TrainingLayout, check_training_files
from internvl_core.checkpoint.unsent import UnsentSave
from internvl_core.contract import METRICS_FILE, CheckpointRef, StageFile, StageResult
from internvl_core.errors import CheckpointCorrupt, CheckpointError
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.resume import describe_resume, fetch_checked
from internvl_core.train.upload import UploadLimits, Uploads

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "deepspeed", "peft")


@dataclass(frozen=True)
class Committed:
    """A verified local copy of a committed checkpoint of this stage."""

    checkpoint: CheckpointRef
    kind: CheckpointKind
    step: int
    counters: dict[str, int]
    info: dict[str, Any]
    """Of its manifest: what the run that wrote it said of itself."""
    size_bytes: int
    path: Path

    @classmethod
    def describe(cls, checkpoint: CheckpointRef, manifest: Manifest, path: Path) -> Self:
        """Describe a copy by its manifest."""
        return cls(
            checkpoint,
            manifest.kind,
            manifest.step,
            manifest.info["counters"],
            manifest.info,
            sum(entry.size_bytes for entry in manifest.files),
            path,
        )


class StageCommits:
    """The commits of one stage in its store, for rank 0 of one attempt."""

    def __init__(
        self,
        stage: StageFile,
        *,
        layout: TrainingLayout,
        metrics: MetricsFile,
        cache_dir: Path,
        limits: UploadLimits,
        save_total_limit: int | None,
    ) -> None:
        """Look at nothing yet.

        Args:
            layout: files of a training checkpoint of this run.
            metrics: the loss curve, committed beside the weights; lies in the attempt's directory.
            limits: how long training bears with the store.
            save_total_limit: checkpoints that stay in the store, final weights included, two at the least; None: all.
        """
        self._store = StageStore(stage.store_uri, stage.stage, stage.fingerprint)
        self._stage = stage
        self._layout = layout
        self._metrics = metrics
        self._cache_dir = cache_dir
        self._limits = limits
        self._keep = None if save_total_limit is None else max(MIN_KEPT, save_total_limit)
        self._lease: Lease | None = None
        self._uploads: Uploads | None = None
        self._adopted: Path | None = None
        self._found: Committed | None = None
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

    @property
    def uploads(self) -> Uploads:
        """The saves under way; there once the stage is `acquire`d."""
        assert self._uploads is not None
        return self._uploads

    def acquire(self) -> Committed | None:
        """Take the stage's lease, and fetch the newest checkpoint that this attempt may resume from.

        What did not verify is logged with why; it is no part of this attempt's lineage.

        Raises:
            LeaseHeld: another run is at work.
            CheckpointCorrupt: there are some, and none verifies: nobody trains a stage anew without a word.
        """
        self._lease = self._store.acquire(Owner.of_this_process(self._stage.run_id), choose_base=self._choose)
        if self._found is not None:
            self._info |= describe_resume(self._found, self._info["versions"])
        self._uploads = Uploads(self._build_command(self._lease.fence), self._limits, on_verified=self._free)
        return self._found

    def check(self) -> None:
        """Raise what keeps checkpoints from ever being committed."""
        self.uploads.check()

    def wait_for_room(self, has_room_on_disk: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until one more save may be made: what is sent makes room, in the queue and on the disk.

        Raises:
            StoreUnavailable, DiskFull, Fenced: it never may.
        """
        uploads = self.uploads
        return uploads.wait(
            lambda: uploads.has_room and (uploads.num_unsent == 0 or has_room_on_disk()),
            timeout_s,
        )

    def drop_cached(self) -> None:
        """Make room on the disk by the copy of a checkpoint that is in the store."""
        if self._adopted is not None:
            shutil.rmtree(self._adopted, ignore_errors=True)
            self._adopted = None

    def describe_backlog(self) -> str:
        """Say what waits for the store and why."""
        return self.uploads.describe_backlog()

    def submit(
        self, directory: Path, step: int, kind: CheckpointKind, counters: Mapping[str, int] | None = None
    ) -> UnsentSave:
        """Hand a directory over to be committed, with the loss curve up to here beside the weights.

        Args:
            directory: what to commit, complete; not to be changed afterwards, and gone when it is in the store.
            step: updates that its weights have seen.
            kind: to resume from, or the stage's final weights.
            counters: of the finished training, for an evaluation that has to be done again.
        """
        assert self._lease is not None
        if self._metrics.path.exists():
            shutil.copyfile(self._metrics.path, directory / METRICS_FILE)
        if kind is CheckpointKind.TRAINING:
            check_training_files(directory, self._layout, step=step)
        save = UnsentSave.note(
            self._metrics.path.parent,
            directory,
            step=step,
            fence=self._lease.fence,
            kind=kind,
            parent=self._stage.start_from,
            info={**self._info, "counters": dict(counters or {}), "time": time.time()},
        )
        self.uploads.submit(save)
        return save

    def hand_over(self, result: StageResult) -> None:
        """Declare the stage finished."""
        assert self._lease is not None
        report = {name: value for name, value in asdict(result).items() if name != "checkpoint"}
        self._store.hand_over(result.checkpoint, report, fence=self._lease.fence)

    def close(self) -> None:
        """Let go of the stage, so that the next run need not wait; what is unsent stays on the disk."""
        if self._uploads is not None:
            self._uploads.close()
        if self._lease is not None:
            try:
                self._lease.release()
            except CheckpointError as error:
                logger.warning("The lease was not released, the next run on another machine waits for it: %s", error)

    def _choose(self, commits: Iterable[Commit]) -> Commit | None:
        """Find the commit to go on from, and fetch it: the newest that verifies and that this attempt may have."""
        # The store asks again if the stage was worked on meanwhile.
        self._found = None
        told = self._stage.resume_from
        only_own = told is not None or not self._stage.resume
        passed_over: CheckpointCorrupt | None = None
        listed: list[Commit] = []
        for commit in commits:
            listed.append(commit)
            try:
                self._found = self._fetch(commit.checkpoint, only_own=only_own)
            except CheckpointCorrupt as error:
                logger.warning("Passed over a checkpoint: %s", error)
                passed_over = error
            else:
                if self._found is not None:
                    return commit
        if told is not None:
            # No other takes its place. It may be of another stage's directory, and then no commit here is its base.
            self._found = self._fetch(told, only_own=False)
            return next((commit for commit in listed if commit.checkpoint == told), None)
        if passed_over is not None:
            raise passed_over
        return None

    def _fetch(self, checkpoint: CheckpointRef, *, only_own: bool) -> Committed | None:
        """Fetch a checkpoint whole; None for one of another run where only this run's own count.

        Raises:
            CheckpointCorrupt: it does not verify, or lacks a part of the state.
            CheckpointNotFound: it was superseded and removed since it was listed.
        """
        manifest = read_manifest(checkpoint)
        if only_own and manifest.info["run_id"] != self._stage.run_id:
            return None
        return Committed.describe(
            checkpoint, manifest, fetch_checked(checkpoint, manifest, self._layout, self._cache_dir)
        )

    def _build_command(self, fence: int) -> list[str]:
        stage = self._stage
        return [
            *(sys.executable, "-m", "internvl_core.checkpoint.uploader"),
            f"--store={stage.store_uri}",
            f"--stage={stage.stage}",
            f"--fingerprint={stage.fingerprint}",
            f"--fence={fence}",
            f"--attempt-dir={self._metrics.path.parent}",
            *([] if self._keep is None else [f"--keep={self._keep}"]),
        ]

    def _free(self, save: UnsentSave, checkpoint: CheckpointRef) -> None:
        """Give up the local directory of a save whose copy is verified; the newest is kept where fetch looks."""
        try:
            adopted = adopt(save.directory, checkpoint, self._cache_dir)
            if self._adopted is not None and self._adopted != adopted:
                shutil.rmtree(self._adopted, ignore_errors=True)
            self._adopted = adopted
        except OSError as error:
            logger.warning("%s is in the store, but stays here too: %s", save.directory, os.strerror(error.errno or 0))
