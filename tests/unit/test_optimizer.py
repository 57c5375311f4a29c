from dataclasses import replace
from typing import Any

import pytest
from tiny_internvl import build_batch, build_tiny_model
from torch import nn

from internvl_core.arguments import ModelArguments
from internvl_core.errors import InternVLError
from internvl_core.model.trainable import list_trainable, set_trainable
from internvl_core.train.gradient_check import GradientCheck
from internvl_core.train.optimizer import LearningRates, build_parameter_groups

# PEFT 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FROZEN = ModelArguments(freeze_llm=True, freeze_backbone=True, freeze_mlp=True, grad_checkpoint=False)
EVERYTHING = ModelArguments(grad_checkpoint=False)


def build(arguments: ModelArguments) -> nn.Module:
    return set_trainable(build_tiny_model(num_vision_layers=3), arguments).train()


# groups


def group(
    model: nn.Module, rates: LearningRates, *, decayed: set[str] | None = None
) -> list[tuple[float, float, set[str]]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = set(names.values()) if decayed is None else decayed
    groups = build_parameter_groups(model, rates, decayed=decayed, weight_decay=0.05)
    return [(item["lr"], item["weight_decay"], {names[id(found)] for found in item["params"]}) for item in groups]


def find_part(name: str) -> str:
    return next((part for part in ("vision_tower", "multi_modal_projector") if f".{part}." in name), "rest")


@pytest.mark.parametrize(
    "arguments", [EVERYTHING, replace(FROZEN, use_llm_lora=2, use_backbone_lora=3, freeze_mlp=False)]
)
def test_each_part_learns_at_its_own_rate_and_adapters_with_their_part(arguments: ModelArguments) -> None:
    model = build(arguments)
    groups = group(model, LearningRates(3e-4, vision=1e-5, mlp=2e-3))
    assert [(rate, decay) for rate, decay, _ in groups] == [(3e-4, 0.05), (1e-5, 0.05), (2e-3, 0.05)]
    expected = {"rest": 3e-4, "vision_tower": 1e-5, "multi_modal_projector": 2e-3}
    for rate, _, names in groups:
        assert {expected[find_part(name)] for name in names} == {rate}
    assert sorted(name for *_, names in groups for name in names) == sorted(list_trainable(model))


def test_parts_split_again_where_some_of_them_do_not_decay() -> None:
    model = build(EVERYTHING)
    weights = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    groups = group(model, LearningRates(3e-4, vision=1e-5), decayed=weights)
    assert sorted((rate, decay) for rate, decay, _ in groups) == [(1e-5, 0.0), (1e-5, 0.05), (3e-4, 0.0), (3e-4, 0.05)]
    assert groups[0][0] == 3e-4
    for _, decay, names in groups:
        assert {name in weights for name in names} == {decay > 0}


def test_parts_of_one_rate_are_one_group_and_none_is_empty() -> None:
    assert len(group(build(EVERYTHING), LearningRates(3e-4))) == 1
    assert len(group(build(EVERYTHING), LearningRates(3e-4, vision=3e-4))) == 1
    only_projector = build(replace(FROZEN, freeze_mlp=False))
    ((rate, _, names),) = group(only_projector, LearningRates(3e-4, vision=1e-5, mlp=2e-3))
    assert (rate, names) == (2e-3, set(list_trainable(only_projector)))


# what gets a gradient


def take_step(model: nn.Module, check: GradientCheck, **batch: Any) -> None:
    nothing: Any = None
    check.on_train_begin(nothing, nothing, nothing, model=model)
    model(**(batch or build_batch())).loss.backward()
    check.on_pre_optimizer_step(nothing, nothing, nothing)


@pytest.mark.parametrize("flags", [{"freeze_llm": False}, {"use_llm_lora": 2, "freeze_mlp": False}])
def test_a_first_step_that_reaches_what_was_declared_passes_and_is_not_watched_again(flags: dict[str, Any]) -> None:
    model = build(replace(FROZEN, **flags))
    check = GradientCheck(model)
    take_step(model, check)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters() if parameter.requires_grad)
    check.on_pre_optimizer_step(*[None] * 3)  # type: ignore[arg-type]


def test_layers_that_reentrant_checkpointing_robs_of_their_gradient_end_the_stage() -> None:
    # F10, as it happened to the original.
    model = build(replace(FROZEN, unfreeze_vit_layers=-2, freeze_mlp=False))
    check = GradientCheck(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(
            InternVLError, match=r"Without a gradient: model\.vision_tower\.encoder\.layer\.1\..* With one, .*: none"
        ) as caught,
    ):
        take_step(model, check)
    assert caught.value.exit_code == 70
    assert "\n" not in str(caught.value)


def test_a_parameter_that_was_not_declared_ends_the_stage_too() -> None:
    model = build(replace(FROZEN, freeze_mlp=False))
    check = GradientCheck(model)
    model.lm_head.requires_grad_(True)
    with pytest.raises(InternVLError, match=r"Without a gradient: none\. With one, .* frozen: lm_head\.weight"):
        take_step(model, check)


def test_a_part_that_the_loss_does_not_depend_on_is_found() -> None:
    model = build(replace(FROZEN, freeze_mlp=False, unfreeze_lm_head=True))
    check = GradientCheck(model)
    projector = model.model.multi_modal_projector
    projector.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(InternVLError, match=r"Without a gradient: model\.multi_modal_projector"):
        take_step(model, check)
