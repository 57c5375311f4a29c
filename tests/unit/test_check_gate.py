"""The gate behind a stage."""

from pathlib import Path

import pytest

from internvl_core.contract import CheckpointRef, StageResult
from internvl_core.errors import GateNotPassed
from tasks.check_gate import check_gate
from tasks.stage import Gate
from tasks.trained_stage import TrainedStage

CHECKPOINT = CheckpointRef("file:///store/stage2-0/data/4", "0" * 64)


def train(**metrics: float) -> TrainedStage:
    result = StageResult(step=4, checkpoint=CHECKPOINT, metrics=metrics, counters={}, seconds={})
    return TrainedStage("stage2", result, is_skipped=False, metrics_path=Path("metrics.jsonl"))


@pytest.mark.parametrize("score", [0.9, 0.95, 1.0])
def test_a_score_at_the_gate_or_above_passes(score: float) -> None:
    check_gate(train(accuracy=score), Gate(metric="accuracy", at_least=0.9))


def test_without_a_gate_any_score_passes() -> None:
    check_gate(train(), None)


@pytest.mark.parametrize("score", [0.8999999, 0.0, float("nan")])
def test_a_score_below_is_stopped_with_both_numbers_and_the_checkpoint(score: float) -> None:
    with pytest.raises(GateNotPassed) as caught:
        check_gate(train(accuracy=score), Gate(metric="accuracy", at_least=0.9))
    message = str(caught.value)
    assert f"stage2: accuracy is {score:.6g}" in message
    assert "0.9" in message
    assert CHECKPOINT.uri in message


def test_a_metric_that_was_not_measured_is_stopped_with_those_that_were() -> None:
    with pytest.raises(GateNotPassed, match=r"^stage2: gate on accuracy/digit, but it has only accuracy, last_loss\."):
        check_gate(train(accuracy=1.0, last_loss=0.1), Gate(metric="accuracy/digit", at_least=0.9))


def test_a_stage_without_any_metric_says_so() -> None:
    with pytest.raises(GateNotPassed, match=r"it has only none\."):
        check_gate(train(), Gate(metric="accuracy", at_least=0.9))
