from typing import Any

import peft
import pytest
import torch
from chat_reference import IMAGE_TOKEN, make_chat_config, make_chat_state
from torch import Tensor
from transformers.models.qwen2 import Qwen2ForCausalLM

from internvl_core.errors import ArgumentError
from internvl_core.model.chat_config import build_native_config, build_text_config
from internvl_core.model.chat_weights import merge_chat_adapters, to_native
from internvl_core.model.weights import Weights, from_state_dict

# PEFT 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def read_all(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in weights.items()}


def check_one_line(refusal: pytest.ExceptionInfo[ArgumentError]) -> None:
    assert "\n" not in str(refusal.value)


def wrap_language_model(rank: int, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give a language model an adapter with PEFT: its tensors as they are saved unmerged, and as PEFT merges them."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(build_text_config(make_chat_config()["llm_config"]))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    saved = {f"language_model.{name}": tensor.clone() for name, tensor in adapted.state_dict().items()}
    merged = adapted.merge_and_unload().state_dict()
    return saved, {f"language_model.{name}": tensor for name, tensor in merged.items()}


@pytest.mark.parametrize("has_base_layers", [True, False])
def test_adapters_are_merged_as_peft_does(has_base_layers: bool) -> None:
    saved, expected = wrap_language_model(rank=4)
    if not has_base_layers:
        # As PEFT named them before 0.6.
        saved = {name.replace(".base_layer.", "."): tensor for name, tensor in saved.items()}
    plain = {"mlp1.0.weight": torch.ones(3)}
    merged = read_all(merge_chat_adapters(from_state_dict(saved | plain), backbone_rank=0, llm_rank=4))
    assert merged.keys() == expected.keys() | plain.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)
    base = saved["language_model.base_model.model.model.norm.weight"]
    assert torch.equal(merged["language_model.model.norm.weight"], base)


def test_adapters_of_both_parts_are_merged_with_their_own_ranks() -> None:
    torch.manual_seed(0)
    chat_config = make_chat_config()
    state = make_chat_state(chat_config)
    wrapped, expected = {}, {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        rank = {"vision_model": 3, "language_model": 5}.get(part)
        if rank is None:
            wrapped[name] = expected[name] = tensor
            continue
        start = f"{part}.base_model.model.{rest.removesuffix('.weight')}"
        if not rest.endswith(("attn.qkv.weight", "self_attn.q_proj.weight")):
            wrapped[f"{part}.base_model.model.{rest}"] = expected[name] = tensor
            continue
        down, up = torch.randn(rank, tensor.shape[1]), torch.randn(tensor.shape[0], rank)
        wrapped |= {f"{start}.base_layer.weight": tensor}
        wrapped |= {f"{start}.lora_A.default.weight": down, f"{start}.lora_B.default.weight": up}
        expected[name] = tensor + 2 * up @ down
    merged = merge_chat_adapters(from_state_dict(wrapped), backbone_rank=3, llm_rank=5)
    assert merged.keys() == state.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name].read(), tensor, rtol=1e-6, atol=1e-5)
    to_native(merged, build_native_config(chat_config, image_token_id=IMAGE_TOKEN))


def test_an_adapter_that_learnt_nothing_leaves_every_bit() -> None:
    saved, _ = wrap_language_model(rank=2)
    halves = {name: (tensor * (0 if "lora_B" in name else 1)).bfloat16() for name, tensor in saved.items()}
    merged = read_all(merge_chat_adapters(from_state_dict(halves), backbone_rank=0, llm_rank=2))
    weight = "language_model.{}model.layers.0.mlp.up_proj.{}weight"
    assert torch.equal(merged[weight.format("", "")], halves[weight.format("base_model.model.", "base_layer.")])


def test_weights_without_adapters_pass_unchanged() -> None:
    weights = from_state_dict(make_chat_state(make_chat_config()))
    assert merge_chat_adapters(weights, backbone_rank=0, llm_rank=16) == weights


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda name: name.replace("base_model.model.", "base_model.model.base_model.model."),
            "wrapped in adapters twice",
        ),
        (lambda name: name.replace("base_layer.", "base_layer.base_layer."), "wrapped in adapters twice"),
        (lambda name: name.replace(".default.", ".second."), "only plain LoRA adapters named default"),
        (lambda name: name.replace("lora_B.default.weight", "lora_magnitude_vector"), "only plain LoRA adapters"),
        (lambda name: name.replace("lora_B", "lora_A"), "its adapter is incomplete"),
        (lambda name: name.replace("base_layer.weight", "bases.weight"), "its adapter is incomplete"),
    ],
)
def test_adapters_of_other_kinds_are_refused(rename: Any, message: str) -> None:
    saved, _ = wrap_language_model(rank=2)
    renamed = {rename(name): tensor for name, tensor in saved.items()}
    with pytest.raises(ArgumentError, match=message) as refusal:
        merge_chat_adapters(from_state_dict(renamed), backbone_rank=0, llm_rank=2)
    check_one_line(refusal)


def test_an_adapter_of_another_rank_than_the_config_says_is_refused() -> None:
    saved, _ = wrap_language_model(rank=2)
    with pytest.raises(ArgumentError, match="says rank 16 for this part") as refusal:
        merge_chat_adapters(from_state_dict(saved), backbone_rank=0, llm_rank=16)
    check_one_line(refusal)
