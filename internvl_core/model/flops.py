"""What training costs in FLOPs, from the shape of the model; knows no torch.

A multiplication and an addition are two FLOPs. A product [M, K] x [K, N] takes 2 M K N; scores and
their product with the values take 4 S^2 D for S positions of width D, half of it where attention
is causal (Kaplan et al., arXiv 2001.08361, 2.1; PaLM, arXiv 2204.02311, appendix B). Norms,
activations, softmax and the optimizer are left out: under 2 % together.

The backward pass of a product takes as much again for the gradient of its input, where something
before it learns, and as much once more for its weights, if they learn. A part counts as learning as
a whole if any weight of it does: adapters and single layers are cheaper than this says.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from internvl_core.data.sizes import SampleCost
from internvl_core.model.configs import SIZES_2_5, read_shipped


@dataclass(frozen=True)
class TowerShape:
    """A vision tower."""

    width: int
    num_layers: int
    mlp_width: int
    num_patches: int
    """Of a tile."""
    values_per_patch: int


@dataclass(frozen=True)
class DecoderShape:
    """A language model with gated MLPs and grouped-query attention."""

    width: int
    num_layers: int
    mlp_width: int
    attention_width: int
    """Of all query heads together."""
    key_width: int
    """Of all key heads together; the values are as wide."""
    vocab_size: int


@dataclass(frozen=True)
class ModelShape:
    """An InternVL."""

    tower: TowerShape
    decoder: DecoderShape
    tokens_per_tile: int

    @classmethod
    def from_config(cls, config: Any) -> "ModelShape":
        """Read transformers' InternVLConfig."""
        vision, text = config.vision_config, config.text_config
        (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        tower = TowerShape(
            width=vision.hidden_size,
            num_layers=vision.num_hidden_layers,
            mlp_width=vision.intermediate_size,
            num_patches=(height // patch_height) * (width // patch_width),
            values_per_patch=vision.num_channels * patch_height * patch_width,
        )
        decoder = DecoderShape(
            width=text.hidden_size,
            num_layers=text.num_hidden_layers,
            mlp_width=text.intermediate_size,
            attention_width=text.num_attention_heads * head_width,
            key_width=text.num_key_value_heads * head_width,
            vocab_size=text.vocab_size,
        )
        return cls(tower, decoder, int(tower.num_patches * config.downsample_ratio**2))


def _read_shape(name: str) -> ModelShape:
    content = json.dumps(read_shipped(name))
    return ModelShape.from_config(json.loads(content, object_hook=lambda items: SimpleNamespace(**items)))


NAMED_SHAPES = {size: _read_shape(f"internvl2_5-{size}") for size in SIZES_2_5}
"""InternVL 2.5, by the size in its name (reference 6.1)."""


def find_learning_parts(parameters: Iterable[tuple[str, bool]]) -> dict[str, bool]:
    """Find which parts count as learning, as arguments of `build_sample_cost` and `count_model_flops`.

    Args:
        parameters: the name of each, and whether it learns.
    """
    learning = {"learns_vision": False, "learns_projector": False, "learns_llm": False}
    parts = {"vision_tower": "learns_vision", "multi_modal_projector": "learns_projector"}
    for name, learns in parameters:
        if not learns:
            continue
        part = next((flag for part, flag in parts.items() if f".{part}." in name), None)
        if part is not None:
            learning[part] = True
        elif ".language_model." in name:
            # Adapters add little of their own, but gradients flow through as if the projector learnt.
            learning["learns_projector" if "lora_" in name else "learns_llm"] = True
    return learning


def build_sample_cost(
    shape: ModelShape, *, learns_vision: bool, learns_projector: bool, learns_llm: bool, is_checkpointed: bool
) -> SampleCost:
    """Build the cost by which packs are balanced: all that the step computes, recomputation included.

    The LM head is left out. It sees supervised positions only, and how many a sample has is no part
    of its size. A supervised token costs 5 % more than another in the 8b model, 38 % in the 1b.

    Args:
        is_checkpointed: whether the layers that get a gradient are computed anew in the backward pass.
    """
    return _count(shape, _Learning(learns_vision, learns_projector, learns_llm), is_checkpointed=is_checkpointed)


def count_model_flops(
    shape: ModelShape,
    *,
    learns_vision: bool,
    learns_projector: bool,
    learns_llm: bool,
    tokens: float,
    tokens_squared: float,
    tiles: float,
    supervised_tokens: float,
) -> float:
    """Count what training on samples needs at least: the numerator of the model FLOPs utilisation.

    Recomputation is no use, so it does not count (PaLM, arXiv 2204.02311, appendix B).

    Args:
        tokens_squared: the sum of the squares of the samples' tokens.
        supervised_tokens: those that reach the LM head.
    """
    learning = _Learning(learns_vision, learns_projector, learns_llm)
    cost = _count(shape, learning, is_checkpointed=False)
    head = 2 * shape.decoder.width * shape.decoder.vocab_size * (1 + learning.any + learns_llm)
    return (
        cost.per_token * tokens
        + cost.per_token_squared * tokens_squared
        + cost.per_tile * tiles
        + head * supervised_tokens
    )


@dataclass(frozen=True)
class _Learning:
    vision: bool
    projector: bool
    llm: bool

    @property
    def any(self) -> bool:
        return self.vision or self.projector or self.llm


def _count(shape: ModelShape, learning: _Learning, *, is_checkpointed: bool) -> SampleCost:
    decoder = shape.decoder
    layer_weights = decoder.width * (2 * decoder.attention_width + 2 * decoder.key_width + 3 * decoder.mlp_width)
    recomputed = is_checkpointed and learning.any
    # A frozen decoder still has to pass the gradient on to the projector.
    weight_passes = 1 + learning.any + learning.llm
    # Recomputation stops before the last product of a layer, whose result the backward pass does not need.
    recomputed_weights = recomputed * (layer_weights - decoder.width * decoder.mlp_width)
    attention_passes = 1 + recomputed + 2 * learning.any
    return SampleCost(
        per_token=2 * decoder.num_layers * (weight_passes * layer_weights + recomputed_weights),
        per_token_squared=attention_passes * decoder.num_layers * 2 * decoder.attention_width,
        per_tile=_count_tower(shape, learning, is_checkpointed=is_checkpointed) + _count_projector(shape, learning),
    )


def _count_tower(shape: ModelShape, learning: _Learning, *, is_checkpointed: bool) -> float:
    tower = shape.tower
    positions = tower.num_patches + 1
    layer = 2 * positions * (4 * tower.width**2 + 2 * tower.width * tower.mlp_width) + 4 * positions**2 * tower.width
    embedding = 2 * tower.num_patches * tower.values_per_patch * tower.width
    if not learning.vision:
        return tower.num_layers * layer + embedding
    # Pixels need no gradient.
    return tower.num_layers * layer * (3 + is_checkpointed) + embedding * 2


def _count_projector(shape: ModelShape, learning: _Learning) -> float:
    shuffled_width = shape.tower.width * shape.tower.num_patches // shape.tokens_per_tile
    products = 2 * shape.tokens_per_tile * (shuffled_width + shape.decoder.width) * shape.decoder.width
    # Its norm comes before its products, and learns with them.
    return products * (1 + (learning.vision or learning.projector) + learning.projector)
