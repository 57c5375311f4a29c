"""Which parts of the model learn, and how fast; over plain values, like all of argument_rules."""

from collections.abc import Iterator, Mapping
from typing import Any

# The rest take parameters in other forms than groups.
_GROUPED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def list_own_rates(values: Mapping[str, Any]) -> list[str]:
    """Name the arguments that give a part a learning rate of its own."""
    return [name for name in ("vision_lr", "mlp_lr") if values[name] is not None]


def iter_trainable_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the arguments that say what learns."""
    adapters = [name for name in ("use_llm_lora", "use_backbone_lora") if values[name]]
    frozen = all(values[name] for name in ("freeze_llm", "freeze_backbone", "freeze_mlp"))
    if frozen and not adapters and not values["unfreeze_vit_layers"] and not values["unfreeze_lm_head"]:
        yield (
            "freeze_llm, freeze_backbone, freeze_mlp: all True and no LoRA, so nothing would learn. "
            "Set one to False, or give use_llm_lora a rank."
        )
    if values["drop_path_rate"] and not _learns_vision(values):
        yield (
            f"drop_path_rate: {values['drop_path_rate']}, but the vision tower is frozen (freeze_backbone), and "
            "dropping its layers teaches it nothing. The original's full-finetune recipes set it and it only adds "
            "noise there. Set 0.0."
        )
    yield from _iter_rate_problems(values)


def iter_doubly_trained(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is adapted and learns in full as well, which is allowed and seldom meant."""
    if values["use_llm_lora"] and not values["freeze_llm"]:
        yield (
            f"use_llm_lora: {values['use_llm_lora']} beside freeze_llm False: the language model learns in full and "
            "its adapters too. Set freeze_llm to True if only the adapters should."
        )
    if values["use_backbone_lora"] and (not values["freeze_backbone"] or values["unfreeze_vit_layers"]):
        other = f"unfreeze_vit_layers {values['unfreeze_vit_layers']}" if values["freeze_backbone"] else None
        yield (
            f"use_backbone_lora: {values['use_backbone_lora']} beside {other or 'freeze_backbone False'}: layers of "
            "the vision tower learn in full and their adapters too. Freeze them if only the adapters should."
        )


def _iter_rate_problems(values: Mapping[str, Any]) -> Iterator[str]:
    if values["vision_lr"] is not None and not _learns_vision(values):
        yield (
            f"vision_lr: {values['vision_lr']}, but nothing of the vision tower learns (freeze_backbone). Leave it out."
        )
    if values["mlp_lr"] is not None and values["freeze_mlp"]:
        yield f"mlp_lr: {values['mlp_lr']}, but the projector does not learn (freeze_mlp). Leave it out."
    for name in list_own_rates(values):
        if values["optim"] not in _GROUPED_OPTIMIZERS:
            yield f"optim: {values['optim']} takes no {name}. Use {' or '.join(_GROUPED_OPTIMIZERS)}."


def _learns_vision(values: Mapping[str, Any]) -> bool:
    return bool(not values["freeze_backbone"] or values["unfreeze_vit_layers"] or values["use_backbone_lora"])
