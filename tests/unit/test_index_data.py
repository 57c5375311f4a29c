"""What is refused before stage 1, and which tokenizer each stage's data are counted with."""

from pathlib import Path
from typing import Any

import pytest

from internvl_core.inspection.lint_report import (
    DatasetReport,
    Finding,
    LintReport,
    MediaReport,
    MetaReport,
    TokenizerSource,
)
from tasks.data_jobs import list_meta_jobs
from tasks.data_table import iter_problem_lines, list_distinct, render_data_table, write_data_markdown
from tasks.index_data import iter_refusals
from tasks.stage import Stage

BAD = Finding("record", 2, [3, 9], "unknown key 'x'.")


def build_report(*, num_records: int = 1000, num_bad: int = 0, num_too_long: int = 0, **changes: Any) -> DatasetReport:
    return DatasetReport(
        "pets",
        "pets.jsonl",
        num_records=num_records,
        num_samples=num_records - num_bad,
        num_too_long=num_too_long,
        findings=[Finding("record", num_bad, [3], "unknown key 'x'.")] if num_bad else [],
        **changes,
    )


def build_meta(
    *datasets: DatasetReport, max_bad_fraction: float = 0.01, is_held_out: bool = False, title: str = "stage1"
) -> MetaReport:
    return MetaReport(title, "meta.json", is_held_out, 4096, max_bad_fraction, list(datasets))


def decode(*, failed: int, tried: int, of: int = 100_000) -> MediaReport:
    return MediaReport(of, tried, [Finding("missing", failed, [7], "a.png: no such file.")] if failed else [])


def refuse(dataset: DatasetReport, **changes: Any) -> list[str]:
    return list(iter_refusals(build_meta(dataset, **changes)))


# --- refusals


@pytest.mark.parametrize(("num_bad", "max_bad_fraction", "is_refused"), [(10, 0.01, 0), (11, 0.01, 1), (1, 0.0, 1)])
def test_bad_records_are_borne_up_to_their_share(num_bad: int, max_bad_fraction: float, is_refused: int) -> None:
    problems = refuse(build_report(num_bad=num_bad), max_bad_fraction=max_bad_fraction)
    assert len(problems) == is_refused
    for problem in problems:
        assert problem.startswith(f"stage1: dataset 'pets': {num_bad} of 1000 records are bad, max_bad_fraction is ")
        assert "pets.jsonl:3: unknown key 'x'" in problem


def test_a_held_out_set_bears_nothing_bad() -> None:
    (problem,) = refuse(build_report(num_bad=1), max_bad_fraction=0.5, is_held_out=True)
    assert "held out, and pets.jsonl:3: unknown key 'x'. All must be good." in problem
    (problem,) = refuse(build_report(media=decode(failed=1, tried=8)), max_bad_fraction=0.5, is_held_out=True)
    assert "pets.jsonl:7: a.png: no such file" in problem


def test_a_data_set_of_which_nothing_is_left_is_refused() -> None:
    (problem,) = refuse(build_report(num_records=5, num_too_long=5))
    assert (
        problem == "stage1: dataset 'pets': nothing of pets.jsonl can be trained on. 5 are longer than max_seq_length."
    )
    (problem,) = refuse(build_report(num_records=5, num_too_long=2, num_too_many_tiles=3))
    assert problem.endswith("2 are longer than max_seq_length. 3 have more tiles than num_images_expected.")
    (problem,) = refuse(build_report(num_records=5, num_bad=5), max_bad_fraction=1.0)
    assert problem.endswith("can be trained on. pets.jsonl:3: unknown key 'x'.")


def test_a_data_set_that_cannot_be_read_is_refused() -> None:
    assert refuse(DatasetReport("pets", "pets.jsonl", error="holds no record.")) == [
        "stage1: dataset 'pets': holds no record."
    ]


def test_over_long_samples_are_borne() -> None:
    assert refuse(build_report(num_too_long=999)) == []


@pytest.mark.parametrize(
    ("failed", "tried", "of", "max_bad_fraction", "is_refused"),
    [
        (0, 8, 1000, 0.01, False),
        (1, 8, 1000, 0.01, False),  # bad luck, with 8 in 100
        (2, 8, 1000, 0.01, True),
        (1, 8, 1000, 0.0, True),
        (1, 1, 1000, 0.5, True),  # nothing that was tried is good
        (8, 8, 1000, 0.3, True),
        (4, 8, 8, 0.5, False),  # all of it was tried: the share is known
        (5, 8, 8, 0.5, True),
        (5, 8, 1000, 0.5, False),
    ],
)
def test_a_pick_of_the_media_speaks_for_all_with_care(
    failed: int, tried: int, of: int, max_bad_fraction: float, is_refused: bool
) -> None:
    media = decode(failed=failed, tried=tried, of=of)
    assert bool(refuse(build_report(media=media), max_bad_fraction=max_bad_fraction)) == is_refused


# --- tables


def test_problems_are_told_with_their_lines_and_the_first_in_full() -> None:
    dataset = DatasetReport(
        "pets", "pets.jsonl", num_records=9, num_samples=7, num_too_long=1, too_long_lines=[4], findings=[BAD]
    )
    assert list(iter_problem_lines(build_meta(dataset))) == [
        "pets: 2 × record (lines 3, 9): unknown key 'x'.",
        "pets: 1 × too long (line 4): more than max_seq_length, 4,096; left out, which is no fault",
    ]


def test_a_table_writes_no_cell_as_markup() -> None:
    dataset = DatasetReport("[red]|pets", "pets.jsonl", num_records=9, num_samples=9)
    assert r"| `[red]\|pets` |" in write_data_markdown([build_meta(dataset)])
    assert list(render_data_table(build_meta(dataset)).columns[0].cells) == [r"\[red]|pets"]


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("<img src=x onerror=alert(1)> a|b", "`pets: 1 × record (line 3): <img src=x onerror=alert(1)> a|b`"),
        ("`</code><b>``", "``` pets: 1 × record (line 3): `</code><b>`` ```"),
        ("a\n\n# b\r<b>", "`pets: 1 × record (line 3): a  # b <b>`"),
    ],
)
def test_text_of_records_is_quoted_in_markdown(text: str, quoted: str) -> None:
    findings = [Finding("record", 1, [3], text)]
    dataset = DatasetReport("pets", "pets.jsonl", num_records=9, num_samples=8, findings=findings)
    assert write_data_markdown([build_meta(dataset)]).endswith(f"\n\n- {quoted}")


def test_stages_that_read_the_same_data_alike_share_a_table() -> None:
    dataset = build_report(index_dir="/cache/index/1")
    report = LintReport(
        [
            build_meta(dataset),
            build_meta(dataset, title="stage2"),
            build_meta(dataset, title="stage2", is_held_out=True),
            build_meta(build_report(index_dir="/cache/index/2"), title="finetune"),
        ]
    )
    assert [meta.title for meta in list_distinct(report)] == ["stage1, stage2", "stage2, held out", "finetune"]


# --- the stages' tokenizers


def build_stage(name: str, *, start_from: str | None = None, **arguments: Any) -> Stage:
    given = {"conv_style": "internvl2_5", "meta_path": f"/data/{name}.json", **arguments}
    return Stage(name=name, entry="pretrain", arguments=given, start_from=start_from)


def test_a_stage_has_the_tokenizer_of_its_start_or_of_the_stage_before() -> None:
    stages = [
        build_stage("stage1", vision_path="/models/vision", llm_path="/models/llm", eval_meta_path="/data/held.json"),
        build_stage("stage2"),
        build_stage("stage3", start_from="previous"),
        build_stage("stage4", model_name_or_path="/models/whole"),
        build_stage("stage5", start_from="s3://runs/stage4"),
        build_stage("stage6"),
    ]
    jobs = list_meta_jobs(stages, start_from=None)
    components = TokenizerSource("/models/llm", "/models/vision")
    elsewhere = TokenizerSource("s3://runs/stage4")
    assert [(job.title, Path(job.meta_path).stem, job.is_held_out) for job in jobs[:3]] == [
        ("stage1", "stage1", False),
        ("stage1", "held", True),
        ("stage2", "stage2", False),
    ]
    assert [job.source for job in jobs] == [
        *[components] * 4,
        TokenizerSource("/models/whole"),
        *[elsewhere] * 2,
    ]
    assert jobs[0].values["max_seq_length"] == 8192


def test_the_first_stage_has_the_tokenizer_of_the_checkpoint_it_starts_from() -> None:
    (job,) = list_meta_jobs([build_stage("stage2")], start_from="s3://runs/stage1")
    assert job.source == TokenizerSource("s3://runs/stage1")
