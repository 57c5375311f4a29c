"""The DeepSpeed configurations, built from one table (reference 5.4).

Other than the original's files: no `wall_clock_breakdown` (its timers synchronise the device
in every step). Standard library only; DeepSpeed itself is imported at launch.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_core.errors import ArgumentError


@dataclass(frozen=True)
class ZeroSettings:
    """One row of the table; buckets and thresholds count elements, not bytes."""

    stage: int
    bucket_size: int
    """Of reduction; also of all-gather in stages 1 and 2, of prefetch and sub-groups in stage 3."""
    persistence_threshold: int = 0
    max_live_parameters: int = 0
    is_offloaded: bool = False


_ZERO1 = ZeroSettings(1, 1_000_000_000)
_ZERO2 = ZeroSettings(2, 100_000_000)
_ZERO3 = ZeroSettings(3, 1_000_000_000, 10_000_000, 1_000_000_000)
_ZERO3_34B = ZeroSettings(3, 1_000_000_000, 100_000, 1_000_000_000)
_ZERO3_OFFLOAD = ZeroSettings(3, 10_000_000, 10_000, 100_000_000, is_offloaded=True)

BUILT_IN: dict[str, ZeroSettings] = {
    "zero1": _ZERO1,
    "zero2": _ZERO2,
    "zero3": _ZERO3,
    "zero3_offload": _ZERO3_OFFLOAD,
    # The names of the original's files, for command lines that give them without having them.
    "zero_stage1_config.json": _ZERO1,
    "zero_stage2_config.json": _ZERO2,
    "zero_stage3_config.json": _ZERO3,
    "zero_stage3_config_34b.json": _ZERO3_34B,
    "zero_stage3_config_70b.json": _ZERO3_34B,
    "zero_stage3_config_100b.json": ZeroSettings(3, 1_000_000_000, 10_000, 1_000_000_000),
    "zero_stage3_config_100b_1e8.json": ZeroSettings(3, 100_000_000, 10_000, 1_000_000_000),
    "zero_stage3_config_100b_1e7_offload.json": _ZERO3_OFFLOAD,
}


def resolve_deepspeed(value: str | dict[str, Any], *, decay_all: bool = True) -> dict[str, Any]:
    """Resolve a built-in name, or read a JSON file; a file that exists wins over its built-in namesake.

    Args:
        value: a name of `BUILT_IN` (a directory before a file name is allowed), a path, or the configuration itself.
        decay_all: give the built-in configuration its own AdamW, whose weight decay reaches every
            tensor; without it Trainer builds the optimizer and its groups.

    Raises:
        ArgumentError: no such name or file, the file is not a JSON object, or its optimizer contradicts `decay_all`.
    """
    settings = find_built_in(value)
    if settings is not None:
        return _build_config(settings, decay_all=decay_all)
    config = value if isinstance(value, dict) else _read_config(Path(value))
    if "optimizer" in config and not decay_all:
        raise ArgumentError(
            "decay_all: False, but the deepspeed configuration has an `optimizer`, which decays every tensor. "
            "Remove the block or leave decay_all at True."
        )
    return config


def find_built_in(value: str | dict[str, Any]) -> ZeroSettings | None:
    """Find the settings that a value names; None for a configuration or a path of the user's own."""
    if isinstance(value, dict) or os.path.isfile(value):  # noqa: PTH113  # Path.is_file raises for a very long name
        return None
    return BUILT_IN.get(Path(value).name if value.endswith(".json") else value)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(
            f"deepspeed: {str(path)!r} is neither a built-in name nor a readable file ({error.strerror}). "
            f"Built in: {', '.join(BUILT_IN)}."
        ) from None
    except ValueError as error:
        raise ArgumentError(f"deepspeed: {path} is not JSON ({error}). Fix the file.") from None
    if not isinstance(config, dict):
        raise ArgumentError(f"deepspeed: {path} holds a {type(config).__name__}; it should be a JSON object.")
    return config


def _build_config(settings: ZeroSettings, *, decay_all: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "zero_optimization": _build_zero(settings),
        "fp16": {
            "enabled": "auto",
            "auto_cast": True,
            "loss_scale": 0,
            "initial_scale_power": 32,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 2000,
    }
    if decay_all:
        config["optimizer"] = _build_optimizer(settings)
    return config


def _build_optimizer(settings: ZeroSettings) -> dict[str, Any]:
    params: dict[str, Any] = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    if not settings.is_offloaded:
        # DeepSpeed's own fused AdamW is compiled on first use: it needs nvcc on a GPU machine and took
        # 125 s on two CPU cores. torch ships the same fused update for both, and ZeRO supports it.
        params |= {"torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": params}


def _build_zero(settings: ZeroSettings) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": settings.stage,
        "overlap_comm": not settings.is_offloaded,
        "contiguous_gradients": True,
        "reduce_bucket_size": settings.bucket_size,
    }
    if settings.stage < 3:
        return zero | {
            "allgather_partitions": True,
            "allgather_bucket_size": settings.bucket_size,
            "reduce_scatter": True,
        }
    zero |= {
        "sub_group_size": settings.bucket_size,
        "stage3_prefetch_bucket_size": settings.bucket_size,
        "stage3_param_persistence_threshold": settings.persistence_threshold,
        "stage3_max_live_parameters": settings.max_live_parameters,
        "stage3_max_reuse_distance": settings.max_live_parameters,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    if settings.is_offloaded:
        zero |= {
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        }
    return zero
