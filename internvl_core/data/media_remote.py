"""The media of a data set in an object store, through fsspec.

Only the answer that there is no such object is about the object; a refusal of access is about the
store, because the same is said of all objects when credentials expire.
"""

import errno
import io
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.remote_backend import open_filesystem
from internvl_core.data.media_root import BLOCK_BYTES, MAX_FILE_BYTES, MediaRoot, asking, check_name
from internvl_core.errors import MediaError, Reason, StoreUnavailable

_REFUSALS = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class RemoteRoot(MediaRoot):
    """The objects below a prefix."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def _filesystem(self) -> Any:
        # Its event loop and its sockets do not survive a fork: each process opens its own.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), open_filesystem(self.uri))
        return self._opened[1]

    def exists(self) -> bool:
        with translated(f"Looking up {self.uri}"):
            return bool(self._filesystem.exists(self._filesystem._strip_protocol(self.uri)))

    def read(self, name: str, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        path = self._find_path(name)
        with self._asking(f"{self.uri}/{name}"):
            try:
                # A byte more than allowed, in one request: neither a look at the size first, nor all of a huge object.
                body = bytes(self._filesystem.cat_file(path, start=0, end=max_bytes + 1))
            except (*_REFUSALS, PermissionError):
                raise
            except OSError:
                info = self._filesystem.info(path)
                if info["type"] != "file" or info["size"] != 0:
                    raise
                body = b""  # S3 has no first byte of an empty object to give.
        if len(body) > max_bytes:
            raise self._refuse_size(name, max_bytes)
        return body

    def open(self, name: str, *, block_bytes: int = BLOCK_BYTES) -> BinaryIO:
        if self.uri.startswith("memory://"):
            return io.BytesIO(self.read(name))  # fsspec would hand out the one file that all readers share.
        path, where = self._find_path(name), f"{self.uri}/{name}"
        with self._asking(where):
            file = self._filesystem.open(path, "rb", block_size=block_bytes, cache_type="readahead")
            if file.details["type"] != "file":
                raise IsADirectoryError(errno.EISDIR, "a folder")
        return io.BufferedReader(_RemoteFile(where, file))

    def list_files(self, name: str) -> list[str]:
        path, where = self._find_path(name), f"{self.uri}/{name}"
        with self._asking(where):
            found = self._filesystem.ls(path, detail=True)
        # A store may hold an empty object that stands for the folder, and lists a file as the only one in itself.
        paths = [info["name"].rstrip("/") for info in found if info["type"] == "file"]
        names = [found_path.removeprefix(f"{path}/") for found_path in paths if found_path.startswith(f"{path}/")]
        if paths and not names:
            raise MediaError(f"{where}: not a folder.", reason=Reason.MISSING)
        return self._sort(name, names)

    @contextmanager
    def _asking(self, where: str) -> Iterator[None]:
        with asking(where, refusals=_REFUSALS):
            try:
                yield
            except PermissionError as error:
                # Expired credentials look the same: were it the file's fault, all of a data set would be lost to them.
                raise StoreUnavailable(
                    f"Reading {where}: {self.uri} refuses access: {error.strerror or error}. Check that the "
                    "credentials are valid, and may read and list: who may not list is told this of a missing file too."
                ) from error

    def _find_path(self, name: str) -> str:
        check_name(name)
        return str(self._filesystem._strip_protocol(f"{self.uri}/{posixpath.normpath(name)}"))


class _RemoteFile(io.RawIOBase):
    """A file of an fsspec filesystem whose errors are ours, so that an outage is not taken for a broken file."""

    def __init__(self, where: str, file: Any) -> None:
        self._where = where
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with asking(self._where, refusals=()):
            return int(self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        with asking(self._where, refusals=()):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()
