"""What happens around the steps: metrics out, stop requests in, checkpoints committed."""

import math
import time
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from internvl_core.supervision.progress import Phase
from internvl_core.train.finite import FiniteSteps
from internvl_core.train.ledger import SampleLedger
from internvl_core.train.machine_meter import MachineMeter
from internvl_core.train.meter import StepMeter
from internvl_core.train.metrics import MetricsFile
from internvl_core.train.ranks import wait_together
from internvl_core.train.sampler import StepSampler
from internvl_core.train.spike import find_spike
from internvl_core.train.supervisor_link import SupervisorLink

EMA_DECAY = 0.98
"""Of `loss_ema`, for each step: a line that stands for n steps counts as n of its mean."""


class CheckpointQueue(Protocol):
    """Where rank 0 puts what is saved."""

    def check(self) -> None:
        """Raise what keeps checkpoints from ever being committed."""

    def has_room(self, step: int) -> bool:
        """Wait a few seconds for room for one more; raise if there will be none."""

    def submit(self, step: int) -> None:
        """Take the checkpoint of a step that every rank has written."""


class MetricsCallback(TrainerCallback):
    """Append a line to metrics.jsonl at each log step, on rank 0; each step that is saved is one.

    The loss of a line is the mean of the steps that were applied; without any there is no line. Place
    it behind whatever asks for a save and behind the ranks' consensus.
    """

    def __init__(
        self, metrics: MetricsFile, ledger: SampleLedger, meter: StepMeter, finite: FiniteSteps, machine: MachineMeter
    ) -> None:
        self._metrics = metrics
        self._machine = machine
        self._ledger = ledger
        self._meter = meter
        self._finite = finite
        self._last_time = 0.0
        self._last_step = 0
        self._began = 0.0
        self._loss_ema: float | None = None
        self.first_step_s: float | None = None
        """From the beginning of training to the end of its first step: workers started, first samples read."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = self._last_time = time.monotonic()
        self._last_step = state.global_step
        # The curve of the checkpoint that is resumed from; nothing where training begins.
        lines = self._metrics.read() if state.is_world_process_zero and state.global_step else []
        self._loss_ema = lines[-1].get("loss_ema") if lines else None
        self._meter.restart()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.first_step_s is None:
            self.first_step_s = time.monotonic() - self._began
        control.should_log |= control.should_save or control.should_training_stop
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log |= control.should_save
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        now = time.monotonic()
        elapsed_s = max(now - self._last_time, 1e-9)
        steps = state.global_step - self._last_step
        old_share = EMA_DECAY**steps if self._loss_ema is not None else 0.0
        self._loss_ema = old_share * (self._loss_ema or 0.0) + (1 - old_share) * logs["loss"]
        self._metrics.append(
            step=state.global_step,
            max_steps=state.max_steps,
            loss=logs["loss"],
            loss_ema=self._loss_ema,
            learning_rate=logs["learning_rate"],
            **{name: value for name, value in logs.items() if name.startswith("learning_rate/")},
            # In fp16 a gradient that overflows is routine: the scaler skips the step and lowers its scale.
            **({"grad_norm": logs["grad_norm"]} if math.isfinite(logs.get("grad_norm", math.inf)) else {}),
            **find_spike(logs["loss"], state),
            steps_per_s=steps / elapsed_s,
            **self._meter.read(elapsed_s),
            **self._ledger.read_mixture(),
            bad_samples=self._ledger.counters["bad_samples"],
            **self._finite.counters,
            **self._machine.read(),
            eta_s=(state.max_steps - state.global_step) * elapsed_s / max(steps, 1),
        )
        self._last_time, self._last_step = now, state.global_step


class ProgressCallback(TrainerCallback):
    """Tell the supervisor of each batch and step, before the ranks wait for each other."""

    def __init__(self, link: SupervisorLink) -> None:
        self._link = link
        # The first step is set up as well: workers start, kernels are compiled.
        self._phase = Phase.SETUP

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._link.tell(self._phase, state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._link.tell(self._phase, state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._link.tell(self._phase, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._phase = Phase.STEP
        self._link.tell(self._phase, state.global_step)


class ConsensusCallback(TrainerCallback):
    """What the ranks tell each other in each step: stop requests, bad samples, tokens, waits, what is not finite.

    One all-reduce carries it all, once the gradients of a step are there: what is not finite must be
    known before the optimizer uses it, and a device is asked for an answer once a step. All ranks
    save and leave at the same step, when any of them was asked to stop.
    """

    def __init__(
        self,
        link: SupervisorLink,
        ledger: SampleLedger,
        meter: StepMeter,
        sampler: StepSampler,
        finite: FiniteSteps,
    ) -> None:
        self._link = link
        self._ledger = ledger
        self._meter = meter
        self._sampler = sampler
        self._finite = finite
        self._epoch = 0.0
        self._is_asked_to_stop = False
        self.is_stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch = state.epoch or 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # In each step: ranks that left at different steps would hang.
        measured, counted = self._meter.take(), self._ledger.take()
        counts = torch.tensor([int(self._link.is_set), *measured, *counted], dtype=torch.int64)
        told = torch.cat([counts.to(args.device), self._finite.take(args.device)])
        if dist.is_initialized():
            dist.all_reduce(told)
        num_asked, *sums = told.tolist()
        self._is_asked_to_stop = num_asked > 0
        step = self._sampler.get_step(state.global_step + 1)
        state.num_input_tokens_seen += self._meter.add(sums[: len(measured)], step)
        self._ledger.add(sums[len(measured) : len(measured) + len(counted)])
        self._finite.add(sums[len(measured) + len(counted) :])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._end_epoch(args, state, control, self._sampler.get_step(state.global_step).epoch)
        # At the last step training ends by itself, and the final checkpoint is worth more than one to resume from.
        if self._is_asked_to_stop and state.global_step < state.max_steps:
            self.is_stopping = True
            control.should_save = True
            control.should_training_stop = True
        if control.should_save:
            self._link.tell(Phase.SAVE, state.global_step)
        return control

    def _end_epoch(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, epoch: float) -> None:
        """Do what Trainer does at the end of an epoch; to it the whole training is one."""
        if int(epoch) > int(self._epoch) and state.global_step < state.max_steps:
            control.should_save |= args.save_strategy == "epoch"
            control.should_log |= args.logging_strategy == "epoch"
        self._epoch = state.epoch = epoch


class CommitCallback(TrainerCallback):
    """Hand each checkpoint that Trainer saved over to be committed, once every rank has written its part.

    Training waits only where one more save would be too many for the store or for the disk. Place it behind
    whatever asks for a save.
    """

    def __init__(self, commits: CheckpointQueue | None, meter: StepMeter, link: SupervisorLink) -> None:
        """Commit what is saved.

        Args:
            commits: on rank 0; None on the others.
            meter: told how long training stood still for a save.
            link: told that training waits.
        """
        self._commits = commits
        self._meter = meter
        self._link = link
        self._stopped = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._await_room(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._await_room(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if dist.is_initialized():
            dist.barrier()
        if self._commits is not None:
            self._commits.submit(state.global_step)
        self._meter.record_stall(time.monotonic() - self._stopped)

    def _await_room(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if self._commits is not None:
            self._commits.check()
        if not control.should_save:
            return
        self._stopped = time.monotonic()
        commits, step = self._commits, state.global_step
        wait_together(
            None if commits is None else lambda: commits.has_room(step),
            args.device,
            tell=lambda: self._link.tell(Phase.SAVE, step),
        )


class StopAfterSaveCallback(TrainerCallback):
    """Stop after a save during which a stop was asked for, without a second one; place it behind the commit."""

    def __init__(self, link: SupervisorLink, consensus: ConsensusCallback) -> None:
        self._link = link
        self._consensus = consensus

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        asked = torch.tensor([int(self._link.is_set)], device=args.device)
        if dist.is_initialized():
            dist.all_reduce(asked)
        if asked.item() and state.global_step < state.max_steps:
            self._consensus.is_stopping = True
            control.should_training_stop = True
        return control
