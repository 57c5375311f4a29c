"""What counts as something new to train on."""

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import Owner, StageStore
from internvl_core.contract import CheckpointRef
from tasks.find_news import News
from tasks.find_news import find_news as find_news_of_recipe
from tasks.model_registry import Judged
from tasks.stage import Stage

MODEL = {"model_name_or_path": "OpenGVLab/InternVL2_5-1B"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    write_record(tmp_path / "a.jsonl", "Which digit?")
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"root": "images", "annotation": "a.jsonl"}}))
    return tmp_path


def write_record(path: Path, question: str) -> None:
    record = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "7"}]}
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def build_stage(folder: Path, **given: Any) -> Stage:
    arguments = {"conv_style": "internvl2_5", "meta_path": str(folder / "meta.json"), "max_steps": 4, **given}
    return Stage(name="finetune", entry="finetune", arguments=arguments)


def commit(folder: Path, name: str) -> str:
    """Commit a checkpoint; returns the URI of its stage."""
    (folder / name).mkdir()
    (folder / name / "weights").write_text(name)
    store = StageStore(f"file://{folder}/store", name, "0" * 64)
    lease = store.acquire(Owner.of_this_process("run"), choose_base=lambda _: None)
    store.publish(folder / name, step=1, fence=lease.fence, kind=CheckpointKind.FINAL, parent=None, info={})
    lease.release()
    return store.uri


def find_news(
    stage: Stage, last: Judged | None, folder: Path, *, start_from: CheckpointRef | None = None, follows: bool = True
) -> News:
    return find_news_of_recipe([stage], last, start_from=start_from, follows_champion=follows, workspace=folder)


def judge(folder: Path, stage: Stage, **given: Any) -> Judged:
    """Describe what is noted of the version that training the stage today would become."""
    return Judged(find_news(stage, None, folder, **given).inputs, version=7, time_s=1_795_737_600)


def test_without_a_version_all_is_new(folder: Path) -> None:
    assert find_news(build_stage(folder, **MODEL), None, folder).reason_to_skip is None


def test_the_same_data_and_arguments_are_skipped_and_the_version_is_named(folder: Path) -> None:
    stage = build_stage(folder, **MODEL)
    news = find_news(stage, judge(folder, stage), folder)
    assert news.reason_to_skip == (
        "Nothing new: data and arguments are those of version 7, judged 2026-11-27 00:00 UTC."
    )


def test_a_start_from_the_champion_is_nothing_new(folder: Path) -> None:
    last = judge(folder, build_stage(folder, **MODEL))
    for digest in ("1" * 64, "2" * 64):
        champion = CheckpointRef("file:///store/x", digest)
        assert find_news(build_stage(folder), last, folder, start_from=champion).reason_to_skip is not None


def test_another_start_that_is_not_the_champion_is_new(folder: Path) -> None:
    last = judge(folder, build_stage(folder, **MODEL), follows=False)
    other = {"model_name_or_path": "OpenGVLab/InternVL2_5-8B"}
    assert find_news(build_stage(folder, **MODEL), last, folder, follows=False).reason_to_skip is not None
    assert find_news(build_stage(folder, **other), last, folder, follows=False).reason_to_skip is None
    given = CheckpointRef("file:///store/x", "1" * 64)
    assert find_news(build_stage(folder), last, folder, start_from=given, follows=False).reason_to_skip is None


def test_a_start_that_a_stage_names_itself_counts(folder: Path) -> None:
    first, second = (commit(folder, name) for name in ("first", "second"))

    def build(start: str) -> Stage:
        return build_stage(folder).model_copy(update={"start_from": start})

    last = judge(folder, build(first), follows=False)
    assert find_news(build(first), last, folder, follows=False).reason_to_skip is not None
    assert find_news(build(second), last, folder, follows=False).reason_to_skip is None


def test_a_start_that_a_later_stage_names_counts_even_where_the_champion_is_the_first_ones(folder: Path) -> None:
    def look(start: str, last: Judged | None) -> News:
        stages = [build_stage(folder, **MODEL), build_stage(folder).model_copy(update={"start_from": start})]
        return find_news_of_recipe(stages, last, start_from=None, follows_champion=True, workspace=folder)

    first, second = (commit(folder, name) for name in ("first", "second"))
    last = Judged(look(first, None).inputs, version=7, time_s=0)
    assert look(first, last).reason_to_skip is not None
    assert look(second, last).reason_to_skip is None
    assert look("previous", last).reason_to_skip is None


def test_a_record_more_is_new(folder: Path) -> None:
    stage = build_stage(folder, **MODEL)
    last = judge(folder, stage)
    write_record(folder / "a.jsonl", "And this one?")
    assert find_news(stage, last, folder).reason_to_skip is None


def test_another_argument_is_new(folder: Path) -> None:
    last = judge(folder, build_stage(folder, **MODEL))
    assert find_news(build_stage(folder, **{**MODEL, "max_steps": 5}), last, folder).reason_to_skip is None
