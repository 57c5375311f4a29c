"""Faults of the steps themselves: a loss, a gradient, a weight that is not finite; memory that runs out."""

import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from stage_runs import Attempt, Inputs, forget_commits, load_weights, make_inputs
from step_faults import find_changed, run_faulty

from internvl_core.checkpoint.store import fetch

NAN_ON_RANK_1 = {"loss": {"2": [math.nan, [1]]}}
TWO_BAD_STEPS = {**NAN_ON_RANK_1, "gradient": {"3": [math.inf, [0]]}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def arguments(inputs: Inputs) -> dict[str, Any]:
    return {**inputs.arguments, "max_steps": 5, "lr_scheduler_type": "linear"}


@pytest.fixture(scope="module")
def saved(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """DDP, two steps that are left out, the second of them saved."""
    saving = {**arguments, "save_strategy": "steps", "save_steps": 3}
    return run_faulty(tmp_path_factory.mktemp("ddp") / "1", saving, TWO_BAD_STEPS)


def check_left_out(attempt: Attempt, *, num_ranks: int = 2) -> None:
    assert attempt.exit_code == 0, attempt.log[-4000:]
    for rank in range(num_ranks):
        # Weights, masters, moments and step counts, bit for bit.
        assert find_changed(attempt, rank) == {1: True, 2: False, 3: False, 4: True, 5: True}
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in attempt.curve)
    assert attempt.result.counters["skipped_steps"] == 2
    assert "Step 2 is left out: its loss is not finite" in attempt.log
    assert "Step 3 is left out: its gradient is not finite" in attempt.log


@pytest.mark.integration
@pytest.mark.fault(22, "the loss is NaN once", how="on one rank of two", then="the step changes no bit on any rank")
def test_a_step_that_is_not_finite_changes_no_bit(saved: Attempt) -> None:
    check_left_out(saved)
    assert [(line["step"], line["skipped_steps"]) for line in saved.curve] == [(1, 0), (4, 2), (5, 2)]
    # The schedule is one of steps, whether they were applied or not.
    expected = [0.003 * (1 - (line["step"] - 1) / 5) for line in saved.curve]
    assert [line["learning_rate"] for line in saved.curve] == pytest.approx(expected)


WAYS = {
    "zero2 in bf16, two forwards a step": {"deepspeed": "zero2", "bf16": True, "gradient_accumulation_steps": 2},
    "zero3": {"deepspeed": "zero3", "logging_steps": 5},
    "zero3 in bf16, rates of its own": {"deepspeed": "zero3", "bf16": True, "decay_all": False, "vision_lr": 0.001},
    "zero1": {"deepspeed": "zero1"},
    "zero1 in bf16": {"deepspeed": "zero1", "bf16": True},
    "zero2 without clipping": {"deepspeed": "zero2", "max_grad_norm": 0},
    "ddp in bf16": {"bf16": True, "gradient_accumulation_steps": 2},
}


@pytest.mark.integration
@pytest.mark.fault(22, "the loss is NaN once", how="under ZeRO", then="the step changes no bit on any rank")
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] if number > 1 else []) for number, way in enumerate(WAYS)]
)
def test_a_step_that_is_not_finite_changes_no_bit_however_ranks_share_the_work(
    way: str, arguments: dict[str, Any], saved: Attempt, tmp_path: Path
) -> None:
    attempt = run_faulty(tmp_path / "1", {**arguments, **WAYS[way]}, TWO_BAD_STEPS)
    check_left_out(attempt)
    if "logging_steps" in WAYS[way]:
        # The same training as under DDP, in one line: the mean of the steps that were applied.
        (line,) = attempt.curve
        assert line["loss"] == pytest.approx(fmean(line["loss"] for line in saved.curve), rel=1e-5)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.fault(22, "the loss is NaN once", how="in a single process", then="the step changes no bit")
def test_a_step_that_is_not_finite_changes_no_bit_in_one_process(arguments: dict[str, Any], tmp_path: Path) -> None:
    faults = {"loss": {"2": [math.nan, [0]]}, "gradient": {"3": [math.inf, [0]]}}
    check_left_out(run_faulty(tmp_path / "1", {**arguments, "bf16": True}, faults, num_ranks=1), num_ranks=1)


@pytest.mark.integration
@pytest.mark.fault(
    23, "losses are NaN in a row", how="on one rank, over a resume", then="78 with its samples; nothing is spoilt"
)
def test_too_many_steps_in_a_row_end_the_stage_also_over_a_resume(
    saved: Attempt, arguments: dict[str, Any], tmp_path: Path
) -> None:
    forget_commits(saved, tmp_path / "store", after_step=3)
    saving = {**arguments, "save_strategy": "steps", "save_steps": 3}
    resumed = run_faulty(tmp_path / "1", saving, {"loss": {"4": [math.inf, [1]]}}, store=tmp_path / "store")
    assert "Resuming from step 3" in resumed.log
    assert (resumed.exit_code, resumed.failure.error, resumed.failure.step) == (78, "NonFinite", 4)
    assert "2 (loss), 3 (gradient), 4 (loss)" in resumed.failure.message
    # Those of the forward of rank 1 alone, though rank 0 may have been the first to say it.
    assert len(resumed.failure.sample_ids) == 4
    assert all(re.fullmatch(r"word:\d+", sample_id) for sample_id in resumed.failure.sample_ids)
    # The checkpoint that the second of them was saved in has the weights of the last step that was applied.
    (commit,) = resumed.commits
    weights = load_weights(fetch(commit.checkpoint, tmp_path / "cache"))
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.integration
@pytest.mark.fault(
    24, "weights are NaN at a commit", how="put into a weight of one rank", then="78, and nothing of it is committed"
)
@pytest.mark.parametrize(
    ("way", "rank"), [({}, 0), pytest.param({"deepspeed": "zero3"}, 1, marks=pytest.mark.slow)], ids=["ddp", "zero3"]
)
def test_weights_that_are_not_finite_are_never_committed(
    way: dict[str, Any], rank: int, arguments: dict[str, Any], tmp_path: Path
) -> None:
    saving = {**arguments, **way, "save_strategy": "steps", "save_steps": 1}
    attempt = run_faulty(tmp_path / "1", saving, {"weight": {"2": [math.nan, [rank]]}})
    assert (attempt.exit_code, attempt.failure.error, attempt.failure.step) == (78, "NonFinite", 2)
    assert re.match(r"step 2: \S+ is not finite \(1 of \d+ tensors of this rank", attempt.failure.message)
    assert attempt.failure.rank == rank
    (commit,) = attempt.commits
    assert commit.step == 1
    weights = load_weights(fetch(commit.checkpoint, tmp_path / "cache"))
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.integration
@pytest.mark.fault(
    25, "memory runs out in a step", how="bad_alloc on one rank", then="71 with the forward and what to lower"
)
def test_memory_that_runs_out_in_a_step_is_told_with_the_forward(arguments: dict[str, Any], tmp_path: Path) -> None:
    packed = {**arguments, "use_packed_ds": True, "max_packed_tokens": 192, "num_images_expected": 8}
    packed |= {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    attempt = run_faulty(tmp_path / "1", packed, {"memory": {"2": ["cpu", [1]]}})
    failure = attempt.failure
    assert (attempt.exit_code, failure.error, failure.step, failure.rank) == (71, "OutOfMemory", 2, 1)
    assert re.search(
        r"can't allocate memory.* 2 packs of \d+ samples: \d+ tokens .*, \d+ tiles\. Lower ", failure.message
    )
    assert "max_packed_tokens" in failure.message
    assert failure.sample_ids
    assert all(re.fullmatch(r"word:\d+", sample_id) for sample_id in failure.sample_ids)
    assert [commit.step for commit in attempt.commits] == [1]


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.fault(27, "a loss leaps", how="a step's loss times 100", then="a warning and loss_spike in the metrics")
def test_a_loss_that_leaps_is_an_event(arguments: dict[str, Any], tmp_path: Path) -> None:
    attempt = run_faulty(tmp_path / "1", {**arguments, "max_steps": 8}, {"loss": {"7": [100.0, [0, 1]]}})
    assert attempt.exit_code == 0, attempt.log[-4000:]
    assert [line["step"] for line in attempt.curve if line.get("loss_spike", 0) > 10] == [7]
    assert "step 7: the loss leapt to" in attempt.log
