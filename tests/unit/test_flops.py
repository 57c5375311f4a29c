"""The formulas, against torch's own counter and against published sizes."""

import itertools

import pytest
from tiny_internvl import TOKENS_PER_TILE, build_batch, build_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from internvl_core.model.flops import NAMED_SHAPES, ModelShape, build_sample_cost, count_model_flops
from internvl_core.model.trainable import enable_checkpointing

LEARNING = [parts for parts in itertools.product((False, True), repeat=3) if any(parts)]


def count_with_torch(*, vision: bool, projector: bool, llm: bool, num_tiles: int, is_checkpointed: bool) -> float:
    """Count a step on a batch of two sequences of the same length, the tiles all in the first."""
    model = build_tiny_model()
    model.set_attn_implementation("eager")
    model.requires_grad_(llm)
    model.model.vision_tower.requires_grad_(vision)
    model.model.multi_modal_projector.requires_grad_(projector)
    if is_checkpointed:
        enable_checkpointing(model)
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**build_batch(num_tiles=num_tiles)).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("vision", "projector", "llm"), LEARNING)
@pytest.mark.parametrize("num_tiles", [1, 20])
def test_a_step_costs_what_torch_counts(vision: bool, projector: bool, llm: bool, num_tiles: int) -> None:
    counted = count_with_torch(vision=vision, projector=projector, llm=llm, num_tiles=num_tiles, is_checkpointed=False)
    length = 6 + num_tiles * TOKENS_PER_TILE
    computed = count_model_flops(
        ModelShape.from_config(build_tiny_model().config),
        learns_vision=vision,
        learns_projector=projector,
        learns_llm=llm,
        tokens=2 * length,
        # Torch's attention computes the whole square, and masks half of it.
        tokens_squared=2 * 2 * length**2,
        tiles=num_tiles,
        supervised_tokens=2 * length,
    )
    assert computed == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(("vision", "projector", "llm"), LEARNING)
def test_recomputation_costs_what_torch_counts(vision: bool, projector: bool, llm: bool) -> None:
    counted = [
        count_with_torch(vision=vision, projector=projector, llm=llm, num_tiles=20, is_checkpointed=is_checkpointed)
        for is_checkpointed in (True, False)
    ]
    shape = ModelShape.from_config(build_tiny_model().config)
    with_it, without = (
        build_sample_cost(
            shape, learns_vision=vision, learns_projector=projector, learns_llm=llm, is_checkpointed=is_checkpointed
        )
        for is_checkpointed in (True, False)
    )
    length = 6 + 20 * TOKENS_PER_TILE
    more = (
        (with_it.per_token - without.per_token) * 2 * length
        + (with_it.per_token_squared - without.per_token_squared) * 2 * 2 * length**2
        + (with_it.per_tile - without.per_tile) * 20
    )
    assert more == pytest.approx(counted[0] - counted[1], rel=0.01)


@pytest.mark.parametrize(
    ("size", "billions"),
    # Of the language models' cards: parameters of all layers and of the head (arXiv 2412.15115 and 2403.17297).
    [("1b", 0.49), ("2b", 1.89), ("4b", 3.4), ("8b", 7.74), ("26b", 19.86), ("38b", 32.76), ("78b", 72.7)],
)
def test_named_shapes_have_as_many_weights_as_their_models(size: str, billions: float) -> None:
    decoder = NAMED_SHAPES[size].decoder
    cost = build_sample_cost(
        NAMED_SHAPES[size], learns_vision=True, learns_projector=True, learns_llm=True, is_checkpointed=False
    )
    # Six FLOPs a weight and token (arXiv 2001.08361), and two tables of tokens; the smallest ties them.
    tables = (1 if size == "1b" else 2) * decoder.width * decoder.vocab_size
    assert (cost.per_token / 6 + tables) / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_frozen_language_model_passes_the_gradient_on() -> None:
    # Forward and the gradient of activations, but none of weights: 4 P instead of 6 P a token.
    shape = NAMED_SHAPES["8b"]
    both = [
        build_sample_cost(shape, learns_vision=False, learns_projector=True, learns_llm=llm, is_checkpointed=False)
        for llm in (False, True)
    ]
    assert both[0].per_token / both[1].per_token == pytest.approx(4 / 6)
    assert both[0].per_token_squared == both[1].per_token_squared
    assert both[0].per_tile == both[1].per_tile


def test_a_frozen_vision_tower_is_only_run_forward() -> None:
    shape = NAMED_SHAPES["26b"]
    frozen, learning = (
        build_sample_cost(shape, learns_vision=vision, learns_projector=True, learns_llm=True, is_checkpointed=True)
        for vision in (False, True)
    )
    assert learning.per_tile / frozen.per_tile == pytest.approx(4, rel=0.02)


def test_attention_grows_with_the_square_of_each_sample_alone() -> None:
    cost = build_sample_cost(
        NAMED_SHAPES["8b"], learns_vision=True, learns_projector=True, learns_llm=True, is_checkpointed=False
    )
    # 32 layers, 4096 wide, 2 products of 2 FLOPs, half of the square, three passes.
    assert cost.per_token_squared == 32 * 4096 * 2 * 2 / 2 * 3
