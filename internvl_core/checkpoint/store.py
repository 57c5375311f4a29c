"""Publish, find and hand over the checkpoints of a stage; the way in for everything outside this package.

A checkpoint exists when its commit record exists: `publish` writes the files, then MANIFEST, then
exclusively the record, and never touches any of them again. `commits.py` draws the layout. A crash
in between leaves a folder in `data/` that no record names and no reader sees.
"""

import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_core.checkpoint.backend import create_once, open_backend
from internvl_core.checkpoint.commits import (
    DATA_FOLDER,
    Commit,
    CommitName,
    iter_verified,
    list_commit_names,
    open_checkpoint,
    pack_commit,
    read_commit,
    read_manifest,
    resolve_checkpoint,
)
from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.fetch import fetch, read_file
from internvl_core.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointKind,
    FileEntry,
    Manifest,
    list_files,
)
from internvl_core.checkpoint.probe import check_store
from internvl_core.checkpoint.record import pack_record, unpack_record
from internvl_core.checkpoint.uri import is_checkpoint_uri, normalize_store_uri
from internvl_core.contract import CheckpointRef
from internvl_core.errors import (
    ArgumentError,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    Fenced,
    StoreUnavailable,
)

__all__ = [
    "Commit",
    "StageStore",
    "check_store",
    "fetch",
    "is_checkpoint_uri",
    "read_file",
    "read_manifest",
    "resolve_checkpoint",
]

logger = logging.getLogger(__name__)

HANDOVER_FOLDER = "handover"

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HANDOVER_NAME = re.compile(r"\d{12}\.\d{6}\.json")


class StageStore:
    """The checkpoints of one stage with one fingerprint."""

    def __init__(self, store_uri: str, stage: str, fingerprint: str) -> None:
        for name in (stage, fingerprint):
            if not _PLAIN_NAME.fullmatch(name):
                raise ArgumentError(f"{name!r} cannot name a folder of a store. Use letters, digits, '.', '_', '-'.")
        self._backend = open_backend(f"{normalize_store_uri(store_uri)}/{stage}-{fingerprint[:16]}")
        self._stage = stage
        self._fingerprint = fingerprint

    @property
    def uri(self) -> str:
        return self._backend.uri

    def next_fence(self) -> int:
        """Number a new attempt: one more than any that has committed."""
        return 1 + max((name.fence for name in list_commit_names(self._backend)), default=0)

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
            Fenced: this step is committed already with this fence, by somebody else.
            StoreUnavailable, DiskFull: nothing is committed.
        """
        with translated(f"Reading {directory}"):
            paths = list_files(directory)
        if not paths:
            raise CheckpointError(f"{directory} contains no file, so there is nothing to publish.")
        # A folder of its own for each try: whatever a crashed or rival one left is never mixed in.
        save = f"{step:012d}.{fence:06d}.{secrets.token_hex(4)}"
        folder = f"{DATA_FOLDER}/{save}"
        files = self._upload(directory, paths, folder)
        manifest = Manifest(self._stage, self._fingerprint, step, fence, kind, parent, info, files)
        create_once(self._backend, f"{folder}/{MANIFEST_FILE}", manifest.to_bytes())
        name = CommitName(step, fence, kind)
        if not create_once(self._backend, name.path, pack_commit(name, save, manifest.digest)):
            raise Fenced(
                f"{self.uri}/{name.path} exists: another process committed step {step} with fence {fence}. "
                "Two runs of one stage write to the same store; stop one of them."
            )
        return CheckpointRef(f"{self.uri}/{folder}", manifest.digest)

    def find_newest(self, kind: CheckpointKind | None = None) -> CheckpointRef | None:
        """Find the newest checkpoint whose record and MANIFEST verify; `fetch` verifies its data.

        Newest is by step, then fence; at the same of both the final weights. Those passed over are logged with why.
        """
        commit = next(iter_verified(self._backend, kind), None)
        return commit.checkpoint if commit else None

    def list_committed(self) -> list[Commit]:
        """List all commits whose record is readable, newest first."""
        commits = []
        for name in list_commit_names(self._backend):
            try:
                commits.append(read_commit(self._backend, name))
            except (CheckpointCorrupt, CheckpointNotFound) as error:
                logger.warning("Left out of the list: %s", error)
        return commits

    def hand_over(self, checkpoint: CheckpointRef, result: Mapping[str, Any]) -> None:
        """Declare the stage finished with a checkpoint; the same again does nothing.

        Raises:
            CheckpointNotFound: the checkpoint is not committed, or not in this stage.
            Fenced: it was handed over with another result.
            CheckpointCorrupt: an earlier handover of it is damaged and in the way.
        """
        manifest = read_manifest(checkpoint)
        backend, save = open_checkpoint(checkpoint.uri)
        if backend.uri != self.uri:
            raise CheckpointNotFound(f"{checkpoint.uri} is not a checkpoint of {self.uri}.")
        path = f"{HANDOVER_FOLDER}/{manifest.step:012d}.{manifest.fence:06d}.json"
        named = {"data": f"{DATA_FOLDER}/{save}", "digest": checkpoint.digest}
        if create_once(self._backend, path, pack_record({"checkpoint": named, "result": dict(result)})):
            return
        self._read_handover(path)
        raise Fenced(f"{self.uri}/{path} exists with another result: another process finished this stage.")

    def find_handover(self) -> tuple[CheckpointRef, dict[str, Any]] | None:
        """Find the newest handover whose checkpoint's record and MANIFEST verify; None if the stage is not finished."""
        names = [name for name in self._backend.list_names(HANDOVER_FOLDER) if _HANDOVER_NAME.fullmatch(name)]
        for name in sorted(names, reverse=True):
            try:
                checkpoint, result = self._read_handover(f"{HANDOVER_FOLDER}/{name}")
                read_manifest(checkpoint)
            except (CheckpointCorrupt, CheckpointNotFound, FileNotFoundError) as error:
                logger.warning("Passed over the handover %s: %s", name, error)
            else:
                return checkpoint, result
        return None

    def _upload(self, directory: Path, paths: Sequence[str], folder: str) -> tuple[FileEntry, ...]:
        """Upload files and ask the store what arrived: a completed multipart upload is no proof that all parts did."""
        files = tuple(self._backend.upload(directory, paths, folder))
        sizes_bytes = self._backend.get_sizes_bytes(folder)
        for entry in files:
            found = sizes_bytes.get(entry.path)
            if found != entry.size_bytes:
                raise StoreUnavailable(
                    f"{self.uri}/{folder}/{entry.path}: {found} bytes arrived, {entry.size_bytes} were sent."
                )
        return files

    def _read_handover(self, path: str) -> tuple[CheckpointRef, dict[str, Any]]:
        where = f"{self.uri}/{path}"
        try:
            content = unpack_record(self._backend.read(path), where=where)
            named, result = content["checkpoint"], dict(content["result"])
            return CheckpointRef(f"{self.uri}/{named['data']}", str(named["digest"])), result
        except CheckpointCorrupt as error:
            raise CheckpointCorrupt(f"{error} Remove it and run the stage again.") from error
        except (KeyError, TypeError) as error:
            raise CheckpointCorrupt(f"{where}: not a handover: {error}. Remove it and run the stage again.") from error
