"""Where a data set's media lie, and the only way to them: a local folder or an object store.

A record names its media relative to the root, and nothing outside the root is ever opened: not by
`..`, not by an absolute path, not by a link. Names are taken literally; nothing in them is decoded.
A file that is missing or not to be had is the record's fault (`MediaError`, quarantined); a disk that
fails and a store that does not answer or lets nobody in are not (`StoreUnavailable`, retried).

A root is cheap to make, picklable, and may be used in forked workers and by several threads.
"""

import errno
import os
import posixpath
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.uri import FILE_PREFIX, is_checkpoint_uri, normalize_uri
from internvl_core.errors import ArgumentError, DataError, MediaError, Reason

MAX_FILE_BYTES = 256 << 20
"""Largest medium that is read whole; a photo of 90 megapixels without compression has 256 MiB."""
MAX_FOLDER_FILES = 100_000
"""Most frames in a folder: an hour at 25 frames a second."""

BLOCK_BYTES = 1 << 20
"""How much of a remote file is read ahead."""

NO_LETTER = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, the two that break lines, and halves of surrogate pairs: in no path that people can read."""

# On these a key is only a name. sftp has links, which cannot be resolved and checked from here; http has redirects.
_REMOTE_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")

_MAX_NAME_BYTES = 4096
_MAX_PART_BYTES = 255
_DIGITS = re.compile(r"([0-9]+)")

# The answers of a disk that say something about this one file; any other error is about the disk.
_REFUSALS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_REFUSAL_NUMBERS = (errno.ELOOP, errno.ENAMETOOLONG)


def open_root(root: str) -> "MediaRoot":
    """Give access to a local folder, or to an object store by its URI; nothing is read yet.

    Raises:
        ArgumentError: a URI with credentials, a query or a chain of protocols, or of a protocol other than
            file, s3, gs, az, abfs, memory.
    """
    if not is_checkpoint_uri(root):
        return _LocalRoot(os.path.abspath(root))  # noqa: PTH100 (a Path would fold a leading double slash)
    uri = normalize_uri(root)
    if uri.startswith(FILE_PREFIX):
        return _LocalRoot(uri.removeprefix(FILE_PREFIX))
    protocol = uri.partition("://")[0]
    if protocol not in _REMOTE_PROTOCOLS:
        raise ArgumentError(
            f"root {uri}: media are read from local folders and from {', '.join(_REMOTE_PROTOCOLS)}; what a name leads "
            f"to on {protocol}:// cannot be checked. Copy or mount the files."
        )
    # Here, because a remote root is a MediaRoot itself.
    from internvl_core.data.media_remote import RemoteRoot

    return RemoteRoot(uri)


def check_name(name: str) -> None:
    """Check that a name can only mean a file below a root; looks at the text alone.

    Raises:
        DataError: with Reason.PATH.
    """
    problem = _find_problem(name)
    if problem:
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        raise DataError(f"path {shown!r} {problem}", reason=Reason.PATH)


def _find_problem(name: str) -> str | None:
    if "://" in name or "::" in name:
        return "is an address. Name the file relative to the data set's root."
    if name.startswith("/"):
        return "is absolute. Name the file relative to the data set's root."
    if NO_LETTER.search(name):
        return "holds a control character or half a surrogate pair. Rename the file, or repair the record's escapes."
    if "\\" in name:
        return "holds a backslash. Folders are divided by '/'."
    parts = name.split("/")
    if ".." in parts:
        return "leads upward. Name the file relative to the data set's root, without '..'."
    if all(part in {"", "."} for part in parts):
        return "names no file."
    longest = max(len(part.encode()) for part in parts)
    if longest > _MAX_PART_BYTES or len(name.encode()) > _MAX_NAME_BYTES:
        return f"is longer than a file's name can be: {_MAX_PART_BYTES} bytes a part, {_MAX_NAME_BYTES} in all."
    return None


class MediaRoot(ABC):
    """The files below one root."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        """A local path, or a URI in its normal form."""

    @abstractmethod
    def exists(self) -> bool:
        """Tell whether the root is there, or, in an object store, has anything below it."""

    @abstractmethod
    def read(self, name: str, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Read a file whole.

        Raises:
            MediaError: missing, no regular file, outside the root, or longer than `max_bytes`.
            StoreUnavailable: the disk or the store fails.
        """

    @abstractmethod
    def open(self, name: str, *, block_bytes: int = BLOCK_BYTES) -> BinaryIO:
        """Open a file for reading and seeking; the caller closes it.

        Args:
            block_bytes: how much a remote file is read ahead; for a header less will do.

        Raises:
            MediaError: missing, no regular file, or outside the root.
            StoreUnavailable: the disk or the store fails.
        """

    @abstractmethod
    def list_files(self, name: str) -> list[str]:
        """List the files directly in a folder, hidden ones left out, in natural order: frame_2 before frame_10.

        Returns:
            Names relative to the root, each fit for `open`.

        Raises:
            MediaError: no such folder, or too many files in it.
            StoreUnavailable: the disk or the store fails.
        """

    def _sort(self, folder: str, names: list[str]) -> list[str]:
        visible = [name for name in names if not name.startswith(".")]
        if len(visible) > MAX_FOLDER_FILES:
            raise MediaError(
                f"{self.uri}/{folder}: {len(visible)} files; at most {MAX_FOLDER_FILES} are read as one video.",
                reason=Reason.MEDIA_SIZE,
            )
        folder = posixpath.normpath(folder)
        return [f"{folder}/{name}" for name in sorted(visible, key=_natural_key)]

    def _refuse_size(self, name: str, max_bytes: int) -> MediaError:
        return MediaError(f"{self.uri}/{name}: more than {max_bytes >> 20} MiB in one file.", reason=Reason.MEDIA_SIZE)


class _LocalRoot(MediaRoot):
    def exists(self) -> bool:
        return os.path.isdir(self.uri)  # noqa: PTH112

    def read(self, name: str, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        with self.open(name) as file, asking(f"{self.uri}/{name}"):
            if os.fstat(file.fileno()).st_size > max_bytes:
                raise self._refuse_size(name, max_bytes)
            return file.read()

    def open(self, name: str, *, block_bytes: int = BLOCK_BYTES) -> BinaryIO:
        where = f"{self.uri}/{name}"
        path = self._resolve(name)
        with asking(where), ExitStack() as stack:
            # Looked at before it is opened: to open a device can already do something.
            _check_regular(where, os.stat(path, follow_symlinks=False))
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            _check_regular(where, os.fstat(descriptor))
            file = os.fdopen(descriptor, "rb")
            stack.pop_all()
            return file

    def list_files(self, name: str) -> list[str]:
        path = self._resolve(name)
        with asking(f"{self.uri}/{name}"), os.scandir(path) as entries:
            names = [entry.name for entry in entries if not entry.is_dir()]
        return self._sort(name, names)

    def _resolve(self, name: str) -> str:
        check_name(name)
        where = f"{self.uri}/{name}"
        with asking(where):
            root = os.path.realpath(self.uri, strict=True)
            path = os.path.realpath(f"{root}/{name}", strict=True)
        if not path.startswith(f"{root.rstrip('/')}/") and path != root:
            raise MediaError(f"{where}: a link leads to {path}, outside the root.", reason=Reason.PATH)
        return path


@contextmanager
def asking(where: str, *, refusals: tuple[type[OSError], ...] = _REFUSALS) -> Iterator[None]:
    """Tell apart what is wrong with one file from what is wrong with the disk or the store.

    Args:
        where: what a message calls the file.
        refusals: the errors that say something about this file alone.

    Raises:
        MediaError: the file is not to be had, or is called what cannot be asked for.
        StoreUnavailable: the disk or the store fails.
    """
    with translated(f"Reading {where}"):
        try:
            yield
        except OSError as error:
            if not isinstance(error, refusals) and error.errno not in _REFUSAL_NUMBERS:
                raise
            cause = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or type(error).__name__
            raise MediaError(f"{where}: {cause}.", reason=Reason.MISSING) from None
        except ValueError as error:  # Of this name or this file; a store that is no store fails in `exists`.
            raise MediaError(f"{where}: cannot be read: {' '.join(str(error).split())}.") from None


def _check_regular(where: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{where}: not a regular file.")


def _natural_key(name: str) -> tuple[list[str | int], str]:
    # Every second part is digits.
    return [int(part) if number % 2 else part for number, part in enumerate(_DIGITS.split(name))], name
