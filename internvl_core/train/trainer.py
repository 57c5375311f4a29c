"""Our Trainer: Hugging Face's, with tiles normalised on the device and one choice of weight decay.

Loss: the model's own token mean. Trainer divides by the number of supervised tokens over all
ranks and accumulation steps, so it is the exact global mean.
"""

from typing import Any

from torch import nn
from transformers import Trainer

from internvl_core.data.media import normalise


class InternVLTrainer(Trainer):
    """Trainer for batches whose tiles arrive as uint8."""

    def __init__(self, *, normalize_type: str, decay_all: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._normalize_type = normalize_type
        self._decay_all = decay_all

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if inputs.get("pixel_values") is not None:
            dtype = next(self.accelerator.unwrap_model(self.model).parameters()).dtype
            inputs["pixel_values"] = normalise(inputs["pixel_values"], self._normalize_type, dtype)
        return inputs

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay every tensor as the original does (F12), or all but biases and norms as Hugging Face does."""
        if self._decay_all:
            return [name for name, _ in model.named_parameters()]
        return list(super().get_decay_parameter_names(model))
