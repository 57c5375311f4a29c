"""Steps that are not finite: one process and torch's own optimizers; more ranks are in tests/faults/test_steps.py."""

import copy
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState

from internvl_core.errors import NonFinite
from internvl_core.train.finite import MAX_SAMPLE_IDS, FiniteSteps
from internvl_core.train.update import Forward, Update

CPU = torch.device("cpu")


class Training:
    """A model of one weight, trained as Trainer trains: forwards, norm, what the ranks found, optimizer."""

    def __init__(self, optimizer: str = "AdamW", *, max_in_a_row: int = 3, **arguments: Any) -> None:
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        options = {"weight_decay": 0.1} if optimizer == "AdamW" else {}
        self.optimizer = getattr(torch.optim, optimizer)([self.weight], lr=0.1, **options)
        self.arguments: Any = SimpleNamespace(**{"deepspeed": None, "fp16": False, **arguments})
        self.state = TrainerState(max_steps=10)
        self.update = Update()
        self.finite = FiniteSteps(self.update, max_in_a_row=max_in_a_row)
        self.finite.on_train_begin(self.arguments, self.state, TrainerControl())

    def step(
        self, *losses: float, gradient: float = 1.0, ids: list[str] | None = None, is_applied: bool = False
    ) -> None:
        for number, loss in enumerate(losses):
            sample_ids = ids or [f"pets:{self.state.global_step}{number}"]
            self.update.record(Forward(sample_ids, 8, 1, 8), step=self.state.global_step + 1)
            self.finite.watch_loss(self.weight.sum() + loss).backward()
        assert self.weight.grad is not None
        self.weight.grad *= gradient
        norm = nn.utils.clip_grad_norm_([self.weight], 1.0)
        self.finite.watch_norm(norm, is_applied=is_applied)
        self.finite.add(self.finite.take(CPU).tolist())
        self.finite.on_pre_optimizer_step(
            self.arguments, self.state, TrainerControl(), optimizer=self.optimizer, lr_scheduler=None
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1

    def copy_state(self) -> tuple[Tensor, Mapping[str, Any]]:
        return self.weight.detach().clone(), copy.deepcopy(self.optimizer.state_dict()["state"])


def check_same(found: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [1.5, -2.0, 0.0, 3e38])
def test_watching_a_finite_loss_changes_no_bit(value: float) -> None:
    weight = torch.tensor(value, requires_grad=True)
    update = Update()
    update.record(Forward([], 1, 0, 1), step=1)
    loss = FiniteSteps(update, max_in_a_row=1).watch_loss(weight * 1.1)
    assert loss.item() == (weight * 1.1).item()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert torch.equal(gradient, torch.tensor(1.1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not(value: float) -> None:
    weight = torch.tensor(1.0, requires_grad=True)
    update = Update()
    update.record(Forward([], 1, 0, 1), step=1)
    # By itself the gradient would be 1.
    FiniteSteps(update, max_in_a_row=1).watch_loss(weight + value).backward()
    assert weight.grad is not None
    assert weight.grad.isnan()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor", "RMSprop"])
@pytest.mark.parametrize(("losses", "gradient"), [((math.nan,), 1.0), ((1.0, math.inf, 1.0), 1.0), ((1.0,), math.inf)])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str, losses: tuple[float, ...], gradient: float) -> None:
    training = Training(optimizer)
    training.step(1.0)
    before = training.copy_state()
    training.step(*losses, gradient=gradient)
    check_same(training.copy_state(), before)
    assert training.finite.take_skipped()
    training.step(1.0)
    assert not training.finite.take_skipped()
    assert not torch.equal(training.weight.detach(), before[0])
    assert training.finite.counters == {"skipped_steps": 1}


def test_too_many_in_a_row_are_the_end_with_the_samples(caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    training.step(math.nan)
    training.step(1.0)
    training.step(1.0, math.nan, 1.0)
    training.step(1.0, gradient=math.inf)
    before = training.copy_state()
    with pytest.raises(NonFinite) as caught:
        training.step(math.inf, ids=["cars:7", "cars:8"])
    check_same(training.copy_state(), before)
    error = caught.value
    assert "3 steps in a row" in str(error)
    assert "3 (loss), 4 (gradient), 5 (loss)" in str(error)
    assert "pets (2), cars (2)" in str(error)
    assert "\n" not in str(error)
    assert error.step == 5
    # Of the third step only the forward whose loss it was; of the fourth all.
    assert error.sample_ids == ["pets:21", "pets:30", "cars:7", "cars:8"]
    assert "Step 3 is left out: its loss is not finite. 1 of at most 3 in a row. Its samples: pets:21" in caplog.text


def test_a_list_of_samples_has_an_end(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(max_in_a_row=1)
    with pytest.raises(NonFinite) as caught:
        training.step(math.nan, ids=[f"pets:{line}" for line in range(1000)])
    assert len(caught.value.sample_ids) == MAX_SAMPLE_IDS
    assert f"pets:19 and {MAX_SAMPLE_IDS - 20} more" in caplog.text
    assert "pets:20" not in caplog.text


def test_what_the_scaler_of_fp16_leaves_out_is_routine_and_counted_apart() -> None:
    training = Training(fp16=True, max_in_a_row=1)
    for _ in range(3):
        # The optimizer's step is the scaler's business.
        training.finite.watch_norm(math.inf, is_applied=False)
        training.finite.add(training.finite.take(CPU).tolist())
        training.finite.on_pre_optimizer_step(training.arguments, training.state, TrainerControl())
    assert training.finite.counters == {"skipped_steps": 0, "scaler_skips": 3}
    with pytest.raises(NonFinite):
        training.step(math.nan)


def test_under_deepspeed_the_schedule_goes_on_past_a_step_that_was_left_out() -> None:
    training = Training(deepspeed="zero2")
    schedule = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: 1 / (1 + step))
    training.step(1.0)
    for wrapper in (schedule, SimpleNamespace(scheduler=schedule)):
        before = schedule.last_epoch
        training.finite.watch_norm(math.inf, is_applied=False)
        training.finite.add(training.finite.take(CPU).tolist())
        training.finite.on_pre_optimizer_step(
            training.arguments, training.state, TrainerControl(), optimizer=training.optimizer, lr_scheduler=wrapper
        )
        training.optimizer.step()
        assert schedule.last_epoch == before + 1


def test_a_step_that_deepspeed_applied_all_the_same_is_the_end_at_once() -> None:
    with pytest.raises(NonFinite, match=r"^step 1: the loss is not finite, and DeepSpeed has applied it"):
        Training(deepspeed="zero0.json").step(math.nan, is_applied=True)


def test_counts_and_the_row_go_on_after_a_resume() -> None:
    training = Training()
    training.step(math.nan)
    training.step(math.nan)
    # As Trainer does it when it saves.
    training.state.stateful_callbacks["FiniteSteps"] = training.finite.state()
    resumed = Training()
    resumed.state.stateful_callbacks = training.state.stateful_callbacks
    resumed.finite.on_train_begin(resumed.arguments, resumed.state, TrainerControl())
    assert resumed.finite.counters == {"skipped_steps": 2}
    with pytest.raises(NonFinite, match="3 steps in a row"):
        resumed.step(math.nan)
