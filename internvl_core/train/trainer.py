"""Our Trainer: Hugging Face's, with our data, our loss, our parameter groups and our checkpoints of adapters.

Loss: the mean over supervised tokens, each with its weight, over all ranks and accumulation steps
at once. So it does not depend on how a step's samples fall to them.
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, set_seed

from internvl_core.data.collate import PackCollator
from internvl_core.data.dataset import SupervisedDataset
from internvl_core.data.tiles import normalise
from internvl_core.model.adapters import find_saved_modules, fold_adapters, load_adapter_into, save_adapter
from internvl_core.model.save import save_model
from internvl_core.model.skeleton import fill
from internvl_core.model.sources import open_whole
from internvl_core.supervision.stop_signals import STOP_SIGNALS
from internvl_core.train.finite import FiniteSteps
from internvl_core.train.finite_weights import check_optimizer, check_tensors, check_weights
from internvl_core.train.gradient_check import GradientCheck
from internvl_core.train.ledger import SampleLedger
from internvl_core.train.local_saves import LocalSaves
from internvl_core.train.memory_report import explaining_memory
from internvl_core.train.meter import StepMeter
from internvl_core.train.optimizer import LearningRates, build_parameter_groups
from internvl_core.train.sampler import StepSampler
from internvl_core.train.update import Forward, Update


class InternVLTrainer(Trainer):
    """Trainer over the batches of a `StepSampler`."""

    model: Any
    optimizer: Any

    def __init__(
        self,
        *,
        train_dataset: SupervisedDataset,
        sampler: StepSampler,
        ledger: SampleLedger,
        meter: StepMeter,
        update: Update,
        finite: FiniteSteps,
        normalize_type: str,
        decay_all: bool,
        saves_dir: Path,
        **kwargs: Any,
    ) -> None:
        """Set up training.

        Args:
            saves_dir: where checkpoints are written, in folders named `checkpoint-<step>`.
        """
        super().__init__(train_dataset=train_dataset, **kwargs)
        self._sampler = sampler
        self._ledger = ledger
        self._meter = meter
        self._update = update
        self.finite = finite
        self._loss_before: Tensor | None = None
        self.saves = LocalSaves()
        self._normalize_type = normalize_type
        self._decay_all = decay_all
        self._saves_dir = saves_dir
        self._rates = LearningRates(self.args.learning_rate, vision=self.args.vision_lr, mlp=self.args.mlp_lr)
        self._first_rate = self.args.learning_rate
        self.add_callback(GradientCheck(self.model))
        # `compute_loss` divides by what the whole update has.
        self.loss_is_scaled_for_ga = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        is_packed = isinstance(self.data_collator, PackCollator)
        packs = self.args.per_device_train_batch_size if is_packed else None
        with explaining_memory(self._update, packs_per_forward=packs):
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load this rank's batches; the sampler shares them out and knows where to begin, so accelerate does not."""
        args = self.args
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=_ignore_stops,
            # Its own: the loader's first draw would move the generator that a resumed run has just restored.
            generator=torch.Generator().manual_seed(args.seed),
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; as a result, not to resume from, whole where PEFT cannot say what learnt beside adapters."""
        if not _internal_call and not self.is_whole and find_saved_modules(self.model) is None:
            self.save_merged(output_dir or self.args.output_dir)
        else:
            self._check_weights(is_whole=self.is_whole)
            with self.saves.writing(Path(output_dir or self.args.output_dir)):
                super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights(is_whole=self.is_whole)
        check_optimizer(self.model, self.optimizer, step=self.state.global_step)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        # Another rank may have made it; whichever has no room for its part leaves nothing of it.
        with self.saves.writing(folder, is_begun=True):
            super()._save_checkpoint(model, trial)

    def save_merged(self, output_dir: str) -> None:
        """Save the model whole, an adapter folded into it if there is one; the model itself stays as it is."""
        if self.is_whole:
            self.save_model(output_dir)
            return
        self._check_weights(is_whole=False)
        # On all ranks: under ZeRO-3 each has a part. What save_model gathers there is without the frozen parts.
        state_dict = self.accelerator.get_state_dict(self.deepspeed) if self.is_deepspeed_enabled else None
        if self.args.should_save:
            folded = fold_adapters(self.model, state_dict)
            check_tensors(folded.items(), step=self.state.global_step)
            with self.saves.writing(Path(output_dir)):
                save_model(self.model.get_base_model(), self.processing_class, Path(output_dir), state_dict=folded)

    def _check_weights(self, *, is_whole: bool) -> None:
        check_weights(self.model, is_whole=is_whole, step=self.state.global_step)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        return super().get_batch_samples(self._meter.time_waits(epoch_iterator), *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Sum the weights of all supervised tokens of an update, over all ranks."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in batch_samples:
            total += batch["loss_weights"].sum(dtype=torch.float64)
        summed: Tensor = self.accelerator.reduce(total.to(device), reduction="sum")
        return summed

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Times the ranks: DDP and DeepSpeed take the mean of their gradients, not the sum.
        output = model(**inputs, loss_normalizer=num_items_in_batch / self.args.world_size)
        loss = self.finite.watch_loss(output.loss)
        return (loss, output) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed steps within its backward pass.
        is_applied = self.is_deepspeed_enabled and not self.accelerator.optimizer_step_was_skipped
        self.finite.watch_norm(norm, is_applied=is_applied)
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Log, and keep the loss of a step that was left out from the mean."""
        if self.finite.take_skipped():
            grad_norm = None
            if self._loss_before is None:
                tr_loss.zero_()
            else:
                tr_loss.copy_(self._loss_before)
            # As if one step fewer had been since: the mean's divisor.
            self._globalstep_last_logged += 1
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        self._loss_before = tr_loss.clone()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        forward = Forward(
            inputs.pop("sample_ids"), inputs.pop("num_tokens"), inputs["num_tiles"], inputs["input_ids"].numel()
        )
        self._update.record(forward, step=self.state.global_step + 1)
        self._ledger.record(forward.sample_ids, inputs.pop("bad_samples"), step=self.state.global_step)
        self._meter.record_batch(tokens=forward.tokens, tiles=forward.tiles, places=forward.places)
        # Past DeepSpeed, for which Trainer would round them to bf16.
        loss_weights = inputs.pop("loss_weights").to(self.args.device)
        inputs = super()._prepare_inputs(inputs)
        if inputs.get("pixel_values") is not None:
            dtype = next(self.accelerator.unwrap_model(self.model).parameters()).dtype
            inputs["pixel_values"] = normalise(inputs["pixel_values"], self._normalize_type, dtype)
        return {**inputs, "loss_weights": loss_weights}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights to resume from, every one of them.

        Trainer (5.23) reads the file by the names in memory, which are not those of the published
        layout, and goes on with the weights it has where none of the names match.
        """
        folder = Path(resume_from_checkpoint)
        if self.is_whole:
            fill(self.model, open_whole(folder, folder).weights, source=resume_from_checkpoint)
        else:
            load_adapter_into(self.model, folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this rank's random state; on another number of ranks all begin with one that the step decides.

        Trainer (5.23) leaves a rank that has no file as it is, and gives the others those of ranks that did otherwise.
        """
        if checkpoint is None or len(list(Path(checkpoint).glob("rng_state*.pth"))) == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        seed = np.random.SeedSequence([self.args.seed, self.state.global_step, self.args.process_index])
        set_seed(int(seed.generate_state(1)[0]))

    def _get_output_dir(self, trial: Any) -> str:
        """Give the folder that Trainer writes checkpoints below."""
        return str(self._saves_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights, configuration and tokenizer, without Trainer's pickle of this machine's arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.is_whole:
            save_model(self.model, self.processing_class, folder, state_dict=state_dict)
        else:
            save_adapter(self.model, folder, state_dict)
            # What it was trained with: tiles, chat format.
            self.model.get_base_model().config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    @property
    def is_whole(self) -> bool:
        """Whether there are no adapters."""
        return isinstance(self.model, PreTrainedModel)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer; with groups by part where a part has a learning rate of its own."""
        if self.optimizer is None and self._rates.own:
            learning = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(learning))
            groups = build_parameter_groups(learning, self._rates, decayed=decayed, weight_decay=self.args.weight_decay)
            self._first_rate = groups[0]["lr"]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, learning)
            self.optimizer = optimizer_class(groups, **options)
        built: torch.optim.Optimizer = super().create_optimizer(model)
        return built

    def _get_learning_rate(self) -> float:
        """Get the main learning rate of this step, also where every group has one of its own."""
        return float(super()._get_learning_rate() * (self.args.learning_rate / self._first_rate))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            # One schedule multiplies all rates.
            factor = logs["learning_rate"] / self.args.learning_rate
            logs |= {f"learning_rate/{part}": rate * factor for part, rate in self._rates.own.items()}
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay every tensor as the original does (F12), or all but biases and norms as Hugging Face does."""
        if self._decay_all:
            return [name for name, _ in model.named_parameters()]
        return list(super().get_decay_parameter_names(model))


def _ignore_stops(worker: int) -> None:
    """Let a worker live through the SIGTERM that torchrun sends to whole groups: its rank still has a step to end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
