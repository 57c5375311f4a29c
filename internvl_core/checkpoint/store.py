"""The checkpoints of a stage: the way in for everything outside this package.

    <store>/<stage>-<fingerprint16>/
        lease/          who may commit, one after the other         lease, acquisition
        data/           the files of each save, MANIFEST last        publication
        commits/        a checkpoint exists from here on             commits
        handover/       the stage is finished                        handover
        pins/           kept by people                               pins

Nothing is ever renamed, appended to or overwritten, except the beat of a lease, which no commit rests on.
Which commits count is told by the leases (lineage); what may go is decided in garbage.
"""

import logging
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_core.checkpoint import garbage, handover, pins, publication
from internvl_core.checkpoint.acquisition import ChooseBase, Clock, acquire
from internvl_core.checkpoint.backend import Backend, open_backend
from internvl_core.checkpoint.commits import (
    Commit,
    CommitName,
    list_commit_names,
    read_commit,
    read_manifest,
)
from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.fetch import fetch, read_file
from internvl_core.checkpoint.garbage import MIN_KEPT, GarbageReport
from internvl_core.checkpoint.lease import Lease, Owner, list_fences, open_lease
from internvl_core.checkpoint.lineage import iter_verified, read_lineage, resolve_checkpoint
from internvl_core.checkpoint.manifest import CheckpointKind, Manifest, list_files
from internvl_core.checkpoint.probe import check_store
from internvl_core.checkpoint.uri import is_checkpoint_uri, normalize_store_uri
from internvl_core.checkpoint.verify import verify
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointCorrupt, CheckpointError, CheckpointNotFound

__all__ = [
    "Commit",
    "GarbageReport",
    "Lease",
    "Owner",
    "StageStore",
    "check_store",
    "fetch",
    "is_checkpoint_uri",
    "read_file",
    "read_manifest",
    "resolve_checkpoint",
]

logger = logging.getLogger(__name__)

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class StageStore:
    """The checkpoints of one stage with one fingerprint; readers see those of its present history."""

    def __init__(self, store_uri: str, stage: str, fingerprint: str, *, backend: Backend | None = None) -> None:
        """Open the store; nothing is read or written yet.

        Args:
            store_uri: under which the stages' directories lie.
            stage, fingerprint: what the stage's directory is named after.
            backend: opened at the stage's directory; None: by the URI.
        """
        for name in (stage, fingerprint):
            if not _PLAIN_NAME.fullmatch(name):
                raise ArgumentError(f"{name!r} cannot name a folder of a store. Use letters, digits, '.', '_', '-'.")
        self._backend = backend or open_backend(f"{normalize_store_uri(store_uri)}/{stage}-{fingerprint[:16]}")
        self._stage = stage
        self._fingerprint = fingerprint
        self._verified: set[str] = set()
        self._in_progress: set[str] = set()

    @property
    def uri(self) -> str:
        return self._backend.uri

    def acquire(self, owner: Owner, *, choose_base: ChooseBase, takes_over: bool = False, clock: Clock = time) -> Lease:
        """Take the lease of the stage from whoever is gone; see `acquisition.acquire`.

        Raises:
            LeaseHeld: the present holder lives; says who it is.
        """
        return acquire(self._backend, owner, choose_base=choose_base, takes_over=takes_over, clock=clock)

    def open_lease(self, fence: int) -> Lease:
        """Go on with a lease that another process of the same holder took.

        Raises:
            CheckpointNotFound, CheckpointCorrupt: it does not exist, or is damaged.
        """
        return open_lease(self._backend, fence)

    def next_fence(self) -> int:
        """Tell the number that the next lease would have, without taking it."""
        fences = [*list_fences(self._backend), *(name.fence for name in list_commit_names(self._backend))]
        return 1 + max(fences, default=0)

    def publish(
        self,
        directory: Path,
        *,
        step: int,
        fence: int,
        kind: CheckpointKind,
        parent: CheckpointRef | None,
        info: dict[str, Any],
    ) -> CheckpointRef:
        """Store a directory and commit it.

        On the file system of a `file://` store the files are hard-linked, not copied: from now on nobody may
        write into them, only remove or replace them.

        Returns:
            The checkpoint, which exists when this returns.

        Raises:
            Fenced: a later lease exists, or this step is committed already with this fence, by somebody else.
            StoreUnavailable, DiskFull: nothing is committed.
        """
        with translated(f"Reading {directory}"):
            paths = list_files(directory)
        if not paths:
            raise CheckpointError(f"{directory} contains no file, so there is nothing to publish.")
        manifest = Manifest(self._stage, self._fingerprint, step, fence, kind, parent, info, files=())
        # A folder of its own for each try: whatever a crashed or rival one left is never mixed in.
        save = f"{step:012d}.{fence:06d}.{secrets.token_hex(4)}"
        self._in_progress.add(save)
        try:
            return publication.publish(self._backend, save, directory, paths, manifest)
        finally:
            self._in_progress.remove(save)

    def find_newest(self, kind: CheckpointKind | None = None) -> CheckpointRef | None:
        """Find the newest checkpoint whose record and MANIFEST verify; `fetch` verifies its data.

        Newest is by step, then fence; at the same of both the final weights. Those passed over are logged with why.
        """
        commit = next(iter_verified(self._backend, kind), None)
        return commit.checkpoint if commit else None

    def find_commit(self, step: int, fence: int, kind: CheckpointKind) -> CheckpointRef | None:
        """Find what was committed under a name, live or not; None if nothing was.

        Raises:
            CheckpointCorrupt: the record is damaged.
        """
        try:
            return read_commit(self._backend, CommitName(step, fence, kind)).checkpoint
        except CheckpointNotFound:
            return None

    def list_committed(self, *, include_dead: bool = False) -> list[Commit]:
        """List the commits whose record is readable, newest first.

        Args:
            include_dead: also those that do not belong to the present history.
        """
        names = list_commit_names(self._backend)
        lineage = read_lineage(self._backend, names)
        commits = []
        for name in names:
            if not include_dead and not lineage.is_live(name):
                continue
            try:
                commits.append(read_commit(self._backend, name))
            except (CheckpointCorrupt, CheckpointNotFound) as error:
                logger.warning("Left out of the list: %s", error)
        return commits

    def verify(self, checkpoint: CheckpointRef) -> None:
        """Read every byte of a checkpoint from the store and compare it with the manifest; nothing is kept.

        Raises:
            CheckpointNotFound: it is not committed, or not any more.
            CheckpointCorrupt: names the first file that differs.
        """
        verify(self._backend, checkpoint)
        self._verified.add(checkpoint.digest)

    def collect_garbage(self, fence: int, *, keep: int | None, is_rehearsal: bool = False) -> GarbageReport:
        """Remove what newer verified checkpoints supersede, and what crashed saves left; see `garbage`.

        What this object verified before is not read again, only its sizes are looked at.

        Args:
            fence: of the lease of this process.
            keep: live checkpoints that must verify before any older one goes; final weights, pinned and
                handed-over ones stay besides. None: all stay, and only what crashed saves left goes.
            is_rehearsal: only tell what would be removed by the holder of this lease, which need not be taken.

        Raises:
            ArgumentError: fewer than two are to be kept.
            Fenced: a later lease exists.
        """
        if keep is not None and keep < MIN_KEPT:
            raise ArgumentError(f"keep: {keep} is too few, for the newest may rot. Keep at least {MIN_KEPT}.")
        return garbage.collect_garbage(
            self._backend,
            fence,
            keep=keep,
            verified=self._verified,
            in_progress=self._in_progress,
            is_rehearsal=is_rehearsal,
        )

    def pin(self, name: str, checkpoint: CheckpointRef) -> None:
        """Keep a checkpoint until it is unpinned; the same pin again does nothing.

        Raises:
            ArgumentError: the name cannot be one, or is taken by another checkpoint.
            CheckpointNotFound, CheckpointCorrupt: the checkpoint is not a committed one of this stage.
        """
        pins.pin(self._backend, name, checkpoint)

    def unpin(self, name: str) -> None:
        """Remove a pin.

        Raises:
            CheckpointNotFound: there is none of this name; lists those there are.
        """
        pins.unpin(self._backend, name)

    def list_pins(self) -> dict[str, CheckpointRef]:
        """List what people pinned, by name."""
        return pins.list_pins(self._backend)

    def hand_over(self, checkpoint: CheckpointRef, result: Mapping[str, Any], *, fence: int | None = None) -> None:
        """Declare the stage finished with a checkpoint; the same again does nothing.

        Args:
            fence: of the lease of this process; None: that of the checkpoint.

        Raises:
            CheckpointNotFound: the checkpoint is not committed, or not in this stage.
            Fenced: a later lease exists, or it was handed over with another result.
            CheckpointCorrupt: an earlier handover of it is damaged and in the way.
        """
        handover.hand_over(self._backend, checkpoint, result, fence=fence)

    def find_handover(self) -> tuple[CheckpointRef, dict[str, Any]] | None:
        """Find the newest handover whose checkpoint's record and MANIFEST verify; None if the stage is not finished."""
        found = handover.find_handover(self._backend)
        return (found.checkpoint, found.result) if found else None
