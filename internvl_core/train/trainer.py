"""Our Trainer: Hugging Face's, with tiles normalised on the device and one choice of weight decay.

Loss: the model's own token mean. Trainer divides by the number of supervised tokens over all
ranks and accumulation steps, so it is the exact global mean.
"""

from typing import Any

from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from internvl_core.data.dataset import Sample, SupervisedDataset
from internvl_core.data.media import normalise


class InternVLTrainer(Trainer):
    """Trainer for batches whose tiles arrive as uint8."""

    def __init__(self, *, normalize_type: str, decay_all: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._normalize_type = normalize_type
        self._decay_all = decay_all

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        inputs.pop("sample_ids", None)
        if inputs.get("pixel_values") is not None:
            dtype = next(self.accelerator.unwrap_model(self.model).parameters()).dtype
            inputs["pixel_values"] = normalise(inputs["pixel_values"], self._normalize_type, dtype)
        return inputs

    def _get_train_sampler(self, train_dataset: Dataset[Sample] | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, SupervisedDataset):
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        # Trainer would decode every image of the dataset to learn its length.
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        grouped: Sampler[int] = LengthGroupedSampler(batch_size, lengths=dataset.lengths)
        return grouped

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay every tensor as the original does (F12), or all but biases and norms as Hugging Face does."""
        if self._decay_all:
            return [name for name, _ in model.named_parameters()]
        return list(super().get_decay_parameter_names(model))
