"""Files moved in parts by a few threads, in bounded memory, and hashed on the way.

The parts of a file are made and taken in order by one thread, which hashes them, and cross the network on others in any
order. At most `SLOTS` parts are in memory, whatever the number and the sizes of the files.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any, BinaryIO, Self

from internvl_core.checkpoint.manifest import FileEntry

PART_BYTES = 8 << 20
SLOTS = 10
_MAX_PARTS = 10_000  # of a file on S3


def choose_part_bytes(size_bytes: int) -> int:
    """Choose the size of a file's parts: the usual one, or more for a file that would have too many."""
    return max(PART_BYTES, -(-size_bytes // _MAX_PARTS))


class PartPool:
    """The threads and the memory of one transfer of several files."""

    def __init__(self) -> None:
        self._files = ThreadPoolExecutor(SLOTS, "files")
        self._parts = ThreadPoolExecutor(SLOTS, "parts")
        self._slots = BoundedSemaphore(SLOTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.shutdown(cancel_futures=True)
        self._parts.shutdown(cancel_futures=True)

    def run(self, transfer: Callable[[str], FileEntry], paths: Sequence[str]) -> list[FileEntry]:
        """Transfer files side by side, large and small; the first error ends those that have not begun."""
        return list(self._files.map(transfer, paths))

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold the memory of one part."""
        with self._slots:
            yield

    def send(self, source: Path, send_part: Callable[[int, bytes], None], *, part_bytes: int) -> tuple[int, str]:
        """Read a file part by part and send each, numbered from 1; an empty file has one empty part.

        Returns:
            How many bytes were sent, and their sha256; no part is on its way any more, even if an error is raised.
        """
        digest, size_bytes = hashlib.sha256(), 0
        pending: deque[Future[None]] = deque()
        try:
            with source.open("rb") as file:
                for number in itertools.count(1):
                    part = self._read(file, part_bytes)
                    if part or number == 1:
                        future = self._parts.submit(send_part, number, part)
                        future.add_done_callback(self._release)
                        pending.append(future)
                        digest.update(part)
                        size_bytes += len(part)
                    else:
                        self._slots.release()
                    if len(part) < part_bytes:
                        break
                    while pending and pending[0].done():
                        pending.popleft().result()
            for future in pending:
                future.result()
        finally:
            wait(pending)
        return size_bytes, digest.hexdigest()

    def iter_parts(self, read_part: Callable[[int, int], bytes], ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Yield the bytes of ranges [start, stop) in order while those that follow are on their way."""
        pending: deque[Future[bytes]] = deque()
        try:
            for start, stop in ranges:
                # Whoever holds parts gives one on before it waits for a slot, so nobody waits for ever.
                while not self._slots.acquire(blocking=not pending):
                    yield pending[0].result()
                    self._release(pending.popleft())
                pending.append(self._parts.submit(read_part, start, stop))
            while pending:
                yield pending[0].result()
                self._release(pending.popleft())
        finally:
            for future in pending:
                self._release(future)

    def _read(self, file: BinaryIO, size_bytes: int) -> bytes:
        """Read a part into a slot of its own, which stays taken."""
        self._slots.acquire()
        try:
            return file.read(size_bytes)
        except OSError:
            self._slots.release()
            raise

    def _release(self, _: Future[Any]) -> None:
        self._slots.release()
