import json
from pathlib import Path

from internvl_core.train.metrics import MetricsFile


def write(path: Path, *steps: int) -> MetricsFile:
    metrics = MetricsFile(path)
    for step in steps:
        metrics.append(step=step, max_steps=9, loss=1.0 / step)
    return metrics


def test_each_line_is_an_object_with_its_step_and_time(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 1, 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["max_steps"], line["loss"]) for line in lines] == [(1, 9, 1.0), (2, 9, 0.5)]
    assert lines[0]["time"] <= lines[1]["time"]


def test_a_file_that_was_never_written_is_an_empty_curve(tmp_path: Path) -> None:
    assert MetricsFile(tmp_path / "metrics.jsonl").read() == []


def test_an_attempt_continues_the_curve_up_to_the_step_it_resumes_from(tmp_path: Path) -> None:
    write(tmp_path / "earlier.jsonl", 1, 2, 3, 4)
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.continue_from(tmp_path / "earlier.jsonl", step=2)
    metrics.append(step=3, max_steps=9, loss=7.0)
    assert [(line["step"], line["loss"]) for line in metrics.read()] == [(1, 1.0), (2, 0.5), (3, 7.0)]


def test_an_attempt_without_a_curve_to_continue_begins_an_empty_one(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", 5)
    metrics.continue_from(tmp_path / "missing.jsonl", step=2)
    assert metrics.read() == []
