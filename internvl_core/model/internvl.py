"""Transformers' native InternVL, made fit for training.

Adds what the native class lacks and nothing else: stochastic depth in the vision tower, a
vision tower that is in evaluation mode whenever nothing of it learns, and a dummy tile for
batches without images. Checkpoints stay plain native InternVL folders.

Shapes: `B` sequences, `T` tokens, `K` tiles, `S` pixels of a tile's side, `D` width of the language model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping


class InternVLForTraining(InternVLForConditionalGeneration):
    """Native InternVL with drop path, a properly frozen vision tower and a dummy tile."""

    def train(self, mode: bool = True) -> "InternVLForTraining":
        """Switch the mode, but keep a vision tower of which nothing learns in evaluation mode.

        Trainer calls `model.train()` at each step; the original left drop path active in a frozen tower (F11).
        """
        super().train(mode)
        vision_tower = self.model.vision_tower
        if not any(parameter.requires_grad for parameter in vision_tower.parameters()):
            vision_tower.eval()
        return self

    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the native forward; while training, a batch without tiles still touches the vision tower.

        Under DDP and ZeRO every rank has to compute the same parameters in each step. The features of
        the dummy tile [1, 3, S, S] enter the loss multiplied by zero.

        Args:
            input_ids: [B, T].
            pixel_values: normalised tiles [K, 3, S, S], in the order of their placeholders; None for no tile.
            **kwargs: as in the native class.
        """
        output = super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        if self.training and pixel_values is None and output.loss is not None:
            output.loss = output.loss + 0.0 * self._dummy_features().sum()
        return output

    def _dummy_features(self) -> Tensor:
        height, width = self.config.vision_config.image_size
        tile = torch.zeros(1, self.config.vision_config.num_channels, height, width, device=self.device)
        features: Tensor = self.get_image_features(pixel_values=tile, return_dict=True).pooler_output
        return features


# Saved folders must load with plain transformers: it writes the class's name into config.json, and
# renames the weights to the published layout only for classes of its own or of a registered type.
InternVLForTraining.__name__ = InternVLForConditionalGeneration.__name__
register_checkpoint_conversion_mapping("internvl", get_checkpoint_conversion_mapping("internvl"), overwrite=True)


def add_drop_path(model: InternVLForConditionalGeneration, rate: float) -> None:
    """Add stochastic depth to the vision tower: layer l of L drops with probability `rate * l / (L - 1)`.

    Both residual branches of a layer are dropped tile by tile and scaled by the inverse of the
    probability to be kept, as in timm's DropPath, which the original uses (reference 2.2). The
    branch's layer scale multiplies channels, so scaling before it or after it is the same.
    """
    layers = model.model.vision_tower.encoder.layer
    for layer, layer_rate in zip(layers, torch.linspace(0, rate, len(layers)).tolist(), strict=True):
        if layer_rate > 0:
            layer.attention.register_forward_hook(_DropPath(layer_rate))
            layer.mlp.register_forward_hook(_DropPath(layer_rate))


class _DropPath:
    """Forward hook that zeroes a branch for a random subset of the tiles."""

    def __init__(self, rate: float) -> None:
        self.keep = 1.0 - rate

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (self._drop(output[0]), *output[1:])
        return self._drop(output)

    def _drop(self, branch: Tensor) -> Tensor:
        mask = branch.new_empty(branch.shape[0], *[1] * (branch.dim() - 1)).bernoulli_(self.keep)
        return branch * mask.div_(self.keep)
