"""What is refused before anything is trained: files, data, stores, checkpoints to start from."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.errors import ArgumentError, CheckpointNotFound, DataError
from tasks.check_inputs import check_inputs
from tasks.stage import Gate, Stage


def build_stage(name: str = "stage1", *, start_from: str | None = None, **arguments: Any) -> Stage:
    return Stage(name=name, entry="pretrain", arguments=arguments, start_from=start_from)


def check(tmp_path: Path, *stages: Stage, store_uri: str | None = None, start_from: str | None = None) -> None:
    check_inputs.fn(list(stages), store_uri=store_uri or f"file://{tmp_path}/store", start_from=start_from)


def write_meta(directory: Path, **entry: Any) -> Path:
    (directory / "a.jsonl").write_text('{"conversations": []}\n')
    path = directory / "meta.json"
    path.write_text(json.dumps({"a": {"root": ".", "annotation": "a.jsonl", **entry}}))
    return path


def commit(directory: Path) -> StageStore:
    (directory / "save").mkdir()
    (directory / "save/model.safetensors").write_bytes(b"weights")
    store = StageStore(f"file://{directory}/store", "stage0", "0" * 64)
    store.publish(directory / "save", step=7, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})
    return store


def test_right_inputs_pass_and_the_store_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "vision").mkdir()
    meta = str(write_meta(tmp_path))
    check(tmp_path, build_stage(meta_path=meta, vision_path=str(tmp_path / "vision"), llm_path="Qwen/Qwen2.5-0.5B"))
    assert list((tmp_path / "store").iterdir()) == []


def test_a_meta_file_is_read_as_a_whole(tmp_path: Path) -> None:
    meta = write_meta(tmp_path, repat_time=2)
    with pytest.raises(DataError, match=r"^stage1: meta_path: .*meta\.json: dataset 'a': unknown key 'repat_time'"):
        check(tmp_path, build_stage(meta_path=str(meta)))


def test_a_held_out_set_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^stage1: eval_meta_path: .*nowhere\.json: no such meta file"):
        check(tmp_path, build_stage(eval_meta_path=str(tmp_path / "nowhere.json")))


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "../model", "~/model", "models/a/b", ""])
def test_a_model_that_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path, path: str) -> None:
    stage = build_stage(model_name_or_path=path)
    if not path:
        check(tmp_path, stage)
        return
    with pytest.raises(ArgumentError, match=r"^stage1: model_name_or_path: .* is no folder, nor the id of a model"):
        check(tmp_path, stage)


@pytest.mark.parametrize("place", ["recipe", "stage", "model"])
def test_a_checkpoint_to_start_from_must_be_committed(tmp_path: Path, place: str) -> None:
    def start(uri: str) -> None:
        stage = {"stage": build_stage(start_from=uri), "model": build_stage(model_name_or_path=uri)}.get(place)
        check(tmp_path, *([stage] if stage else []), start_from=uri if place == "recipe" else None)

    store = commit(tmp_path)
    start(store.uri)
    with pytest.raises(CheckpointNotFound, match=r"(start_from|model_name_or_path): .* never committed\. Committed: 7"):
        start(f"{store.uri}/data/000000000009.000001.0badcafe")


COMPONENTS = ("model_name_or_path", "vision_path", "llm_path", "mlp_path")


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_plain_remote_folder_is_a_model_and_one_without_files_is_none(
    tmp_path: Path, name: str, s3_bucket_uri: str
) -> None:
    fsspec.filesystem("s3").pipe_file(f"{s3_bucket_uri}/team/model/config.json", b"{}")
    check(tmp_path, build_stage(**{name: f"{s3_bucket_uri}/team/model"}))
    with pytest.raises(ArgumentError, match=rf"^stage1: {name}: .*/team/typo: there is no such folder, or no file in"):
        check(tmp_path, build_stage(**{name: f"{s3_bucket_uri}/team/typo"}))


def test_a_plain_remote_folder_is_nothing_to_start_from(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/model/config.json", b"{}")
    with pytest.raises(CheckpointNotFound, match="Committed: nothing"):
        check(tmp_path, build_stage(start_from="memory://bucket/model"))


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("prefix", ["", "file://"])
@pytest.mark.parametrize("file", ["mlp.pth", "mlp.safetensors"])
def test_only_a_projector_may_be_a_file(tmp_path: Path, name: str, prefix: str, file: str) -> None:
    (tmp_path / file).write_bytes(b"weights")
    stage = build_stage(**{name: f"{prefix}{tmp_path / file}"})
    if name == "mlp_path":
        check(tmp_path, stage)
        return
    with pytest.raises(
        ArgumentError, match=rf"^stage1: {name}: .*{file}(: no such folder| is a file)\. Give the folder"
    ):
        check(tmp_path, stage)


def test_a_projector_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path, message in (
        (f"{tmp_path}/mlp.pth", "no folder"),
        (f"file://{tmp_path}/mlp.pth", "no such file"),
    ):
        with pytest.raises(ArgumentError, match=rf"^stage1: mlp_path: .*mlp\.pth.*{message}"):
            check(tmp_path, build_stage(mlp_path=path))


def test_a_start_from_the_stage_before_has_nothing_to_be_looked_at(tmp_path: Path) -> None:
    check(tmp_path, build_stage(start_from="previous"))


@pytest.mark.parametrize(
    ("metric", "problem"),
    [("accuracy", None), ("accuracy/a", None), ("accuracy/b", r"held-out sets give only accuracy, accuracy/a\.")],
)
def test_a_gate_on_what_is_not_scored_is_refused(tmp_path: Path, metric: str, problem: str | None) -> None:
    stage = build_stage(eval_meta_path=str(write_meta(tmp_path)))
    gated = stage.model_copy(update={"gate": Gate(metric=metric, at_least=0.9)})
    if problem is None:
        check(tmp_path, gated)
        return
    with pytest.raises(ArgumentError, match=rf"^stage1: gate: on {metric}, but the {problem}"):
        check(tmp_path, gated)


def test_a_gate_without_a_held_out_set_is_refused(tmp_path: Path) -> None:
    gated = build_stage().model_copy(update={"gate": Gate(metric="accuracy", at_least=0.9)})
    with pytest.raises(ArgumentError, match=r"^stage1: gate: on accuracy, but the stage has no eval_meta_path"):
        check(tmp_path, gated)


def test_a_relative_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="'runs/store' is a relative path"):
        check(tmp_path, store_uri="runs/store")


def test_all_problems_come_together_led_by_their_places(tmp_path: Path) -> None:
    stages = [build_stage(meta_path="/nowhere.json"), build_stage("stage2", model_name_or_path="/nowhere")]
    with pytest.raises(ArgumentError) as caught:
        check(tmp_path, *stages, store_uri="runs/store")
    lines = str(caught.value).splitlines()
    assert ["relative path" in lines[0], lines[1][:18], lines[2][:27]] == [
        True,
        "stage1: meta_path:",
        "stage2: model_name_or_path:",
    ]


def test_problems_of_one_kind_keep_their_exit_code(tmp_path: Path) -> None:
    stages = [build_stage(meta_path="/nowhere.json"), build_stage("stage2", meta_path="/nowhere.json")]
    with pytest.raises(DataError, match=r"stage1: meta_path: .*\nstage2: meta_path: "):
        check(tmp_path, *stages)
