"""Decode the media of a data set and compare them with its index.

A pick is spread over the file and is the same each time, so what was seen bad once can be looked at again.
"""

import logging
import multiprocessing
import os
import random
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from internvl_core.data.annotation import AnnotationChanged
from internvl_core.data.encoding import Encoding
from internvl_core.data.index import DatasetIndex, Problem
from internvl_core.data.index_build import SAMPLE
from internvl_core.data.mixture import Rows
from internvl_core.data.pixels import PixelRules, PixelSource
from internvl_core.data.records import Record, parse_record
from internvl_core.errors import DataError, Reason
from internvl_core.inspection.lint_report import NUM_LINES_SHOWN, Finding, MediaReport

logger = logging.getLogger(__name__)

# Pillow and PyAV let go of the interpreter while they decode, and a store is mostly waited for.
_THREADS = 8
_BATCH_ROWS = 32
_PROGRESS_S = 30.0


def check_tiles(found: int, expected: int) -> None:
    """Compare the tiles that were cut with those that the index counted.

    Raises:
        DataError: they differ, and with them the length of the sample.
    """
    if found != expected:
        raise DataError(
            f"{found} tiles, but {expected} by the width and height of the record, or by the header of the file. "
            "Correct them.",
            reason=Reason.SIZE_MISMATCH,
        )


class MediaCheck:
    """The decoding of one data set's media."""

    def __init__(self, index: DatasetIndex, encoding: Encoding, rules: PixelRules) -> None:
        """Describe what is decoded, and how.

        Args:
            encoding: the data set's own.
        """
        self.rules = rules
        self._index = index
        self._decoder = _Decoder(index, PixelSource(index.meta, encoding, rules))
        self._rows = Rows((index.status == SAMPLE) & (index.tiles > 0))

    def decode_some(self, count: int) -> MediaReport:
        """Decode a pick: one of each of `count` equal stretches of the file."""
        rows = self._pick(count)
        tally = _Tally()
        with ThreadPoolExecutor(_THREADS) as pool:
            for problem in pool.map(self._decoder.decode, rows):
                tally.add(problem)
        return self._report(tally)

    def decode_all(self) -> MediaReport:
        """Decode everything, in as many processes as this one may use cores.

        Raises:
            DataError: a process died over a medium; names the lines that it may have been.
        """
        tally = _Tally()
        told = time.monotonic()
        for problems in self._iter_decoded(len(os.sched_getaffinity(0))):
            for problem in problems:
                tally.add(problem)
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                logger.info("%s: %d of %d decoded", self._index.meta.name, tally.num_decoded, len(self._rows))
        return self._report(tally)

    def _pick(self, count: int) -> list[int]:
        total = len(self._rows)
        count = min(count, total)
        draw = random.Random(self._index.meta.name)  # noqa: S311
        bounds = [total * number // count for number in range(count + 1)]
        return self._find([draw.randrange(*bounds[number : number + 2]) for number in range(count)])

    def _find(self, numbers: Sequence[int]) -> list[int]:
        rows: list[int] = self._rows.find(np.asarray(numbers, np.int64)).tolist()
        return rows

    def _iter_decoded(self, num_processes: int) -> Iterator[list[Problem | None]]:
        # Spawned, because a fork of a process with torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, context, initializer=_start, initargs=(self._decoder,)) as pool:
            waiting: deque[tuple[list[int], Future[list[Problem | None]]]] = deque()
            for rows in self._iter_batches():
                waiting.append((rows, pool.submit(_decode_in_worker, rows)))
                if len(waiting) > 4 * num_processes:
                    yield self._wait(*waiting.popleft())
            while waiting:
                yield self._wait(*waiting.popleft())

    def _iter_batches(self) -> Iterator[list[int]]:
        for start in range(0, len(self._rows), _BATCH_ROWS):
            yield self._find(range(start, min(start + _BATCH_ROWS, len(self._rows))))

    def _wait(self, rows: Sequence[int], future: Future[list[Problem | None]]) -> list[Problem | None]:
        try:
            return future.result()
        except BrokenProcessPool:
            raise DataError(
                f"{self._index.meta.annotation}: a process died while it decoded lines {rows[0] + 1} and after. Look "
                "at them with internvl data show; if it was for want of memory, more is needed.",
                reason=Reason.MEDIA,
            ) from None

    def _report(self, tally: "_Tally") -> MediaReport:
        return MediaReport(len(self._rows), tally.num_decoded, tally.list_findings())


@dataclass(frozen=True)
class _Decoder:
    index: DatasetIndex
    pixels: PixelSource

    def decode(self, row: int) -> Problem | None:
        """Decode one record's media; what is wrong with them, or None.

        Raises:
            AnnotationChanged: the file was edited since it was indexed.
        """
        meta = self.index.meta
        try:
            content = parse_record(self.index.read_line(row), ignore_keys=meta.ignore_keys)
            record = Record(meta.name, meta.annotation, row + 1, content)
            media = self.pixels.load(record, key=record.sample_id, is_training=False)
            check_tiles(sum(media.tile_counts), int(self.index.tiles[row]))
        except AnnotationChanged:
            raise
        except DataError as error:
            return Problem(row + 1, error.reason, str(error))
        return None


class _Tally:
    def __init__(self) -> None:
        self.num_decoded = 0
        self._counts: Counter[Reason] = Counter()
        self._firsts: dict[Reason, list[Problem]] = {}

    def add(self, problem: Problem | None) -> None:
        self.num_decoded += 1
        if problem is None:
            return
        self._counts[problem.reason] += 1
        firsts = self._firsts.setdefault(problem.reason, [])
        if len(firsts) < NUM_LINES_SHOWN:
            firsts.append(problem)

    def list_findings(self) -> list[Finding]:
        return [
            Finding(reason.value, count, [problem.line for problem in firsts], firsts[0].message)
            for reason, count in sorted(self._counts.items())
            for firsts in [self._firsts[reason]]
        ]


_decoder: _Decoder | None = None


def _start(decoder: _Decoder) -> None:
    import torch

    global _decoder
    # The processes are the parallelism.
    torch.set_num_threads(1)
    _decoder = decoder


def _decode_in_worker(rows: Iterable[int]) -> list[Problem | None]:
    assert _decoder is not None
    return [_decoder.decode(row) for row in rows]
