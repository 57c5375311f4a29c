"""A stage as its task starts it: supervisor, torchrun, gloo ranks, a `file://` store."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import (
    DEADLINE_S,
    Attempt,
    Inputs,
    check_equal_weights,
    forget_commits,
    launch,
    load_weights,
    make_inputs,
    run,
    wait,
)
from transformers import AutoModelForImageTextToText, AutoTokenizer

from internvl_core.checkpoint.base_model import get_base
from internvl_core.checkpoint.manifest import CheckpointKind
from internvl_core.contract import StageFile
from internvl_core.data.meta import load_meta
from internvl_core.model.load import load_checkpoint

pytestmark = [
    pytest.mark.integration,
    # PEFT 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

MAX_STEPS = 40
STEPS_PER_EPOCH = 5
"""40 questions of the finetune set, 8 an update."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def everything(inputs: Inputs) -> dict[str, Any]:
    """Everything learns, and everything random is on: shuffling, augmentation, drop path."""
    return {
        **inputs.arguments,
        "max_steps": MAX_STEPS,
        "drop_path_rate": 0.3,
        "dataloader_num_workers": 2,
        "logging_steps": 3,
        "report_to": "tensorboard",
    }


@pytest.fixture(scope="module")
def undisturbed(everything: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    return run(tmp_path_factory.mktemp("undisturbed") / "1", everything)


@pytest.fixture(scope="module")
def under_deepspeed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    arguments = {
        **inputs.arguments,
        "deepspeed": "zero2",
        "bf16": True,
        "grad_checkpoint": True,
        "group_by_length": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "data_seed": 7,
        "logging_steps": 100,
        "num_train_epochs": 1,
    }
    del arguments["max_steps"]
    return run(tmp_path_factory.mktemp("deepspeed") / "1", arguments)


def test_a_run_ends_with_a_final_commit_a_handover_and_a_result(undisturbed: Attempt) -> None:
    result = undisturbed.result
    (commit,) = undisturbed.commits
    assert (commit.kind, commit.step, commit.checkpoint) == (CheckpointKind.FINAL, MAX_STEPS, result.checkpoint)
    handover = undisturbed.store.find_handover()
    assert handover is not None
    assert handover[0] == result.checkpoint
    assert handover[1]["metrics"] == result.metrics
    assert set(result.seconds) == {"setup", "train", "first_step", "checkpoint_stall", "evaluate"}
    assert result.counters["samples"] == MAX_STEPS * 8
    assert result.counters["trainable_parameters"] == result.counters["total_parameters"] > 10_000


def test_the_curve_and_its_summary_are_sane(undisturbed: Attempt) -> None:
    curve, result = undisturbed.curve, undisturbed.result
    # Each third step, and the last one, whose weights are committed.
    assert [line["step"] for line in curve] == [*range(3, MAX_STEPS, 3), MAX_STEPS]
    assert result.metrics["first_loss"] == curve[0]["loss"] > curve[-1]["loss"] == result.metrics["last_loss"]
    assert set(result.metrics) >= {"accuracy", "accuracy/word"}
    # Of the whole training; the median may differ from the mean, but not wildly.
    mean = result.counters["tokens"] / result.seconds["train"]
    assert mean / 3 < result.metrics["tokens_per_s"] < mean * 3
    assert 10 < result.counters["tokens"] / result.counters["samples"] < 64


def test_final_weights_are_a_plain_folder_that_says_nothing_about_this_machine(undisturbed: Attempt) -> None:
    folder = undisturbed.final_dir
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "metrics.jsonl"}
    assert "training_args.bin" not in names
    for path in folder.glob("*.json"):
        assert "/tmp" not in path.read_text()
        assert str(undisturbed.directory.parents[1]) not in path.read_text()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.image_token_id == AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<IMG_CONTEXT>")


def test_tensorboard_writes_below_the_attempts_output(undisturbed: Attempt) -> None:
    assert undisturbed.exit_code == 0
    assert list((undisturbed.directory / "output" / "runs").rglob("events.out.tfevents.*"))
    assert not list(Path.cwd().glob("runs/*_*/events.out.tfevents.*"))


def test_a_stopped_run_resumes_to_the_very_weights_of_an_undisturbed_one(
    undisturbed: Attempt, everything: dict[str, Any], tmp_path: Path
) -> None:
    with launch(tmp_path / "1", everything) as running:
        deadline = time.monotonic() + DEADLINE_S
        # In the second epoch: a resume has to find the order and the augmentation of that one.
        while not any(line["step"] > STEPS_PER_EPOCH for line in running.read_metrics()):
            assert running.poll() is None, (tmp_path / "1" / "trainer.log").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.ask_to_stop()
        stopped = wait(running)
    assert (stopped.failure.error, stopped.exit_code) == ("Preempted", 75)
    (commit,) = stopped.commits
    assert commit.kind is CheckpointKind.TRAINING
    assert STEPS_PER_EPOCH < commit.step < MAX_STEPS
    assert stopped.failure.message == f"Stopped on request at step {commit.step}; a checkpoint is committed."

    resumed = run(tmp_path / "2", everything)
    assert f"Resuming from step {commit.step}" in resumed.log
    check_equal_weights(resumed.final_dir / "model.safetensors", undisturbed.final_dir / "model.safetensors")
    assert resumed.result.metrics["last_loss"] == undisturbed.result.metrics["last_loss"]
    assert resumed.result.metrics["accuracy"] == undisturbed.result.metrics["accuracy"]
    assert resumed.result.counters == undisturbed.result.counters
    steps = [line["step"] for line in resumed.curve]
    assert steps == sorted({*range(3, MAX_STEPS, 3), commit.step, MAX_STEPS})


def test_a_trained_stage_without_a_handover_is_only_evaluated(
    undisturbed: Attempt, everything: dict[str, Any], tmp_path: Path
) -> None:
    result = undisturbed.result
    store = tmp_path / "store"
    shutil.copytree(undisturbed.directory.parent / "store", store)
    (handover,) = store.rglob("handover/*.json")
    handover.unlink()
    # On another number of ranks: it must not matter to the accuracy.
    again = run(tmp_path / "2", everything, num_ranks=1)
    assert "only the evaluation is left" in again.log
    assert (again.result.metrics, again.result.counters) == (result.metrics, result.counters)
    assert again.result.checkpoint.digest == result.checkpoint.digest
    assert len(again.commits) == 1
    assert again.store.find_handover() is not None
    assert again.curve == undisturbed.curve


def test_deepspeed_trains_an_epoch_in_bf16_and_commits_as_the_flags_say(under_deepspeed: Attempt) -> None:
    result = under_deepspeed.result
    found = [(commit.step, commit.kind.value) for commit in under_deepspeed.commits]
    assert sorted(found) == [(2, "training"), (4, "training"), (5, "final"), (5, "training")]
    assert result.step == STEPS_PER_EPOCH
    # What is in the store is nowhere else.
    assert list((under_deepspeed.directory / "output").glob("checkpoint-*")) == []
    assert list((under_deepspeed.directory / "unsent").iterdir()) == []
    weights = load_weights(under_deepspeed.final_dir)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    # What is committed is logged, whatever logging_steps says.
    assert [line["step"] for line in under_deepspeed.curve] == [2, 4, 5]


def test_deepspeed_resumes_to_the_same_weights(under_deepspeed: Attempt, tmp_path: Path) -> None:
    forget_commits(under_deepspeed, tmp_path / "store", after_step=2)
    arguments = dict(StageFile.get(under_deepspeed.directory).arguments)
    del arguments["output_dir"]
    resumed = run(tmp_path / "2", arguments)
    assert "Resuming from step 2" in resumed.log
    check_equal_weights(resumed.final_dir / "model.safetensors", under_deepspeed.final_dir / "model.safetensors")
    assert [line["loss"] for line in resumed.curve] == [line["loss"] for line in under_deepspeed.curve]


@pytest.mark.slow
def test_deepspeed_resumes_on_another_number_of_ranks(under_deepspeed: Attempt, tmp_path: Path) -> None:
    forget_commits(under_deepspeed, tmp_path / "store", after_step=2)
    arguments = {**StageFile.get(under_deepspeed.directory).arguments, "gradient_accumulation_steps": 2}
    del arguments["output_dir"]
    alone = run(tmp_path / "2", arguments, num_ranks=1)
    assert "Resuming from step 2" in alone.log
    # In bf16, whose sums run in another order.
    expected = [line["loss"] for line in under_deepspeed.curve]
    assert [line["loss"] for line in alone.curve] == pytest.approx(expected, rel=0.01)
    assert alone.result.counters == under_deepspeed.result.counters


@pytest.mark.slow
def test_ranks_and_accumulation_share_the_batch_without_changing_the_result(inputs: Inputs, tmp_path: Path) -> None:
    """One rank is a bare torchrun: no attempt directory, no store; weights stay in `output_dir`."""
    arguments = {
        **inputs.arguments,
        "max_steps": 6,
        # Text-only samples too: a rank without tiles has to keep step.
        "meta_path": str(inputs.folder / "data" / "pretrain.json"),
    }
    output, elsewhere = tmp_path / "output", tmp_path / "elsewhere"
    elsewhere.mkdir()
    alone = {**arguments, "per_device_train_batch_size": 8, "output_dir": str(output)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += ["-m", "internvl_core.finetune", *(f"--{name}={value}" for name, value in alone.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(elsewhere.iterdir()) == []
    accumulated = {**arguments, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    shared = run(tmp_path / "1", accumulated)
    expected, weights = load_weights(output), load_weights(shared.final_dir)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            weights[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    curve = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in shared.curve] == pytest.approx([line["loss"] for line in curve], rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_stage_and_nothing_is_committed(inputs: Inputs, tmp_path: Path) -> None:
    arguments = {**inputs.arguments, "learning_rate": 1e30, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    attempt = run(tmp_path / "1", {**arguments, "logging_steps": 100, "max_non_finite_steps": 1})
    assert (attempt.failure.error, attempt.exit_code) == ("NonFinite", 78)
    assert "\n" not in attempt.failure.message
    assert "not finite in 1 step," in attempt.failure.message
    assert ": 2 (" in attempt.failure.message
    assert attempt.failure.sample_ids
    assert attempt.commits == []


def test_a_wrong_argument_is_named(inputs: Inputs, tmp_path: Path) -> None:
    attempt = run(tmp_path / "1", {**inputs.arguments, "freeze_lm": True}, num_ranks=1)
    assert (attempt.failure.error, attempt.exit_code) == ("ArgumentError", 64)
    assert attempt.failure.message == "freeze_lm: no such argument. Nearest: freeze_llm."


def test_a_missing_meta_file_is_named(inputs: Inputs, tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    attempt = run(tmp_path / "1", {**inputs.arguments, "meta_path": str(path)}, num_ranks=1)
    assert (attempt.failure.error, attempt.exit_code) == ("DataError", 65)
    assert str(path) in attempt.failure.message
    assert "\n" not in attempt.failure.message


def write_broken_meta(inputs: Inputs, folder: Path) -> Path:
    """Write a copy of eight records, the seventh of which names an image that is not there."""
    (meta,) = load_meta(inputs.folder / "data" / "finetune.json")
    records = [json.loads(line) for line in Path(meta.annotation).read_text().splitlines()[:8]]
    records[6] |= {"image": "missing.png", "width": 32, "height": 32}
    (folder / "broken.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    content = {"word": {"root": meta.root, "annotation": str(folder / "broken.jsonl")}}
    (folder / "meta.json").write_text(json.dumps(content))
    return folder / "meta.json"


@pytest.mark.fault(3, "a file vanishes", how="a record's image is missing", then="left out, counted and written down")
def test_a_bad_sample_is_dropped_counted_and_written_down(inputs: Inputs, tmp_path: Path) -> None:
    meta_path = write_broken_meta(inputs, tmp_path)
    arguments = {**inputs.arguments, "meta_path": str(meta_path), "max_steps": 3, "dataloader_num_workers": 1}
    # A batch of one: the bad sample is all of it, and its rank has nothing to learn from in that step.
    attempt = run(tmp_path / "1", {**arguments, "per_device_train_batch_size": 1, "max_steps": 8})
    counters = attempt.result.counters
    # Two epochs of eight draws, over both ranks.
    assert (counters["samples"], counters["bad_samples"], counters["bad_samples/word"]) == (16, 2, 2)
    lines = [line for path in (attempt.directory / "quarantine").iterdir() for line in path.read_text().splitlines()]
    assert [(json.loads(line)["sample_id"], json.loads(line)["reason"]) for line in lines] == [
        ("word:7", "missing")
    ] * 2
    assert all("nan" not in str(line["loss"]).lower() for line in attempt.curve)


@pytest.mark.fault(2, "too many samples are bad", how="one, and none is borne", then="exit 65 on all ranks")
def test_more_bad_samples_than_are_borne_end_the_stage_on_all_ranks(inputs: Inputs, tmp_path: Path) -> None:
    arguments = {**inputs.arguments, "meta_path": str(write_broken_meta(inputs, tmp_path)), "max_bad_fraction": 0}
    started = time.monotonic()
    attempt = run(tmp_path / "1", arguments)
    assert (attempt.failure.error, attempt.exit_code) == ("DataError", 65)
    assert "Too many bad samples: word: 1 of " in attempt.failure.message
    assert "quarantine" in attempt.failure.message
    assert "\n" not in attempt.failure.message
    assert attempt.commits == []
    # torchrun alone would leave the other rank waiting in its all-reduce for another 30 s.
    assert time.monotonic() - started < 90


def test_an_adapter_is_committed_with_its_base_resumed_and_folded_in_where_it_has_none(
    undisturbed: Attempt, inputs: Inputs, tmp_path: Path
) -> None:
    adapter = {"freeze_llm": True, "freeze_backbone": True, "freeze_mlp": True, "use_llm_lora": 4, "deepspeed": "zero1"}
    common = {name: value for name, value in inputs.arguments.items() if name not in ("vision_path", "llm_path")}
    base = undisturbed.result.checkpoint
    saving = {**common, **adapter, "save_strategy": "steps", "save_steps": 1}
    over_commit = run(tmp_path / "1", saving, store=tmp_path / "a", start_from=base, num_ranks=1)
    names = {path.name for path in over_commit.final_dir.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "base_checkpoint.json", "tokenizer.json"}
    assert not names & {"model.safetensors", "training_args.bin"}
    assert "/output/" not in (over_commit.final_dir / "adapter_config.json").read_text()

    forget_commits(over_commit, tmp_path / "c", after_step=1)
    resumed = run(tmp_path / "3", saving, store=tmp_path / "c", start_from=base, num_ranks=1)
    assert "Resuming from step 1" in resumed.log
    weights = "adapter_model.safetensors"
    check_equal_weights(resumed.final_dir / weights, over_commit.final_dir / weights)

    shutil.copytree(undisturbed.final_dir, tmp_path / "folder")
    over_folder = run(
        tmp_path / "2",
        {**common, **adapter, "model_name_or_path": str(tmp_path / "folder")},
        store=tmp_path / "b",
        num_ranks=1,
    )
    assert get_base(over_folder.final_dir).name == str(tmp_path / "folder")
    check_equal_weights(over_folder.final_dir / weights, over_commit.final_dir / weights)


@pytest.mark.slow
def test_an_adapter_is_folded_in_where_its_base_is_made_on_the_spot(
    undisturbed: Attempt, inputs: Inputs, tmp_path: Path
) -> None:
    # A projector put into a model: nobody could find that base again.
    common = {name: value for name, value in inputs.arguments.items() if name not in ("vision_path", "llm_path")}
    folder = str(undisturbed.final_dir)
    adapter = {"freeze_llm": True, "freeze_backbone": True, "freeze_mlp": True, "use_llm_lora": 4, "deepspeed": "zero1"}
    over_folder = run(tmp_path / "1", {**common, **adapter, "model_name_or_path": folder}, store=tmp_path / "a")
    given = {**common, **adapter, "model_name_or_path": folder, "mlp_path": folder}
    folded = run(tmp_path / "2", given, store=tmp_path / "b")
    assert "adapter_config.json" not in {path.name for path in folded.final_dir.iterdir()}
    assert folded.result.counters == over_folder.result.counters
    merged = load_checkpoint(str(over_folder.final_dir), cache_dir=tmp_path).model.state_dict()
    whole = load_checkpoint(str(folded.final_dir), cache_dir=tmp_path).model.state_dict()
    before = load_checkpoint(str(undisturbed.final_dir), cache_dir=tmp_path).model.state_dict()
    changed = {name for name in whole if not torch.equal(whole[name], before[name])}
    assert len(changed) == 14
    for name, tensor in merged.items():
        torch.testing.assert_close(whole[name], tensor)
