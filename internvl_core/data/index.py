"""The index of an annotation file: for each line where it lies, how long its sample is, or why it is none.

Built once, by several processes, for one content of the file and one way of encoding it; both are in
its name, so an index is never out of date. It appears whole by one rename and is never changed,
so ranks, stages and concurrent builders share it. Columns are memory-mapped: a rank holds no more
of them than it touches.

    <cache_dir>/index/<key>/index.json       settings, counts by reason and kind, bytes
                            offsets.npy      [L + 1] int64, where each line begins
                            tokens.npy       [L] int32, image tokens included
                            tiles.npy        [L] uint16
                            supervised.npy   [L] int32, tokens that are learnt
                            status.npy       [L] uint8: 0 sample, 255 blank line, else a `Reason`
                            problems.jsonl   line, reason and message of bad lines

`L` lines of the file, blank ones included, so that a row's number gives the line's.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from internvl_core.contract import digest_json
from internvl_core.data.annotation import AnnotationFile, digest_annotation, fetch_annotation
from internvl_core.data.encoding import Encoding
from internvl_core.data.index_build import BLANK, COLUMNS, IndexPart, iter_parts
from internvl_core.data.meta import DatasetMeta
from internvl_core.errors import ArgumentError, DataError, InternVLError, Reason

logger = logging.getLogger(__name__)

# Raise it when the meaning of a column changes.
_FORMAT = 1
_HEADER_FILE = "index.json"
_PROBLEMS_FILE = "problems.jsonl"
# Beyond it the table of a check counts but does not quote.
_MAX_PROBLEMS = 100_000
_STALE_BUILD_S = 24 * 3600
_REBUILD = "Remove the folder; it is built anew by itself."

_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True)
class Problem:
    """A line that is no sample."""

    line: int
    reason: Reason
    message: str


class DatasetIndex:
    """The index of one data set, opened."""

    def __init__(self, directory: Path, meta: DatasetMeta, annotation: AnnotationFile) -> None:
        self.directory = directory
        self.meta = meta
        self.annotation = annotation
        self._header: dict[str, Any] = json.loads((directory / _HEADER_FILE).read_text())
        self.num_lines: int = self._header["num_lines"]
        for name in COLUMNS:
            if len(getattr(self, name)) != self.num_lines + (1 if name == "offsets" else 0):
                raise InternVLError(f"{directory}: {name} is damaged. {_REBUILD}")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        return self._map("offsets", np.int64)

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        return self._map("tokens", np.int32)

    @cached_property
    def tiles(self) -> NDArray[np.uint16]:
        return self._map("tiles", np.uint16)

    @cached_property
    def supervised(self) -> NDArray[np.int32]:
        return self._map("supervised", np.int32)

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        return self._map("status", np.uint8)

    @property
    def num_records(self) -> int:
        """Lines that are not blank."""
        return self.num_lines - int(self._header["num_blank"])

    @property
    def num_samples(self) -> int:
        """Records that are sound, over-long ones included."""
        return self.num_records - sum(self.problem_counts.values())

    @property
    def problem_counts(self) -> Mapping[Reason, int]:
        return {Reason(name): count for name, count in self._header["problems"].items()}

    @property
    def kind_counts(self) -> Mapping[str, int]:
        """Samples by kind: text, image, multi_image, video."""
        return dict(self._header["kinds"])

    def read_line(self, row: int) -> bytes:
        """Read one line of the annotation; row 0 is line 1."""
        start, end = self.offsets[row : row + 2].tolist()
        return self.annotation.read_line(start, end - start)

    def iter_problems(self) -> Iterator[Problem]:
        with (self.directory / _PROBLEMS_FILE).open(encoding="utf-8") as file:
            for line in file:
                content = json.loads(line)
                yield Problem(content["line"], Reason(content["reason"]), content["message"])

    def __getstate__(self) -> dict[str, Any]:
        # A mapped column would be pickled with all it holds.
        return {name: value for name, value in self.__dict__.items() if name not in COLUMNS}

    def _map(self, name: str, dtype: type[_Number]) -> NDArray[_Number]:
        column: NDArray[_Number] = np.load(self.directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if column.dtype != dtype:
            raise InternVLError(f"{self.directory}: {name} is damaged. {_REBUILD}")
        return column


def open_index(
    meta: DatasetMeta, encoding: Encoding, cache_dir: Path, *, num_processes: int | None = None
) -> DatasetIndex:
    """Open the index of a data set; build it first if nobody has.

    Args:
        encoding: the stage's; the data set's own settings are applied here.
        num_processes: to build with; None for as many as there are cores.

    Raises:
        DataError: the annotation cannot be read, holds no record, or not as many as `length` says.
    """
    encoding = encoding.for_dataset(meta)
    path = fetch_annotation(meta.annotation, cache_dir)
    digest = digest_annotation(path, cache_dir)
    annotation = AnnotationFile(path, shown_as=meta.annotation, digest=digest)
    settings = {
        "format": _FORMAT,
        "annotation": digest,
        # A video's frames are drawn by the name, sizes are read below the root.
        "dataset": meta.name,
        "root": meta.root,
        "ignore_keys": sorted(meta.ignore_keys),
        **encoding.to_json(),
    }
    directory = cache_dir / "index" / digest_json(settings)[:32]
    if not (directory / _HEADER_FILE).exists():
        _check_own_settings(meta, encoding)
        _build(directory, annotation, meta, encoding, settings, num_processes)
    index = DatasetIndex(directory, meta, annotation)
    if not index.num_records:
        raise DataError(f"{meta.annotation}: holds no record. Remove dataset {meta.name!r} or fill the file.")
    if meta.length is not None and meta.length != index.num_records:
        raise DataError(
            f"dataset {meta.name!r}: length is {meta.length}, but {meta.annotation} has {index.num_records} records. "
            "Correct one of them."
        )
    return index


def _check_own_settings(meta: DatasetMeta, encoding: Encoding) -> None:
    try:
        encoding.count_tokens([])
    except ArgumentError as error:
        if meta.conv_style is None and meta.system_prompt is None:
            raise
        raise DataError(f"dataset {meta.name!r}: {error}") from None


def _build(
    directory: Path,
    annotation: AnnotationFile,
    meta: DatasetMeta,
    encoding: Encoding,
    settings: Mapping[str, Any],
    num_processes: int | None,
) -> None:
    started = time.monotonic()
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(directory.parent)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=directory.parent))
    try:
        header = _write(building, iter_parts(annotation.path, meta, encoding, num_processes=num_processes))
        (building / _HEADER_FILE).write_text(json.dumps({**header, "settings": settings}, indent=2))
        # An edit while it was built: the file was read in two states.
        annotation.read_line(0, 1)
        _publish(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    seconds = time.monotonic() - started
    logger.info(
        "Indexed %s: %d lines in %.1f s (%.0f lines/s)",
        annotation.shown_as,
        header["num_lines"],
        seconds,
        header["num_lines"] / max(seconds, 1e-9),
    )


def _write(directory: Path, parts: Iterator[IndexPart]) -> dict[str, Any]:
    """Write columns and problems; returns the header."""
    reasons: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    num_problems = 0
    with (directory / _PROBLEMS_FILE).open("w", encoding="utf-8") as problems:
        for part in parts:
            for name, values in part.columns.items():
                columns[name].append(values)
            kinds.update(part.kinds)
            reasons.update(problem[1] for problem in part.problems)
            for line, reason, message in part.problems[: max(0, _MAX_PROBLEMS - num_problems)]:
                problems.write(json.dumps({"line": line, "reason": reason, "message": message}) + "\n")
            num_problems += len(part.problems)
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    for name, values in arrays.items():
        np.save(directory / f"{name}.npy", values, allow_pickle=False)
    return {
        "num_lines": len(arrays["status"]),
        "num_blank": int((arrays["status"] == BLANK).sum()),
        "problems": dict(sorted(reasons.items())),
        "kinds": dict(sorted(kinds.items())),
        "num_tokens": int(arrays["tokens"].sum(dtype=np.int64)),
        "num_tiles": int(arrays["tiles"].sum(dtype=np.int64)),
    }


def _publish(building: Path, directory: Path) -> None:
    for file in building.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    try:
        building.rename(directory)
    except OSError:
        # Another builder was first; its index is the same.
        if not (directory / _HEADER_FILE).exists():
            raise


def _remove_stale(folder: Path) -> None:
    """Remove what builders that were killed left behind."""
    for building in folder.glob(".building-*"):
        with suppress(OSError):
            if time.time() - building.stat().st_mtime > _STALE_BUILD_S:
                shutil.rmtree(building, ignore_errors=True)
