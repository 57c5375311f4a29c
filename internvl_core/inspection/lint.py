"""Look through data sets before anything is trained: index every record, decode a pick of the media.

A record is judged by the index alone, so the cost is that of the index, which training needs anyway.
What is reported is bounded, however many records there are and however many of them are bad.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_core.data.encoding import Encoding
from internvl_core.data.index import DatasetIndex, open_index
from internvl_core.data.index_build import SAMPLE, STATUS
from internvl_core.data.index_mend import mend_index
from internvl_core.data.meta import DatasetMeta, load_meta
from internvl_core.data.records import MAX_LINE_BYTES
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.errors import DataError
from internvl_core.inspection.lint_report import (
    ALL_MEDIA,
    NUM_LINES_SHOWN,
    DatasetReport,
    Finding,
    LintJob,
    LintReport,
    MediaReport,
    MetaJob,
    MetaReport,
    TokenizerSource,
)
from internvl_core.inspection.tokenizer_source import count_tokens_per_tile, load_encoder

logger = logging.getLogger(__name__)

# Of a part of the rows, so that ten million do not become ten million numbers of eight bytes.
_BLOCK_ROWS = 1 << 20


def preload() -> None:
    """Import what nearly every job needs for its tokenizer and its media, which takes seconds."""
    from transformers import AutoTokenizer  # noqa: F401

    import internvl_core.inspection.lint_media  # noqa: F401


def run_lint(content: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job as a process is given it, and report."""
    return lint(LintJob.from_json(content)).to_json()


def lint(job: LintJob) -> LintReport:
    """Index and look through all data sets of a job.

    What several meta files share, under equal settings, is looked at once.

    Raises:
        DataError: a meta file is wrong.
        ArgumentError: a tokenizer or an argument is.
    """
    linter = _Linter(job)
    return LintReport([linter.lint_meta(meta) for meta in job.metas])


class _Linter:
    def __init__(self, job: LintJob) -> None:
        self._job = job
        self._cache_dir = Path(job.cache_dir).expanduser()
        self._encoders: dict[TokenizerSource, TextEncoder] = {}
        self._media: dict[tuple[Path, str], MediaReport] = {}
        self._repeated: dict[Path, int] = {}

    def lint_meta(self, job: MetaJob) -> MetaReport:
        encoding = self._build_encoding(job)
        return MetaReport(
            title=job.title,
            meta_path=job.meta_path,
            is_held_out=job.is_held_out,
            max_seq_length=job.values["max_seq_length"],
            max_bad_fraction=job.values["max_bad_fraction"],
            datasets=[self._lint_dataset(meta, encoding, job) for meta in load_meta(job.meta_path)],
            max_tiles=job.max_tiles,
        )

    def _build_encoding(self, job: MetaJob) -> Encoding:
        if job.source is not None and job.source not in self._encoders:
            self._encoders[job.source] = load_encoder(job.source, self._cache_dir)
        tokens_per_tile = count_tokens_per_tile(job.source, job.values, self._cache_dir)
        encoder = self._encoders[job.source] if job.source else None
        return Encoding.from_arguments(job.values, encoder=encoder, tokens_per_tile=tokens_per_tile)

    def _open_index(self, meta: DatasetMeta, encoding: Encoding) -> DatasetIndex:
        index = open_index(meta, encoding, self._cache_dir)
        if mend_index(index, encoding.for_dataset(meta)) == index.directory:
            return index
        return open_index(meta, encoding, self._cache_dir)

    def _lint_dataset(self, meta: DatasetMeta, encoding: Encoding, job: MetaJob) -> DatasetReport:
        known = _list_indexes(self._cache_dir)
        started = time.monotonic()
        try:
            index = self._open_index(meta, encoding)
        except DataError as error:
            return DatasetReport(meta.name, meta.annotation, error=str(error))
        seconds = time.monotonic() - started
        has_tokens = encoding.encoder is not None
        # A held-out question is asked however long it is.
        max_tokens = job.values["max_seq_length"] if has_tokens and not job.is_held_out else None
        too_long, too_many_tiles = _find_too_large(index, max_tokens, job.max_tiles)
        return DatasetReport(
            name=meta.name,
            annotation=meta.annotation,
            num_records=index.num_records,
            num_samples=index.num_samples,
            num_tokens=_sum(index.tokens) if has_tokens else None,
            max_tokens=int(index.tokens.max(initial=0)) if has_tokens else None,
            num_too_long=None if max_tokens is None else too_long.count,
            too_long_lines=too_long.lines,
            num_too_many_tiles=None if job.max_tiles is None else too_many_tiles.count,
            too_many_tiles_lines=too_many_tiles.lines,
            num_tiles=_sum(index.tiles),
            kinds=dict(index.kind_counts),
            findings=_list_findings(index),
            media=self._decode(index, encoding, job),
            num_repeated_ids=self._count_repeated_ids(index),
            index_dir=str(index.directory),
            is_built=index.directory.name not in known,
            seconds=seconds,
            size_bytes=int(index.offsets[-1]),
        )

    def _decode(self, index: DatasetIndex, encoding: Encoding, job: MetaJob) -> MediaReport | None:
        if not self._job.num_media:
            return None
        if not index.tiles.any():
            return MediaReport(0, 0, [])
        # Brings torch along, which data sets of text do without; in a run that is done already.
        from internvl_core.data.pixels import PixelRules
        from internvl_core.inspection.lint_media import MediaCheck

        check = MediaCheck(index, encoding.for_dataset(index.meta), PixelRules.from_arguments(job.values))
        key = (index.directory, repr(check.rules))
        if key not in self._media:
            is_full = self._job.num_media == ALL_MEDIA
            self._media[key] = check.decode_all() if is_full else check.decode_some(self._job.num_media)
        return self._media[key]

    def _count_repeated_ids(self, index: DatasetIndex) -> int | None:
        if not self._job.counts_ids:
            return None
        path = index.annotation.path
        if path not in self._repeated:
            self._repeated[path] = count_repeated_ids(path, index.num_lines)
        return self._repeated[path]


def count_repeated_ids(path: Path, num_lines: int) -> int:
    """Count records with the id of an earlier record; those without an id have none to repeat.

    Holds 8 bytes a line: ids are compared by a 64-bit hash, at which 10 million of them make a wrong
    pair once in 400,000 files.
    """
    hashes = np.empty(num_lines, np.int64)
    count = 0
    with path.open("rb") as file:
        # A longer line is no record; its pieces are none either.
        for line in iter(partial(file.readline, MAX_LINE_BYTES + 1), b""):
            try:
                identity = json.loads(line).get("id")
            except (ValueError, AttributeError, RecursionError):
                continue  # No record at all, and told as such.
            if identity is not None and count < num_lines:
                hashes[count] = hash(json.dumps(identity))
                count += 1
    hashes[:count].sort()
    return int((hashes[1:count] == hashes[: max(0, count - 1)]).sum())


def _list_findings(index: DatasetIndex) -> list[Finding]:
    examples: dict[str, str] = {}
    for problem in index.iter_problems():
        examples.setdefault(problem.reason.value, problem.message)
        if len(examples) == len(index.problem_counts):
            break
    return [
        Finding(reason.value, count, _find_lines(index.status, STATUS[reason]), examples.get(reason.value, ""))
        for reason, count in index.problem_counts.items()
    ]


def _find_lines(status: NDArray[np.uint8], value: int) -> list[int]:
    lines: list[int] = []
    for start in range(0, len(status), _BLOCK_ROWS):
        found = np.flatnonzero(status[start : start + _BLOCK_ROWS] == value)[: NUM_LINES_SHOWN - len(lines)]
        lines += (found + start + 1).tolist()
        if len(lines) == NUM_LINES_SHOWN:
            break
    return lines


@dataclass
class _Lines:
    """Lines of one kind: how many, and the first of them."""

    count: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, is_found: NDArray[np.bool_], start: int) -> None:
        self.count += int(is_found.sum())
        self.lines += (np.flatnonzero(is_found)[: NUM_LINES_SHOWN - len(self.lines)] + start + 1).tolist()


def _find_too_large(index: DatasetIndex, max_tokens: int | None, max_tiles: int | None) -> tuple[_Lines, _Lines]:
    """Find samples that are too long, and others that have too many tiles, as the mixture leaves them out."""
    too_long, too_many_tiles = _Lines(), _Lines()
    for start in range(0, index.num_lines, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        is_left = index.status[block] == SAMPLE
        if max_tokens is not None:
            is_long = index.tokens[block] > max_tokens
            too_long.add(is_left & is_long, start)
            is_left &= ~is_long
        if max_tiles is not None:
            too_many_tiles.add(is_left & (index.tiles[block] > max_tiles), start)
    return too_long, too_many_tiles


def _sum(column: NDArray[Any]) -> int:
    return int(column.sum(dtype=np.int64))


def _list_indexes(cache_dir: Path) -> set[str]:
    folder = cache_dir / "index"
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
