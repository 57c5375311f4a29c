"""The index of an annotation file: for each line where it lies, how long its sample is, or why it is none.

Built once, by several processes, for one content of the file and one way of encoding it; both are in
its name. Media are in it as they were when they were looked at: whoever replaces a picture under its
old name removes the index, and records whose media could not be read are looked at again before
training (`index_mend`). It appears whole and is never changed, so ranks, stages and concurrent
builders share it. Columns are memory-mapped: a rank holds no more of them than it touches.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from internvl_core.contract import digest_json
from internvl_core.data.annotation import AnnotationFile, digest_annotation, fetch_annotation
from internvl_core.data.encoding import Encoding
from internvl_core.data.index_build import COLUMNS, iter_parts
from internvl_core.data.index_files import HEADER_FILE, PROBLEMS_FILE, find_newest, write_parts, writing
from internvl_core.data.meta import DatasetMeta
from internvl_core.errors import ArgumentError, DataError, InternVLError, Reason

logger = logging.getLogger(__name__)

# Raise it when the meaning of a column changes.
_FORMAT = 1

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
        try:
            self._header: dict[str, Any] = json.loads((directory / HEADER_FILE).read_text())
            self.num_lines: int = self._header["num_lines"]
            # By size, because each mapped column costs a file descriptor.
            for name, dtype in COLUMNS.items():
                needed_bytes = self._count_rows(name) * np.dtype(dtype).itemsize
                if (directory / f"{name}.npy").stat().st_size < needed_bytes:
                    raise ValueError(f"{name} is cut short")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refuse(error) from None

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

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the index was built for."""
        return dict(self._header["settings"])

    def read_line(self, row: int) -> bytes:
        """Read one line of the annotation; row 0 is line 1."""
        start, end = self.offsets[row : row + 2].tolist()
        return self.annotation.read_line(start, end - start)

    def iter_problems(self) -> Iterator[Problem]:
        with (self.directory / PROBLEMS_FILE).open(encoding="utf-8") as file:
            for line in file:
                content = json.loads(line)
                yield Problem(content["line"], Reason(content["reason"]), content["message"])

    def __getstate__(self) -> dict[str, Any]:
        # A mapped column would be pickled with all it holds.
        return {name: value for name, value in self.__dict__.items() if name not in COLUMNS}

    def _map(self, name: str, dtype: type[_Number]) -> NDArray[_Number]:
        try:
            column: NDArray[_Number] = np.load(self.directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise self._refuse(error) from None
        if column.dtype != dtype or column.shape != (self._count_rows(name),):
            raise self._refuse(f"{name} has another shape")
        return column

    def _count_rows(self, name: str) -> int:
        return self.num_lines + (1 if name == "offsets" else 0)

    def _refuse(self, cause: object) -> InternVLError:
        return InternVLError(f"{self.directory}: is damaged: {cause}. Remove the folder; it is built anew by itself.")


def open_index(
    meta: DatasetMeta, encoding: Encoding, cache_dir: Path, *, num_processes: int | None = None
) -> DatasetIndex:
    """Open the newest index of a data set; build it first if nobody has.

    Args:
        encoding: the stage's; the data set's own settings are applied here.
        num_processes: to build with; None for as many as there are cores.

    Raises:
        DataError: the annotation cannot be read, holds no record, or not as many as `length` says.
    """
    encoding = encoding.for_dataset(meta)
    path = fetch_annotation(meta.annotation, cache_dir)
    digest, version = digest_annotation(path, cache_dir)
    annotation = AnnotationFile(path, shown_as=meta.annotation, digest=digest, version=version)
    settings = {
        "format": _FORMAT,
        "annotation": digest,
        # A video's frames are drawn by the name, sizes are read below the root.
        "dataset": meta.name,
        "root": meta.root,
        "ignore_keys": sorted(meta.ignore_keys),
        **encoding.to_json(),
    }
    folder, key = cache_dir / "index", digest_json(settings)[:32]
    directory = find_newest(folder, key)
    if directory is None:
        _check_own_settings(meta, encoding)
        directory = folder / f"{key}.0"
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
    with writing(directory) as building:
        parts = iter_parts(annotation.path, meta, encoding, num_processes=num_processes)
        num_lines = write_parts(building, parts, settings)["num_lines"]
        # An edit while it was built: the file was read in two states.
        annotation.check_unchanged()
    seconds = time.monotonic() - started
    logger.info(
        "Indexed %s: %d lines in %.1f s (%.0f lines/s)",
        annotation.shown_as,
        num_lines,
        seconds,
        num_lines / max(seconds, 1e-9),
    )
