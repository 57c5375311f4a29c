"""Bytes that a rank holds of weights, gradients and optimizer state; knows no torch.

Formulas follow what DeepSpeed 0.19.8 allocates (runtime/zero/stage_1_and_2.py and stage3.py), on top of
Rajbhandari et al., arXiv 1910.02054: of `n` parameters that learn on `R` ranks, in `b` bytes each,

    stage   weights      optimizer      gradients
    none    4 n          8 n            4 n, and as much again in DDP's buckets
    1, 2    b n          (4 + 8) n / R  b times the parameters that reach into the rank's share, each whole
    3       b n / R      (4 + 8) n / R  b n / R

AdamW's two moments take 8 bytes, the float32 master 4, of weights in float32 too; what is frozen has weights
alone. Stage 1 holds whole gradients, b n, where an update has several batches. Without DeepSpeed all is float32
(autocast's copies belong to the activations). A share is what one rank of `R` owns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from internvl_core.deepspeed_config import resolve_deepspeed

_FLOAT32 = 4
_ALIGNMENT = 2
"""Elements that stages 1 and 2 align the share of every rank to: nccl_start_alignment_factor."""

# What DeepSpeed takes where a configuration is silent (runtime/zero/config.py).
_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model."""

    numel: int
    learns: bool


@dataclass(frozen=True)
class Sharding:
    """How a stage's state lies on its ranks."""

    num_ranks: int
    stage: int | None
    """Of ZeRO; None without DeepSpeed."""
    weight_bytes: int
    moments_bytes: int
    """Of the optimizer, for each parameter, without the master."""
    accumulates: bool
    """Several batches make an update."""
    bucket_elements: int
    num_buckets: int
    sub_group_elements: int
    persistence_threshold: int
    """Stage 3 keeps parameters of at most so many elements whole."""
    max_live_elements: int
    offloads_optimizer: bool
    offloads_weights: bool

    @classmethod
    def from_arguments(cls, values: Mapping[str, Any], *, num_ranks: int) -> "Sharding":
        """Read a stage's resolved arguments.

        Raises:
            ArgumentError: `deepspeed` is neither a built-in name nor a readable file.
        """
        given = values["deepspeed"]
        config = resolve_deepspeed(given, decay_all=values["decay_all"]) if given is not None else None
        zero = config.get("zero_optimization", {}) if config is not None else {}
        stage = int(zero.get("stage", 0)) if config is not None else None
        numbers = {name: _read_number(zero, name) for name in _DEFAULTS}
        overlaps = zero.get("overlap_comm", stage == 3)
        return cls(
            num_ranks=num_ranks,
            stage=stage,
            weight_bytes=2 if config is not None and (values["bf16"] or values["fp16"]) else _FLOAT32,
            moments_bytes=2 * _FLOAT32,
            accumulates=values["gradient_accumulation_steps"] > 1,
            bucket_elements=numbers["reduce_bucket_size"],
            num_buckets=2 if overlaps and stage in (1, 2) else 1,
            sub_group_elements=numbers["sub_group_size"],
            persistence_threshold=numbers["stage3_param_persistence_threshold"],
            max_live_elements=numbers["stage3_max_live_parameters"],
            offloads_optimizer=_is_offloaded(zero, "offload_optimizer"),
            offloads_weights=stage == 3 and _is_offloaded(zero, "offload_param"),
        )


@dataclass(frozen=True)
class StateMemory:
    """Bytes on the rank that holds the most."""

    weights: int
    gradients: int
    """Between two batches of an update, or before the optimizer steps, whichever is more."""
    optimizer: int
    """Moments, and under DeepSpeed the float32 master."""
    buckets: int
    """What gradients are reduced in during the backward pass; under stage 3 also the weights that are gathered."""
    update: int
    """Copies of the gradients while the optimizer steps, when buckets and activations are gone."""
    host: int = 0
    """Offloaded, for each rank; no part of the GPU."""

    @property
    def static(self) -> int:
        """What stays from step to step, with the gradients."""
        return self.weights + self.gradients + self.optimizer

    def count_peak(self, activations: int) -> int:
        """Count the bytes of the moment that needs most: the backward pass, or the optimizer's step."""
        return self.static + max(self.buckets + activations, self.update)


def estimate_state(parameters: Sequence[Parameter], sharding: Sharding) -> StateMemory:
    """Estimate what one rank holds of a model's state.

    Args:
        parameters: in the order of the model: under stages 1 and 2 a rank's share begins and ends within one.
    """
    if sharding.stage == 3:
        return _estimate_stage_3(parameters, sharding)
    if sharding.stage is None:
        return _estimate_plain(parameters, sharding)
    return _estimate_stages_1_and_2(parameters, sharding)


def _estimate_plain(parameters: Sequence[Parameter], sharding: Sharding) -> StateMemory:
    learning = _sum(parameters, learns=True)
    gradients = _FLOAT32 * learning
    return StateMemory(
        weights=_FLOAT32 * (learning + _sum(parameters, learns=False)),
        gradients=gradients,
        optimizer=sharding.moments_bytes * learning,
        # DDP reduces in copies; a single rank is not wrapped in it.
        buckets=gradients if sharding.num_ranks > 1 else 0,
        update=0,
    )


def _estimate_stages_1_and_2(parameters: Sequence[Parameter], sharding: Sharding) -> StateMemory:
    num_ranks = sharding.num_ranks if sharding.stage else 1
    learning = _sum(parameters, learns=True)
    share = -(-learning // (num_ranks * _ALIGNMENT)) * _ALIGNMENT
    size = sharding.weight_bytes
    own = _count_largest_overlap([each.numel for each in parameters if each.learns], share, num_ranks)
    gradients = size * own
    buckets = size * sharding.bucket_elements * sharding.num_buckets if sharding.stage else 0
    if sharding.accumulates:
        # Stage 1 lets them grow whole before it reduces them; both have room for the share of one batch beside the sum.
        buckets += gradients
        gradients = size * learning if sharding.stage != 2 else gradients
    optimizer = (_FLOAT32 + sharding.moments_bytes) * share
    weights = size * (_sum(parameters, learns=False) + share * num_ranks)
    if sharding.offloads_optimizer:
        # Gradients reach the host in float32, and come back as weights through a buffer there.
        host = optimizer + (_FLOAT32 + size) * share
        return StateMemory(weights, 0, 0, buckets, update=0, host=host)
    # One flat copy, and one of that in float32.
    update = size * share + (_FLOAT32 * share if size != _FLOAT32 else 0)
    return StateMemory(weights, gradients, optimizer, buckets, update)


def _estimate_stage_3(parameters: Sequence[Parameter], sharding: Sharding) -> StateMemory:
    size = sharding.weight_bytes
    share = _sum_shares(parameters, sharding.num_ranks, learns=True)
    frozen_share = _sum_shares(parameters, sharding.num_ranks, learns=False)
    persistent = [each.numel for each in parameters if each.numel <= sharding.persistence_threshold]
    others = [each.numel for each in parameters if each.numel > sharding.persistence_threshold]
    gathered = min(sum(others), max(sharding.max_live_elements, max(others, default=0)))
    buckets = size * (sharding.bucket_elements + gathered)
    optimizer = (_FLOAT32 + sharding.moments_bytes) * share
    weights = size * (share + frozen_share)
    gradients = size * share
    whole = size * sum(persistent)
    update = (size + (_FLOAT32 if size != _FLOAT32 else 0)) * min(share, sharding.sub_group_elements)
    host = 0
    if sharding.offloads_optimizer:
        host += optimizer + gradients + _FLOAT32 * share
        optimizer = gradients = update = 0
    if sharding.offloads_weights:
        host += weights
        weights = 0
    return StateMemory(weights + whole, gradients, optimizer, buckets, update, host)


def _count_largest_overlap(sizes: Sequence[int], share: int, num_ranks: int) -> int:
    """Count the elements of all parameters that reach into a rank's share, for the rank where they are most.

    A parameter on the border of two shares is held whole by both ranks.
    """
    changes = [0] * (num_ranks + 1)
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        if size:
            changes[(end - size) // share] += size
            changes[(end - 1) // share + 1] -= size
    return max(accumulate(changes))


def _sum(parameters: Sequence[Parameter], *, learns: bool) -> int:
    return sum(each.numel for each in parameters if each.learns is learns)


def _sum_shares(parameters: Sequence[Parameter], num_ranks: int, *, learns: bool) -> int:
    return sum(-(-each.numel // num_ranks) for each in parameters if each.learns is learns)


def _read_number(zero: Mapping[str, Any], name: str) -> int:
    value = zero.get(name, zero.get(name.removeprefix("stage3_")))
    # "auto" is settled by Trainer from the model's width, to less than the default.
    return int(value) if isinstance(value, int | float) else _DEFAULTS[name]


def _is_offloaded(zero: Mapping[str, Any], name: str) -> bool:
    return bool((zero.get(name) or {}).get("device", "none") != "none")
