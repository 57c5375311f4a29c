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
from internvl_core.errors import DataError, NonFinite, Reason
from internvl_core.progress import Phase
from internvl_core.train.callbacks import (
    EMA_DECAY,
    CommitCallback,
    ConsensusCallback,
    MetricsCallback,
    ProgressCallback,
    StopAfterSaveCallback,
)
from internvl_core.train.ledger import SampleLedger
from internvl_core.train.meter import StepMeter
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.sampler import Share, StepSampler
from internvl_core.train.steps import Step

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
def consensus(ledger: SampleLedger, meter: StepMeter, sampler: StepSampler) -> ConsensusCallback:
    return ConsensusCallback(Link(), ledger, meter, sampler)


@pytest.fixture
def callback(metrics: MetricsFile, ledger: SampleLedger, meter: StepMeter) -> MetricsCallback:
    return MetricsCallback(metrics, ledger, meter)


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


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("logs", [{"loss": float("nan")}, {"loss": 1.0, "grad_norm": float("inf")}])
def test_a_value_that_is_not_finite_ends_training_on_every_rank(
    callback: MetricsCallback, metrics: MetricsFile, logs: dict[str, float], is_main: bool
) -> None:
    with pytest.raises(NonFinite, match=r"^step 3: (loss is nan|grad_norm is inf)\. ") as failure:
        log(callback, state(3, is_main=is_main), **logs)
    assert "\n" not in str(failure.value)
    assert metrics.read() == []


def test_a_gradient_that_overflows_in_fp16_is_the_scalers_business(callback: MetricsCallback) -> None:
    logs = {"loss": 1.0, "learning_rate": 0.1, "grad_norm": float("inf")}
    callback.on_log(arguments(fp16=True), state(1), TrainerControl(), logs=logs)
    with pytest.raises(NonFinite):
        callback.on_log(arguments(fp16=True), state(1), TrainerControl(), logs={**logs, "loss": float("nan")})


@pytest.mark.parametrize("reason", ["should_save", "should_training_stop"])
def test_what_is_saved_is_logged_before_so_that_its_loss_is_checked(callback: MetricsCallback, reason: str) -> None:
    assert callback.on_step_end(arguments(), state(3), TrainerControl(**{reason: True})).should_log
    assert not callback.on_step_end(arguments(), state(3), TrainerControl()).should_log
    assert callback.on_epoch_end(arguments(), state(3), TrainerControl(should_save=True)).should_log


def test_too_many_bad_samples_end_training_at_the_step(ledger: SampleLedger, consensus: ConsensusCallback) -> None:
    ledger.record(["pets:1"], [], step=0)
    consensus.on_step_end(arguments(), state(1), TrainerControl())
    assert ledger.counters["samples"] == 1
    ledger.record(["pets:2"], [BadSample("pets", 3, Reason.MEDIA, "broken")], step=1)
    with pytest.raises(DataError, match="pets: 1 of 3"):
        consensus.on_step_end(arguments(), state(2), TrainerControl())


def test_tokens_of_all_steps_are_counted(meter: StepMeter, consensus: ConsensusCallback) -> None:
    counted = state(0)
    for step in (1, 2):
        meter.record_batch(tokens=10 * step, tiles=0, places=40)
        counted.global_step = step
        consensus.on_step_end(arguments(), counted, TrainerControl())
    assert counted.num_input_tokens_seen == 30


def test_an_epoch_ends_within_what_is_one_epoch_to_trainer(consensus: ConsensusCallback) -> None:
    wanted = arguments(save_strategy="epoch", logging_strategy="epoch")
    saved, logged = [], []
    for step in range(1, 11):
        current = state(step, epoch=step / 10)
        control = consensus.on_step_end(wanted, current, TrainerControl())
        assert current.epoch == step / 2
        saved += [step] * control.should_save
        logged += [step] * control.should_log
    # At the last step Trainer ends its own epoch.
    assert saved == logged == [2, 4, 6, 8]


def test_a_stop_request_saves_and_ends_training(ledger: SampleLedger, meter: StepMeter, sampler: StepSampler) -> None:
    link = Link()
    callback = ConsensusCallback(link, ledger, meter, sampler)
    control = callback.on_step_end(arguments(), state(3), TrainerControl())
    assert [control.should_save, control.should_training_stop, callback.is_stopping] == [False] * 3
    link.set()
    control = callback.on_step_end(arguments(), state(4), TrainerControl())
    assert control.should_save
    assert control.should_training_stop
    assert callback.is_stopping


def test_a_stop_request_at_the_last_step_lets_training_finish(
    ledger: SampleLedger, meter: StepMeter, sampler: StepSampler
) -> None:
    link = Link()
    link.set()
    callback = ConsensusCallback(link, ledger, meter, sampler)
    control = callback.on_step_end(arguments(), state(10), TrainerControl())
    assert [control.should_save, control.should_training_stop, callback.is_stopping] == [False] * 3


def test_a_stop_during_a_save_ends_training_without_a_second_one(
    ledger: SampleLedger, meter: StepMeter, sampler: StepSampler
) -> None:
    link = Link()
    consensus = ConsensusCallback(link, ledger, meter, sampler)
    callback = StopAfterSaveCallback(link, consensus)
    control = callback.on_save(arguments(), state(4), TrainerControl())
    assert not control.should_training_stop
    link.set()
    control = callback.on_save(arguments(), state(4), TrainerControl())
    assert (control.should_training_stop, control.should_save, consensus.is_stopping) == (True, False, True)


def test_a_stop_during_the_save_of_the_last_step_lets_training_finish(
    ledger: SampleLedger, meter: StepMeter, sampler: StepSampler
) -> None:
    link = Link()
    link.set()
    consensus = ConsensusCallback(link, ledger, meter, sampler)
    control = StopAfterSaveCallback(link, consensus).on_save(arguments(), state(10), TrainerControl())
    assert (control.should_training_stop, consensus.is_stopping) == (False, False)


def test_the_supervisor_is_told_of_batches_and_steps_and_of_a_save_before_it_begins(
    ledger: SampleLedger, meter: StepMeter, sampler: StepSampler
) -> None:
    link = Link()
    progress = ProgressCallback(link)
    consensus = ConsensusCallback(link, ledger, meter, sampler)
    for step in (0, 1):
        progress.on_step_begin(arguments(), state(step), TrainerControl())
        progress.on_substep_end(arguments(), state(step), TrainerControl())
        progress.on_step_end(arguments(), state(step + 1), TrainerControl())
        consensus.on_step_end(arguments(), state(step + 1), TrainerControl(should_save=step == 1))
    assert link.told == [
        *[(Phase.SETUP, 0), (Phase.SETUP, 0), (Phase.STEP, 1)],
        *[(Phase.STEP, 1), (Phase.STEP, 1), (Phase.STEP, 2), (Phase.SAVE, 2)],
    ]


def test_only_rank_0_commits_what_was_saved() -> None:
    committed: list[tuple[Path, int]] = []
    callback = CommitCallback(lambda directory, step: committed.append((directory, step)))
    callback.on_save(arguments(), state(4, is_main=False), TrainerControl())
    assert committed == []
    callback.on_save(arguments(), state(4), TrainerControl())
    assert committed == [(Path("out/checkpoint-4"), 4)]


def test_the_mean_of_the_loss_goes_on_over_a_resume(ledger: SampleLedger, meter: StepMeter, tmp_path: Path) -> None:
    losses = {2: 4.0, 4: 3.0, 5: 2.0, 8: 2.5}

    def train(path: Path, *, first: int, last: int) -> list[float]:
        metrics = MetricsFile(path)
        callback = MetricsCallback(metrics, ledger, meter)
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
