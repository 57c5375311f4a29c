"""Verification of a checkpoint where it lies: every byte is read from the store, nothing is kept."""

from internvl_core.checkpoint.backend import Backend
from internvl_core.checkpoint.commits import DATA_FOLDER, find_commit, get_save, read_manifest_in
from internvl_core.checkpoint.manifest import MANIFEST_FILE, Manifest, check_entries, check_size, read_twice
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, CheckpointNotFound


def verify(backend: Backend, checkpoint: CheckpointRef) -> None:
    """Compare every file of a committed checkpoint with its manifest, by reading it from the store.

    Args:
        backend: opened at the stage's directory.
        checkpoint: of this stage.

    Raises:
        CheckpointNotFound: it is not committed, or not any more.
        CheckpointCorrupt: names the first file that differs.
    """
    manifest = verify_sizes(backend, checkpoint)
    folder = f"{DATA_FOLDER}/{get_save(backend, checkpoint)}"
    try:
        found = read_twice(lambda paths: backend.describe(folder, paths), manifest.files, where=checkpoint.uri)
    except FileNotFoundError as error:
        raise _missing(backend, checkpoint, str(error)) from error
    check_entries(found, manifest.files, where=checkpoint.uri)


def verify_sizes(backend: Backend, checkpoint: CheckpointRef) -> Manifest:
    """Compare record, MANIFEST, names and sizes of a checkpoint; raises as `verify`."""
    manifest = read_manifest_in(backend, checkpoint)
    sizes_bytes = backend.get_sizes_bytes(f"{DATA_FOLDER}/{get_save(backend, checkpoint)}")
    for entry in manifest.files:
        if entry.path not in sizes_bytes:
            raise _missing(backend, checkpoint, entry.path)
        check_size(sizes_bytes[entry.path], entry, where=checkpoint.uri)
    unknown = sizes_bytes.keys() - {entry.path for entry in manifest.files} - {MANIFEST_FILE}
    if unknown:
        raise CheckpointCorrupt(f"{checkpoint.uri}/{min(unknown)}: not named by the manifest of its checkpoint.")
    return manifest


def _missing(backend: Backend, checkpoint: CheckpointRef, path: str) -> CheckpointNotFound | CheckpointCorrupt:
    """Tell a file that is lost from a checkpoint that was collected as garbage meanwhile: its record went first."""
    if find_commit(backend, get_save(backend, checkpoint)) is None:
        return CheckpointNotFound(f"{checkpoint.uri} was collected as garbage while it was being read.")
    return CheckpointCorrupt(f"{checkpoint.uri}/{path}: missing, though the manifest names it.")
