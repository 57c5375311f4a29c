"""Every item of a training checkpoint counts: without it there is no resume, with another one the result differs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from same_training import find_differences
from stage_runs import Attempt, Inputs, find_training_commit, forget_commits, make_inputs, run
from training_checkpoints import republish

from internvl_core.checkpoint.store import fetch

pytestmark = pytest.mark.integration

STEP = 4
"""Resumed from; the step before it that is saved is two."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def arguments(inputs: Inputs) -> dict[str, Any]:
    """Everything random is on: shuffling, augmentation, drop path; and the losses of two steps are one of a line."""
    values = {
        **inputs.arguments,
        "max_steps": 6,
        "drop_path_rate": 0.3,
        "dataloader_num_workers": 2,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    del values["eval_meta_path"]
    return values


@pytest.fixture(scope="module")
def undisturbed(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    return run(tmp_path_factory.mktemp("undisturbed") / "1", arguments)


@pytest.fixture(scope="module")
def under_zero2(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    return run(tmp_path_factory.mktemp("zero2") / "1", {**arguments, "deepspeed": "zero2"})


def go_back(attempt: Attempt, store: Path) -> Attempt:
    """Copy a finished attempt's store as it was when its second save had just been committed."""
    forget_commits(attempt, store, after_step=STEP)
    (copy,) = store.iterdir()
    return Attempt(attempt.directory, type(attempt.store)(f"file://{store}", "stage", copy.name[-16:]), 0)


def check_refused(attempt: Attempt, arguments: dict[str, Any], name: str, tmp_path: Path) -> None:
    begun = go_back(attempt, tmp_path / "store")
    for step in (2, STEP):
        checkpoint = find_training_commit(begun, step).checkpoint
        republish(checkpoint, lambda folder: next(folder.rglob(name)).unlink(), tmp_path)
    refused = run(tmp_path / "1", arguments)
    assert (refused.failure.error, refused.exit_code) == ("CheckpointCorrupt", 80)
    assert name.strip("*") in refused.failure.message
    assert "missing" in refused.failure.message
    assert "\n" not in refused.failure.message


@pytest.mark.fault(
    70,
    "a part of the state is missing from every checkpoint",
    how="published anew without one file",
    then="refused with the file's name (80), where Trainer would go on with a new one",
)
@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "scheduler.pt",
                "rng_state_1.pth",
                "data_position.json",
                "samples.json",
                "trainer_state.json",
                "metrics.jsonl",
                "model.safetensors",
            )
        ),
    ],
)
def test_nothing_is_resumed_without_any_part_of_its_state(
    undisturbed: Attempt, arguments: dict[str, Any], name: str, tmp_path: Path
) -> None:
    check_refused(undisturbed, arguments, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["*zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt", "latest"])
def test_nothing_is_resumed_without_a_part_of_deepspeeds_state(
    under_zero2: Attempt, arguments: dict[str, Any], name: str, tmp_path: Path
) -> None:
    check_refused(under_zero2, {**arguments, "deepspeed": "zero2"}, name, tmp_path)


@pytest.mark.slow
def test_zero1_and_zero2_go_on_from_each_other(under_zero2: Attempt, arguments: dict[str, Any], tmp_path: Path) -> None:
    go_back(under_zero2, tmp_path / "store")
    resumed = run(tmp_path / "1", {**arguments, "deepspeed": "zero1"})
    assert f"Resuming from step {STEP}" in resumed.log
    expected = [line["loss"] for line in under_zero2.curve]
    assert [line["loss"] for line in resumed.curve] == pytest.approx(expected, rel=1e-5)


def test_a_resume_with_all_of_the_state_ends_as_an_undisturbed_run(
    undisturbed: Attempt, arguments: dict[str, Any], tmp_path: Path
) -> None:
    go_back(undisturbed, tmp_path / "store")
    resumed = run(tmp_path / "1", arguments)
    assert f"Resuming from step {STEP}" in resumed.log
    assert find_differences(resumed, undisturbed) == set()


def test_a_stage_that_is_told_so_goes_on_from_a_checkpoint_of_another_store(
    undisturbed: Attempt, arguments: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = find_training_commit(undisturbed, STEP).checkpoint
    resumed = run(tmp_path / "1", arguments, resume_from=checkpoint)
    assert f"Resuming from step {STEP}: {checkpoint.uri}" in resumed.log
    assert find_differences(resumed, undisturbed) == set()
    assert {commit.step for commit in resumed.commits} == {6}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "differing"),
    [
        ("optimizer.pt", "grad_norm"),
        ("scheduler.pt", "learning_rate"),
        ("rng_state_0.pth", "grad_norm"),
        ("rng_state_1.pth", "grad_norm"),
        ("samples.json", "counters"),
        ("metrics.jsonl", "loss_ema"),
        ("model.safetensors", "loss"),
    ],
)
def test_a_resume_with_a_part_of_another_step_ends_otherwise(
    undisturbed: Attempt, arguments: dict[str, Any], name: str, differing: str, tmp_path: Path
) -> None:
    """What the comparison above would not notice, it would not test."""
    begun = go_back(undisturbed, tmp_path / "store")
    earlier = fetch(find_training_commit(begun, 2).checkpoint, tmp_path) / name
    checkpoint = find_training_commit(begun, STEP).checkpoint
    republish(checkpoint, lambda folder: shutil.copyfile(earlier, folder / name), tmp_path)
    resumed = run(tmp_path / "1", arguments)
    assert f"Resuming from step {STEP}" in resumed.log
    assert differing in find_differences(resumed, undisturbed)
