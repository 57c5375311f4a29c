"""Follow a file that somebody else writes."""

from collections.abc import Iterator
from pathlib import Path


class LineTail:
    """Read a file that somebody else appends to, whole lines at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self, *, take_unfinished: bool = False) -> Iterator[str]:
        """Yield the lines that were finished since the last call; none if the file is not there yet.

        With `take_unfinished` the last line may lack its end: its writer is gone.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n") and not take_unfinished:
                    return
                self._offset += len(line)
                yield line.removesuffix(b"\n").decode(errors="replace")
