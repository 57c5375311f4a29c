"""Runs whose steps go wrong (fakes/faulty_steps.py), and what they leave to look at."""

import json
from pathlib import Path
from typing import Any

from stage_runs import Attempt, run

FAULTY_STEPS = Path(__file__).parent / "fakes" / "faulty_steps.py"


def run_faulty(directory: Path, arguments: dict[str, Any], faults: dict[str, Any], **options: Any) -> Attempt:
    ranks = [str(FAULTY_STEPS), options.get("entry", "finetune"), json.dumps(faults)]
    return run(directory, arguments, ranks=ranks, **options)


def find_changed(attempt: Attempt, rank: int) -> dict[int, bool]:
    """Say for each step whether it changed a bit of what the rank holds: weights, masters, moments, step counts."""
    lines = (attempt.directory / f"state-{rank}.jsonl").read_text().splitlines()
    return {line["step"]: line["before"] != line["after"] for line in map(json.loads, lines)}
