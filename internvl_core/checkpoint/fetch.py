"""A checkpoint's files as a local directory, verified.

What is handed out has just been compared with the manifest, byte for byte; a copy in the cache
is compared again each time, for it may have rotted or been edited since.
"""

import errno
import hashlib
import logging
import shutil
import tempfile
from pathlib import Path

from internvl_core.checkpoint.backend import Backend
from internvl_core.checkpoint.commits import DATA_FOLDER, open_checkpoint, read_manifest
from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.local_backend import LocalBackend
from internvl_core.checkpoint.manifest import Manifest, check_entries, check_files, check_size, read_twice
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointCorrupt, CheckpointNotFound

logger = logging.getLogger(__name__)


def fetch(checkpoint: CheckpointRef, cache_dir: Path) -> Path:
    """Bring a committed checkpoint to this machine and verify it.

    Nothing is copied from a store that is a local directory. The result is for reading only.

    Args:
        checkpoint: what to fetch.
        cache_dir: where downloads are kept, in a folder named after the digest.

    Returns:
        The directory with the files.

    Raises:
        CheckpointNotFound: it was never committed.
        CheckpointCorrupt: the store's bytes are not those of the manifest.
    """
    manifest = read_manifest(checkpoint)
    backend, save = open_checkpoint(checkpoint.uri)
    folder = f"{DATA_FOLDER}/{save}"
    if isinstance(backend, LocalBackend):
        path = backend.get_path(folder)
        _check(path, manifest)
        return path
    target = cache_dir / checkpoint.digest[:16]
    if _is_cached(target, manifest):
        return target
    with translated(f"Preparing {cache_dir}"):
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".fetching-", dir=cache_dir))
    try:
        _download(backend, folder, manifest, temporary)
        _move_into_place(temporary, target, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def copy_checkpoint(checkpoint: CheckpointRef, target: Path) -> None:
    """Copy a committed checkpoint into a folder of one's own, verified; the folder appears whole or not at all.

    Args:
        target: does not exist, or is empty.

    Raises:
        ArgumentError: the target is a file, or holds something.
        CheckpointNotFound, CheckpointCorrupt: as for `fetch`.
    """
    if target.is_dir() and any(target.iterdir()):
        raise ArgumentError(f"{target}: is not empty. Give a new folder, or empty it first.")
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"{target}: is a file. Give a new folder.")
    manifest = read_manifest(checkpoint)
    backend, save = open_checkpoint(checkpoint.uri)
    with translated(f"Preparing {target.parent}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".fetching-", dir=target.parent))
    try:
        _download(backend, f"{DATA_FOLDER}/{save}", manifest, temporary)
        with translated(f"Moving the copy to {target}"):
            # mkdtemp's 0700 would keep others out.
            temporary.chmod(0o755)
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def adopt(directory: Path, checkpoint: CheckpointRef, cache_dir: Path) -> Path | None:
    """Make the local directory that a checkpoint was published from its cached copy, so that it is never downloaded.

    Where the store is a local directory nothing is cached, and the directory is removed.

    Args:
        directory: unchanged since it was published.

    Returns:
        The cached copy; None where there is none.

    Raises:
        OSError: it can neither be moved nor removed.
    """
    backend, _ = open_checkpoint(checkpoint.uri)
    target = cache_dir / checkpoint.digest[:16]
    if isinstance(backend, LocalBackend) or target.exists():
        shutil.rmtree(directory)
        return None
    cache_dir.mkdir(parents=True, exist_ok=True)
    try:
        directory.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # A cache on another disk is filled by whoever needs it.
        shutil.rmtree(directory)
        return None
    return target


def read_file(checkpoint: CheckpointRef, path: str) -> bytes:
    """Read one small file of a committed checkpoint, verified against its manifest.

    Raises:
        CheckpointNotFound: the checkpoint is not committed, or has no such file.
        CheckpointCorrupt: the file is not the one that was published.
    """
    where = f"{checkpoint.uri}/{path}"
    entry = next((entry for entry in read_manifest(checkpoint).files if entry.path == path), None)
    if entry is None:
        raise CheckpointNotFound(f"{where}: the checkpoint has no such file.")
    backend, save = open_checkpoint(checkpoint.uri)
    try:
        content = backend.read(f"{DATA_FOLDER}/{save}/{path}")
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{where}: missing, though the manifest names it.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise CheckpointCorrupt(f"{where}: sha256 is {found}, the manifest says {entry.sha256}.")
    return content


def _is_cached(target: Path, manifest: Manifest) -> bool:
    """Verify what an earlier fetch left; remove it if it is damaged."""
    if not target.is_dir():
        return False
    try:
        _check(target, manifest)
    except CheckpointCorrupt as error:
        logger.warning("Fetching again, the cached copy is damaged: %s", error)
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


def _download(backend: Backend, folder: str, manifest: Manifest, directory: Path) -> None:
    uri = f"{backend.uri}/{folder}"
    sizes_bytes = backend.get_sizes_bytes(folder)
    for entry in manifest.files:
        # Before the transfer: one truncated shard must not cost the download of all the others.
        check_size(sizes_bytes.get(entry.path), entry, where=uri)
    try:
        found = read_twice(lambda paths: backend.download(folder, paths, directory), manifest.files, where=uri)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{uri}: a file vanished while it was downloaded: {error}.") from error
    check_entries(found, manifest.files, where=uri)


def _move_into_place(temporary: Path, target: Path, manifest: Manifest) -> None:
    with translated(f"Moving the download to {target}"):
        try:
            temporary.rename(target)
        except OSError:
            # Another process of this machine was faster: its copy is as good, if it verifies.
            if not target.is_dir():
                raise
            _check(target, manifest)


def _check(directory: Path, manifest: Manifest) -> None:
    with translated(f"Reading {directory}"):
        check_files(directory, manifest.files)
