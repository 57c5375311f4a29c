import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from internvl_core.data.quarantine import BadSample
from internvl_core.errors import DataError, NonFinite, Reason
from internvl_core.train.callbacks import CommitCallback, ConsensusCallback, EpochCallback, MetricsCallback
from internvl_core.train.ledger import SampleLedger
from internvl_core.train.metrics import MetricsFile


def arguments(**values: Any) -> Any:
    return SimpleNamespace(**{"fp16": False, "device": torch.device("cpu"), "output_dir": "out", **values})


def state(step: int, *, is_main: bool = True, tokens: int = 0, epoch: float | None = None) -> TrainerState:
    return TrainerState(
        global_step=step, max_steps=10, is_world_process_zero=is_main, num_input_tokens_seen=tokens, epoch=epoch
    )


class Request:
    """A stop request that the test sets."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        self._event.set()


class Epochs:
    """Remembers the epochs it was told."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.seen.append(epoch)


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl")


def log(callback: MetricsCallback, state: TrainerState, **logs: float) -> None:
    callback.on_log(arguments(), state, TrainerControl(), logs={"learning_rate": 0.1, **logs})


@pytest.fixture
def ledger(tmp_path: Path) -> SampleLedger:
    return SampleLedger(["pets"], tmp_path, mixture="digest", rank=0, max_bad_fraction=0)


def test_a_log_step_becomes_a_line_with_speed_and_remaining_time(metrics: MetricsFile, ledger: SampleLedger) -> None:
    callback = MetricsCallback(metrics, ledger)
    callback.on_train_begin(arguments(), state(4, tokens=1000), TrainerControl())
    log(callback, state(6, tokens=1600), loss=2.5, grad_norm=1.5)
    (line,) = metrics.read()
    assert (line["step"], line["max_steps"], line["loss"], line["grad_norm"]) == (6, 10, 2.5, 1.5)
    # 600 tokens in two steps, and four steps to go.
    assert line["tokens_per_s"] / line["steps_per_s"] == pytest.approx(300)
    assert line["eta_s"] * line["steps_per_s"] == pytest.approx(4)


def test_speed_is_measured_since_the_last_line(metrics: MetricsFile, ledger: SampleLedger) -> None:
    callback = MetricsCallback(metrics, ledger)
    callback.on_train_begin(arguments(), state(0), TrainerControl())
    log(callback, state(1, tokens=900), loss=1.0)
    log(callback, state(3, tokens=1000), loss=1.0)
    line = metrics.read()[-1]
    assert line["tokens_per_s"] / line["steps_per_s"] == pytest.approx(50)


def test_only_rank_0_writes_and_only_lines_with_a_loss(metrics: MetricsFile, ledger: SampleLedger) -> None:
    callback = MetricsCallback(metrics, ledger)
    log(callback, state(1, is_main=False), loss=1.0)
    callback.on_log(arguments(), state(1), TrainerControl(), logs={"train_runtime": 3.0})
    assert metrics.read() == []


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("logs", [{"loss": float("nan")}, {"loss": 1.0, "grad_norm": float("inf")}])
def test_a_value_that_is_not_finite_ends_training_on_every_rank(
    metrics: MetricsFile, ledger: SampleLedger, logs: dict[str, float], is_main: bool
) -> None:
    with pytest.raises(NonFinite, match=r"^step 3: (loss is nan|grad_norm is inf)\. ") as failure:
        log(MetricsCallback(metrics, ledger), state(3, is_main=is_main), **logs)
    assert "\n" not in str(failure.value)
    assert metrics.read() == []


def test_a_gradient_that_overflows_in_fp16_is_the_scalers_business(metrics: MetricsFile, ledger: SampleLedger) -> None:
    logs = {"loss": 1.0, "learning_rate": 0.1, "grad_norm": float("inf")}
    MetricsCallback(metrics, ledger).on_log(arguments(fp16=True), state(1), TrainerControl(), logs=logs)
    with pytest.raises(NonFinite):
        MetricsCallback(metrics, ledger).on_log(
            arguments(fp16=True), state(1), TrainerControl(), logs={"loss": float("nan"), "learning_rate": 0.1}
        )


@pytest.mark.parametrize("reason", ["should_save", "should_training_stop"])
def test_what_is_saved_is_logged_before_so_that_its_loss_is_checked(
    metrics: MetricsFile, ledger: SampleLedger, reason: str
) -> None:
    callback = MetricsCallback(metrics, ledger)
    assert callback.on_step_end(arguments(), state(3), TrainerControl(**{reason: True})).should_log
    assert not callback.on_step_end(arguments(), state(3), TrainerControl()).should_log
    assert callback.on_epoch_end(arguments(), state(3), TrainerControl(should_save=True)).should_log


def test_too_many_bad_samples_end_training_at_the_step(ledger: SampleLedger) -> None:
    callback = ConsensusCallback(Request(), ledger)
    ledger.record(["pets:1"], [], step=0)
    callback.on_step_end(arguments(), state(1), TrainerControl())
    assert ledger.counters["samples"] == 1
    ledger.record(["pets:2"], [BadSample("pets", 3, Reason.MEDIA, "broken")], step=1)
    with pytest.raises(DataError, match="pets: 1 of 3"):
        callback.on_step_end(arguments(), state(2), TrainerControl())


def test_a_stop_request_saves_and_ends_training(ledger: SampleLedger) -> None:
    request = Request()
    callback = ConsensusCallback(request, ledger)
    control = callback.on_step_end(arguments(), state(3), TrainerControl())
    assert [control.should_save, control.should_training_stop, callback.is_stopping] == [False] * 3
    request.set()
    control = callback.on_step_end(arguments(), state(4), TrainerControl())
    assert control.should_save
    assert control.should_training_stop
    assert callback.is_stopping


def test_a_stop_request_at_the_last_step_lets_training_finish(ledger: SampleLedger) -> None:
    request = Request()
    request.set()
    callback = ConsensusCallback(request, ledger)
    control = callback.on_step_end(arguments(), state(10), TrainerControl())
    assert [control.should_save, control.should_training_stop, callback.is_stopping] == [False] * 3


def test_only_rank_0_commits_what_was_saved() -> None:
    committed: list[tuple[Path, int]] = []
    callback = CommitCallback(lambda directory, step: committed.append((directory, step)))
    callback.on_save(arguments(), state(4, is_main=False), TrainerControl())
    assert committed == []
    callback.on_save(arguments(), state(4), TrainerControl())
    assert committed == [(Path("out/checkpoint-4"), 4)]


def test_every_listener_hears_which_epoch_begins_also_in_the_middle_of_one() -> None:
    listeners = [Epochs(), Epochs()]
    callback = EpochCallback(listeners)
    for epoch in (None, 0, 1.0, 2.75):
        callback.on_epoch_begin(arguments(), state(0, epoch=epoch), TrainerControl())
    assert [listener.seen for listener in listeners] == [[0, 0, 1, 2]] * 2
