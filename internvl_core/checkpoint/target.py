"""A folder to be filled, here or in a store, one finished file after the other.

Invariant: nobody's files are touched. A target that has any is refused, so what is found in it later was written here.
"""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_core.checkpoint.backend import Backend, open_backend
from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.local_backend import LocalBackend
from internvl_core.checkpoint.uri import FILE_PREFIX, normalize_uri
from internvl_core.errors import ArgumentError, StoreUnavailable


class TargetFolder:
    """Where files are written, and from where they go to the target."""

    def __init__(self, uri: str, folder: Path, backend: Backend | None) -> None:
        self.uri = uri
        self.folder = folder
        """Write here, under the name that the file is to have."""
        self.sizes_bytes: dict[str, int] = {}
        """Of the files stored so far."""
        self._backend = backend

    def store(self, path: Path) -> None:
        """Take a finished file of `folder`; in a remote target's case its local copy is gone afterwards.

        Raises:
            StoreUnavailable, DiskFull: it could not be stored.
        """
        size_bytes = path.stat().st_size
        if self._backend is not None:
            name = self.uri.rpartition("/")[2]
            self._backend.upload(self.folder, [path.name], name)
            found = self._backend.get_sizes_bytes(name).get(path.name)
            # A completed multipart upload is no proof that all parts arrived.
            if found != size_bytes:
                raise StoreUnavailable(f"{self.uri}/{path.name}: {found} bytes arrived, {size_bytes} were sent.")
            path.unlink()
        self.sizes_bytes[path.name] = size_bytes


@contextmanager
def open_target(uri: str, *, scratch_dir: Path) -> Iterator[TargetFolder]:
    """Open an empty target; a local folder is made if it is missing.

    Args:
        uri: local path or any fsspec URI.
        scratch_dir: where the files for a remote target lie until they are stored.

    Raises:
        ArgumentError: it is not empty, is a file, or cannot be a folder.
    """
    uri = check_target(uri)
    if uri.startswith(FILE_PREFIX):
        folder = Path(uri.removeprefix(FILE_PREFIX))
        with translated(f"Making {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        yield TargetFolder(uri, folder, None)
        return
    with translated(f"Preparing {scratch_dir}"):
        scratch_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=scratch_dir))
    try:
        # One level up, where the backend can name the folder.
        yield TargetFolder(uri, folder, open_backend(uri.rpartition("/")[0]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_target(uri: str) -> str:
    """Refuse a target that has files, before anything is computed for it.

    Returns:
        Its normal form.
    """
    uri = normalize_uri(uri if "://" in uri else str(Path(uri).absolute()))
    backend = open_backend(uri)
    if isinstance(backend, LocalBackend):
        path = Path(uri.removeprefix(FILE_PREFIX))
        if path.exists() and not path.is_dir():
            raise ArgumentError(f"{path}: is a file. Give a new folder.")
        is_empty = not (path.is_dir() and any(path.iterdir()))
    else:
        if "/" not in uri.partition("://")[2]:
            raise ArgumentError(f"{uri}: is a whole bucket. Give a new folder in it.")
        is_empty = not backend.list_names("")
        if is_empty:
            # A bucket that is not there, or closed, looks just as empty.
            probe = f".probe-{secrets.token_hex(4)}"
            backend.create(probe, b"")
            backend.remove(probe)
    if not is_empty:
        raise ArgumentError(f"{uri.removeprefix(FILE_PREFIX)}: is not empty. Give a new folder, or empty it first.")
    return uri
