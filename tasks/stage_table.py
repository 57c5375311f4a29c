"""The table of a run, a row a stage: the one place that says which columns there are and how they read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table

from tasks.trained_stage import TrainedStage

MISSING = "–"

_MAX_TOLD_TRIES = 3


@dataclass(frozen=True)
class Column:
    """A column: its heading, and how to write a stage's cell."""

    title: str
    write_cell: Callable[[TrainedStage], str]
    is_number: bool = True
    is_wide: bool = False
    """Too long for a terminal's table."""
    write_short: Callable[[TrainedStage], str] | None = None
    """Writes the cell of a terminal's table, where the other is too long."""


def stage_rows(stages: Sequence[TrainedStage]) -> list[list[str]]:
    """Write the cells of each stage, in the order of `COLUMNS`; a dash where a stage did not report."""
    return [[column.write_cell(stage) for column in COLUMNS] for stage in stages]


def render_table(stages: Sequence[TrainedStage]) -> Table:
    """Draw the table for a terminal.

    Checkpoint URIs are not in it: a terminal would cut them. List them below.
    """
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [column for column in COLUMNS if not column.is_wide]
    for column in shown:
        # Headings on two lines: so the table of the shipped recipes fits 80 columns.
        heading = column.title.replace(" ", "\n", 1)
        justify: Literal["left", "right"] = "right" if column.is_number else "left"
        table.add_column(heading, justify=justify, vertical="bottom", no_wrap=column.is_number, overflow="fold")
    for stage in stages:
        table.add_row(*((column.write_short or column.write_cell)(stage) for column in shown))
    return table


def format_duration(seconds: float) -> str:
    """Write a duration with its two leading units."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_count(count: float) -> str:
    """Write a count in full up to ten thousand, else with three digits and k, M, G or T."""
    if count < 10_000:
        return f"{count:,.0f}"
    size = float(count)
    for unit in ("", "k", "M", "G"):
        if size < 999.5:
            return f"{size:.3g}{unit}"
        size /= 1000
    return f"{size:,.3g}T"


def _write_metric(name: str, form: str) -> Callable[[TrainedStage], str]:
    return lambda stage: _write_number(stage.result.metrics, name, form)


def _write_number(numbers: Mapping[str, float], name: str, form: str) -> str:
    return format(numbers[name], form) if name in numbers else MISSING


def _write_trainable(stage: TrainedStage) -> str:
    counters = stage.result.counters
    if "trainable_parameters" not in counters:
        return MISSING
    trainable = format_count(counters["trainable_parameters"])
    total = counters.get("total_parameters")
    return f"{trainable} of {format_count(total)}" if total else trainable


def _write_speed(stage: TrainedStage) -> str:
    speed = stage.result.metrics.get("tokens_per_s")
    return MISSING if speed is None else format_count(speed)


def _write_result(stage: TrainedStage) -> str:
    failed = stage.failed_tries
    if stage.is_skipped or not failed:
        return _write_short_result(stage)
    earlier = "...; " if len(failed) > _MAX_TOLD_TRIES else ""
    told = "; ".join(each.describe() for each in failed[-_MAX_TOLD_TRIES:])
    return f"trained, {len(failed) + 1} tries ({earlier}{told})"


def _write_short_result(stage: TrainedStage) -> str:
    if stage.is_skipped:
        return "skipped"
    # No longer than the other words: the table would not fit.
    return f"try {len(stage.failed_tries) + 1}" if stage.failed_tries else "trained"


def _write_seconds(stage: TrainedStage) -> str:
    return f"{stage.result.total_s:,.1f}" if stage.result.seconds else MISSING


COLUMNS = (
    Column("stage", lambda stage: stage.name, is_number=False),
    Column("result", _write_result, is_number=False, write_short=_write_short_result),
    Column("steps", lambda stage: f"{stage.result.step:,}"),
    Column("trainable parameters", _write_trainable),
    Column("first loss", _write_metric("first_loss", ".3f")),
    Column("last loss", _write_metric("last_loss", ".3f")),
    Column("accuracy", _write_metric("accuracy", ".3f")),
    Column("tokens per s", _write_speed),
    Column("seconds", _write_seconds),
    Column("checkpoint", lambda stage: stage.checkpoint.uri, is_number=False, is_wide=True),
)
