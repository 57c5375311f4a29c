"""The formulas of state: against DeepSpeed's own way of sharing out, against each other, and by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_core.argument_rules import resolve_arguments
from internvl_core.model.memory import Parameter, Sharding, StateMemory, estimate_state

MODEL = [Parameter(1000, True), Parameter(500, False), Parameter(3000, True), Parameter(40, True)]
LEARNING, FROZEN = 4040, 500


def read_sharding(num_ranks: int = 4, **values: Any) -> Sharding:
    return Sharding.from_arguments(resolve_arguments(values), num_ranks=num_ranks)


def estimate(parameters: list[Parameter] = MODEL, **values: Any) -> StateMemory:
    return estimate_state(parameters, read_sharding(**values))


def share_out_as_deepspeed(sizes: list[int], num_ranks: int) -> list[int]:
    """Count what each rank's `params_in_partition` holds, by the rule of `get_partition_info`."""
    share = -(-sum(sizes) // (2 * num_ranks)) * 2
    held = [0] * num_ranks
    for rank in range(num_ranks):
        start, end, position = share * rank, share * (rank + 1), 0
        for size in sizes:
            if start <= position < end or position < start < position + size:
                held[rank] += size
            position += size
    return held


def test_without_deepspeed_a_parameter_that_learns_takes_16_bytes_and_a_frozen_one_4() -> None:
    state = estimate(num_ranks=1, bf16=True)
    assert state.static == 16 * LEARNING + 4 * FROZEN
    assert (state.buckets, state.update, state.host) == (0, 0, 0)
    # DDP's buckets are a second copy of the gradients.
    assert estimate(num_ranks=2).buckets == 4 * LEARNING


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_on_one_rank_every_stage_of_zero_takes_16_bytes_and_a_frozen_parameter_2(zero: str) -> None:
    state = estimate(num_ranks=1, deepspeed=zero, bf16=True)
    persistent = 2 * (LEARNING + FROZEN) if zero == "zero3" else 0
    assert state.static - persistent == (2 + 2 + 4 + 8) * LEARNING + 2 * FROZEN


def test_stage_1_shares_the_optimizer_and_stage_3_everything() -> None:
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    first, third = estimate(deepspeed="zero1", bf16=True), estimate(deepspeed=config, bf16=True)
    assert first.optimizer == third.optimizer == 12 * LEARNING / 4
    assert first.weights == 2 * (LEARNING + FROZEN)
    assert third.weights == 2 * (LEARNING + FROZEN) / 4
    assert third.gradients == 2 * LEARNING / 4


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=20), num_ranks=st.integers(1, 9))
def test_a_rank_holds_the_gradients_of_every_parameter_that_reaches_into_its_share(
    sizes: list[int], num_ranks: int
) -> None:
    parameters = [Parameter(size, True) for size in sizes]
    state = estimate(parameters, num_ranks=num_ranks, deepspeed="zero2", bf16=True)
    assert state.gradients == 2 * max(share_out_as_deepspeed(sizes, num_ranks))


def test_stage_1_holds_whole_gradients_between_the_batches_of_an_update() -> None:
    first, second = (
        estimate(deepspeed=zero, bf16=True, gradient_accumulation_steps=2).gradients for zero in ("zero1", "zero2")
    )
    assert first == 2 * LEARNING
    assert second == estimate(deepspeed="zero2", bf16=True).gradients < first


def test_weights_in_float32_have_a_master_too_under_deepspeed() -> None:
    state = estimate(deepspeed="zero1", num_ranks=1)
    assert (state.weights, state.gradients, state.optimizer) == (4 * (LEARNING + FROZEN), 4 * LEARNING, 12 * LEARNING)


def test_offloading_moves_the_state_to_the_host() -> None:
    kept, offloaded = (estimate(deepspeed=zero, bf16=True) for zero in ("zero3", "zero3_offload"))
    assert (offloaded.gradients, offloaded.optimizer) == (0, 0)
    # Of this model no parameter is large enough to leave the GPU.
    assert offloaded.weights == 2 * (LEARNING + FROZEN)
    assert offloaded.host == 2 * (LEARNING + FROZEN) / 4 + kept.optimizer + kept.gradients + 4 * LEARNING / 4


def test_buckets_are_those_of_the_built_in_configurations() -> None:
    # Two of 1e9 elements, since reduction overlaps with the backward pass.
    assert estimate(deepspeed="zero1", bf16=True).buckets == 2 * 2 * 1_000_000_000
    assert estimate(deepspeed="zero2", bf16=True).buckets == 2 * 2 * 100_000_000
    large = [Parameter(3_000_000_000, True), Parameter(20_000_000, True)]
    # One, and 1e9 elements of gathered weights, but never less than the largest parameter.
    assert estimate(large, deepspeed="zero3", bf16=True).buckets == 2 * (1_000_000_000 + 3_000_000_000)
    many = [Parameter(20_000_000, True)] * 200
    assert estimate(many, deepspeed="zero3", bf16=True).buckets == 2 * (1_000_000_000 + 1_000_000_000)


def test_a_configuration_of_ones_own_is_read_with_deepspeeds_defaults(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False}})
    )
    sharding = read_sharding(deepspeed=str(path))
    assert (sharding.stage, sharding.bucket_elements, sharding.num_buckets) == (2, 500_000_000, 1)


def test_the_most_is_needed_in_the_backward_pass_or_in_the_optimizers_step() -> None:
    state = StateMemory(weights=10, gradients=5, optimizer=20, buckets=3, update=8)
    assert state.count_peak(activations=4) == 35 + 8
    assert state.count_peak(activations=6) == 35 + 9
