"""The parts of the report that people unfold."""

import json
from pathlib import Path
from typing import Any

from internvl_core.contract import EXAMPLES_FILE, STAGE_FILE, CheckpointRef, StageResult
from internvl_core.inspection.lint_report import DatasetReport, MetaReport
from tasks.report_details import write_answers, write_arguments, write_data
from tasks.trained_stage import TrainedStage

PICTURE = "data:image/jpeg;base64,/9j/4AAQ"


def make_stage(folder: Path, name: str, **files: Any) -> TrainedStage:
    attempt_dir = folder / name
    attempt_dir.mkdir()
    for file, content in files.items():
        (attempt_dir / {"examples": EXAMPLES_FILE, "stage": STAGE_FILE}[file]).write_text(json.dumps(content))
    result = StageResult(4, CheckpointRef("file:///store/x", "0" * 64), {}, {}, {})
    return TrainedStage(name, result, is_skipped=False, metrics_path=attempt_dir / "metrics.jsonl")


def make_example(**changes: Any) -> dict[str, Any]:
    example = {"sample_id": "digit:3", "question": "Which?", "expected": "seven", "answer": "one", "is_right": False}
    return {**example, "picture": PICTURE, **changes}


def test_answers_are_shown_with_what_was_expected_where_they_are_wrong(tmp_path: Path) -> None:
    examples = [make_example(), make_example(is_right=True, answer="seven", picture=None)]
    page = write_answers([make_stage(tmp_path, "stage2", examples={"version": 1, "examples": examples})])
    assert "stage2: 1 right and 1 wrong ones shown" in page
    assert page.count("<dt>expected</dt><dd>seven</dd>") == 1
    assert page.count(f'<img alt="" src="{PICTURE}">') == 1


def test_only_the_answers_of_the_last_stage_are_open(tmp_path: Path) -> None:
    content = {"version": 1, "examples": [make_example()]}
    page = write_answers([make_stage(tmp_path, name, examples=content) for name in ("stage1", "stage2")])
    assert page.index("<details><summary>stage1") < page.index("<details open><summary>stage2")


def test_nothing_that_a_model_or_a_record_says_becomes_markup(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    example = make_example(sample_id=evil, question=evil, expected=evil, answer=evil, picture=f"{PICTURE}{evil}")
    page = write_answers([make_stage(tmp_path, "stage2", examples={"version": 1, "examples": [example]})])
    assert "<script" not in page
    assert "<img" not in page


def test_arguments_are_those_that_differ_from_their_defaults_without_passwords(tmp_path: Path) -> None:
    given = {"max_steps": 40, "seed": 42, "output_dir": "/somewhere", "meta_path": "https://user:pa55@host/meta.json"}
    page = write_arguments([make_stage(tmp_path, "stage1", stage={"version": 1, "arguments": given})])
    assert "<summary>stage1: 2</summary>" in page
    assert "max_steps" in page
    assert "seed" not in page
    assert "https://host/meta.json" in page
    assert "pa55" not in page


def test_a_stage_of_another_machine_leaves_no_empty_section(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, "stage1")
    assert (write_answers([stage]), write_arguments([stage]), write_data([])) == ("", "", "")


def test_a_skipped_stage_shows_what_its_last_attempt_with_a_result_left(tmp_path: Path) -> None:
    for number, steps in ((1, 40), (9, 60), (10, 80)):
        attempt_dir = tmp_path / str(number)
        attempt_dir.mkdir()
        (attempt_dir / STAGE_FILE).write_text(json.dumps({"arguments": {"max_steps": steps}}))
        if steps < 80:
            (attempt_dir / "result.json").write_text("{}")
    result = StageResult(4, CheckpointRef("file:///store/x", "0" * 64), {}, {}, {})
    page = write_arguments([TrainedStage("stage1", result, is_skipped=True, metrics_path=tmp_path / "metrics.jsonl")])
    assert "<code>60</code>" in page


def test_data_sets_are_listed_with_their_problems(tmp_path: Path) -> None:
    dataset = DatasetReport("pets <b>", "pets.jsonl", error="pets.jsonl: no such file.")
    page = write_data([MetaReport("stage1", "/data/meta.json", False, 128, 0.0, [dataset])])
    assert "<h3>stage1</h3>" in page
    assert "pets &lt;b&gt;: cannot be used: pets.jsonl: no such file." in page
