"""Checkpoints of a run by hand: `checkpoint-<step>` folders in its output_dir, each with a MANIFEST.

    <output_dir>/saving/checkpoint-<step>   what is being written; whole when its MANIFEST is there
    <output_dir>/checkpoint-<step>          moved here whole, in one step; never changed afterwards

So a folder that a person or another program finds beside the weights is never half of one. The
fence of a manifest is the number of the run in this output_dir that wrote it: what a later run wrote is
newer, whatever its step. Only one run at a time may use an output_dir (`hold`).
"""

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.garbage import MIN_KEPT
from internvl_core.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointKind,
    Manifest,
    check_files,
    check_size,
    describe_file,
    list_files,
)
from internvl_core.errors import CheckpointCorrupt, LeaseHeld

logger = logging.getLogger(__name__)

SAVES_FOLDER = "saving"
LOCK_FILE = ".lock"
_NAME = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class LocalCheckpoint:
    """A folder with a MANIFEST that can be read; its files are not looked at."""

    path: Path
    manifest: Manifest

    @property
    def order(self) -> tuple[int, int]:
        """Key that is greater for the newer."""
        return self.manifest.fence, self.manifest.step


def read_local(path: Path) -> LocalCheckpoint:
    """Read the MANIFEST of a checkpoint's folder.

    Raises:
        CheckpointCorrupt: there is none, or it is damaged.
    """
    try:
        with translated(f"Reading {path}", answers=(FileNotFoundError,)):
            record = (path / MANIFEST_FILE).read_bytes()
    except FileNotFoundError:
        raise CheckpointCorrupt(
            f"{path} has no {MANIFEST_FILE}: it was never finished, or another trainer wrote it."
        ) from None
    return LocalCheckpoint(path, Manifest.from_bytes(record, where=f"{path}/{MANIFEST_FILE}"))


class LocalCheckpoints:
    """The checkpoints in one output_dir; for one process of a run."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.saves_dir = output_dir / SAVES_FOLDER
        self._lock: int | None = None
        self._verified: set[str] = set()

    def hold(self) -> None:
        """Keep other runs out until this process ends, and clear up what a dead one left half done.

        Raises:
            LeaseHeld: another run uses this output_dir.
        """
        with translated(f"Locking {self.output_dir}"):
            self.output_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.output_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise LeaseHeld(
                    f"{self.output_dir} is in use by another run. Wait for it, stop it, or give another output_dir."
                ) from None
            self._lock = descriptor
            self._clear_saves()

    def list_newest_first(self) -> list[LocalCheckpoint]:
        """List the checkpoints whose MANIFEST can be read; log the others with the reason."""
        found = []
        for path in self.output_dir.glob("checkpoint-*"):
            if not (path.is_dir() and _NAME.fullmatch(path.name)):
                continue
            try:
                found.append(read_local(path))
            except CheckpointCorrupt as error:
                logger.warning("Passed over a checkpoint: %s", error)
        return sorted(found, key=lambda checkpoint: checkpoint.order, reverse=True)

    def has_any(self) -> bool:
        """Tell whether there is anything called a checkpoint, whole or not, ours or not."""
        return any(path.is_dir() and _NAME.fullmatch(path.name) for path in self.output_dir.glob("checkpoint-*"))

    def iter_verified(self) -> Iterator[LocalCheckpoint]:
        """Yield the checkpoints of which every byte verifies, newest first; log the others with the reason."""
        for checkpoint in self.list_newest_first():
            try:
                self.verify(checkpoint)
            except CheckpointCorrupt as error:
                logger.warning("Passed over a checkpoint: %s", error)
            else:
                yield checkpoint

    def verify(self, checkpoint: LocalCheckpoint) -> None:
        """Compare a checkpoint with its manifest; of one that this process wrote or read whole only names and sizes.

        Raises:
            CheckpointCorrupt: names the first file that differs.
        """
        with translated(f"Reading {checkpoint.path}"):
            if checkpoint.manifest.digest in self._verified:
                _check_sizes(checkpoint)
            else:
                check_files(checkpoint.path, checkpoint.manifest.files)
        self._verified.add(checkpoint.manifest.digest)

    def commit(
        self, directory: Path, *, entry: str, fingerprint: str, step: int, fence: int, info: dict[str, Any]
    ) -> LocalCheckpoint:
        """Give a save its MANIFEST and move it beside the others, in the place of an older one of this step.

        Args:
            directory: in `saves_dir`, written by all ranks.
            entry: stands for the stage that a run by hand has not.
        """
        with translated(f"Committing {directory}"):
            files = tuple(describe_file(directory, path) for path in list_files(directory))
            manifest = Manifest(entry, fingerprint, step, fence, CheckpointKind.TRAINING, None, info, files)
            for folder in {directory, *((directory / entry.path).parent for entry in files)}:
                _sync(folder)
            for file in files:
                _sync(directory / file.path)
            _write_synced(directory / MANIFEST_FILE, manifest.to_bytes())
            path = self._install(directory)
        self._verified.add(manifest.digest)
        return LocalCheckpoint(path, manifest)

    def prune(self, keep: int) -> list[Path]:
        """Remove what is older than the newest so many that verify; fewer of them, and nothing is removed.

        Returns:
            What was removed.
        """
        num_kept = 0
        removed = []
        for checkpoint in self.list_newest_first():
            if num_kept >= max(keep, MIN_KEPT):
                logger.info("Removing %s: superseded by %d newer ones that verify.", checkpoint.path, num_kept)
                shutil.rmtree(checkpoint.path, ignore_errors=True)
                removed.append(checkpoint.path)
                continue
            with suppress(CheckpointCorrupt):
                self.verify(checkpoint)
                num_kept += 1
        return removed

    def _clear_saves(self) -> None:
        for path in self.saves_dir.glob("*"):
            try:
                checkpoint = read_local(path)
                check_files(path, checkpoint.manifest.files)
            except CheckpointCorrupt:
                logger.warning("Removing %s: a run ended before it was written.", path)
                shutil.rmtree(path)
            else:
                self._install(path)

    def _install(self, directory: Path) -> Path:
        path = self.output_dir / directory.name
        if path.is_dir():
            shutil.rmtree(path)
        directory.rename(path)
        _sync(self.output_dir)
        return path


def _check_sizes(checkpoint: LocalCheckpoint) -> None:
    for entry in checkpoint.manifest.files:
        path = checkpoint.path / entry.path
        check_size(path.stat().st_size if path.is_file() else None, entry, where=str(checkpoint.path))


def _write_synced(path: Path, body: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
