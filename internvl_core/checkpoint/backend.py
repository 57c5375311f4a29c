"""The few operations that the commit protocol needs of a store.

Names are relative to the root that a backend was opened at. `create` is exclusive: of any
number of racing writers exactly one succeeds. fsspec does not promise that for every protocol
(on local files its check and its write are two steps), hence a class of our own for files.

Every error of an operating system or SDK leaves as StoreUnavailable or DiskFull with its cause
on one line, except the two that are answers: FileExistsError of `create`, FileNotFoundError of what reads.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from internvl_core.checkpoint.faults import SyncFailed
from internvl_core.checkpoint.local_backend import LocalBackend
from internvl_core.checkpoint.manifest import FileEntry
from internvl_core.checkpoint.remote_backend import RemoteBackend
from internvl_core.checkpoint.uri import FILE_PREFIX, S3_PREFIXES, SFTP_PREFIX, normalize_uri
from internvl_core.errors import StoreUnavailable

logger = logging.getLogger(__name__)

CREATE_ATTEMPTS = 3


class Backend(Protocol):
    """One store, seen from one root."""

    uri: str

    def create(self, name: str, body: bytes) -> None:
        """Create a small object durably.

        Raises:
            FileExistsError: the name is taken.
        """

    def put(self, name: str, body: bytes) -> None:
        """Write a small object, whole or not at all, over whatever has the name: for what nobody's commit rests on."""

    def read(self, name: str) -> bytes:
        """Read an object whole; FileNotFoundError where there is none."""

    def list_names(self, folder: str) -> list[str]:
        """List the names directly in a folder; none for a folder that does not exist."""

    def get_sizes_bytes(self, folder: str) -> dict[str, int]:
        """Ask for the size of every file below a folder, by path relative to it."""

    def upload(self, directory: Path, paths: Sequence[str], folder: str) -> list[FileEntry]:
        """Store files of a local directory, durably, in a folder that did not exist before.

        Returns:
            What was sent of each: the digest is of the very bytes that went out, or of the file that was linked.
        """

    def download(self, folder: str, paths: Sequence[str], directory: Path) -> list[FileEntry]:
        """Copy files of a folder ("" for the backend's own) into a local directory, which is the caller's alone.

        Returns:
            What arrived of each; the caller compares.

        Raises:
            FileNotFoundError: one is missing.
        """

    def describe(self, folder: str, paths: Sequence[str]) -> list[FileEntry]:
        """Read files of a folder through, keeping nothing, and say what is there; raises as `download`."""

    def remove(self, name: str) -> None:
        """Remove an object; one that is gone already is no error."""

    def remove_all(self, folder: str) -> None:
        """Remove everything below a folder, in no order; a folder that is gone already is no error."""


def open_backend(uri: str) -> Backend:
    """Open a store at a root; nothing is read or written yet.

    Raises:
        ArgumentError: the URI is not one that can be a store.
    """
    uri = normalize_uri(uri)
    if uri.startswith(FILE_PREFIX):
        return LocalBackend(uri)
    # The others late: their packages are extras.
    if uri.startswith(S3_PREFIXES):
        from internvl_core.checkpoint.s3_backend import S3Backend

        return S3Backend(uri)
    if uri.startswith(SFTP_PREFIX):
        from internvl_core.checkpoint.sftp_backend import SftpBackend

        return SftpBackend(uri)
    return RemoteBackend(uri)


def create_once(backend: Backend, name: str, body: bytes) -> bool:
    """Create an object exactly once, even if the answer to a creation that worked is lost.

    Returns:
        Whether the object now holds `body`; False if another writer was first.
    """
    for _ in range(CREATE_ATTEMPTS - 1):
        try:
            return _create(backend, name, body)
        except StoreUnavailable as error:
            if isinstance(error.__cause__, SyncFailed):
                # The name may be there, and read back as ours, and yet not be on the disk.
                raise
            logger.warning("%s Trying again.", error)
    return _create(backend, name, body)


def _create(backend: Backend, name: str, body: bytes) -> bool:
    try:
        backend.create(name, body)
    except FileExistsError:
        # Perhaps by our own earlier attempt, whose answer never came: the bytes tell.
        return find_object(backend, name) == body
    return True


def find_object(backend: Backend, name: str) -> bytes | None:
    """Read an object whole; None where there is none."""
    try:
        return backend.read(name)
    except FileNotFoundError:
        return None
