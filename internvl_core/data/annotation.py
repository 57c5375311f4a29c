"""Annotation files: where they lie, what is in them by digest, and their lines by byte offset.

Text of an annotation is never held in memory (F15). A remote file is fetched once for each of its
versions; a local one is read where it lies. Every read sees the file as it was opened: one that
was changed meanwhile is refused, because offsets into another content are lies.
"""

import hashlib
import json
import os
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from internvl_core.checkpoint.faults import translated
from internvl_core.checkpoint.manifest import hash_file
from internvl_core.checkpoint.remote_backend import open_filesystem
from internvl_core.checkpoint.uri import FILE_PREFIX, normalize_uri
from internvl_core.contract import write_json_atomically
from internvl_core.errors import DataError


@dataclass(frozen=True)
class FileVersion:
    """What the system says of a file's content without reading it; an edit changes the change time at least."""

    size_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class AnnotationFile:
    """Lines of a local annotation file, by byte offset; opened when first read, in every process anew."""

    def __init__(self, path: Path, *, shown_as: str, digest: str, version: FileVersion) -> None:
        """Describe a file.

        Args:
            shown_as: what messages call it, a remote file by its URI.
            digest: of the content that offsets belong to.
            version: of the file when it had that content.
        """
        self.path = path
        self.shown_as = shown_as
        self._digest = digest
        self._version = version
        self._descriptor: int | None = None

    def read_line(self, offset: int, size_bytes: int) -> bytes:
        """Read part of the file.

        Raises:
            AnnotationChanged: the file is not the one that was indexed.
            StoreUnavailable: the disk fails.
        """
        descriptor = self._open()
        with translated(f"Reading {self.shown_as}"):
            # pread has no file position, so workers forked with this descriptor cannot disturb each other.
            return os.pread(descriptor, size_bytes, offset)

    def check_unchanged(self) -> None:
        """Check that the file is the one that was described.

        Raises:
            AnnotationChanged: it is not.
        """
        self._open()

    def _open(self) -> int:
        if self._descriptor is None:
            with translated(f"Opening {self.shown_as}", answers=(FileNotFoundError,)):
                try:
                    self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    raise AnnotationChanged(f"{self.shown_as}: is gone since it was indexed.") from None
        self._check_version(self._descriptor)
        return self._descriptor

    def _check_version(self, descriptor: int) -> None:
        # A file that was replaced lives on behind the descriptor; one that is written to shows it here.
        version = FileVersion.of(os.fstat(descriptor))
        if version == self._version:
            return
        # A link, a chmod or a touch changes no content.
        if version.size_bytes != self._version.size_bytes or hash_file(Path(f"/dev/fd/{descriptor}")) != self._digest:
            raise AnnotationChanged(
                f"{self.shown_as}: was edited after it was indexed. Start again: it is indexed anew by itself."
            )
        self._version = version

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


class AnnotationChanged(DataError):
    """An annotation file is gone or no longer what it was; no single record is to blame."""


def exists(annotation: str) -> bool:
    """Tell whether an annotation, a local path or a URI, is a file.

    Raises:
        ArgumentError: the URI is not one that data may have.
        StoreUnavailable: its store does not answer.
    """
    local = _find_local(annotation)
    if local is not None:
        # Pathlib's own raises where a name is too long.
        return os.path.isfile(local)  # noqa: PTH113
    uri = normalize_uri(annotation)
    with translated(f"Looking for {uri}"):
        return bool(open_filesystem(uri).isfile(uri))


def fetch_annotation(annotation: str, cache_dir: Path) -> Path:
    """Give the local path of an annotation; a remote file is copied into the cache, once for each version.

    Raises:
        DataError: there is no such file.
        StoreUnavailable: its store does not answer.
    """
    local = _find_local(annotation)
    if local is not None:
        return local
    uri = normalize_uri(annotation)
    filesystem = open_filesystem(uri)
    with translated(f"Reading {uri}", answers=(FileNotFoundError,)):
        try:
            version = filesystem.ukey(uri)
        except FileNotFoundError:
            raise DataError(f"{uri}: no such file.") from None
    key = hashlib.sha256(f"{uri}\0{version}".encode()).hexdigest()[:32]
    path = cache_dir / "annotations" / f"{key}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{key}.{uuid.uuid4().hex}")
        with translated(f"Fetching {uri}"):
            filesystem.get_file(uri, str(partial))
        partial.replace(path)
    return path


def _find_local(annotation: str) -> Path | None:
    if "://" not in annotation and "::" not in annotation:
        return Path(annotation)
    uri = normalize_uri(annotation)
    return Path(uri.removeprefix(FILE_PREFIX)) if uri.startswith(FILE_PREFIX) else None


def digest_annotation(path: Path, cache_dir: Path) -> tuple[str, FileVersion]:
    """Sha256 (hex) of a local file and the version it belongs to, remembered in the cache until the file changes.

    Raises:
        DataError: the file cannot be read, or is being written to.
    """
    version = FileVersion.of(_stat(path))
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    memory = cache_dir / "digests" / f"{key}.json"
    # Whatever is wrong with what was remembered, the file itself says it again.
    with suppress(OSError, ValueError, KeyError, TypeError):
        remembered = json.loads(memory.read_text())
        if remembered["version"] == asdict(version):
            return str(remembered["sha256"]), version
    digest = hash_file(path)
    if FileVersion.of(_stat(path)) != version:
        raise DataError(f"{path}: is being written to. Run again when it is whole.")
    memory.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(memory, {"path": str(path), "version": asdict(version), "sha256": digest})
    return digest, version


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
