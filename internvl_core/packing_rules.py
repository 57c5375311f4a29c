"""Which stages pack, and what their arguments may say; over plain values, like all of argument_rules."""

from collections.abc import Iterator, Mapping
from typing import Any

_ONLY_PACKED = (
    *("num_images_expected", "max_packed_tokens", "log_freq", "strict_mode", "replacement"),
    *("packer", "packed_attention"),
)


def is_packed(values: Mapping[str, Any], *, entry: str) -> bool:
    """Tell whether a stage packs: pretrain always does, as the seeds have it, finetune where it is asked to."""
    return entry == "pretrain" or bool(values["use_packed_ds"])


def iter_without_effect(
    values: Mapping[str, Any], properties: Mapping[str, Mapping[str, Any]], *, entry: str
) -> Iterator[str]:
    """Yield the arguments of packing that a stage was given although it pads; stages of a recipe share arguments."""
    if not is_packed(values, entry=entry):
        for name in _ONLY_PACKED:
            if values[name] != properties[name]["default"]:
                yield name


def iter_packing_problems(
    values: Mapping[str, Any], properties: Mapping[str, Mapping[str, Any]], *, entry: str
) -> Iterator[str]:
    """Yield what is wrong with the arguments of packing.

    Args:
        properties: schema fragments by name, for the defaults.
    """
    default = properties["max_buffer_size"]["default"]
    if values["packer"] != "legacy" and values["max_buffer_size"] != default:
        yield (
            f"max_buffer_size: {values['max_buffer_size']} belongs to packer legacy, and packer is "
            f"{values['packer']}, which holds no open packs. Leave it out, or set packer to legacy."
        )
    if not is_packed(values, entry=entry):
        return
    if values["max_seq_length"] > values["max_packed_tokens"]:
        yield (
            f"max_seq_length: {values['max_seq_length']} is more than max_packed_tokens, "
            f"{values['max_packed_tokens']}: samples between the two would fit into no pack. Lower the one or raise "
            "the other."
        )
    if values["train_sampling_strategy"] == "group_by_length":
        yield "group_by_length: packs leave no padding to save. Leave it out where batches are packed."
    if values["replacement"] and values["max_steps"] <= 0:
        yield "replacement: data that start over never end. Give max_steps."
