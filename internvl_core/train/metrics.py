"""metrics.jsonl: one line a log step, read by the task while training goes on, and the stage's loss curve."""

import json
import time
from pathlib import Path
from typing import Any


class MetricsFile:
    """Append-only file of log steps; only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *, step: int, max_steps: int, **values: float) -> None:
        line = {"step": step, "max_steps": max_steps, "time": time.time(), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def continue_from(self, earlier: Path, *, step: int) -> None:
        """Begin with the lines of an earlier attempt, up to the step that is resumed from."""
        lines = [line for line in _read(earlier) if line["step"] <= step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read(self) -> list[dict[str, Any]]:
        return _read(self.path)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
