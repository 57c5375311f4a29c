"""Our Trainer: Hugging Face's, with tiles normalised on the device and one choice of weight decay.

Loss: the model's own token mean. Trainer divides by the number of supervised tokens over all
ranks and accumulation steps, so it is the exact global mean.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from internvl_core.data.dataset import Sample, SupervisedDataset
from internvl_core.data.tiles import normalise
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.train.callbacks import EpochCallback
from internvl_core.train.ledger import SampleLedger
from internvl_core.train.sampler import EpochSampler


class InternVLTrainer(Trainer):
    """Trainer for batches whose tiles arrive as uint8."""

    model: Any

    def __init__(
        self,
        *,
        train_dataset: SupervisedDataset,
        ledger: SampleLedger,
        normalize_type: str,
        decay_all: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(train_dataset=train_dataset, **kwargs)
        self._ledger = ledger
        self._normalize_type = normalize_type
        self._decay_all = decay_all
        self._sampler = self._build_sampler(train_dataset)
        self.add_callback(EpochCallback([train_dataset, self._sampler]))

    def save_merged(self, output_dir: str) -> None:
        """Save the model whole, an adapter folded into it if there is one; ends training."""
        if isinstance(self.model, PreTrainedModel):
            self.save_model(output_dir)
            return
        self.model = self.model.merge_and_unload()
        # Not save_model: under DeepSpeed that takes names and tensors from the engine, which knows the adapter only.
        self._save(output_dir)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if "bad_samples" in inputs:
            self._ledger.record(inputs.pop("sample_ids"), inputs.pop("bad_samples"), step=self.state.global_step)
        if inputs.get("pixel_values") is not None:
            dtype = next(self.accelerator.unwrap_model(self.model).parameters()).dtype
            inputs["pixel_values"] = normalise(inputs["pixel_values"], self._normalize_type, dtype)
        return inputs

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Count supervised tokens over all ranks; at least 1, because batches of bad samples alone have none."""
        count = super()._get_num_items_in_batch(*args, **kwargs)
        return count.clamp(min=1) if isinstance(count, torch.Tensor) else count

    def _get_train_sampler(self, train_dataset: Dataset[Sample] | None = None) -> Sampler[int]:
        return self._sampler

    def _build_sampler(self, dataset: SupervisedDataset) -> EpochSampler:
        args = self.args
        return EpochSampler(
            dataset.mixture,
            # The index knows the lengths; Trainer would decode every image to learn them.
            is_grouped=args.train_sampling_strategy == "group_by_length",
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights to resume from, every one of them.

        Trainer (5.23) reads the file by the names in memory, which are not those of the published
        layout, and goes on with the weights it has where none of the names match.
        """
        if not isinstance(self.model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = InternVLForTraining.from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights, configuration and tokenizer, without Trainer's pickle of this machine's arguments."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay every tensor as the original does (F12), or all but biases and norms as Hugging Face does."""
        if self._decay_all:
            return [name for name, _ in model.named_parameters()]
        return list(super().get_decay_parameter_names(model))
