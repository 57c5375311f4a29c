"""A rehearsal without content needs what torch's profiler sees of a real step."""

from typing import Any

import pytest
import torch
from tiny_internvl import IMAGE_TOKEN, TILE_SIZE, TOKENS_PER_TILE, build_tiny_model

from internvl_core.arguments import ModelArguments
from internvl_core.model.activations import Activations, Caps, rehearse
from internvl_core.model.attention import use_packed_attention
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.trainable import enable_checkpointing, set_trainable

pytestmark = [
    # PEFT 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOKENS, TILES = 512, 96
FROZEN = {"freeze_llm": True, "freeze_backbone": True, "freeze_mlp": True}
STAGES: dict[str, dict[str, Any]] = {
    "projector": FROZEN | {"freeze_mlp": False},
    "tower": FROZEN | {"freeze_mlp": False, "freeze_backbone": False},
    "all": {},
    "adapters": FROZEN | {"use_llm_lora": 4},
    "last layer of the tower": FROZEN | {"unfreeze_vit_layers": -1},
    "head": FROZEN | {"unfreeze_lm_head": True},
}


def build_learner(stage: str, *, is_checkpointed: bool, device: str) -> InternVLForTraining:
    with torch.device(device):
        model = build_tiny_model(num_vision_layers=4, vocab_size=1024)
    if is_checkpointed:
        enable_checkpointing(model)
    set_trainable(model, ModelArguments(**STAGES[stage])).train()
    return model


def rehearse_stage(stage: str, *, is_checkpointed: bool) -> Activations:
    model = build_learner(stage, is_checkpointed=is_checkpointed, device="meta")
    return rehearse(model, Caps(num_sequences=1, tokens=TOKENS, tiles=TILES, is_packed=True))


def measure_step(stage: str, *, is_checkpointed: bool) -> int:
    """Measure the most bytes that torch's allocator has given out during a step, the batch included."""
    model = build_learner(stage, is_checkpointed=is_checkpointed, device="cpu")
    use_packed_attention(model, "sdpa")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    ids = torch.randint(3, IMAGE_TOKEN, (1, TOKENS))
    ids[0, : TILES * TOKENS_PER_TILE] = IMAGE_TOKEN
    batch: dict[str, Any] = {
        "input_ids": ids,
        "pixel_values": torch.randn(TILES, 3, TILE_SIZE, TILE_SIZE),
        "labels": ids.clone(),
        "loss_weights": torch.ones(1, TOKENS),
        "cu_seq_lens": torch.tensor([0, TOKENS], dtype=torch.int32),
        "max_seq_len": TOKENS,
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(**batch).loss.backward()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = batch["pixel_values"].nbytes
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return int(peak)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_rehearsal_needs_what_a_real_step_needs(stage: str, is_checkpointed: bool) -> None:
    rehearsed = rehearse_stage(stage, is_checkpointed=is_checkpointed)
    assert rehearsed.peak == pytest.approx(measure_step(stage, is_checkpointed=is_checkpointed), rel=0.02)


def test_recomputation_keeps_the_input_of_each_layer() -> None:
    kept = rehearse_stage("all", is_checkpointed=True).kept
    positions = (TILE_SIZE // 8) ** 2 + 1
    inputs = 4 * (4 * TILES * positions * 16 + 2 * TOKENS * 16)
    assert inputs < kept < 0.5 * rehearse_stage("all", is_checkpointed=False).kept


def test_logits_take_twelve_bytes_a_token_of_the_vocabulary_for_each_position() -> None:
    # In float32: the logarithms that the loss keeps, their gradient, and that of the logits.
    logits = rehearse_stage("all", is_checkpointed=True).logits
    assert logits == pytest.approx(12 * TOKENS * 1024, rel=0.02)


def test_a_frozen_tower_keeps_nothing_but_its_pixels() -> None:
    few, many = (
        rehearse(
            build_learner("head", is_checkpointed=False, device="meta"),
            Caps(num_sequences=1, tokens=TOKENS, tiles=tiles, is_packed=True),
        )
        for tiles in (1, TILES)
    )
    assert many.kept - few.kept == (TILES - 1) * 4 * 3 * TILE_SIZE**2


def test_padded_batches_hold_a_mask_with_the_square_of_their_tokens() -> None:
    packed, padded = (
        rehearse(
            build_learner("all", is_checkpointed=False, device="meta"),
            Caps(num_sequences=1, tokens=TOKENS, tiles=1, is_packed=is_packed),
        ).kept
        for is_packed in (True, False)
    )
    # In float32 for each of the two layers, and once in eight bits.
    assert padded - packed >= 2 * 4 * TOKENS**2
