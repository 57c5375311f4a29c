"""The table of a meta file's data sets: the one place that says which columns there are and how they read."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rich import box
from rich.markup import escape
from rich.table import Table

from internvl_core.inspection.lint_report import DatasetReport, Finding, LintReport, MetaReport
from tasks.stage_table import MISSING, format_count

_KINDS = {"text": "text", "image": "image", "multi_image": "images", "video": "video"}


@dataclass(frozen=True)
class Column:
    """A column: its heading, and how to write a data set's cell."""

    title: str
    write_cell: Callable[[DatasetReport], str]
    is_number: bool = True


def list_distinct(report: LintReport) -> list[MetaReport]:
    """Join stages that read the same data in the same way under the titles of them all."""
    distinct: dict[tuple[object, ...], MetaReport] = {}
    for meta in report.metas:
        indexes = tuple(dataset.index_dir or dataset.annotation for dataset in meta.datasets)
        key = (indexes, meta.is_held_out, meta.max_seq_length, meta.max_tiles, meta.max_bad_fraction)
        known = distinct.get(key)
        distinct[key] = replace(known, title=f"{known.title}, {meta.title}") if known else meta
    return [
        replace(meta, title=f"{meta.title}, held out" if meta.is_held_out else meta.title) for meta in distinct.values()
    ]


def data_rows(meta: MetaReport) -> list[list[str]]:
    """Write the cells of each data set, in the order of `COLUMNS`; a dash where nothing is known."""
    return [[column.write_cell(dataset) for column in COLUMNS] for dataset in meta.datasets]


def render_data_table(meta: MetaReport) -> Table:
    """Draw the table for a terminal."""
    table = Table(
        title=escape(f"{meta.title}: {meta.meta_path}" if meta.title else meta.meta_path),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in COLUMNS:
        heading = column.title.replace(" ", "\n", 1)
        table.add_column(heading, justify="right" if column.is_number else "left", vertical="bottom", overflow="fold")
    for row in data_rows(meta):
        table.add_row(*map(escape, row))
    return table


def write_data_markdown(metas: list[MetaReport]) -> str:
    """Write all tables, each under its title, and their problems below."""
    return "\n\n".join(part for meta in metas for part in _iter_markdown(meta))


def iter_problem_lines(meta: MetaReport) -> Iterator[str]:
    """Describe every kind of problem of every data set: how many, where the first are, what is wrong in the first."""
    for dataset in meta.datasets:
        if dataset.error is not None:
            yield f"{dataset.name}: cannot be used: {dataset.error}"
            continue
        for finding in dataset.all_findings:
            yield _describe(dataset, finding)
        if dataset.num_too_long:
            yield (
                f"{dataset.name}: {dataset.num_too_long:,} × too long"
                f"{_tell_lines(dataset.too_long_lines, dataset.num_too_long)}: more than max_seq_length, "
                f"{meta.max_seq_length:,}; left out, which is no fault"
            )
        if dataset.num_too_many_tiles:
            yield (
                f"{dataset.name}: {dataset.num_too_many_tiles:,} × too many tiles"
                f"{_tell_lines(dataset.too_many_tiles_lines, dataset.num_too_many_tiles)}: more than "
                f"num_images_expected, {meta.max_tiles:,}; left out, which is no fault"
            )
        if dataset.num_repeated_ids:
            yield f"{dataset.name}: {dataset.num_repeated_ids:,} × id of an earlier record; ids need not differ"
        if not dataset.num_usable:
            yield f"{dataset.name}: nothing of it can be trained on"


def _iter_markdown(meta: MetaReport) -> Iterator[str]:
    yield f"**{meta.title}** {_quote(meta.meta_path)}"
    rows = [
        [column.title for column in COLUMNS],
        ["---:" if column.is_number else "---" for column in COLUMNS],
        *([_quote(name).replace("|", r"\|"), *numbers] for name, *numbers in data_rows(meta)),
    ]
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)
    problems = [f"- {_quote(line)}" for line in iter_problem_lines(meta)]
    if problems:
        yield "\n".join(problems)


def _quote(text: str) -> str:
    """Write text of others as code, in which a browser finds neither markup nor a link."""
    line = " ".join(text.splitlines())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def _describe(dataset: DatasetReport, finding: Finding) -> str:
    reason = finding.reason.replace("_", " ")
    example = f": {finding.example}" if finding.example else ""
    return f"{dataset.name}: {finding.count:,} × {reason}{_tell_lines(finding.lines, finding.count)}{example}"


def _tell_lines(lines: list[int], count: int) -> str:
    if not lines:
        return ""
    more = ", ..." if count > len(lines) else ""
    return f" (line{'s' if count > 1 else ''} {', '.join(map(str, lines))}{more})"


def _write_count(count: int | None) -> str:
    return MISSING if count is None else format_count(count)


def _write_too_large(dataset: DatasetReport) -> str:
    is_known = dataset.num_too_long is not None or dataset.num_too_many_tiles is not None
    return _write_count(dataset.num_too_large if is_known else None)


def _write_kinds(dataset: DatasetReport) -> str:
    return " ".join(_KINDS[kind] for kind in dataset.kinds) or MISSING


def _write_media(dataset: DatasetReport) -> str:
    if dataset.media is None or not dataset.media.num_with_media:
        return MISSING
    return f"{dataset.media.num_decoded - dataset.media.num_failed:,} of {dataset.media.num_decoded:,}"


COLUMNS = (
    Column("data set", lambda dataset: dataset.name, is_number=False),
    Column("kinds", _write_kinds, is_number=False),
    Column("records", lambda dataset: MISSING if dataset.error else f"{dataset.num_records:,}"),
    Column("bad", lambda dataset: MISSING if dataset.error else f"{dataset.num_bad:,}"),
    Column("too large", _write_too_large),
    Column("tokens", lambda dataset: _write_count(dataset.num_tokens)),
    Column("longest", lambda dataset: _write_count(dataset.max_tokens)),
    Column("tiles", lambda dataset: MISSING if dataset.error else format_count(dataset.num_tiles)),
    Column("media decoded", _write_media),
)
