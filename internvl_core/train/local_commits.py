"""What a run by hand keeps: checkpoints in its output_dir, under the promises of those in a store.

It knows no fingerprint's directory: what it was started with stands in its checkpoints, and a run
that was started otherwise does not go on from them.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from internvl_core import __version__
from internvl_core.argument_rules import PATHS, fingerprint_arguments
from internvl_core.argument_values import LATEST
from internvl_core.checkpoint.commits import COMMITS_FOLDER, is_save_uri
from internvl_core.checkpoint.local_checkpoints import LocalCheckpoint, LocalCheckpoints, read_local
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.resume_point import INPUTS_KEY, check_inputs_equal, find_resume_point
from internvl_core.checkpoint.store import is_checkpoint_uri
from internvl_core.checkpoint.training_files import LAYOUT_KEY, TrainingLayout, check_training_files
from internvl_core.contract import METRICS_FILE, CheckpointRef, digest_json
from internvl_core.errors import ArgumentError, CheckpointCorrupt
from internvl_core.train.commit import LIBRARIES, Committed
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.resume import describe_resume, fetch_checked, read_layout

logger = logging.getLogger(__name__)

_OTHER_DIR = "Give the arguments it was written with, another output_dir, or overwrite_output_dir to begin anew."


class LocalCommits:
    """The checkpoints of one run by hand; for rank 0."""

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        entry: str,
        layout: TrainingLayout,
        metrics: MetricsFile,
        output_dir: Path,
        cache_dir: Path,
    ) -> None:
        """Look at nothing yet.

        Args:
            values: resolved arguments.
            layout: how this run spreads its state over files.
        """
        self._checkpoints = LocalCheckpoints(output_dir)
        self._entry = entry
        self._layout = layout
        self._metrics = metrics
        self._cache_dir = cache_dir
        self._told = values["resume_from_checkpoint"]
        self._overwrites = bool(values["overwrite_output_dir"])
        self._keep = values["save_total_limit"]
        self._fence = 1
        self._inputs = {
            "entry": entry,
            "trainer": __version__.split(".")[0],
            "arguments": fingerprint_arguments(values, world_size=layout.world_size),
            # As they are written: digests of whole models would cost minutes at each start. The position in the
            # data knows other data by itself.
            "paths": {name: values[name] for name in sorted(PATHS - {"resume_from_checkpoint"})},
        }
        self._info: dict[str, Any] = {
            "entry": entry,
            "arguments": {name: value for name, value in values.items() if value is not None},
            INPUTS_KEY: self._inputs,
            "world_size": layout.world_size,
            LAYOUT_KEY: asdict(layout),
            "versions": {"internvl-pipeline": __version__, **{library: version(library) for library in LIBRARIES}},
        }

    @property
    def saves_dir(self) -> Path:
        """Where Trainer writes what is then committed."""
        return self._checkpoints.saves_dir

    def acquire(self) -> Committed | None:
        """Find what this run goes on from, and keep other runs out of its output_dir from now on.

        Raises:
            LeaseHeld: another run uses the output_dir.
            ArgumentError: the checkpoint is of another training, or there is none where one was asked for.
            CheckpointCorrupt: there are some, but none that verifies.
            CheckpointNotFound: the one that was asked for was never committed.
        """
        self._checkpoints.hold()
        listed = self._checkpoints.list_newest_first()
        self._fence = 1 + max((checkpoint.manifest.fence for checkpoint in listed), default=0)
        found: Committed | None = None
        if self._told not in (None, LATEST):
            found = self._get_told(self._told)
        elif self._told == LATEST or not self._overwrites:
            found = self._find_own()
        elif listed:
            logger.warning("overwrite_output_dir: training begins anew in spite of %s.", listed[0].path)
        if found is not None:
            self._info |= describe_resume(found, self._info["versions"])
        return found

    def check(self) -> None:
        """Do nothing: what goes wrong is raised where it does."""

    def wait_for_room(self, has_room_on_disk: Callable[[], bool], timeout_s: float) -> bool:
        """Let a save go ahead at once: none is under way, and room on the disk is looked for behind this."""
        return True

    def drop_cached(self) -> None:
        """Do nothing: there is no copy of anything."""

    def describe_backlog(self) -> str:
        """Say that nothing waits."""
        return "Nothing waits to be committed."

    def submit(
        self, directory: Path, step: int, kind: CheckpointKind, counters: Mapping[str, int] | None = None
    ) -> CheckpointRef:
        """Commit a save, with the loss curve up to here beside the weights, and remove what it supersedes."""
        assert kind is CheckpointKind.TRAINING
        if self._metrics.path.exists():
            shutil.copyfile(self._metrics.path, directory / METRICS_FILE)
        check_training_files(directory, self._layout, step=step)
        started = time.monotonic()
        committed = self._checkpoints.commit(
            directory,
            entry=self._entry,
            fingerprint=digest_json(self._inputs),
            step=step,
            fence=self._fence,
            info={**self._info, "counters": dict(counters or {}), "time": time.time()},
        )
        logger.info("Committed step %d in %.1f s: %s", step, time.monotonic() - started, committed.path)
        if self._keep is not None:
            self._checkpoints.prune(self._keep)
        return CheckpointRef(str(committed.path), committed.manifest.digest)

    def _find_own(self) -> Committed | None:
        for checkpoint in self._checkpoints.iter_verified():
            ref = CheckpointRef(str(checkpoint.path), checkpoint.manifest.digest)
            check_inputs_equal(ref, checkpoint.manifest, self._inputs, advice=_OTHER_DIR)
            try:
                self._check_files(checkpoint)
            except CheckpointCorrupt as error:
                logger.warning("Passed over a checkpoint: %s", error)
                continue
            return Committed.describe(ref, checkpoint.manifest, checkpoint.path)
        if self._checkpoints.has_any():
            raise CheckpointCorrupt(
                f"{self._checkpoints.output_dir}: there are checkpoints, but none verifies; the log says why. Give "
                "another output_dir, or overwrite_output_dir to begin anew."
            )
        if self._told == LATEST:
            raise ArgumentError(
                f"resume_from_checkpoint: {self._checkpoints.output_dir} has no checkpoint. Leave it out to begin."
            )
        return None

    def _get_told(self, where: str) -> Committed:
        """Get the checkpoint that was asked for, or say why not; no other takes its place."""
        advice = "Give the arguments it was written with, or leave resume_from_checkpoint out."
        path = Path(where).absolute()
        if is_checkpoint_uri(where) or is_save_uri(str(path)) or (path / COMMITS_FOLDER).is_dir():
            ref, manifest = find_resume_point(where if is_checkpoint_uri(where) else str(path))
            path = fetch_checked(ref, manifest, self._layout, self._cache_dir)
        elif path.is_dir():
            local = read_local(path)
            self._checkpoints.verify(local)
            self._check_files(local)
            ref, manifest = CheckpointRef(str(path), local.manifest.digest), local.manifest
        else:
            raise ArgumentError(f"resume_from_checkpoint: {path}: no such folder. Correct the path.")
        check_inputs_equal(ref, manifest, self._inputs, advice=advice)
        return Committed.describe(ref, manifest, path)

    def _check_files(self, checkpoint: LocalCheckpoint) -> None:
        written = read_layout(checkpoint.manifest.info, self._layout)
        check_training_files(checkpoint.path, written, step=checkpoint.manifest.step)
