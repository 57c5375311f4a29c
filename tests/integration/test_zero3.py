"""Stages under ZeRO-3: no rank ever holds the model, and the result is that of DDP."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import (
    Attempt,
    Inputs,
    check_equal_weights,
    forget_commits,
    load_weights,
    make_inputs,
    run,
)

from internvl_core.checkpoint.base_model import BaseModel, get_base
from internvl_core.deepspeed_config import resolve_deepspeed

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def zero3(inputs: Inputs) -> str:
    """ZeRO-3 that keeps no parameter whole, however small, as it keeps none of those of a real model."""
    config = resolve_deepspeed("zero3")
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (inputs.folder / "zero3.json").write_text(json.dumps(config))
    return str(inputs.folder / "zero3.json")


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
def under_zero3(arguments: dict[str, Any], zero3: str, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    saving = {**arguments, "deepspeed": zero3, "save_strategy": "steps", "save_steps": 2}
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
def test_adapters_over_a_committed_base_learn_under_zero3_as_under_ddp(
    arguments: dict[str, Any], zero3: str, under_ddp: Attempt, tmp_path: Path
) -> None:
    common = {
        **{name: value for name, value in arguments.items() if name not in ("vision_path", "llm_path")},
        "freeze_llm": True,
        "freeze_backbone": True,
        "use_llm_lora": 4,
        "use_backbone_lora": 2,
        "grad_checkpoint": True,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    base = under_ddp.result.checkpoint
    whole = run(tmp_path / "ddp", common, store=tmp_path / "a", start_from=base)
    shared = run(tmp_path / "zero3", {**common, "deepspeed": zero3}, store=tmp_path / "b", start_from=base)
    expected, found = ([line["loss"] for line in attempt.curve] for attempt in (whole, shared))
    assert found == pytest.approx(expected, abs=1e-5)
    assert get_base(shared.final_dir) == BaseModel("checkpoint", base.uri, base.digest)
    weights = load_file(shared.final_dir / "adapter_model.safetensors")
    for name, tensor in load_file(whole.final_dir / "adapter_model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    forget_commits(shared, tmp_path / "c", after_step=2)
    again = run(tmp_path / "again", {**common, "deepspeed": zero3}, store=tmp_path / "c", start_from=base)
    assert "Resuming from step 2" in again.log
    name = "adapter_model.safetensors"
    check_equal_weights(again.final_dir / name, shared.final_dir / name)


@pytest.mark.slow
def test_zero3_resumes_to_the_same_weights(
    arguments: dict[str, Any], zero3: str, under_zero3: Attempt, tmp_path: Path
) -> None:
    forget_commits(under_zero3, tmp_path / "store", after_step=2)
    saving = {**arguments, "deepspeed": zero3, "save_strategy": "steps", "save_steps": 2}
    resumed = run(tmp_path / "1", saving, store=tmp_path / "store")
    assert "Resuming from step 2" in resumed.log
    check_equal_weights(resumed.final_dir / "model.safetensors", under_zero3.final_dir / "model.safetensors")


@pytest.mark.slow
def test_a_stage_that_is_trained_is_only_evaluated(
    arguments: dict[str, Any], zero3: str, under_zero3: Attempt, tmp_path: Path
) -> None:
    shutil.copytree(
        under_zero3.store.uri.removeprefix("file://"), tmp_path / "store" / under_zero3.store.uri.split("/")[-1]
    )
    shutil.rmtree(*(tmp_path / "store").glob("*/handover"))
    again = run(tmp_path / "1", {**arguments, "deepspeed": zero3}, store=tmp_path / "store")
    assert "only the evaluation is left" in again.log
    assert again.result.metrics["accuracy"] == under_zero3.result.metrics["accuracy"]
    assert again.result.checkpoint.digest == under_zero3.result.checkpoint.digest
