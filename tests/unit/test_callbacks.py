import itertools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from internvl_core.data.quarantine import BadSample
from internvl_core.errors import DataError, Reason, StoreUnavailable
from internvl_core.supervision.progress import Phase
from internvl_core.train.callbacks import (
    EMA_DECAY,
    CommitCallback,
    ConsensusCallback,
    MetricsCallback,
    ProgressCallback,
    StopAfterSaveCallback,
)
from internvl_core.train.finite import FiniteSteps
from internvl_core.train.ledger import SampleLedger
from internvl_core.train.machine_meter import MachineMeter
from internvl_core.train.meter import StepMeter
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.sampler import Share, StepSampler
from internvl_core.train.steps import Step
from internvl_core.train.update import Update

SHARE = Share(0, 1, 1, 1)


def arguments(**values: Any) -> Any:
    defaults = {"fp16": False, "device": torch.device("cpu"), "output_dir": "out"}
    return SimpleNamespace(**{**defaults, "save_strategy": "no", "logging_strategy": "steps", **values})


def state(step: int, *, is_main: bool = True, epoch: float | None = None) -> TrainerState:
    return TrainerState(global_step=step, max_steps=10, is_world_process_zero=is_main, epoch=epoch)


class Link:
    """A link to a supervisor: the test asks for the stop, and reads what the supervisor was told."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.told: list[tuple[Phase, int | None]] = []

    def tell(self, phase: Phase, step: int | None = None) -> None:
        self.told.append((phase, step))

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        self._event.set()


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl")


def log(callback: MetricsCallback, state: TrainerState, **logs: float) -> None:
    callback.on_log(arguments(), state, TrainerControl(), logs={"learning_rate": 0.1, **logs})


@pytest.fixture
def ledger(tmp_path: Path) -> SampleLedger:
    return SampleLedger(["pets"], tmp_path, rank=0, max_bad_fraction=0)


@pytest.fixture
def meter() -> StepMeter:
    return StepMeter(SHARE, None)


@pytest.fixture
def finite() -> FiniteSteps:
    return FiniteSteps(Update(), max_in_a_row=3)


def finish(consensus: ConsensusCallback, reached: TrainerState, wanted: Any = None) -> TrainerControl:
    """End a step as Trainer does; its number goes up in the middle."""
    wanted = wanted or arguments()
    reached.global_step -= 1
    consensus.on_pre_optimizer_step(wanted, reached, TrainerControl())
    reached.global_step += 1
    return consensus.on_step_end(wanted, reached, TrainerControl())


class Plan:
    """Two steps an epoch, of a sample each."""

    def begin(self) -> Mapping[str, Any]:
        return {}

    def count_steps(self, num_epochs: float) -> int:
        raise NotImplementedError

    def iter_steps(
        self, first: int = 0, state: Mapping[str, Any] | None = None, *, is_of_other_data: bool = False
    ) -> Iterator[Step]:
        for number in itertools.count(first):
            yield Step([[number]], (number + 1) / 2, {})


@pytest.fixture
def sampler() -> StepSampler:
    """Every step was read ahead."""
    sampler = StepSampler(Plan(), SHARE, num_steps=10, mixture="digest")
    assert len(list(sampler)) == 10
    return sampler


@pytest.fixture
def consensus(ledger: SampleLedger, meter: StepMeter, sampler: StepSampler, finite: FiniteSteps) -> ConsensusCallback:
    return ConsensusCallback(Link(), ledger, meter, sampler, finite)


@pytest.fixture
def callback(
    metrics: MetricsFile, ledger: SampleLedger, meter: StepMeter, finite: FiniteSteps, tmp_path: Path
) -> MetricsCallback:
    return MetricsCallback(metrics, ledger, meter, finite, MachineMeter(tmp_path))


def test_a_log_step_becomes_a_line_with_speed_and_remaining_time(
    callback: MetricsCallback, metrics: MetricsFile, ledger: SampleLedger, meter: StepMeter
) -> None:
    callback.on_train_begin(arguments(), state(4), TrainerControl())
    meter.add([600, 3, 800, 0], Step([], 0, {}))
    ledger.add([5, 0])
    log(callback, state(6), loss=2.5, grad_norm=1.5)
    (line,) = metrics.read()
    assert (line["step"], line["max_steps"], line["loss"], line["grad_norm"]) == (6, 10, 2.5, 1.5)
    # 600 tokens in two steps, and four steps to go.
    assert line["tokens_per_s"] / line["steps_per_s"] == pytest.approx(300)
    assert line["eta_s"] * line["steps_per_s"] == pytest.approx(4)
    assert (line["token_fill"], line["mixture/pets"]) == (0.75, 1)


def test_what_came_before_training_is_not_measured(
    callback: MetricsCallback, metrics: MetricsFile, meter: StepMeter
) -> None:
    meter.add([900, 0, 900, 0], Step([], 0, {}))
    callback.on_train_begin(arguments(), state(0), TrainerControl())
    log(callback, state(3), loss=1.0)
    assert metrics.read()[-1]["tokens_per_s"] == 0


def test_only_rank_0_writes_and_only_lines_with_a_loss(callback: MetricsCallback, metrics: MetricsFile) -> None:
    log(callback, state(1, is_main=False), loss=1.0)
    callback.on_log(arguments(), state(1), TrainerControl(), logs={"train_runtime": 3.0})
    assert metrics.read() == []


def test_the_norm_of_a_gradient_that_overflowed_in_fp16_is_left_out_of_the_line(
    callback: MetricsCallback, metrics: MetricsFile
) -> None:
    log(callback, state(1), loss=1.0, grad_norm=float("inf"))
    assert "grad_norm" not in metrics.read()[0]


def test_steps_that_were_left_out_are_counted_in_the_line(
    callback: MetricsCallback, metrics: MetricsFile, finite: FiniteSteps
) -> None:
    log(callback, state(1), loss=1.0)
    finite.skipped_steps = 2
    log(callback, state(2), loss=1.0)
    assert [line["skipped_steps"] for line in metrics.read()] == [0, 2]


def test_a_loss_that_leaps_is_an_event_and_nothing_else(
    callback: MetricsCallback, metrics: MetricsFile, caplog: pytest.LogCaptureFixture
) -> None:
    current = state(8)
    current.log_history = [{"loss": 0.5}, *[{"loss": 2.0}] * 6, {"eval_accuracy": 1.0}, {"loss": 21.0}]
    log(callback, current, loss=21.0)
    current.log_history.append({"loss": 19.0})
    log(callback, current, loss=19.0)
    assert [line.get("loss_spike") for line in metrics.read()] == [10.5, None]
    assert "step 8: the loss leapt to 21, 10.5 times the median 2 of the 7 logged before" in caplog.text


def test_the_first_losses_have_nothing_to_leap_from(callback: MetricsCallback, metrics: MetricsFile) -> None:
    current = state(5)
    current.log_history = [*[{"loss": 0.1}] * 4, {"loss": 9.0}]
    log(callback, current, loss=9.0)
    assert "loss_spike" not in metrics.read()[0]


@pytest.mark.parametrize("reason", ["should_save", "should_training_stop"])
def test_what_is_saved_is_logged_before(callback: MetricsCallback, reason: str) -> None:
    assert callback.on_step_end(arguments(), state(3), TrainerControl(**{reason: True})).should_log
    assert not callback.on_step_end(arguments(), state(3), TrainerControl()).should_log
    assert callback.on_epoch_end(arguments(), state(3), TrainerControl(should_save=True)).should_log


def test_too_many_bad_samples_end_training_at_the_step(ledger: SampleLedger, consensus: ConsensusCallback) -> None:
    ledger.record(["pets:1"], [], step=0)
    finish(consensus, state(1))
    assert ledger.counters["samples"] == 1
    ledger.record(["pets:2"], [BadSample("pets", 3, Reason.MEDIA, "broken")], step=1)
    with pytest.raises(DataError, match="pets: 1 of 3"):
        finish(consensus, state(2))


def test_tokens_of_all_steps_are_counted(meter: StepMeter, consensus: ConsensusCallback) -> None:
    counted = state(0)
    for step in (1, 2):
        meter.record_batch(tokens=10 * step, tiles=0, places=40)
        counted.global_step = step
        finish(consensus, counted)
    assert counted.num_input_tokens_seen == 30


def test_an_epoch_ends_within_what_is_one_epoch_to_trainer(consensus: ConsensusCallback) -> None:
    wanted = arguments(save_strategy="epoch", logging_strategy="epoch")
    saved, logged = [], []
    for step in range(1, 11):
        current = state(step, epoch=step / 10)
        control = finish(consensus, current, wanted)
        assert current.epoch == step / 2
        saved += [step] * control.should_save
        logged += [step] * control.should_log
    # At the last step Trainer ends its own epoch.
    assert saved == logged == [2, 4, 6, 8]


def test_a_stop_request_saves_and_ends_training(
    ledger: SampleLedger, meter: StepMeter, sampler: StepSampler, finite: FiniteSteps
) -> None:
    link = Link()
    callback = ConsensusCallback(link, ledger, meter, sampler, finite)
    control = finish(callback, state(3))
    assert [control.should_save, control.should_training_stop, callback.is_stopping] == [False] * 3
    link.set()
    control = finish(callback, state(4))
    assert control.should_save
    assert control.should_training_stop
    assert callback.is_stopping


def test_a_stop_request_at_the_last_step_lets_training_finish(
    ledger: SampleLedger, meter: StepMeter, sampler: StepSampler, finite: FiniteSteps
) -> None:
    link = Link()
    link.set()
    callback = ConsensusCallback(link, ledger, meter, sampler, finite)
    control = finish(callback, state(10))
    assert [control.should_save, control.should_training_stop, callback.is_stopping] == [False] * 3


def test_a_stop_during_a_save_ends_training_without_a_second_one(
    ledger: SampleLedger, meter: StepMeter, sampler: StepSampler, finite: FiniteSteps
) -> None:
    link = Link()
    consensus = ConsensusCallback(link, ledger, meter, sampler, finite)
    callback = StopAfterSaveCallback(link, consensus)
    control = callback.on_save(arguments(), state(4), TrainerControl())
    assert not control.should_training_stop
    link.set()
    control = callback.on_save(arguments(), state(4), TrainerControl())
    assert (control.should_training_stop, control.should_save, consensus.is_stopping) == (True, False, True)


def test_a_stop_during_the_save_of_the_last_step_lets_training_finish(
    ledger: SampleLedger, meter: StepMeter, sampler: StepSampler, finite: FiniteSteps
) -> None:
    link = Link()
    link.set()
    consensus = ConsensusCallback(link, ledger, meter, sampler, finite)
    control = StopAfterSaveCallback(link, consensus).on_save(arguments(), state(10), TrainerControl())
    assert (control.should_training_stop, consensus.is_stopping) == (False, False)


def test_the_supervisor_is_told_of_batches_and_steps_and_of_a_save_before_it_begins(
    ledger: SampleLedger, meter: StepMeter, sampler: StepSampler, finite: FiniteSteps
) -> None:
    link = Link()
    progress = ProgressCallback(link)
    consensus = ConsensusCallback(link, ledger, meter, sampler, finite)
    for step in (0, 1):
        progress.on_step_begin(arguments(), state(step), TrainerControl())
        progress.on_substep_end(arguments(), state(step), TrainerControl())
        progress.on_pre_optimizer_step(arguments(), state(step), TrainerControl())
        progress.on_step_end(arguments(), state(step + 1), TrainerControl())
        consensus.on_step_end(arguments(), state(step + 1), TrainerControl(should_save=step == 1))
    assert link.told == [
        *[(Phase.SETUP, 0)] * 3,
        *[(Phase.STEP, 1)] * 4,
        *[(Phase.STEP, 2), (Phase.SAVE, 2)],
    ]


class Queue:
    """Takes checkpoints once it was asked for room often enough."""

    def __init__(self, *, asked_in_vain: int = 0, error: Exception | None = None) -> None:
        self.submitted: list[int] = []
        self.asked = 0
        self._asked_in_vain = asked_in_vain
        self._error = error

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def has_room(self, step: int) -> bool:
        self.asked += 1
        return self.asked > self._asked_in_vain

    def submit(self, step: int) -> None:
        self.submitted.append(step)


def save(callback: CommitCallback, step: int) -> None:
    callback.on_step_end(arguments(), state(step), TrainerControl(should_save=True))
    callback.on_save(arguments(), state(step), TrainerControl())


def test_what_was_saved_is_handed_over_to_be_committed(meter: StepMeter) -> None:
    queue = Queue()
    save(CommitCallback(queue, meter, Link()), 4)
    assert queue.submitted == [4]


def test_a_save_waits_for_room_before_anything_is_written(meter: StepMeter) -> None:
    queue = Queue(asked_in_vain=2)
    callback = CommitCallback(queue, meter, Link())
    callback.on_step_end(arguments(), state(4), TrainerControl(should_save=True))
    assert (queue.asked, queue.submitted) == (3, [])


def test_a_step_that_is_not_saved_asks_for_no_room(meter: StepMeter) -> None:
    queue = Queue()
    CommitCallback(queue, meter, Link()).on_step_end(arguments(), state(4), TrainerControl())
    assert queue.asked == 0


def test_a_store_that_is_given_up_ends_training_at_the_next_step(meter: StepMeter) -> None:
    callback = CommitCallback(Queue(error=StoreUnavailable("no answer")), meter, Link())
    with pytest.raises(StoreUnavailable, match="no answer"):
        callback.on_step_end(arguments(), state(4), TrainerControl())


def test_the_time_that_a_save_stops_training_is_measured(meter: StepMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100.0, 3.0)
    monkeypatch.setattr("internvl_core.train.callbacks.time.monotonic", lambda: next(clock))
    save(CommitCallback(Queue(), meter, Link()), 4)
    assert meter.total_stall_s == 3
    assert meter.read(12)["checkpoint_stall_pct"] == 25
    assert meter.read(12)["checkpoint_stall_pct"] == 0


def test_ranks_without_a_queue_save_too(meter: StepMeter) -> None:
    # Alone there is no rank 0 to wait for, so only the hand-over is tried here.
    CommitCallback(None, meter, Link()).on_save(arguments(), state(4, is_main=False), TrainerControl())
    assert meter.total_stall_s > 0


def test_the_mean_of_the_loss_goes_on_over_a_resume(
    ledger: SampleLedger, meter: StepMeter, finite: FiniteSteps, tmp_path: Path
) -> None:
    losses = {2: 4.0, 4: 3.0, 5: 2.0, 8: 2.5}

    def train(path: Path, *, first: int, last: int) -> list[float]:
        metrics = MetricsFile(path)
        callback = MetricsCallback(metrics, ledger, meter, finite, MachineMeter(tmp_path))
        callback.on_train_begin(arguments(), state(first), TrainerControl())
        for step, loss in losses.items():
            if first < step <= last:
                log(callback, state(step), loss=loss)
        return [line["loss_ema"] for line in metrics.read()]

    whole = train(tmp_path / "whole.jsonl", first=0, last=8)
    assert whole[0] == 4.0
    # A line of three steps weighs as three.
    assert whole[3] == pytest.approx(whole[2] * EMA_DECAY**3 + 2.5 * (1 - EMA_DECAY**3))
    train(tmp_path / "first.jsonl", first=0, last=4)
    MetricsFile(tmp_path / "resumed.jsonl").continue_from(tmp_path / "first.jsonl", step=4)
    assert train(tmp_path / "resumed.jsonl", first=4, last=8) == whole
