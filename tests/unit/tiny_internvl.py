"""A native InternVL of random weights, small enough for a test, and batches for it."""

from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

from internvl_core.model.internvl import InternVLForTraining

# Tensors this small take ten times longer on two threads that share a core.
torch.set_num_threads(1)

IMAGE_TOKEN = 100
TOKENS_PER_TILE = 4
TILE_SIZE = 32


def build_tiny_model(
    *, num_vision_layers: int = 2, vocab_size: int = 128, image_token: int = IMAGE_TOKEN, seed: int = 0
) -> InternVLForTraining:
    torch.manual_seed(seed)
    vision = InternVLVisionConfig(
        hidden_size=16,
        num_hidden_layers=num_vision_layers,
        num_attention_heads=2,
        attention_bias=True,
        intermediate_size=32,
        image_size=TILE_SIZE,
        patch_size=8,
        initializer_range=0.2,
        layer_scale_init_value=1.0,
    )
    text = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=1,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token,
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return InternVLForTraining(config)


def build_batch(*, num_tiles: int = 2, seed: int = 0) -> dict[str, Any]:
    """Two sequences: one with `num_tiles` tiles at its beginning, one of text."""
    generator = torch.Generator().manual_seed(seed)
    length = 6 + num_tiles * TOKENS_PER_TILE
    input_ids = torch.randint(3, IMAGE_TOKEN, (2, length), generator=generator)
    input_ids[0, : num_tiles * TOKENS_PER_TILE] = IMAGE_TOKEN
    labels = input_ids.masked_fill(input_ids == IMAGE_TOKEN, -100)
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    if num_tiles:
        batch["pixel_values"] = build_tiles(num_tiles, seed=seed)
    return batch


def build_tiles(num_tiles: int, *, seed: int = 0) -> Tensor:
    return torch.randn(num_tiles, 3, TILE_SIZE, TILE_SIZE, generator=torch.Generator().manual_seed(seed))
