"""Samples for a tiny InternVL, alone and packed, and models whose language models differ in their attention."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_internvl import IMAGE_TOKEN, TILE_SIZE, TOKENS_PER_TILE, build_tiny_model
from torch import Tensor
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config

from internvl_core.data.collate import PackCollator
from internvl_core.data.dataset import Sample
from internvl_core.data.loss_weights import LossReduction
from internvl_core.data.sizes import PackLimits
from internvl_core.model.internvl import InternVLForTraining

PAD = 1
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
TEXT_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen2 without groups": lambda: Qwen2Config(**{**_SIZES, "num_key_value_heads": 4}),
    "qwen2 with a window": lambda: Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "qwen3 with wide heads": lambda: Qwen3Config(**_SIZES, head_dim=16),
    "llama": lambda: LlamaConfig(**_SIZES),
    "phi3": lambda: Phi3Config(**_SIZES),
}


def make_sample(num_tokens: int, num_tiles: int = 0, *, seed: int = 0, is_learnt: bool = True) -> Sample:
    """Text of which the second half is learnt, its tiles' placeholders after the first token."""
    generator = torch.Generator().manual_seed(1000 * num_tokens + 10 * num_tiles + seed)
    text = torch.randint(3, IMAGE_TOKEN, (num_tokens,), generator=generator)
    num_prompt_tokens = max(1, num_tokens // 2)
    image = torch.full((num_tiles * TOKENS_PER_TILE,), IMAGE_TOKEN)
    labels = text.clone()
    labels[: num_prompt_tokens if is_learnt else None] = -100
    return {
        "input_ids": torch.cat([text[:1], image, text[1:]]),
        "labels": torch.cat([labels[:1], torch.full_like(image, -100), labels[1:]]),
        "tiles": torch.randint(0, 256, (num_tiles, 3, TILE_SIZE, TILE_SIZE), generator=generator, dtype=torch.uint8),
        "sample_id": f"a:{seed}",
    }


def make_samples() -> list[Sample]:
    """Text and images, one token and many, longer and shorter than the window."""
    return [
        make_sample(9),
        make_sample(6, 2, seed=1),
        make_sample(1, seed=2),
        make_sample(14, 1, seed=3),
        make_sample(2, seed=4),
    ]


def build_model(text: str) -> InternVLForTraining:
    config = copy.deepcopy(build_tiny_model().config)
    config.text_config = TEXT_CONFIGS[text]()
    torch.manual_seed(0)
    return InternVLForTraining(config)


def pack(
    samples: Sequence[Sample], reduction: LossReduction = "token", padded_to: PackLimits | None = None
) -> dict[str, Any]:
    """What the model gets of a pack, its tiles normalised."""
    batch: dict[str, Any] = dict(PackCollator(PAD, reduction, padded_to)(samples))
    return normalise_batch(batch)


def normalise_batch(batch: dict[str, Any]) -> dict[str, Any]:
    inputs = {name: value for name, value in batch.items() if name not in ("sample_ids", "bad_samples", "num_tokens")}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].float() / 127.5 - 1
    return inputs


def prepare_alone(sample: Sample) -> dict[str, Any]:
    """What the native model gets of one sample."""
    batch = pack([sample])
    return {name: batch[name] for name in ("input_ids", "labels", "pixel_values") if name in batch}


def run_alone(model: InternVLForTraining, samples: Sequence[Sample]) -> list[Tensor]:
    """Logits of each sample, [T, V], by transformers' own attention."""
    model.model.language_model.set_attn_implementation("sdpa")
    return [model(**_move(prepare_alone(sample), model.device)).logits[0] for sample in samples]


def run_packed(model: InternVLForTraining, samples: Sequence[Sample]) -> list[Tensor]:
    """Logits of each sample, [T, V], out of one pack."""
    batch = pack(samples)
    lengths = batch["cu_seq_lens"].diff().tolist()
    inputs = {name: value for name, value in batch.items() if name not in ("loss_weights", "labels", "num_tiles")}
    return list(model(**_move(inputs, model.device)).logits[0].split(lengths))


def _move(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
