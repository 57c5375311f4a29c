"""How a checkpoint comes into being: the files, then the MANIFEST, then the commit record, each exactly once.

A crash in between leaves a folder in `data/` that no record names and no reader sees.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from internvl_core.checkpoint.backend import Backend, create_once
from internvl_core.checkpoint.commits import (
    DATA_FOLDER,
    CommitName,
    Origin,
    pack_commit,
    read_commit,
    read_manifest_file,
)
from internvl_core.checkpoint.lease import check_fence, find_lease
from internvl_core.checkpoint.manifest import MANIFEST_FILE, FileEntry, Manifest
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, Fenced, StoreUnavailable


def publish(backend: Backend, save: str, directory: Path, paths: Sequence[str], manifest: Manifest) -> CheckpointRef:
    """Store files and commit them.

    Args:
        backend: opened at the stage's directory.
        save: name of the new folder in `data/`.
        directory: where the files are.
        paths: of the files, relative to it.
        manifest: but for its files.

    Raises:
        Fenced: a later lease exists, or somebody else committed this step with this fence.
        StoreUnavailable, DiskFull: nothing is committed.
    """
    folder = f"{DATA_FOLDER}/{save}"
    manifest = replace(manifest, files=_upload(backend, directory, paths, folder))
    if not create_once(backend, f"{folder}/{MANIFEST_FILE}", manifest.to_bytes()):
        raise StoreUnavailable(f"{backend.uri}/{folder}/{MANIFEST_FILE}: other bytes arrived than were sent.")
    # A courtesy: the record would not be live. But who is fenced should learn it here, not from a reader.
    check_fence(backend, manifest.fence)
    name = CommitName(manifest.step, manifest.fence, manifest.kind)
    origin = _find_origin(backend, manifest.fence)
    if create_once(backend, name.path, pack_commit(name, save, manifest.digest, origin)):
        return CheckpointRef(f"{backend.uri}/{folder}", manifest.digest)
    # With a lease the name is nobody else's: so it is the same save, tried before, whose answers were all lost.
    existing = read_commit(backend, name).checkpoint
    if origin is None or read_manifest_file(backend, existing).files != manifest.files:
        raise Fenced(
            f"{backend.uri}/{name.path} exists: another process committed step {name.step} with fence {name.fence}. "
            "Two runs of one stage write to the same store; stop one of them."
        )
    return existing


def _upload(backend: Backend, directory: Path, paths: Sequence[str], folder: str) -> tuple[FileEntry, ...]:
    """Upload files and ask the store what arrived: a completed multipart upload is no proof that all parts did."""
    files = tuple(backend.upload(directory, paths, folder))
    sizes_bytes = backend.get_sizes_bytes(folder)
    for entry in files:
        found = sizes_bytes.get(entry.path)
        if found != entry.size_bytes:
            raise StoreUnavailable(
                f"{backend.uri}/{folder}/{entry.path}: {found} bytes arrived, {entry.size_bytes} were sent."
            )
    return files


def _find_origin(backend: Backend, fence: int) -> Origin | None:
    try:
        record = find_lease(backend, fence)
    except CheckpointCorrupt:
        return None
    return record.origin if record else None
