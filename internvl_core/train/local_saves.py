"""Writing a checkpoint to the local disk: whole, or not at all where the disk is full.

Invariant: what was there before stays. Only a folder that this save has begun is removed.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_core.errors import DiskFull
from internvl_core.exhaustion import is_disk_full

_GIB = 1024**3


class LocalSaves:
    """The saves of this rank, and how much room the last one took."""

    def __init__(self) -> None:
        self._last_bytes: int | None = None

    @contextmanager
    def writing(self, folder: Path, *, is_begun: bool = False) -> Iterator[None]:
        """Write a save's folder.

        Args:
            is_begun: the folder exists and is of this save.

        Raises:
            DiskFull: there was no room; what was written of the folder is removed.
        """
        is_own = is_begun or not folder.exists()
        try:
            yield
        except Exception as error:
            # On whatever a library raised.
            if not (isinstance(error, DiskFull) or is_disk_full(error, _find_existing(folder))):
                raise
            message = self._explain(folder, is_removed=is_own)
            if is_own:
                shutil.rmtree(folder, ignore_errors=True)
            raise DiskFull(message) from error
        if folder.is_dir():
            self._last_bytes = _measure(folder)

    def _explain(self, folder: Path, *, is_removed: bool) -> str:
        usage = shutil.disk_usage(_find_existing(folder))
        needed = f"{_measure(folder) / _GIB:.2f} GiB were written by then"
        if self._last_bytes is not None:
            needed += f", and the last save took {self._last_bytes / _GIB:.2f} GiB"
        removed = "That is removed again; every" if is_removed else "Every"
        return (
            f"{folder}: no room for the save: {usage.free / _GIB:.2f} of {usage.total / _GIB:.2f} GiB are free on its "
            f"disk (or a quota is used up), {needed}. {removed} earlier checkpoint stays. Make room there or give an "
            "output_dir on another disk, and run again: the stage goes on from its last committed checkpoint."
        )


def _find_existing(path: Path) -> Path:
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _measure(folder: Path) -> int:
    """Add up the files; other ranks may be writing there."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
