"""Describe dataclasses of arguments as JSON Schema, so that forms and early checks need no torch."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from internvl_core.argument_renames import RENAMED

BOUNDS: Mapping[str, Mapping[str, Any]] = {
    "learning_rate": {"exclusiveMinimum": 0},
    "vision_lr": {"exclusiveMinimum": 0},
    "mlp_lr": {"exclusiveMinimum": 0},
    "weight_decay": {"minimum": 0, "maximum": 1},
    "adam_beta1": {"minimum": 0, "exclusiveMaximum": 1},
    "adam_beta2": {"minimum": 0, "exclusiveMaximum": 1},
    "adam_epsilon": {"exclusiveMinimum": 0},
    "max_grad_norm": {"minimum": 0},
    "label_smoothing_factor": {"minimum": 0, "exclusiveMaximum": 1},
    "warmup_steps": {"minimum": 0},
    "num_train_epochs": {"exclusiveMinimum": 0},
    "max_steps": {"minimum": -1, "not": {"const": 0}},
    "per_device_train_batch_size": {"minimum": 1},
    "per_device_eval_batch_size": {"minimum": 1},
    "gradient_accumulation_steps": {"minimum": 1},
    "logging_steps": {"exclusiveMinimum": 0},
    "save_steps": {"exclusiveMinimum": 0},
    "save_total_limit": {"minimum": 1},
    "dataloader_num_workers": {"minimum": 0},
    "dataloader_prefetch_factor": {"minimum": 1},
    "ddp_timeout": {"minimum": 1},
    # numpy's generator takes 32 bits.
    "seed": {"minimum": 0, "maximum": 2**32 - 1},
    "data_seed": {"minimum": 0, "maximum": 2**32 - 1},
    "use_backbone_lora": {"minimum": 0},
    "use_llm_lora": {"minimum": 0},
    "drop_path_rate": {"minimum": 0, "exclusiveMaximum": 1},
    "max_seq_length": {"minimum": 1},
    "force_image_size": {"minimum": 1},
    "down_sample_ratio": {"exclusiveMinimum": 0, "maximum": 1},
    "min_dynamic_patch": {"minimum": 1},
    "max_dynamic_patch": {"minimum": 1},
    # As in data/templates.py; a test holds the two together.
    "conv_style": {"enum": ["Hermes-2", "internlm2-chat", "internvl2_5", "internvl_zh", "phi3-chat"]},
    # As in data/sizes.py.
    "num_images_expected": {"minimum": 1, "maximum": 2**16},
    "max_packed_tokens": {"minimum": 1, "maximum": 2**24},
    "max_buffer_size": {"minimum": 1},
    "log_freq": {"minimum": 1},
    # As in data/loss_weights.py.
    "loss_reduction": {"enum": ["token", "sample", "square"]},
    "min_num_frame": {"minimum": 1},
    "max_num_frame": {"minimum": 1},
    "max_bad_fraction": {"minimum": 0, "maximum": 1},
    "eval_max_new_tokens": {"minimum": 1},
    "max_unsent_checkpoints": {"minimum": 1},
    "store_patience_s": {"minimum": 0},
    "max_non_finite_steps": {"minimum": 1},
    "setup_limit_s": {"exclusiveMinimum": 0},
    "stall_limit_s": {"exclusiveMinimum": 0},
}

_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def build_schema(groups: Mapping[str, type]) -> dict[str, Any]:
    """Build the schema of all groups' fields, flat, each with its group in `x-group`."""
    properties: dict[str, Any] = {}
    for group, dataclass_type in groups.items():
        hints = get_type_hints(dataclass_type)
        for field in fields(dataclass_type):
            if field.name not in RENAMED:
                properties[field.name] = _describe_field(field, hints[field.name]) | {"x-group": group}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Arguments of a training stage",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _describe_field(field: Field[Any], hint: Any) -> dict[str, Any]:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    fragment = _describe_type(hint)
    if default is None:
        # The seeds write `meta_path: str = None`.
        fragment = _merge([fragment, {"type": "null"}])
    if "choices" in field.metadata:
        is_nullable = "null" in fragment["type"]
        fragment["enum"] = [*field.metadata["choices"], *([None] if is_nullable else [])]
    description = " ".join(field.metadata["help"].replace("%%", "%").split())
    return {
        **fragment,
        "default": default.value if isinstance(default, Enum) else default,
        "description": description,
        **BOUNDS.get(field.name, {}),
    }


def _describe_type(hint: Any) -> dict[str, Any]:
    origin = get_origin(hint)
    if origin is Literal:
        kinds = list(dict.fromkeys(_NAMES[type(choice)] for choice in get_args(hint)))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(get_args(hint))}
    if origin in (Union, types.UnionType):
        return _describe_union(get_args(hint))
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"type": "string", "enum": [choice.value for choice in hint]}
    if hint is list or origin is list:
        items = _describe_type(get_args(hint)[0]) if get_args(hint) else {"type": "string"}
        return {"type": "array", "items": items}
    # A dict, or an object that only code can build (ParallelismConfig).
    return {"type": "object"}


def _describe_union(members: tuple[Any, ...]) -> dict[str, Any]:
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        # `SchedulerType | str` says the choices, and text only because a command line is text.
        members = tuple(member for member in members if member is not str)
    return _merge([_describe_type(member) for member in members])


def _merge(fragments: list[dict[str, Any]]) -> dict[str, Any]:
    kinds: list[str] = []
    merged: dict[str, Any] = {}
    for fragment in fragments:
        own = fragment["type"]
        kinds += [kind for kind in ([own] if isinstance(own, str) else own) if kind not in kinds]
        merged |= {key: value for key, value in fragment.items() if key != "type"}
    free = [fragment for fragment in fragments if "enum" not in fragment and fragment["type"] != "null"]
    if "enum" in merged and free:
        # Beside a type that takes any value the choices restrict nothing.
        del merged["enum"]
    elif "enum" in merged and "null" in kinds and None not in merged["enum"]:
        merged["enum"] = [*merged["enum"], None]
    return {"type": kinds[0] if len(kinds) == 1 else kinds} | merged
