"""What the tracker was asked to record, on local disk until MLflow has it.

`events.jsonl` only grows: one line for each request, in order; `artifacts/` has the files that go
with them. `progress.json` says how far they, and the stages' metrics files, were delivered, and
into which MLflow runs. A line is in the file before the caller goes on, so it survives the death of
the process; delivery reads the files and nothing else, so it does not matter which process
delivers. Standard library only.
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from internvl_core.contract import write_json_atomically

ARTIFACTS_FOLDER = "artifacts"
EVENTS_FILE = "events.jsonl"
PROGRESS_FILE = "progress.json"
LOCK_FILE = "lock"

logger = logging.getLogger(__name__)


@dataclass
class StageDelivery:
    """How far one stage is delivered into its MLflow run."""

    name: str
    run_id: str
    metrics_path: str | None
    """The metrics file of the attempt that is going on; None once the stage is finished."""
    offsets: dict[str, int] = field(default_factory=dict)
    """Delivered bytes of each attempt's metrics file."""
    last_steps: dict[str, int] = field(default_factory=dict)
    """Last delivered step of each metric. An attempt that resumes from an older step repeats steps that are there."""
    final_metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Progress:
    """How far a spool is delivered, and where to. Belongs to one MLflow run: another one starts from zero."""

    experiment_id: str | None = None
    key: str = ""
    run_id: str | None = None
    event_offset: int = 0
    stages: dict[str, StageDelivery] = field(default_factory=dict)
    """By the stage's key."""


@dataclass(frozen=True)
class Backlog:
    """What is not delivered yet."""

    events: int
    rows: int


class TrackingSpool:
    """One directory with the events of one pipeline run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._events_path = directory / EVENTS_FILE
        self._progress_path = directory / PROGRESS_FILE

    def exists(self) -> bool:
        return self._events_path.exists()

    def append(self, kind: str, **content: Any) -> None:
        """Add an event, stamped with the time; one write, so a killed process leaves a whole line or a torn last one.

        There is no fsync here: a disk busy with a checkpoint would hold the caller. `sync` does it from the thread.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"kind": kind, "time": time.time(), **content}, default=str) + "\n"
        with self._events_path.open("a+b", buffering=0) as file:
            file.write(self._end_of_torn_line(file.fileno()) + line.encode())

    def keep(self, file: Path) -> str:
        """Copy a file into the spool, as it is now; returns its name there."""
        folder = self.directory / ARTIFACTS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / file.name)
        return file.name

    def find_kept(self, name: str) -> Path:
        """Name a file that was kept."""
        return self.directory / ARTIFACTS_FOLDER / name

    def sync(self) -> None:
        """Force the events to the disk, so that they survive the machine too."""
        if self.exists():
            with self._events_path.open("rb") as file:
                os.fsync(file.fileno())

    def iter_events(self, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield each complete event behind the offset, with the offset behind it; a torn line is passed over."""
        for line, end in _iter_lines(self._events_path, offset):
            event = _parse_object(line)
            if event is not None:
                yield event, end

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other deliveries of this spool out, in this process and others; the kernel frees it at death."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / LOCK_FILE).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def load_progress(self) -> Progress:
        """Load the progress; delivery starts from zero where there is none, which doubles nothing."""
        try:
            content = json.loads(self._progress_path.read_text())
        except FileNotFoundError:
            return Progress()
        stages = {key: StageDelivery(**stage) for key, stage in content.pop("stages").items()}
        return Progress(**content, stages=stages)

    def save_progress(self, progress: Progress) -> None:
        write_json_atomically(self._progress_path, asdict(progress))

    def count_backlog(self) -> Backlog:
        """Count the events, and the rows of metrics files, that are not delivered yet."""
        progress = self.load_progress()
        delivered = {path: offset for stage in progress.stages.values() for path, offset in stage.offsets.items()}
        paths = {stage.metrics_path for stage in progress.stages.values() if stage.metrics_path}
        events = [event for event, _ in self.iter_events(progress.event_offset)]
        paths |= {event["metrics_path"] for event in events if "metrics_path" in event}
        rows = sum(len(list(_iter_lines(Path(path), delivered.get(path, 0)))) for path in paths)
        return Backlog(events=len(events), rows=rows)

    def _end_of_torn_line(self, descriptor: int) -> bytes:
        size = os.fstat(descriptor).st_size
        return b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""


def read_rows(path: Path, offset: int, *, max_rows: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """Read the next complete rows of a metrics file and the offset behind them.

    A last line without its newline is still being written and stays for the next call. A line that
    is no JSON object with a step and a time is passed over, since no later call could mend it.
    """
    rows: list[dict[str, Any]] = []
    for line, end in _iter_lines(path, offset):
        row = _parse_object(line)
        if row is None or not _is_number(row.get("step")) or not _is_number(row.get("time")):
            logger.warning("%s: bytes %d-%d are no row of metrics. They are left out.", path, offset, end)
        else:
            rows.append(row)
        offset = end
        if len(rows) == max_rows:
            break
    return rows, offset


def _iter_lines(path: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield line, offset


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
