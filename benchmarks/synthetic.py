"""Random models and samples of real proportions, to measure training by.

Shapes: `T` tokens, `K` tiles.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

from internvl_core.data.dataset import Sample
from internvl_core.data.sizes import SizeBlock, SizeTotals
from internvl_core.model.flops import NAMED_SHAPES, DecoderShape, ModelShape, TowerShape
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.trainable import enable_checkpointing

SHAPES = {
    # As 2b in small: a sixteenth of the tokens a tile, and about the same share of the work in the tower.
    "tiny": ModelShape(TowerShape(64, 2, 256, 64, 192), DecoderShape(128, 4, 384, 128, 64, 2048), 16),
    **NAMED_SHAPES,
}
REFERENCE_TOKENS_PER_TILE = 256
"""Of the lengths; a model with fewer gets its text and its packs shortened alike."""
IMAGE_TOKEN, PAD = 3, 1


@dataclass(frozen=True)
class Sizes:
    """Tokens and tiles of all samples; a `SampleStream` of one epoch over and over."""

    tokens: NDArray[np.int64]
    tiles: NDArray[np.int64]

    def iter_sizes(self, epoch: int, start: int = 0) -> Iterator[SizeBlock]:
        ids = epoch * len(self.tokens) + np.arange(start, len(self.tokens))
        yield SizeBlock(ids, self.tokens[start:], self.tiles[start:])

    @property
    def totals(self) -> SizeTotals:
        squares = float((self.tokens.astype(np.float64) ** 2).sum())
        return SizeTotals(len(self.tokens), float(self.tokens.sum()), squares, float(self.tiles.sum()))


def draw_sizes(path: Path | None, count: int, tokens_per_tile: int) -> Sizes:
    """Draw sizes from a file, or from a mix shaped like InternVL 2.5's data, scaled to the model's tiles."""
    generator = np.random.default_rng(0)
    if path is not None:
        with np.load(path) as file:
            chosen = generator.choice(len(file["tokens"]), count, replace=False)
            tokens, tiles = file["tokens"][chosen].astype(np.int64), file["tiles"][chosen].astype(np.int64)
        text = tokens - tiles * REFERENCE_TOKENS_PER_TILE
    else:
        # Text alone, photographs, documents, several images, videos.
        kind = generator.choice(5, count, p=[0.2, 0.25, 0.35, 0.1, 0.1])
        lowest, highest = np.array([0, 1, 3, 2, 8])[kind], np.array([0, 7, 13, 24, 32])[kind]
        tiles = generator.integers(lowest, highest + 1)
        text = np.exp(generator.normal(np.log(np.array([400, 150, 150, 200, 150]))[kind], 0.9)).astype(np.int64)
        text = np.minimum(text, 8000)
    text = np.maximum(2, text * tokens_per_tile // REFERENCE_TOKENS_PER_TILE)
    return Sizes(text + tiles * tokens_per_tile, tiles)


def make_samples(sizes: Sizes, shape: ModelShape) -> list[Sample]:
    """Random text after the tiles' placeholders, the second half of it learnt."""
    generator = torch.Generator().manual_seed(0)
    side = get_tile_size(shape)
    tile = torch.randint(0, 256, (1, 3, side, side), generator=generator, dtype=torch.uint8)
    samples: list[Sample] = []
    for tokens, tiles in zip(sizes.tokens.tolist(), sizes.tiles.tolist(), strict=True):
        ids = torch.randint(4, shape.decoder.vocab_size, (tokens,), generator=generator)
        num_image_tokens = tiles * shape.tokens_per_tile
        ids[:num_image_tokens] = IMAGE_TOKEN
        labels = ids.clone()
        labels[: (num_image_tokens + tokens) // 2] = -100
        name = str(len(samples))
        samples.append({"input_ids": ids, "labels": labels, "tiles": tile.expand(tiles, -1, -1, -1), "sample_id": name})
    return samples


def get_tile_size(shape: ModelShape) -> int:
    return math.isqrt(shape.tower.num_patches) * math.isqrt(shape.tower.values_per_patch // 3)


def build_model(shape: ModelShape, *, is_checkpointed: bool) -> InternVLForTraining:
    tower, decoder = shape.tower, shape.decoder
    head_width = 128 if decoder.width >= 2048 else 64 if decoder.width > 128 else 32
    vision = InternVLVisionConfig(
        hidden_size=tower.width,
        num_hidden_layers=tower.num_layers,
        num_attention_heads=tower.width // (128 if tower.width > 1024 else 64 if tower.width > 64 else 32),
        attention_bias=True,
        intermediate_size=tower.mlp_width,
        image_size=get_tile_size(shape),
        patch_size=math.isqrt(tower.values_per_patch // 3),
    )
    text = Qwen2Config(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.width,
        intermediate_size=decoder.mlp_width,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.attention_width // head_width,
        num_key_value_heads=decoder.key_width // head_width,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=PAD,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=shape.tokens_per_tile,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    if ModelShape.from_config(config) != shape:
        raise SystemExit(f"the model is {ModelShape.from_config(config)}, not {shape}")
    torch.manual_seed(0)
    model = InternVLForTraining(config)
    if is_checkpointed:
        enable_checkpointing(model)
    return model.train()
