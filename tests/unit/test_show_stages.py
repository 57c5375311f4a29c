"""What the Prefect UI shows of a run, and that it can never fail one."""

import base64
import io
import json
import logging
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from rich.console import Console

from flows import console
from flows import stages as flow_stages
from flows.recipe import Recipe
from internvl_core.contract import CheckpointRef, StageResult
from internvl_core.errors import DataError, Stalled, WorkerLost
from tasks import show_progress
from tasks.show_progress import LogTail, StageProgress
from tasks.show_stages import show_stages, write_key, write_markdown
from tasks.stage_table import render_table, stage_rows
from tasks.stage_tries import FailedTry
from tasks.trained_stage import TrainedStage

URI = "file:///store/stage1-0/data/4"


def train() -> TrainedStage:
    result = StageResult(4, CheckpointRef(URI, "0" * 64), {"accuracy": 0.5}, {}, {"train": 2.0})
    return TrainedStage("stage1|x", result, is_skipped=False, metrics_path=Path("metrics.jsonl"))


@pytest.mark.parametrize(
    ("parts", "key"), [(("stages", "smoke"), "stages-smoke"), (("progress", "stage1.5_b"), "progress-stage1-5-b")]
)
def test_keys_are_of_the_letters_that_prefect_takes(parts: tuple[str, ...], key: str) -> None:
    assert write_key(*parts) == key


def test_the_table_has_a_row_a_stage_and_links_below() -> None:
    lines = write_markdown([train()], {"MLflow": "http://m/1", "Store": "file:///store"}).splitlines()
    assert lines[0].startswith("| stage | result | steps |")
    assert set(lines[1]) <= set("|-: ")
    assert lines[2].startswith(r"| stage1\|x | trained | 4 |")
    assert URI not in lines[2]
    assert lines[-3:] == [f"- stage1|x: `{URI}`", "- [MLflow](http://m/1)", "- Store: `file:///store`"]


def fail_before(stage: TrainedStage, *failed: FailedTry) -> TrainedStage:
    return replace(stage, failed_tries=failed)


def test_a_stage_that_was_tried_again_says_why_and_what_it_lost() -> None:
    lost, stalled = FailedTry(WorkerLost("x"), 40, 28), FailedTry(Stalled("x"), None, None)
    (row,) = stage_rows([fail_before(train(), lost, stalled)])
    assert row[1] == "trained, 3 tries (WorkerLost at step 40, 12 steps lost; Stalled)"
    (row,) = stage_rows([fail_before(train(), *[stalled] * 9, lost)])
    assert row[1] == "trained, 11 tries (...; Stalled; Stalled; WorkerLost at step 40, 12 steps lost)"
    (row,) = stage_rows([replace(train(), is_skipped=True)])
    assert row[1] == "skipped"


def test_the_terminal_has_room_for_the_number_of_tries_only() -> None:
    metrics = {"first_loss": 3.0, "last_loss": 1.0, "accuracy": 0.5, "tokens_per_s": 4321}
    counters = {"trainable_parameters": 12_480, "total_parameters": 312_480}
    result = StageResult(1234, CheckpointRef(URI, "0" * 64), metrics, counters, {"train": 14.0})
    stage = TrainedStage("finetune", result, is_skipped=False, metrics_path=Path("metrics.jsonl"))
    written = io.StringIO()
    Console(width=80, force_terminal=False, file=written).print(
        render_table([fail_before(stage, *[FailedTry(WorkerLost("x"), 40, 28)] * 100)])
    )
    last_line = written.getvalue().splitlines()[-1]
    assert last_line.split()[:5] == ["finetune", "try", "101", "1,234", "12.5k"]


def test_the_losses_are_a_picture_that_needs_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("tasks.show_stages.create_markdown_artifact", lambda markdown, **_: shown.append(markdown))
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "time": step, "loss": 9 / step}) + "\n" for step in (1, 2, 3)))
    show_stages("smoke", [replace(train(), metrics_path=path)], links={})
    (encoded,) = re.findall(r"^!\[Training loss\]\(data:image/svg\+xml;base64,(\S+)\)$", shown[0], re.MULTILINE)
    svg = base64.b64decode(encoded).decode()
    assert set(re.findall(r"var\((--[\w-]+)\)", svg)) <= set(re.findall(r"(--[\w-]+):#", svg))


def test_a_server_that_refuses_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no server")

    monkeypatch.setattr("tasks.show_stages.create_markdown_artifact", refuse)
    show_stages("smoke", [train()], links={})
    assert "RuntimeError: no server" in caplog.text


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record what Prefect is told, and let the clock stand still."""
    told: list[float] = []

    def create(progress: float, **_: Any) -> Any:
        told.append(progress)
        return uuid4()

    monkeypatch.setattr(show_progress, "create_progress_artifact", create)
    monkeypatch.setattr(show_progress, "update_progress_artifact", lambda _, progress: told.append(progress))
    monkeypatch.setattr(show_progress, "get_run_logger", lambda: logging.getLogger("progress"))
    monkeypatch.setattr(show_progress.time, "monotonic", lambda: 1000.0)
    return told


def show(progress: StageProgress, *steps: int, age_s: float = 0) -> None:
    values = {"max_steps": 40, "loss": 1.0, "tokens_per_s": 10.0, "eta_s": 1.0, "time": time.time() - age_s}
    for step in steps:
        progress.show({"step": step, **values})


def test_progress_is_told_at_a_bounded_rate_and_at_the_end(bars: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        show(StageProgress("stage1"), *range(1, 41))
    assert bars == [2.5, 100]
    assert [line.split("loss")[0].split() for line in caplog.messages] == [
        ["stage1", "step", "1/40"],
        ["stage1", "step", "40/40"],
    ]


def test_a_resumed_stage_says_from_where_and_tells_no_old_steps(
    bars: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    progress = StageProgress("stage1")
    with caplog.at_level(logging.INFO):
        show(progress, 10, 20, age_s=3600)
        assert bars == []
        show(progress, 30)
    assert bars == [75]
    assert [line.split("loss")[0].split() for line in caplog.messages] == [
        ["stage1:", "resumed", "from", "step", "20"],
        ["stage1", "step", "30/40"],
    ]


def test_a_bar_that_cannot_be_drawn_is_given_up_after_one_warning(
    bars: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no server")

    monkeypatch.setattr(show_progress, "create_progress_artifact", refuse)
    progress = StageProgress("stage1")
    show(progress, 1, 2, 3)
    assert caplog.text.count("No progress bar in the Prefect UI") == 1


def test_what_ranks_log_is_sent_in_few_records_that_no_terminal_shows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    # Not the module's own function: other threads tell the time too.
    monkeypatch.setattr(show_progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(show_progress, "get_run_logger", lambda: logging.getLogger("log tail"))
    unread = ["", "one\ntwo", "three", "four"]
    tail = LogTail(lambda: unread.pop(0))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            tail.show()
        assert unread == ["three", "four"]
        now[0] += show_progress.LOG_INTERVAL_S
        tail.show()
        tail.show()
        # A stage that is over has no time to wait for.
        LogTail(lambda: unread.pop(0)).show()
    sent = [record for record in caplog.records if record.name == "log tail"]
    assert [record.getMessage() for record in sent] == ["one\ntwo", "three", "four"]
    assert not any(map(console._is_for_people, sent))


def test_a_report_that_cannot_be_written_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = {"name": "stage1", "entry": "pretrain", "arguments": {"model_name_or_path": "m"}}
    (tmp_path / "report.html").mkdir()
    recipe = Recipe.model_validate({"name": "small", "workspace": str(tmp_path), "stages": [stage]})
    result = flow_stages.RecipeResult(recipe, data=[], trained=[train()])
    monkeypatch.setattr(flow_stages, "show_stages", lambda *_, **__: None)

    class Tracker:
        address = "sqlite:///mlflow.db"

    with pytest.raises(DataError, match=r"a\.jsonl:3"), flow_stages._report(result, Tracker()):  # type: ignore[arg-type]
        raise DataError("a.jsonl:3: no image")
    assert "the report could not be written" in caplog.text
