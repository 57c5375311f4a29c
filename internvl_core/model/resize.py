"""Weights of another size than they were trained in: more tokens, other tiles.

Done on tensors that are still to be read, before they reach a model: so it is the same under ZeRO-3,
where no rank holds a whole parameter (F30, F38).
"""

import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLConfig

from internvl_core.errors import ArgumentError
from internvl_core.model.weights import LazyTensor, Weights

logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64
POSITIONS = "model.vision_tower.embeddings.position_embeddings"


def find_vocabulary_size(num_tokens: int, num_rows: int) -> int:
    """Find how many rows the embeddings get: a multiple of 64 for all tokens, and never fewer than there are.

    The published language models come padded further than their tokenizer needs; the original cuts that off.
    """
    return max(math.ceil(num_tokens / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE, num_rows)


def resize_rows(tensor: LazyTensor, *, num_known: int, num_rows: int) -> LazyTensor:
    """Give an embedding `num_rows` rows, of which those from `num_known` on are the mean of those before.

    Args:
        tensor: [V, D].
        num_known: tokens that the embedding was trained with; rows behind them were padding.
        num_rows: not fewer than V.
    """

    def read() -> Tensor:
        old = tensor.read()
        resized = old.new_empty(num_rows, old.shape[1])
        resized[:num_known] = old[:num_known]
        resized[num_known:] = old[:num_known].float().mean(dim=0).to(old.dtype)
        return resized

    return replace(tensor, shape=(num_rows, tensor.shape[1]), read=read)


def fit_tiles(config: InternVLConfig, weights: Weights, tile_size: int) -> Weights:
    """Set the size of a tile in the config, and resize the vision tower's position embedding if it is for another.

    Raises:
        ArgumentError: tiles of this size are no whole number of tokens.
    """
    old = config.vision_config.image_size
    set_tile_size(config, tile_size)
    if tuple(old) == (tile_size, tile_size):
        return weights
    logger.info("Position embedding of the vision tower: from tiles of %d px to %d px", old[0], tile_size)
    old_grid, new_grid = (
        (size[0] // config.vision_config.patch_size[0], size[1] // config.vision_config.patch_size[1])
        for size in (old, (tile_size, tile_size))
    )
    return {**weights, POSITIONS: resize_positions(weights[POSITIONS], old_grid=old_grid, new_grid=new_grid)}


def set_tile_size(config: InternVLConfig, tile_size: int) -> None:
    """Set the size of a tile, and how many tokens it becomes.

    Raises:
        ArgumentError: tiles of this size are no whole number of tokens.
    """
    vision = config.vision_config
    patch_height, patch_width = vision.patch_size
    side = round(1 / config.downsample_ratio)
    if tile_size % (patch_height * side) or tile_size % (patch_width * side):
        raise ArgumentError(
            f"force_image_size: {tile_size} px is no whole number of tokens, which are {side} x {side} patches of "
            f"{patch_height} px. Nearest: {max(1, round(tile_size / patch_height / side)) * patch_height * side}."
        )
    vision.image_size = (tile_size, tile_size)
    # A chat model's may say otherwise: the original interpolates in every forward.
    config.image_seq_length = count_tokens_per_tile(vision, config.downsample_ratio)


def count_tokens_per_tile(vision_config: Any, down_sample_ratio: float) -> int:
    rows, columns = (
        pixels // patch for pixels, patch in zip(vision_config.image_size, vision_config.patch_size, strict=True)
    )
    return int(rows * columns * down_sample_ratio**2)


def resize_positions(tensor: LazyTensor, *, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> LazyTensor:
    """Interpolate a vision tower's position embedding to another grid of patches; the class token keeps its own.

    Bicubic, in float32, as the original's `resize_pos_embeddings` does (reference 2.2).

    Args:
        tensor: [1, 1 + old rows x old columns, D].
        old_grid, new_grid: rows and columns of patches.
    """

    def read() -> Tensor:
        old = tensor.read()
        patches = old[:, 1:].float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
        patches = nn.functional.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
        return torch.cat([old[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2).to(old.dtype)], dim=1)

    return replace(tensor, shape=(1, 1 + new_grid[0] * new_grid[1], tensor.shape[2]), read=read)
