"""Show one sample as an HTML page: find the line, take it apart, write it down."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_core.data.annotation import fetch_annotation
from internvl_core.data.encoding import Encoding
from internvl_core.data.meta import DatasetMeta, load_meta
from internvl_core.data.pixels import PixelRules
from internvl_core.data.records import MAX_LINE_BYTES, iter_lines
from internvl_core.errors import ArgumentError, DataError, Reason
from internvl_core.inspection.sample_view import view_sample
from internvl_core.inspection.show_job import ShowJob, ShowReport
from internvl_core.inspection.show_page import write_page
from internvl_core.inspection.tokenizer_source import count_tokens_per_tile, load_encoder


def run_show(content: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job as a process is given it, and report."""
    return show(ShowJob.from_json(content)).to_json()


def show(job: ShowJob) -> ShowReport:
    """Write the page of one record.

    Raises:
        ArgumentError: no such data set or line, or a wrong argument.
        DataError: the meta file is wrong, or the line too long to be a record.
    """
    cache_dir = Path(job.cache_dir).expanduser()
    values = job.meta.values
    meta = find_dataset(load_meta(job.meta.meta_path), job.dataset, where=job.meta.meta_path)
    raw = read_line(fetch_annotation(meta.annotation, cache_dir), job.line, shown_as=meta.annotation)
    encoding = Encoding.from_arguments(
        values,
        encoder=load_encoder(job.meta.source, cache_dir) if job.meta.source else None,
        tokens_per_tile=count_tokens_per_tile(job.meta.source, values, cache_dir),
    )
    view = view_sample(
        meta,
        job.line,
        raw,
        encoding=encoding.for_dataset(meta),
        rules=PixelRules.from_arguments(values),
        seed=values["seed"] if values["data_seed"] is None else values["data_seed"],
        max_seq_length=values["max_seq_length"],
        max_tiles=job.meta.max_tiles,
    )
    path = Path(job.out_path or f"{meta.name.replace('/', '-')}-{job.line}.html").absolute()
    try:
        write_page(path, view, encoding.for_dataset(meta))
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be written: {error.strerror}. Name another file with --out.") from None
    return ShowReport(str(path), str(view.problems[0]) if view.problems else None)


def find_dataset(metas: list[DatasetMeta], name: str | None, *, where: str) -> DatasetMeta:
    """Find a data set by name, or the only one.

    Raises:
        ArgumentError: there is none of that name, or none was named and there are several.
    """
    names = [meta.name for meta in metas]
    if name is None:
        if len(metas) == 1:
            return metas[0]
        raise ArgumentError(f"{where}: has {len(metas)} data sets. Name one with --dataset: {', '.join(names)}.")
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)
        raise ArgumentError(f"{where}: no data set {name!r}. Nearest: {nearest[0]!r}. It has {', '.join(names)}.")
    return metas[names.index(name)]


def read_line(path: Path, number: int, *, shown_as: str) -> bytes:
    """Read one line of a file, from 1.

    Raises:
        ArgumentError: the file has not so many, or the line is blank.
        DataError: the line is too long to be a record.
    """
    count = 0
    with path.open("rb") as file:
        for count, line in enumerate(iter_lines(file), start=1):
            if count == number:
                if not line.strip():
                    raise ArgumentError(f"{shown_as}:{number}: is a blank line, which is skipped. Choose another.")
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{shown_as}:{number}: more than {MAX_LINE_BYTES} bytes in one line; no more are read, and the "
                        "record is left out. Choose another.",
                        reason=Reason.LINE_TOO_LONG,
                    )
                return line
    raise ArgumentError(f"{shown_as}: has {count} lines, so no line {number}. Choose one from 1 to {count}.")
