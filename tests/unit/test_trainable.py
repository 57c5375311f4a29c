import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny_internvl import build_batch, build_tiny_model
from torch import nn
from transformers import LlamaConfig, Phi3Config

from internvl_core.arguments import ModelArguments
from internvl_core.errors import ArgumentError
from internvl_core.model import trainable
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.trainable import count_parameters, count_trainable, enable_checkpointing, list_trainable

# PEFT 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# One for each flag; ranks, so that one part's cannot be taken for the other's.
CHOICES: dict[str, tuple[Any, ...]] = {
    "freeze_llm": (True, False),
    "freeze_backbone": (True, False),
    "freeze_mlp": (True, False),
    "unfreeze_lm_head": (False, True),
    "unfreeze_vit_layers": (0, -2),
    "use_llm_lora": (0, 2),
    "use_backbone_lora": (0, 3),
}
# Nothing learns in the first.
COMBINATIONS = [dict(zip(CHOICES, row, strict=True)) for row in itertools.product(*CHOICES.values())][1:]

FROZEN = ModelArguments(freeze_llm=True, freeze_backbone=True, freeze_mlp=True, grad_checkpoint=False)
NUM_VISION_LAYERS = 3

ADAPTERS = [
    {"use_llm_lora": llm, "use_backbone_lora": vision}
    for llm, vision in itertools.product((0, 2, 4), (0, 2, 4))
    if llm or vision
]


def set_trainable(arguments: ModelArguments) -> nn.Module:
    model = build_tiny_model(num_vision_layers=NUM_VISION_LAYERS)
    model.config.vision_feature_layer = arguments.vision_select_layer
    if arguments.grad_checkpoint:
        enable_checkpointing(model)
    return trainable.set_trainable(model, arguments).train()


def find_parameters_with_gradient(model: nn.Module, batch: dict[str, Any]) -> set[str]:
    """Name the parameters that a step of the trainer would move."""
    weights = (batch["labels"] != -100).float()
    model.zero_grad()
    model(**batch, loss_weights=weights, loss_normalizer=weights.sum()).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def find_declared(model: nn.Module, flags: dict[str, Any]) -> set[str]:
    """Name what flags declare to learn, by nothing but the names."""
    layers = set(range(NUM_VISION_LAYERS)[flags["unfreeze_vit_layers"] :]) if flags["unfreeze_vit_layers"] else set()
    declared = set()
    for name, _ in model.named_parameters():
        if "lora_" in name:
            declared.add(name)
        elif "vision_tower" in name:
            layer = int(name.split(".encoder.layer.")[1].split(".")[0]) if ".encoder.layer." in name else None
            declared |= {name} if not flags["freeze_backbone"] or layer in layers else set()
        elif "multi_modal_projector" in name:
            declared |= {name} if not flags["freeze_mlp"] else set()
        elif "lm_head" in name:
            declared |= {name} if not flags["freeze_llm"] or flags["unfreeze_lm_head"] else set()
        else:
            assert "language_model" in name
            declared |= {name} if not flags["freeze_llm"] else set()
    return declared


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_exactly_what_the_flags_declare_gets_a_gradient(grad_checkpoint: bool) -> None:
    # F9: unfreeze_lm_head did nothing. F10: reentrant checkpointing gave unfrozen layers no gradient.
    # Half of the combinations with it and half without: one flag more or less changes sides.
    combinations = [flags for flags in COMBINATIONS if sum(map(bool, flags.values())) % 2 == grad_checkpoint]
    assert len(combinations) == (63 if grad_checkpoint else 64)
    for flags in combinations:
        model = set_trainable(replace(FROZEN, grad_checkpoint=grad_checkpoint, **flags))
        declared = find_declared(model, flags)
        assert any(".lora_A." in name for name in declared) == bool(flags["use_llm_lora"] or flags["use_backbone_lora"])
        assert set(list_trainable(model)) == declared, flags
        for num_tiles in (0, 2):
            assert find_parameters_with_gradient(model, build_batch(num_tiles=num_tiles)) == declared, flags


def test_what_gets_a_gradient_gets_one_that_moves_it() -> None:
    model = set_trainable(replace(FROZEN, freeze_llm=False, freeze_backbone=False, freeze_mlp=False, use_llm_lora=2))
    find_parameters_with_gradient(model, build_batch())
    # Softmax does not see a constant added to every key, and an adapter's B begins at zero.
    assert all(
        parameter.grad.any() or ("k_proj." in name and name.endswith("bias")) or "lora_A" in name
        for name, parameter in model.named_parameters()
    )


@pytest.mark.parametrize(("first", "layers"), [(-1, {2}), (-2, {1, 2}), (-3, {0, 1, 2}), (1, {1, 2}), (2, {2})])
def test_single_layers_of_a_frozen_tower_learn(first: int, layers: set[int]) -> None:
    names = list_trainable(set_trainable(replace(FROZEN, unfreeze_vit_layers=first)))
    assert {name.split(".encoder.layer.")[1].split(".")[0] for name in names} == {str(layer) for layer in layers}


@pytest.mark.parametrize("first", [-4, 3, 9])
def test_layers_that_the_tower_does_not_have_are_refused(first: int) -> None:
    with pytest.raises(ArgumentError, match=f"unfreeze_vit_layers: {first}, but the vision tower has 3 layers"):
        set_trainable(replace(FROZEN, unfreeze_vit_layers=first))


@pytest.mark.parametrize("select_layer", [-2, -3, 1])
@pytest.mark.parametrize("flags", [{"freeze_backbone": False}, {"use_backbone_lora": 2}])
def test_layers_behind_the_selected_one_do_not_learn(select_layer: int, flags: dict[str, Any]) -> None:
    model = set_trainable(replace(FROZEN, vision_select_layer=select_layer, **flags))
    assert find_parameters_with_gradient(model, build_batch()) == set(list_trainable(model))
    num_used = select_layer % (NUM_VISION_LAYERS + 1)
    layers = {name.split(".encoder.layer.")[1].split(".")[0] for name in list_trainable(model) if ".layer." in name}
    assert layers == {str(layer) for layer in range(num_used)}


@pytest.mark.parametrize("flags", ADAPTERS)
def test_adapters_have_the_rank_asked_for_and_an_alpha_of_twice_it(flags: dict[str, int]) -> None:
    model = set_trainable(replace(FROZEN, **flags))
    assert all(".lora_A." in name or ".lora_B." in name for name in list_trainable(model))
    found: dict[str, set[tuple[int, int]]] = {"vision_tower": set(), "language_model": set()}
    count = {"vision_tower": 0, "language_model": 0}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            part = "vision_tower" if "vision_tower" in name else "language_model"
            found[part].add((module.r["default"], module.lora_alpha["default"]))
            assert module.scaling["default"] == 2
            count[part] += 1
    llm, vision = flags["use_llm_lora"], flags["use_backbone_lora"]
    assert found == {
        "vision_tower": {(vision, 2 * vision)} if vision else set(),
        "language_model": {(llm, 2 * llm)} if llm else set(),
    }
    # q, k, v, o, gate, up, down of two layers; q, k, v, the output projection, fc1, fc2 of three.
    assert count == {"vision_tower": 18 if vision else 0, "language_model": 14 if llm else 0}


def test_a_fresh_adapter_changes_nothing() -> None:
    plain, adapted = build_tiny_model(num_vision_layers=3).eval(), set_trainable(replace(FROZEN, use_llm_lora=4)).eval()
    torch.testing.assert_close(adapted(**build_batch()).logits, plain(**build_batch()).logits)


def test_layers_on_which_nothing_depends_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"unfreeze_vit_layers: -1 names only layers behind"):
        set_trainable(replace(FROZEN, freeze_mlp=False, unfreeze_vit_layers=-1, vision_select_layer=-2))
    for select_layer in (4, -5):
        with pytest.raises(ArgumentError, match=f"vision_select_layer: {select_layer}, but the vision tower has 3"):
            trainable.set_trainable(
                build_tiny_model(num_vision_layers=3), replace(FROZEN, vision_select_layer=select_layer)
            )


@pytest.mark.parametrize(
    ("text_config", "targets"),
    [
        (LlamaConfig, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (Phi3Config, ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    ],
)
def test_the_adapters_targets_are_those_of_the_language_model(text_config: Any, targets: list[str]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = build_tiny_model().config
    config.text_config = text_config(**sizes, vocab_size=128, pad_token_id=1, bos_token_id=1, eos_token_id=2)
    model = trainable.set_trainable(InternVLForTraining(config), replace(FROZEN, use_llm_lora=2))
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert sorted(name.rpartition(".")[2] for name in adapted) == targets


def test_a_stage_in_which_nothing_would_learn_is_refused() -> None:
    with pytest.raises(ArgumentError, match="nothing would learn"):
        set_trainable(FROZEN)


def test_frozen_parameters_are_counted_but_not_as_learning() -> None:
    model = set_trainable(replace(FROZEN, freeze_mlp=False))
    projector = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    assert count_trainable(model) == projector
    assert count_parameters(model) == sum(parameter.numel() for parameter in model.parameters())


def test_checkpointed_activations_give_the_same_gradients() -> None:
    models = [
        set_trainable(replace(FROZEN, freeze_llm=False, freeze_backbone=False, grad_checkpoint=on)) for on in (0, 1)
    ]
    for model in models:
        find_parameters_with_gradient(model, build_batch())
    for plain, recomputed in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if plain.requires_grad:
            torch.testing.assert_close(recomputed.grad, plain.grad)


@pytest.mark.parametrize("adapters", [{}, {"use_llm_lora": 2}])
def test_a_frozen_vision_tower_keeps_nothing_for_a_backward_pass(adapters: dict[str, int]) -> None:
    frozen = {"freeze_backbone": True, **({"freeze_llm": True, "freeze_mlp": True} if adapters else {})}
    model = set_trainable(ModelArguments(**frozen, **adapters, grad_checkpoint=True))
    seen: list[bool] = []
    (tower,) = (module for name, module in model.named_modules() if name.endswith("vision_tower"))
    tower.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state.requires_grad))
    model(**build_batch()).loss.backward()
    assert seen == [False]
    assert any(parameter.grad is not None for parameter in model.parameters())
