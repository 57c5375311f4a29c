"""A store in a local or mounted directory, with the standard library only.

`os.link` is the exclusive step: it is atomic, and what it makes visible is written and synced
already. A file counts as stored when it and the folder that names it are synced.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from internvl_core.checkpoint.faults import sync_file, translated
from internvl_core.checkpoint.manifest import HASH_WORKERS, FileEntry, describe_file
from internvl_core.checkpoint.uri import FILE_PREFIX

# Another file system, one without hard links, too many links to one file, or a file of another user.
_NOT_LINKABLE = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK}


class LocalBackend:
    """`file://`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._root = Path(uri.removeprefix(FILE_PREFIX))

    def get_path(self, name: str) -> Path:
        """Say where an object lies on this machine."""
        return self._root / name

    def create(self, name: str, body: bytes) -> None:
        with translated(f"Creating {self._root / name}", answers=(FileExistsError,)):
            _write(self._root / name, body, os.link)

    def put(self, name: str, body: bytes) -> None:
        with translated(f"Writing {self._root / name}"):
            _write(self._root / name, body, os.replace)

    def read(self, name: str) -> bytes:
        with translated(f"Reading {self._root / name}", answers=(FileNotFoundError,)):
            return (self._root / name).read_bytes()

    def list_names(self, folder: str) -> list[str]:
        with translated(f"Listing {self._root / folder}"):
            try:
                return [path.name for path in (self._root / folder).iterdir()]
            except FileNotFoundError:
                return []

    def get_sizes_bytes(self, folder: str) -> dict[str, int]:
        root = self._root / folder
        with translated(f"Listing {root}"):
            sizes_bytes = {}
            for parent, _, names in os.walk(root):
                for name in names:
                    path = Path(parent, name)
                    # Another process may be removing this very folder.
                    with suppress(FileNotFoundError):
                        sizes_bytes[path.relative_to(root).as_posix()] = path.stat().st_size
            return sizes_bytes

    def upload(self, directory: Path, paths: Sequence[str], folder: str) -> list[FileEntry]:
        target = self._root / folder

        def store(path: str) -> FileEntry:
            _store_file((directory / path).resolve(), target / path)
            return describe_file(target, path)

        with translated(f"Storing {directory} in {target}"):
            for path in paths:
                _make_folder((target / path).parent)
            entries = _run_for_each(store, paths)
            for parent in {(target / path).parent for path in paths}:
                _sync(parent)
        return entries

    def download(self, folder: str, paths: Sequence[str], directory: Path) -> list[FileEntry]:
        source = self._root / folder

        def copy(path: str) -> FileEntry:
            shutil.copyfile(source / path, directory / path)
            return describe_file(directory, path)

        with translated(f"Copying {source} to {directory}", answers=(FileNotFoundError,)):
            for path in paths:
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
            return _run_for_each(copy, paths)

    def describe(self, folder: str, paths: Sequence[str]) -> list[FileEntry]:
        root = self._root / folder
        with translated(f"Reading {root}", answers=(FileNotFoundError,)):
            return _run_for_each(lambda path: describe_file(root, path), paths)

    def remove(self, name: str) -> None:
        with translated(f"Removing {self._root / name}"):
            (self._root / name).unlink(missing_ok=True)

    def remove_all(self, folder: str) -> None:
        with translated(f"Removing {self._root / folder}"), suppress(FileNotFoundError):
            shutil.rmtree(self._root / folder)


def _run_for_each(run: Callable[[str], FileEntry], paths: Sequence[str]) -> list[FileEntry]:
    """Work on files in parallel: while one is hashed, another is written to the disk."""
    with ThreadPoolExecutor(HASH_WORKERS) as pool:
        return list(pool.map(run, paths))


def _write(path: Path, body: bytes, publish: Callable[[Path, Path], None]) -> None:
    """Write a file aside, sync it, and give it its name in one step: `os.link` if that is new, or `os.replace`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    _make_folder(path.parent)
    try:
        with temporary.open("xb") as file:
            file.write(body)
            file.flush()
            sync_file(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _store_file(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that cannot be, and sync it."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NOT_LINKABLE:
            raise
        shutil.copyfile(source, target)
    _sync(target)


def _make_folder(folder: Path) -> None:
    """Create a folder with its parents, each durable before anything is put into it."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        # Not as it stands: from `create` that error would mean that somebody else was first.
        raise NotADirectoryError(errno.ENOTDIR, "is a file where a folder is needed", str(folder)) from error
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)
