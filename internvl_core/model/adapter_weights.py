"""Adapters on disk: what they were trained over, and their weights merged into it as it is read.

Merging here needs no model in memory, so it works for every way of loading, ZeRO-3 included. The
folder is PEFT's own; only what changes the formula W + scale x B A is refused (Hu et al., arXiv 2106.09685).
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from internvl_core.errors import ArgumentError
from internvl_core.model.weights import LazyTensor, Weights, from_state_dict

ADAPTER_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_REFUSED = ("use_dora", "fan_in_fan_out", "lora_bias")


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_FILE).is_file()


def merge_adapter_weights(weights: Weights, folder: Path) -> dict[str, LazyTensor]:
    """Merge an adapter's weights into those of its base; what it holds in full replaces the base's.

    Args:
        weights: of the base, by the names in the model.

    Raises:
        ArgumentError: the adapter is of a kind that is not merged here, or of another model.
    """
    config = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    refused = [name for name in _REFUSED if config.get(name)]
    if refused or config.get("peft_type") != "LORA":
        raise ArgumentError(
            f"{folder}: {', '.join(refused) or config.get('peft_type')}: only plain LoRA can be merged. Merge it with "
            "PEFT and give the result."
        )
    adapter = _open(folder)
    modules = [name.removesuffix(_A) for name in adapter if name.endswith(_A)]
    whole = {name: tensor for name, tensor in adapter.items() if not name.endswith((_A, _B))}
    unknown = sorted({*whole, *(f"{module}.weight" for module in modules)} - weights.keys())
    if unknown:
        raise ArgumentError(f"{folder}: its base has no {unknown[0]}. The adapter belongs to another model.")
    merged = {**weights, **whole}
    for module in modules:
        lora_a, lora_b = adapter[f"{module}{_A}"], adapter[f"{module}{_B}"]
        rank = lora_a.shape[0]
        scale = _get_alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        merged[f"{module}.weight"] = _add_product(merged[f"{module}.weight"], lora_a, lora_b, scale)
    return merged


def add_product(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Compute W + scale x B A in float32, in the type of W.

    Args:
        weight: W [N, M].
        down: A [r, M].
        up: B [N, r].
    """
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


def _open(folder: Path) -> Weights:
    file = folder / WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"{file}: cannot be read: {error}. Fetch the adapter again.") from error
    return from_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})


def _add_product(weight: LazyTensor, lora_a: LazyTensor, lora_b: LazyTensor, scale: float) -> LazyTensor:
    return replace(weight, read=lambda: add_product(weight.read(), lora_a.read(), lora_b.read(), scale))


def _get_alpha(config: dict[str, Any], module: str) -> float:
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    return float(patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"]))
