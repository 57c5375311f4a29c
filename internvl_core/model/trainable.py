"""Which parameters learn: the only place where `requires_grad` is set.

Invariant: what `set_trainable` returns as learning is exactly what has `requires_grad`.
"""

import logging
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from internvl_core.arguments import ModelArguments
from internvl_core.errors import ArgumentError
from internvl_core.model.internvl import InternVLForTraining

logger = logging.getLogger(__name__)

LLM_LORA_TARGETS = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|down_proj|up_proj)"
VISION_LORA_TARGETS = r"model\.vision_tower\..*\.(q_proj|k_proj|v_proj|projection_layer|fc1|fc2)"
LORA_DROPOUT = 0.05


def set_trainable(model: InternVLForTraining, arguments: ModelArguments) -> nn.Module:
    """Freeze and unfreeze by the arguments' flags, and wrap the model in adapters if they ask for LoRA.

    Order as in the original: freeze flags, then single layers and the head, which win over them
    (`unfreeze_vit_layers`: -N the last N, +N from layer N on).

    Returns:
        The model, or the PEFT model around it.

    Raises:
        ArgumentError: nothing would learn, or LoRA is combined with parts that learn in full.
    """
    model.requires_grad_(True)
    vision_tower = model.model.vision_tower
    vision_tower.requires_grad_(not arguments.freeze_backbone)
    model.model.multi_modal_projector.requires_grad_(not arguments.freeze_mlp)
    model.model.language_model.requires_grad_(not arguments.freeze_llm)
    model.lm_head.requires_grad_(not arguments.freeze_llm or arguments.unfreeze_lm_head)
    if arguments.unfreeze_vit_layers:
        _unfreeze_layers(vision_tower.encoder.layer, arguments.unfreeze_vit_layers)
    if arguments.use_llm_lora or arguments.use_backbone_lora:
        trained: nn.Module = _add_adapters(model, arguments)
    else:
        trained = model
    _freeze_unused(vision_tower, arguments.vision_select_layer)
    if not count_trainable(trained):
        raise ArgumentError("freeze_llm, freeze_backbone and freeze_mlp are all True and no LoRA: nothing would learn.")
    logger.info("%s of %s parameters learn", f"{count_trainable(trained):,}", f"{count_parameters(trained):,}")
    return trained


def list_trainable(model: nn.Module) -> list[str]:
    """Name every parameter that learns."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def count_trainable(model: nn.Module) -> int:
    return sum(_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)


def count_parameters(model: nn.Module) -> int:
    return sum(_numel(parameter) for parameter in model.parameters())


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass.

    Not reentrant: the reentrant kind gives no gradient to layers whose input needs none (F10).
    """
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # transformers 5.23 then asks for gradients of every embedding's output, for the reentrant kind: a frozen vision
    # tower would keep its activations and get a backward pass.
    model.disable_input_require_grads()


def _unfreeze_layers(layers: nn.ModuleList, first: int) -> None:
    if not -len(layers) <= first < len(layers):
        raise ArgumentError(f"unfreeze_vit_layers: {first}, but the vision tower has {len(layers)} layers.")
    for layer in layers[first:]:
        layer.requires_grad_(True)


def _freeze_unused(vision_tower: Any, select_layer: int) -> None:
    """Freeze what lies behind the layer that the projector reads: it gets no gradient, only weight decay."""
    if select_layer == -1:
        return
    layers = vision_tower.encoder.layer
    # One more state than layers: the first is the embeddings'.
    num_used = range(len(layers) + 1)[select_layer]
    layers[num_used:].requires_grad_(False)
    vision_tower.layernorm.requires_grad_(False)


def _add_adapters(model: InternVLForTraining, arguments: ModelArguments) -> nn.Module:
    from peft import LoraConfig, get_peft_model  # 2 s of imports that only LoRA needs

    learning = list_trainable(model)
    if learning:
        raise ArgumentError(
            f"use_llm_lora, use_backbone_lora: {len(learning)} parameters would learn in full beside the adapters "
            f"({learning[0]} ...), and an adapter checkpoint would lose them. Set freeze_llm, freeze_backbone and "
            "freeze_mlp to True and unfreeze nothing."
        )
    ranks = {
        LLM_LORA_TARGETS: arguments.use_llm_lora,
        VISION_LORA_TARGETS: arguments.use_backbone_lora,
    }
    ranks = {targets: rank for targets, rank in ranks.items() if rank}
    default_rank = next(iter(ranks.values()))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=default_rank,
        lora_alpha=2 * default_rank,
        rank_pattern=ranks,
        alpha_pattern={targets: 2 * rank for targets, rank in ranks.items()},
        target_modules="|".join(f"({targets})" for targets in ranks),
        lora_dropout=LORA_DROPOUT,
        bias="none",
    )
    if not any(re.fullmatch(config.target_modules, name) for name, _ in model.named_modules()):
        raise ArgumentError(f"use_llm_lora: no module of this model matches the LoRA targets {sorted(ranks)}.")
    adapted: nn.Module = get_peft_model(model, config)
    if model.is_activation_checkpointing:
        # PEFT 0.21 asks for them again.
        model.disable_input_require_grads()
    return adapted


def _numel(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a parameter is an empty shard; DeepSpeed keeps its true size beside it.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
