"""What a stage's fingerprint depends on and what not; how wrong arguments are told."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.checkpoint.store import StageStore
from internvl_core.contract import CheckpointRef
from internvl_core.errors import ArgumentError, CheckpointNotFound, DataError
from tasks.stage import Launcher, Stage
from tasks.stage_plan import StagePlan, check_stage_arguments, plan_stage, resolve_stage

PARENT = CheckpointRef("file:///store/stage1-0/data/4", "0" * 64)


def write_inputs(directory: Path, *, question: str = "Which digit?", weights: bytes = b"weights") -> Path:
    """Write a data set of one record and two components."""
    images = directory / "data/images"
    images.mkdir(parents=True)
    record = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "7"}]}
    (directory / "data/a.jsonl").write_text(json.dumps(record) + "\n")
    meta = {"a": {"root": "images", "annotation": "a.jsonl", "length": 1}}
    (directory / "data/meta.json").write_text(json.dumps(meta))
    for name in ("vision", "llm"):
        (directory / name).mkdir()
        (directory / name / "model.safetensors").write_bytes(weights)
    return directory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def build_stage(
    inputs: Path, *, entry: str = "pretrain", ranks: int = 1, start: str = "components", **given: Any
) -> Stage:
    arguments = {
        "conv_style": "internvl2_5",
        "meta_path": str(inputs / "data/meta.json"),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
    }
    if start == "components":
        arguments |= {"vision_path": str(inputs / "vision"), "llm_path": str(inputs / "llm")}
    launcher = Launcher(nproc_per_node=ranks)
    return Stage(name="stage1", entry=entry, arguments={**arguments, **given}, launcher=launcher)


def plan(inputs: Path, stage: Stage, start_from: CheckpointRef | None = None) -> StagePlan:
    return plan_stage(stage, start_from, cache_dir=inputs / "cache")


def fingerprint(inputs: Path, **changes: Any) -> str:
    return plan(inputs, build_stage(inputs, **changes)).fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"logging_steps": 1},
        {"save_strategy": "steps", "save_steps": 2},
        {"report_to": "tensorboard"},
        {"grad_checkpoint": False},
        {"dataloader_num_workers": 3},
        {"per_device_eval_batch_size": 64},
        {"ranks": 2, "per_device_train_batch_size": 4},
        {"ranks": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"learning_rate": 5e-5},
        {"learning_rate": "5e-5"},
        {"seed": 42},
    ],
    ids=str,
)
def test_the_fingerprint_is_blind_to_what_cannot_change_the_result(inputs: Path, changes: dict[str, Any]) -> None:
    assert fingerprint(inputs, **changes) == fingerprint(inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-3},
        {"seed": 7},
        {"max_steps": 5},
        {"entry": "finetune"},
        {"ranks": 2},
        {"per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 2},
        {"freeze_llm": True},
        {"deepspeed": "zero1"},
        {"eval_max_new_tokens": 3},
        {"bf16": True},
    ],
    ids=str,
)
def test_the_fingerprint_sees_what_changes_the_result(inputs: Path, changes: dict[str, Any]) -> None:
    assert fingerprint(inputs, **changes) != fingerprint(inputs)


def test_the_stages_of_deepspeed_are_one_fingerprint(inputs: Path) -> None:
    assert fingerprint(inputs, deepspeed="zero1") == fingerprint(inputs, deepspeed="zero_stage1_config.json")


@given(st.permutations(["learning_rate", "seed", "weight_decay", "warmup_steps"]))
def test_the_order_of_arguments_does_not_matter(inputs: Path, order: list[str]) -> None:
    given = {"learning_rate": 1e-3, "seed": 3, "weight_decay": 0.1, "warmup_steps": 2}
    assert fingerprint(inputs, **{name: given[name] for name in order}) == fingerprint(inputs, **given)


def test_equal_inputs_elsewhere_are_the_same_stage(inputs: Path, tmp_path: Path) -> None:
    assert fingerprint(write_inputs(tmp_path)) == fingerprint(inputs)


@pytest.mark.parametrize("change", [{"question": "Is it even?"}, {"weights": b"other"}], ids=str)
def test_other_bytes_in_data_or_components_are_another_stage(
    inputs: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    assert fingerprint(write_inputs(tmp_path, **change)) != fingerprint(inputs)


def test_a_component_in_the_hub_cache_counts_by_what_its_links_lead_to(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0").write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.safetensors").symlink_to("../blobs/0")
    linked = fingerprint(inputs, vision_path=str(tmp_path / "snapshot"))
    assert linked == fingerprint(inputs)
    (tmp_path / "blobs/0").write_bytes(b"other")
    assert fingerprint(inputs, vision_path=str(tmp_path / "snapshot")) != linked


@pytest.mark.parametrize("name", ["output_dir", "cache_dir", "attempt_dir"])
def test_a_directory_that_the_pipeline_sets_is_refused_in_a_recipe(inputs: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^arguments of stage1: {name}: /elsewhere would be ignored"):
        resolve_stage(build_stage(inputs, **{name: "/elsewhere"}), has_parent=False)


def test_a_held_out_set_is_part_of_the_stage(inputs: Path, tmp_path: Path) -> None:
    same, other = write_inputs(tmp_path / "same"), write_inputs(tmp_path / "other", question="Is it a 7?")
    found = {fingerprint(inputs, eval_meta_path=str(path / "data/meta.json")) for path in (inputs, same, other)}
    assert len(found) == 2
    assert fingerprint(inputs) not in found


def test_the_parent_counts_by_its_digest_and_not_by_its_address(inputs: Path) -> None:
    stage = build_stage(inputs, start="parent")
    moved = CheckpointRef("s3://bucket/elsewhere", PARENT.digest)
    other = CheckpointRef(PARENT.uri, "1" * 64)
    plans = [plan(inputs, stage, start) for start in (PARENT, moved, other)]
    assert plans[0].fingerprint == plans[1].fingerprint != plans[2].fingerprint
    assert plans[0].values["model_name_or_path"] is None


def test_a_model_that_is_a_checkpoint_counts_by_what_is_committed_there(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()
    (tmp_path / "save/model.safetensors").write_bytes(b"first")
    store = StageStore(f"file://{tmp_path}/store", "stage0", "0" * 64)
    found = []
    for step, content in ((1, b"first"), (2, b"second")):
        (tmp_path / "save/model.safetensors").unlink()
        (tmp_path / "save/model.safetensors").write_bytes(content)
        store.publish(tmp_path / "save", step=step, fence=1, kind=CheckpointKind.FINAL, parent=None, info={})
        found.append(fingerprint(inputs, start="model", model_name_or_path=store.uri))
    assert found[0] != found[1]


def test_a_model_that_was_never_committed_is_refused(inputs: Path, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/store/stage0/data/000000000001.000001.0badcafe"
    for folder in (uri, f"file://{tmp_path}/store/stage0"):
        Path(uri.removeprefix("file://")).mkdir(parents=True, exist_ok=True)
        with pytest.raises(CheckpointNotFound, match="Committed: nothing"):
            fingerprint(inputs, start="model", model_name_or_path=folder)


@pytest.mark.parametrize("name", ["model_name_or_path", "vision_path", "llm_path", "mlp_path"])
def test_a_plain_remote_folder_counts_by_what_its_store_says_of_it(inputs: Path, name: str) -> None:
    def find(content: bytes | None) -> str:
        if content is not None:
            fsspec.filesystem("memory").pipe_file(f"/plan/{name}/model.safetensors", content)
        start = "model" if name == "model_name_or_path" else "components"
        return fingerprint(inputs, start=start, **{name: f"memory://plan/{name}"})

    first = find(b"weights")
    assert find(None) == first
    assert find(b"WEIGHTS") != first


@pytest.mark.parametrize(
    ("prefix", "file"), [("", "mlp.pth"), ("", "mlp.safetensors"), ("", "mlp"), ("file://", "mlp.pth")]
)
def test_a_projectors_file_counts_by_its_content(inputs: Path, tmp_path: Path, prefix: str, file: str) -> None:
    found = []
    for folder, content in (("a", b"first"), ("b", b"first"), ("a", b"other")):
        path = tmp_path / folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        found.append(fingerprint(inputs, mlp_path=f"{prefix}{path}"))
    assert found[0] == found[1] != found[2]


def test_data_that_is_missing_is_refused_with_its_path(inputs: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: no such meta file"):
        fingerprint(inputs, meta_path="/nowhere.json")


def test_every_argument_is_resolved_its_default_included(inputs: Path) -> None:
    values = plan(inputs, build_stage(inputs)).values
    assert (values["max_steps"], values["weight_decay"], values["down_sample_ratio"]) == (4, 0.0, 0.5)


# --- messages


def test_a_misspelt_argument_is_refused_with_stage_and_nearest_name(inputs: Path) -> None:
    with pytest.raises(ArgumentError) as caught:
        resolve_stage(build_stage(inputs, learning_rat=1e-3), has_parent=False)
    assert str(caught.value) == "arguments of stage1: learning_rat: no such argument. Nearest: learning_rate."


def test_all_problems_of_all_stages_are_in_one_message(inputs: Path) -> None:
    first = build_stage(inputs, learning_rate="fast", sede=1)
    second = build_stage(inputs, start="parent", freeze_llm=True, freeze_backbone=True, freeze_mlp=True)
    second = second.model_copy(update={"name": "stage1.5"})
    with pytest.raises(ArgumentError) as caught:
        check_stage_arguments([first, second], starts_from_checkpoint=False)
    lines = str(caught.value).splitlines()
    assert [line.rpartition(" should be")[0] or line for line in lines][:2] == [
        "arguments of stage1: learning_rate: 'fast'",
        "arguments of stage1: sede: no such argument. Nearest: seed.",
    ]
    assert lines[2].startswith("arguments of stage1.5: freeze_llm, freeze_backbone, freeze_mlp: all True")
    assert len(lines) == 3


def test_a_stage_behind_another_needs_no_model_of_its_own(inputs: Path) -> None:
    stages = [build_stage(inputs), build_stage(inputs, start="parent")]
    check_stage_arguments(stages, starts_from_checkpoint=False)
    check_stage_arguments(stages[1:], starts_from_checkpoint=True)
    with pytest.raises(ArgumentError, match="model_name_or_path: missing"):
        check_stage_arguments(stages[1:], starts_from_checkpoint=False)


def test_an_entry_that_is_not_built_is_refused_with_that_reason(inputs: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^arguments of stage1: entry: mpo is not built yet"):
        check_stage_arguments([build_stage(inputs, entry="mpo")], starts_from_checkpoint=False)
