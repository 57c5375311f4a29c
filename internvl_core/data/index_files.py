"""The files of an index: written aside, published whole by one rename, never changed.

    <cache_dir>/index/<key>.<generation>/index.json     settings, counts by reason and kind
                                         offsets.npy    [L + 1] int64, where each line begins
                                         tokens.npy     [L] int32, image tokens included
                                         tiles.npy      [L] uint16
                                         supervised.npy [L] int32, tokens that are learnt
                                         status.npy     [L] uint8: 0 sample, 255 blank line, else a `Reason`
                                         problems.jsonl line, reason and message of bad lines

`L` lines of the file, blank ones included, so that a row's number gives the line's. A later generation
differs from an earlier one in records whose media could not be read then and can be now.
"""

import errno
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_core.data.index_build import BLANK, COLUMNS, IndexPart
from internvl_core.errors import DiskFull

HEADER_FILE = "index.json"
PROBLEMS_FILE = "problems.jsonl"
# Beyond it the table of a check counts but does not quote.
MAX_PROBLEMS = 100_000
_STALE_BUILD_S = 24 * 3600


def find_newest(folder: Path, key: str) -> Path | None:
    """Find the newest published generation of an index."""
    published = [path.parent for path in folder.glob(f"{key}.*/{HEADER_FILE}")]
    return max(published, key=get_generation, default=None)


def get_generation(directory: Path) -> int:
    return int(directory.name.rpartition(".")[2])


@contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """Give a folder to write the files into; it is published as `directory` when the block ends well.

    If another builder was first, its files stay: they are the same.

    Raises:
        DiskFull: there is no room for it.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(directory.parent)
    building = directory.parent / f".building-{uuid.uuid4().hex}"
    building.mkdir()
    try:
        yield building
        for file in building.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            building.rename(directory)
        except OSError:
            if not (directory / HEADER_FILE).exists():
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{directory.parent}: no room for an index. Make room and run again.") from None
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_parts(directory: Path, parts: Iterable[IndexPart], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write the parts of a whole file; returns the header."""
    reasons: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    num_problems = 0
    with (directory / PROBLEMS_FILE).open("w", encoding="utf-8") as problems:
        for part in parts:
            for name, values in part.columns.items():
                columns[name].append(values)
            kinds.update(part.kinds)
            reasons.update(problem[1] for problem in part.problems)
            for line, reason, message in part.problems[: max(0, MAX_PROBLEMS - num_problems)]:
                problems.write(json.dumps({"line": line, "reason": reason, "message": message}) + "\n")
            num_problems += len(part.problems)
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    return write_columns(directory, arrays, reasons, kinds, settings)


def write_columns(
    directory: Path,
    arrays: Mapping[str, NDArray[Any]],
    reasons: Mapping[str, int],
    kinds: Mapping[str, int],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Write columns and header; returns the header."""
    for name, values in arrays.items():
        np.save(directory / f"{name}.npy", values, allow_pickle=False)
    header = {
        "num_lines": len(arrays["status"]),
        "num_blank": int((arrays["status"] == BLANK).sum()),
        "problems": dict(sorted(reasons.items())),
        "kinds": dict(sorted(kinds.items())),
        "num_tokens": int(arrays["tokens"].sum(dtype=np.int64)),
        "num_tiles": int(arrays["tiles"].sum(dtype=np.int64)),
        "settings": dict(settings),
    }
    (directory / HEADER_FILE).write_text(json.dumps(header, indent=2))
    return header


def _remove_stale(folder: Path) -> None:
    """Remove what builders that were killed left behind."""
    for building in folder.glob(".building-*"):
        with suppress(OSError):
            if time.time() - building.stat().st_mtime > _STALE_BUILD_S:
                shutil.rmtree(building, ignore_errors=True)
