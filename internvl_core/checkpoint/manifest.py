"""What a checkpoint consists of: each file with its size and sha256, and where it came from.

The manifest is written after every file it names and never changes. Nobody loads a byte of a
checkpoint before `check_files` has compared the whole directory with it.
"""

import enum
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from internvl_core.checkpoint.record import pack_record, unpack_record
from internvl_core.contract import CheckpointRef
from internvl_core.errors import CheckpointCorrupt, CheckpointError

VERSION = 1
MANIFEST_FILE = "MANIFEST"

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
            for entry in files:
                _check_path(entry.path, where=where)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointCorrupt(f"{where}: not a manifest: {error}.") from error
        return manifest


def list_files(directory: Path) -> list[str]:
    """List every file below a directory that a checkpoint is to be made of, sorted by path.

    A symbolic link to a file of the same directory counts as that file; empty directories are not kept.

    Raises:
        CheckpointError: a link leaves the directory or leads to another one, an entry is neither file nor
            directory, or the name of the manifest is taken.
    """
    root = directory.resolve()
    paths = sorted(_iter_paths(root))
    if MANIFEST_FILE in paths:
        raise CheckpointError(f"{directory}: contains {MANIFEST_FILE}, a name that the store needs. Remove it.")
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
