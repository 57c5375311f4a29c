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
from internvl_core.model.internvl import InternVLForTraining, check_select_layer

logger = logging.getLogger(__name__)

# Qwen2 and Llama (which InternLM2 becomes) have three projections and two gates, Phi3 one of each (reference 2.9).
LLM_LORA_TARGETS = (
    r"model\.language_model\..*\."
    r"(q_proj|k_proj|v_proj|qkv_proj|o_proj|gate_proj|up_proj|gate_up_proj|down_proj)"
)
VISION_LORA_TARGETS = r"model\.vision_tower\..*\.(q_proj|k_proj|v_proj|projection_layer|fc1|fc2)"
LORA_DROPOUT = 0.05


def set_trainable(model: InternVLForTraining, arguments: ModelArguments) -> nn.Module:
    """Freeze and unfreeze by the arguments' flags, and wrap the model in adapters if they ask for LoRA.

    A parameter of the model learns if its part is not frozen or an unfreeze flag names it
    (`unfreeze_vit_layers`: -N the last N, +N from layer N on). Adapters come on top, whatever is
    frozen, and always learn. What lies behind `vision_select_layer` does not: no gradient reaches it.

    Returns:
        The model, or the PEFT model around it.

    Raises:
        ArgumentError: nothing would learn, or the flags name layers that the tower does not have or use.
    """
    _set_flags(model, arguments)
    trained = _add_adapters(model, arguments) if arguments.use_llm_lora or arguments.use_backbone_lora else model
    _freeze_unused(model.model.vision_tower, arguments)
    if not count_trainable(trained):
        raise ArgumentError(
            "freeze_llm, freeze_backbone, freeze_mlp, vision_select_layer: nothing would learn. All is frozen or lies "
            "behind the layer that the projector reads, and there is no LoRA."
        )
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


def _set_flags(model: InternVLForTraining, arguments: ModelArguments) -> None:
    vision_tower = model.model.vision_tower
    vision_tower.requires_grad_(not arguments.freeze_backbone)
    model.model.multi_modal_projector.requires_grad_(not arguments.freeze_mlp)
    model.model.language_model.requires_grad_(not arguments.freeze_llm)
    model.lm_head.requires_grad_(not arguments.freeze_llm or arguments.unfreeze_lm_head)
    first = arguments.unfreeze_vit_layers
    if first:
        layers = vision_tower.encoder.layer
        if not -len(layers) <= first < len(layers):
            raise ArgumentError(f"unfreeze_vit_layers: {first}, but the vision tower has {len(layers)} layers.")
        layers[first:].requires_grad_(True)


def _freeze_unused(vision_tower: Any, arguments: ModelArguments) -> None:
    """Freeze what lies behind the layer that the projector reads: it gets no gradient, only weight decay."""
    select_layer = arguments.vision_select_layer
    if select_layer == -1:
        return
    layers = vision_tower.encoder.layer
    # One more state than layers: the first is the embeddings'.
    check_select_layer(select_layer, len(layers))
    num_used = range(len(layers) + 1)[select_layer]
    first = arguments.unfreeze_vit_layers
    if first and range(len(layers))[first] >= num_used:
        raise ArgumentError(
            f"unfreeze_vit_layers: {first} names only layers behind the one that the projector reads "
            f"(vision_select_layer {select_layer}), which nothing depends on. Name an earlier one."
        )
    layers[num_used:].requires_grad_(False)
    vision_tower.layernorm.requires_grad_(False)


def _add_adapters(model: InternVLForTraining, arguments: ModelArguments) -> nn.Module:
    from peft import LoraConfig, get_peft_model  # 2 s of imports that only LoRA needs

    ranks = {LLM_LORA_TARGETS: arguments.use_llm_lora, VISION_LORA_TARGETS: arguments.use_backbone_lora}
    ranks = {targets: rank for targets, rank in ranks.items() if rank}
    for targets in ranks:
        if not any(re.fullmatch(targets, name) for name, _ in model.named_modules()):
            raise ArgumentError(f"use_llm_lora, use_backbone_lora: no module of this model is called {targets}.")
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
    # By identity: their names change, and PEFT freezes them all.
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Not cast to float32: without DeepSpeed the model is float32 anyway, and under it all weights must have one dtype.
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in learning:
        parameter.requires_grad_(True)
    if model.is_activation_checkpointing:
        # PEFT 0.21 asks for them again.
        model.disable_input_require_grads()
    return adapted


def _numel(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a parameter is an empty shard; DeepSpeed keeps its true size beside it.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
