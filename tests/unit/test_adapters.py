import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_internvl import build_batch, build_tiny_model
from torch import Tensor, nn

from internvl_core.arguments import ModelArguments
from internvl_core.errors import CheckpointCorrupt
from internvl_core.model.adapter_weights import merge_adapter_weights
from internvl_core.model.adapters import (
    LEARNT_FILE,
    find_saved_modules,
    fold_adapters,
    load_adapter_into,
    save_adapter,
)
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.trainable import list_trainable, set_trainable
from internvl_core.model.weights import from_state_dict

# PEFT 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FROZEN = ModelArguments(freeze_llm=True, freeze_backbone=True, freeze_mlp=True, grad_checkpoint=False)
ALONE: dict[str, Any] = {"use_llm_lora": 2, "use_backbone_lora": 3}

# What PEFT has words for, and the modules to save that say it.
EXPRESSIBLE = [
    (ALONE, []),
    ({"use_llm_lora": 2, "freeze_mlp": False}, ["model.multi_modal_projector"]),
    ({**ALONE, "freeze_mlp": False}, ["model.multi_modal_projector"]),
    ({"use_llm_lora": 2, "unfreeze_lm_head": True}, ["lm_head"]),
    ({"use_llm_lora": 2, "freeze_backbone": False}, ["model.vision_tower"]),
    ({"use_llm_lora": 2, "unfreeze_vit_layers": -1}, ["model.vision_tower.encoder.layer.2"]),
    ({"use_llm_lora": 2, "unfreeze_vit_layers": -3}, ["model.vision_tower.encoder"]),
    (
        {"use_llm_lora": 2, "freeze_backbone": False, "vision_select_layer": -2},
        [
            "model.vision_tower.embeddings",
            "model.vision_tower.encoder.layer.0",
            "model.vision_tower.encoder.layer.1",
        ],
    ),
    (
        {"use_llm_lora": 2, "freeze_mlp": False, "unfreeze_vit_layers": 1},
        [
            "model.multi_modal_projector",
            "model.vision_tower.encoder.layer.1",
            "model.vision_tower.encoder.layer.2",
        ],
    ),
    ({"use_backbone_lora": 3, "freeze_llm": False}, ["lm_head", "model.language_model"]),
]
INEXPRESSIBLE = [
    {"use_llm_lora": 2, "freeze_llm": False},
    {"use_backbone_lora": 3, "freeze_backbone": False, "freeze_mlp": False},
    {"use_backbone_lora": 3, "unfreeze_vit_layers": -1},
    {**ALONE, "freeze_llm": False, "freeze_backbone": False, "freeze_mlp": False},
]
ALL = [*(flags for flags, _ in EXPRESSIBLE), *INEXPRESSIBLE]


def build(flags: Mapping[str, Any]) -> Any:
    return set_trainable(build_base(), replace(FROZEN, **flags))


def build_base() -> InternVLForTraining:
    return build_tiny_model(num_vision_layers=3)


def train(model: Any, *, seed: int = 0) -> Any:
    """Move whatever learns, all of it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def merge(base: InternVLForTraining, folder: Path) -> InternVLForTraining:
    weights = merge_adapter_weights(from_state_dict(base.state_dict()), folder)
    merged = build_base()
    merged.load_state_dict({name: tensor.read() for name, tensor in weights.items()})
    return merged


@torch.no_grad()
def compute_logits(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(**build_batch()).logits
    return logits


def count_different(first: nn.Module, second: nn.Module) -> int:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return sum(not torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("flags", "modules"), EXPRESSIBLE)
def test_plain_peft_puts_a_saved_adapter_over_its_base(
    flags: dict[str, Any], modules: list[str], tmp_path: Path
) -> None:
    model = train(build(flags))
    assert sorted(find_saved_modules(model) or []) == modules
    save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    expected = compute_logits(model)
    assert not torch.allclose(compute_logits(build_base()), expected, atol=1e-2)
    torch.testing.assert_close(compute_logits(PeftModel.from_pretrained(build_base(), str(tmp_path))), expected)


@pytest.mark.parametrize("flags", INEXPRESSIBLE)
def test_what_peft_cannot_express_is_told_apart(flags: dict[str, Any], tmp_path: Path) -> None:
    model = build(flags)
    assert find_saved_modules(model) is None
    save_adapter(model, tmp_path)
    assert (tmp_path / LEARNT_FILE).is_file()


def test_every_combination_saves_exactly_what_learns(tmp_path: Path) -> None:
    values = itertools.product((True, False), (True, False), (True, False), (0, -1), (0, 2), (0, 3))
    names = ("freeze_llm", "freeze_backbone", "freeze_mlp", "unfreeze_vit_layers", *ALONE)
    for number, row in enumerate(values):
        flags = dict(zip(names, row, strict=True))
        if not flags["use_llm_lora"] and not flags["use_backbone_lora"]:
            continue
        model = build(flags)
        save_adapter(train(model), tmp_path / str(number))
        fresh = build(flags)
        assert count_different(model, fresh) == len(list_trainable(model)), flags
        load_adapter_into(fresh, tmp_path / str(number))
        assert count_different(model, fresh) == 0, flags


@pytest.mark.parametrize("flags", ALL)
def test_folded_adapters_give_the_logits_of_the_model_that_was_trained(flags: dict[str, Any]) -> None:
    model = train(build(flags))
    expected = compute_logits(model)
    folded = build_base()
    folded.load_state_dict(fold_adapters(model))
    torch.testing.assert_close(compute_logits(folded), expected)
    # Folding leaves the model as it was.
    torch.testing.assert_close(compute_logits(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("flags", [flags for flags, _ in EXPRESSIBLE])
def test_a_saved_adapter_merges_to_the_logits_of_the_model_that_was_trained(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    model = train(build(flags))
    save_adapter(model, tmp_path)
    merged = merge(build_base(), tmp_path)
    torch.testing.assert_close(compute_logits(merged), compute_logits(model))


def test_merging_rounds_once_in_bfloat16() -> None:
    model = train(build(ALONE)).to(torch.bfloat16)
    exact = fold_adapters(model.float())
    rounded = fold_adapters(model.to(torch.bfloat16))
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16)), name


def test_a_gathered_state_may_leave_out_what_is_frozen(tmp_path: Path) -> None:
    # As ZeRO-3 gathers it: the parameters in memory are empty shards.
    model = train(build({**ALONE, "freeze_mlp": False}))
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = {name: whole[name] for name in list_trainable(model)}
    for name, state in (("whole", None), ("learning", learning)):
        save_adapter(model, tmp_path / name, state)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "learning"))
    assert first == second


def test_adapters_over_adapters_are_merged_one_after_the_other(tmp_path: Path) -> None:
    first = train(build({"use_llm_lora": 2, "freeze_mlp": False}))
    save_adapter(first, tmp_path / "first")
    merged = merge(build_base(), tmp_path / "first")
    second = train(set_trainable(merged, replace(FROZEN, **ALONE)), seed=1)
    save_adapter(second, tmp_path / "second")
    again = merge(merge(build_base(), tmp_path / "first"), tmp_path / "second")
    torch.testing.assert_close(compute_logits(again), compute_logits(second))


def test_an_adapter_of_other_arguments_is_not_resumed_from(tmp_path: Path) -> None:
    save_adapter(build({"use_llm_lora": 2}), tmp_path)
    with pytest.raises(CheckpointCorrupt, match=r"has no base_model\.model\.model\.multi_modal_projector"):
        load_adapter_into(build({"use_llm_lora": 2, "freeze_mlp": False}), tmp_path)
    save_adapter(build(ALONE), tmp_path)
    with pytest.raises(CheckpointCorrupt, match=r"has an unknown .*vision_tower"):
        load_adapter_into(build({"use_llm_lora": 2}), tmp_path)
