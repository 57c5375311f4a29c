"""What a checkpoint consists of: each file with its size and sha256, and where it came from.

The manifest is written after every file it names and never changes. Nobody loads a byte of a
checkpoint before `check_files` has compared the whole directory with it.
"""

import enum
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from internvl_core.checkpoint.record import pack_record, unpack_record
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, CheckpointError

logger = logging.getLogger(__name__)

VERSION = 1
MANIFEST_FILE = "MANIFEST"

_SHA256 = re.compile(r"[0-9a-f]{64}")

BLOCK_BYTES = 4 << 20
# sha256 releases the GIL; one core hashes 1.0-1.6 GB/s, about what one fast disk delivers per thread.
HASH_WORKERS = min(8, os.cpu_count() or 1)


class CheckpointKind(enum.StrEnum):
    """What a checkpoint is good for."""

    TRAINING = "training"
    """All the state to resume this stage."""
    FINAL = "final"
    """The finished weights of the stage."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint; its path is relative to the checkpoint's directory, with slashes."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint and its lineage; `digest` names the checkpoint for good."""

    stage: str
    fingerprint: str
    step: int
    fence: int
    kind: CheckpointKind
    parent: CheckpointRef | None
    info: dict[str, Any]
    """Resolved arguments, library versions, world size, time: for people and for later checks."""
    files: tuple[FileEntry, ...]

    def to_bytes(self) -> bytes:
        return pack_record({"version": VERSION, **asdict(self)})

    @property
    def digest(self) -> str:
        """Sha256 (hex) of the manifest as it lies in the store."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, record: bytes, *, where: str) -> Self:
        """Read a manifest.

        Raises:
            CheckpointCorrupt: the record is damaged, of another version, or names a file outside its directory.
        """
        content = unpack_record(record, where=where)
        version = content.pop("version", None)
        if version != VERSION:
            raise CheckpointCorrupt(f"{where}: manifest version {version}; this program reads version {VERSION}.")
        try:
            files = tuple(FileEntry(**entry) for entry in content.pop("files"))
            parent = content.pop("parent")
            manifest = cls(
                kind=CheckpointKind(content.pop("kind")),
                parent=CheckpointRef(**parent) if parent else None,
                files=files,
                **content,
            )
            _check_named_files(files, where=where)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointCorrupt(f"{where}: not a manifest: {error}.") from error
        return manifest


def list_files(directory: Path) -> list[str]:
    """List every file below a directory that a checkpoint is to be made of, sorted by path.

    A symbolic link to a file of the same directory counts as that file; empty directories are not kept.

    Raises:
        CheckpointError: a link leaves the directory or leads to another one, an entry is neither file nor
            directory, two names differ only in case, or the name of the manifest is taken.
    """
    root = directory.resolve()
    paths = sorted(_iter_paths(root))
    if MANIFEST_FILE in paths:
        raise CheckpointError(f"{directory}: contains {MANIFEST_FILE}, a name that the store needs. Remove it.")
    if twin := find_twin(paths):
        raise CheckpointError(f"{directory}: {twin} is there twice but for case, which not every file system can hold.")
    return paths


def check_files(directory: Path, files: Iterable[FileEntry]) -> None:
    """Compare a directory with its manifest's files: the same names, sizes and hashes, and no file more.

    A file that the manifest does not name is refused because a trainer that finds it would load it unverified.

    Raises:
        CheckpointCorrupt: names the first file that differs, what was expected and what was found.
    """
    root = directory.resolve()
    entries = tuple(files)
    for entry in entries:
        _check_path(entry.path, where=str(directory))
        path = root / entry.path
        check_size(path.stat().st_size if path.is_file() else None, entry, where=str(directory))
    try:
        found_paths = set(_iter_paths(root))
    except CheckpointError as error:
        raise CheckpointCorrupt(str(error)) from error
    unknown = found_paths - {entry.path for entry in entries} - {MANIFEST_FILE}
    if unknown:
        raise CheckpointCorrupt(f"{directory / min(unknown)}: not named by the manifest of its checkpoint.")
    with ThreadPoolExecutor(HASH_WORKERS) as pool:
        check_entries(pool.map(lambda entry: describe_file(root, entry.path), entries), entries, where=str(directory))


def read_twice(
    read: Callable[[list[str]], list[FileEntry]], expected: Sequence[FileEntry], *, where: str
) -> list[FileEntry]:
    """Read files, and those that are not what they should be once more: what a network damaged is whole then.

    Args:
        read: reads files by their paths and says what was found.
        expected: what the manifest says of them.
        where: of the files, for the log.
    """
    found = {entry.path: entry for entry in read([entry.path for entry in expected])}
    wrong = [entry.path for entry in expected if found[entry.path] != entry]
    if wrong:
        logger.warning("%s: reading %s again, which did not arrive as the manifest says.", where, ", ".join(wrong))
        found |= {entry.path: entry for entry in read(wrong)}
    return [found[entry.path] for entry in expected]


def check_entries(found: Iterable[FileEntry], expected: Iterable[FileEntry], *, where: str) -> None:
    """Compare what files hold with what the manifest says, in the same order.

    Raises:
        CheckpointCorrupt: names the first that differs.
    """
    for actual, entry in zip(found, expected, strict=True):
        check_size(actual.size_bytes, entry, where=where)
        if actual != entry:
            raise CheckpointCorrupt(
                f"{where}/{entry.path}: sha256 is {actual.sha256}, the manifest says {entry.sha256}."
            )


def check_size(found_bytes: int | None, entry: FileEntry, *, where: str) -> None:
    """Compare the size of a file, None if it is not there, with what the manifest says.

    Raises:
        CheckpointCorrupt: it is another, or the file is missing.
    """
    if found_bytes != entry.size_bytes:
        found = "missing" if found_bytes is None else f"{found_bytes} bytes"
        raise CheckpointCorrupt(f"{where}/{entry.path}: {found}, the manifest says {entry.size_bytes} bytes.")


def _iter_paths(root: Path) -> Iterator[str]:
    """Yield every file below a resolved directory, relative to it; refuse what is not plainly a file of it."""
    for folder, subfolders, names in os.walk(root):
        for name in [*subfolders, *names]:
            path = Path(folder, name)
            if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
                raise CheckpointError(f"{path}: links to {path.readlink()}; a checkpoint holds its files itself.")
            if not path.is_file() and not path.is_dir():
                raise CheckpointError(f"{path}: neither a file nor a directory.")
        for name in names:
            yield Path(folder, name).relative_to(root).as_posix()


def _check_named_files(files: Sequence[FileEntry], *, where: str) -> None:
    """Refuse files that no directory of any file system could hold, before a byte of them is asked for."""
    for entry in files:
        _check_path(entry.path, where=where)
        # bool is an int to Python.
        if type(entry.size_bytes) is not int or not 0 <= entry.size_bytes < 2**63:
            raise CheckpointCorrupt(f"{where}: {entry.path} has {entry.size_bytes!r} bytes, which no file has.")
        if not isinstance(entry.sha256, str) or not _SHA256.fullmatch(entry.sha256):
            raise CheckpointCorrupt(f"{where}: {entry.path} has the sha256 {entry.sha256!r}, which is none.")
    folders = {str(parent) for entry in files for parent in PurePosixPath(entry.path).parents}
    for entry in files:
        if entry.path in folders or entry.path == MANIFEST_FILE:
            raise CheckpointCorrupt(f"{where}: names {entry.path} as a file, which cannot be one.")
    if twin := find_twin(entry.path for entry in files):
        raise CheckpointCorrupt(f"{where}: names {twin} twice, at least for file systems that ignore case.")


def find_twin(paths: Iterable[str]) -> str | None:
    """Find a path that is another one's as well where case does not count, in lower case."""
    return next((path for path, count in Counter(path.casefold() for path in paths).items() if count > 1), None)


def _check_path(path: str, *, where: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or path.startswith("/") or ".." in parts or "\0" in path:
        raise CheckpointCorrupt(f"{where}: names the file {path!r}, which is not a plain path below its directory.")


def describe_file(root: Path, path: str) -> FileEntry:
    """Read a file through, links followed, and say what is in it."""
    digest, size_bytes = hashlib.sha256(), 0
    with (root / path).open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size_bytes += len(block)
    return FileEntry(path, size_bytes, digest.hexdigest())


def hash_file(path: Path) -> str:
    """Sha256 (hex) of a file's bytes, links followed."""
    return describe_file(path.parent, path.name).sha256
