"""Cut an annotation file into parts and measure them in several processes, in order."""

import gc
import itertools
import mmap
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_core.data.encoding import Encoding
from internvl_core.data.measure import measure_lines
from internvl_core.data.meta import DatasetMeta
from internvl_core.data.records import MAX_LINE_BYTES
from internvl_core.errors import DataError, Reason
from internvl_core.supervision.process_tree import die_with

COLUMNS: dict[str, Any] = {
    "offsets": np.int64,
    "tokens": np.int32,
    "tiles": np.uint16,
    "supervised": np.int32,
    "status": np.uint8,
}
BLANK = 255
SAMPLE = 0
STATUS = {reason: number for number, reason in enumerate(Reason, start=1)}

_PART_BYTES = 4 << 20
# Below it a pool of processes takes longer to start than the work does.
_MIN_PARALLEL_BYTES = 8 << 20
_BATCH_LINES = 2000
_MAX_TILES = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class IndexPart:
    """The rows of consecutive lines."""

    columns: dict[str, NDArray[Any]]
    kinds: Counter[str]
    problems: list[tuple[int, str, str]]
    """Line, reason, message."""


@dataclass(frozen=True)
class _Range:
    start: int
    end: int
    first_line: int


def iter_parts(
    path: Path, meta: DatasetMeta, encoding: Encoding, *, num_processes: int | None = None
) -> Iterator[IndexPart]:
    """Yield the parts of a file in its order; `offsets` has the file's size as its last element.

    Args:
        encoding: the data set's own.
        num_processes: None for as many as this process may use cores.
    """
    size_bytes = path.stat().st_size
    builder = _Builder(path, meta, encoding)
    if num_processes is None:
        num_processes = len(os.sched_getaffinity(0))
    if num_processes == 1 or size_bytes < _MIN_PARALLEL_BYTES:
        yield from map(builder.build, _iter_ranges(path))
    else:
        yield from _build_in_parallel(builder, path, num_processes)
    end = {name: np.empty(0, dtype) for name, dtype in COLUMNS.items()}
    yield IndexPart({**end, "offsets": np.array([size_bytes], np.int64)}, Counter(), [])


def _build_in_parallel(builder: "_Builder", path: Path, num_processes: int) -> Iterator[IndexPart]:
    # Spawned, because a fork of a process with threads, as every tokenizer and torch have, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=_start_worker, initargs=(builder,)) as pool:
        waiting: deque[tuple[_Range, Future[IndexPart]]] = deque()
        for part in _iter_ranges(path):
            waiting.append((part, pool.submit(_build_in_worker, part)))
            if len(waiting) > 4 * num_processes:
                yield _wait(path, *waiting.popleft())
        while waiting:
            yield _wait(path, *waiting.popleft())


def _wait(path: Path, part: _Range, future: Future[IndexPart]) -> IndexPart:
    try:
        return future.result()
    except BrokenProcessPool:
        raise DataError(
            f"{path}:{part.first_line}: a process that measured the lines from here on died. Was the file cut off "
            "meanwhile, or did memory run out? Else one of the next media crashes its decoder."
        ) from None


def _iter_ranges(path: Path) -> Iterator[_Range]:
    """Cut the file behind line ends, into parts of about `_PART_BYTES`."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, first_line = 0, 1
        while start < len(content):
            end = content.find(b"\n", min(start + _PART_BYTES, len(content)) - 1) + 1
            end = end or len(content)
            yield _Range(start, end, first_line)
            first_line += _count_line_ends(content, start, end)
            start = end


def _count_line_ends(content: mmap.mmap, start: int, end: int) -> int:
    # In pieces: one line may be as long as the file.
    pieces = range(start, end, _PART_BYTES)
    return sum(content[piece : min(piece + _PART_BYTES, end)].count(b"\n") for piece in pieces)


_builder: "_Builder | None" = None


def _start_worker(builder: "_Builder") -> None:
    global _builder
    # The processes are the parallelism; threads of the tokenizer would only compete with them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Records have no cycles; to look for some among so many objects took a tenth of the time.
    gc.disable()
    # A pool that is killed would leave its processes waiting for work.
    die_with(builder.owner)
    _builder = builder


def _build_in_worker(part: _Range) -> IndexPart:
    assert _builder is not None
    index_part = _builder.build(part)
    gc.collect()
    return index_part


@dataclass(frozen=True)
class _Builder:
    path: Path
    meta: DatasetMeta
    encoding: Encoding
    owner: int = field(default_factory=os.getpid)

    def build(self, part: _Range) -> IndexPart:
        offsets = self._find_lines(part)
        rows = np.zeros(len(offsets) - 1, dtype=[(name, COLUMNS[name]) for name in COLUMNS if name != "offsets"])
        kinds: Counter[str] = Counter()
        problems: list[tuple[int, str, str]] = []
        with self.path.open("rb") as file:
            for start in range(0, len(rows), _BATCH_LINES):
                bounds = offsets[start : start + _BATCH_LINES + 1]
                self._measure(
                    file, bounds, part.first_line + start, rows[start : start + _BATCH_LINES], kinds, problems
                )
        columns: dict[str, NDArray[Any]] = {"offsets": np.array(offsets[:-1], np.int64)}
        columns |= {name: rows[name].copy() for name in COLUMNS if name != "offsets"}
        return IndexPart(columns, kinds, problems)

    def _find_lines(self, part: _Range) -> list[int]:
        offsets = [part.start]
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while offsets[-1] < part.end:
                offsets.append(content.find(b"\n", offsets[-1], part.end) + 1 or part.end)
        return offsets

    def _measure(
        self,
        file: Any,
        bounds: list[int],
        first_line: int,
        rows: NDArray[Any],
        kinds: Counter[str],
        problems: list[tuple[int, str, str]],
    ) -> None:
        lines = []
        for start, end in itertools.pairwise(bounds):
            file.seek(start)
            # One byte over the limit is enough for the refusal.
            lines.append(file.read(min(end - start, MAX_LINE_BYTES + 1)))
        measures = measure_lines(lines, first_line=first_line, meta=self.meta, encoding=self.encoding)
        for position, (line, measure) in enumerate(zip(lines, measures, strict=True)):
            if not line.strip():
                rows[position]["status"] = BLANK
            elif isinstance(measure, DataError):
                rows[position]["status"] = STATUS[measure.reason]
                problems.append((first_line + position, measure.reason.value, str(measure)))
            elif measure.num_tiles > _MAX_TILES:
                rows[position]["status"] = STATUS[Reason.TOO_LONG]
                message = f"{measure.num_tiles} tiles; an index counts up to {_MAX_TILES}."
                problems.append((first_line + position, Reason.TOO_LONG.value, message))
            else:
                rows[position] = (measure.num_tokens, measure.num_tiles, measure.num_supervised, SAMPLE)
                kinds[measure.kind] += 1
