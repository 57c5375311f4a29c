"""Stages under ZeRO-3: no rank ever holds the model, and the result is that of DDP."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import (
    Attempt,
    Inputs,
    check_equal_weights,
    forget_commits,
    load_weights,
    make_inputs,
    run,
)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def arguments(inputs: Inputs) -> dict[str, Any]:
    """From components, in float32; questions with tiles and without, and more of them on one rank than on the other."""
    return {
        **inputs.arguments,
        "max_steps": 4,
        "eval_meta_path": str(inputs.folder / "data" / "pretrain_held_out.json"),
        "per_device_eval_batch_size": 3,
    }


@pytest.fixture(scope="module")
def under_ddp(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    return run(tmp_path_factory.mktemp("ddp") / "1", arguments)


@pytest.fixture(scope="module")
def under_zero3(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    saving = {**arguments, "deepspeed": "zero3", "save_strategy": "steps", "save_steps": 2}
    return run(tmp_path_factory.mktemp("zero3") / "1", saving)


def test_zero3_trains_and_answers_as_ddp(under_ddp: Attempt, under_zero3: Attempt) -> None:
    expected, found = ([line["loss"] for line in attempt.curve] for attempt in (under_ddp, under_zero3))
    assert found == pytest.approx(expected, abs=1e-5)
    assert under_zero3.result.metrics == pytest.approx(
        {**under_ddp.result.metrics, "tokens_per_s": under_zero3.result.metrics["tokens_per_s"]}, abs=1e-5
    )
    assert under_zero3.result.counters == under_ddp.result.counters
    weights = load_weights(under_zero3.final_dir)
    for name, tensor in load_weights(under_ddp.final_dir).items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_zero3_resumes_to_the_same_weights(arguments: dict[str, Any], under_zero3: Attempt, tmp_path: Path) -> None:
    forget_commits(under_zero3, tmp_path / "store", after_step=2)
    saving = {**arguments, "deepspeed": "zero3", "save_strategy": "steps", "save_steps": 2}
    resumed = run(tmp_path / "1", saving, store=tmp_path / "store")
    assert "Resuming from step 2" in resumed.log
    check_equal_weights(resumed.final_dir / "model.safetensors", under_zero3.final_dir / "model.safetensors")


@pytest.mark.slow
def test_a_stage_that_is_trained_is_only_evaluated(
    arguments: dict[str, Any], under_zero3: Attempt, tmp_path: Path
) -> None:
    shutil.copytree(
        under_zero3.store.uri.removeprefix("file://"), tmp_path / "store" / under_zero3.store.uri.split("/")[-1]
    )
    shutil.rmtree(*(tmp_path / "store").glob("*/handover"))
    again = run(tmp_path / "1", {**arguments, "deepspeed": "zero3"}, store=tmp_path / "store")
    assert "only the evaluation is left" in again.log
    assert again.result.metrics["accuracy"] == under_zero3.result.metrics["accuracy"]
    assert again.result.checkpoint.digest == under_zero3.result.checkpoint.digest
