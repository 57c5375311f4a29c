import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_reference import (
    IMAGE_TOKEN,
    build_chat_checkpoint,
    compute_image_features,
    compute_logits,
    make_chat_config,
    make_chat_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, InternVLConfig

from internvl_core.errors import ArgumentError
from internvl_core.model.chat_config import build_native_config, build_text_config, build_vision_config
from internvl_core.model.chat_weights import (
    llm_to_native,
    to_chat,
    to_native,
    vision_to_native,
)
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.weights import (
    LazyTensor,
    Weights,
    from_state_dict,
    open_weights,
    to_published_names,
    write_weights,
)

# Tensors this small take ten times longer on two threads that share a core.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
DYNAMIC = {"type": "dynamic", "factor": 2.0}

FLAVOURS: list[dict[str, Any]] = [
    {"llm": "qwen2", "vit": "300m"},
    {"llm": "qwen2", "vit": "6b", "eps": 1e-5, "select_layer": -3},
    {"llm": "internlm2", "vit": "6b", "ps_version": "v1"},
    {"llm": "internlm2", "llm_bias": True, "rope_scaling": DYNAMIC, "select_layer": -2},
    {"llm": "llama", "vit": "6b", "llm_bias": True, "tied": True},
    {"llm": "internlm2", "tied": True, "ps_version": "v1", "eps": 1e-3},
    {"llm": "llama", "force_image_size": 112},
]


def build_config(chat: dict[str, Any]) -> InternVLConfig:
    return build_native_config(chat, image_token_id=IMAGE_TOKEN)


def read_all(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in weights.items()}


def load(folder: Path) -> InternVLForTraining:
    config = build_config(json.loads((folder / "config.json").read_text()))
    model = InternVLForTraining(config).eval()
    model.load_state_dict(read_all(to_native(open_weights(folder), config)))
    return model


def check_equal(given_tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given_tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given_tensors[name].dtype == tensor.dtype, name
        assert torch.equal(given_tensors[name], tensor), name


def check_announced(weights: Weights) -> None:
    for name, tensor in weights.items():
        value = tensor.read()
        assert (tuple(value.shape), value.dtype) == (tensor.shape, tensor.dtype), name


def check_one_line(refusal: pytest.ExceptionInfo[ArgumentError], *parts: str) -> None:
    assert "\n" not in str(refusal.value)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize("name", ["qwen2", "internlm2"])
@torch.no_grad()
def test_a_golden_checkpoint_computes_what_the_original_code_did(name: str) -> None:
    golden = load_file(GOLDEN / name / "golden.safetensors")
    model = load(GOLDEN / name)
    features = model.get_image_features(pixel_values=golden["pixel_values"], return_dict=True).pooler_output
    torch.testing.assert_close(features, golden["image_features"], rtol=0, atol=1e-4)
    output = model(**{name: golden[name] for name in ("input_ids", "pixel_values", "labels")})
    torch.testing.assert_close(output.logits, golden["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.loss.reshape(1), golden["loss"].reshape(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "internlm2"])
@torch.no_grad()
def test_the_reference_that_the_other_flavours_are_held_to_is_right_itself(name: str) -> None:
    golden, state = load_file(GOLDEN / name / "golden.safetensors"), load_file(GOLDEN / name / "model.safetensors")
    config = {**json.loads((GOLDEN / name / "config.json").read_text())}
    config["llm_config"].setdefault("rope_scaling", None)
    features = compute_image_features(state, config, golden["pixel_values"])
    torch.testing.assert_close(features, golden["image_features"], rtol=0, atol=1e-4)
    used = 0
    for input_ids, expected in zip(golden["input_ids"], golden["logits"], strict=True):
        tiles = int((input_ids == IMAGE_TOKEN).sum()) // features.shape[1]
        logits = compute_logits(state, config, input_ids, golden["pixel_values"][used : used + tiles])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        used += tiles


@pytest.mark.parametrize("flavour", FLAVOURS)
@torch.no_grad()
def test_every_flavour_computes_what_the_reference_says(flavour: dict[str, Any], tmp_path: Path) -> None:
    build_chat_checkpoint(tmp_path, **flavour)
    model, state = load(tmp_path), load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    torch.manual_seed(0)
    tile_px = config["force_image_size"]
    tiles = torch.randn(2, 3, tile_px, tile_px)
    features = model.get_image_features(pixel_values=tiles, return_dict=True).pooler_output
    torch.testing.assert_close(features, compute_image_features(state, config, tiles), rtol=1e-4, atol=1e-4)
    assert features.shape[1] == model.config.image_seq_length
    # Longer than the language model's 512 positions where a dynamic scaling has to set in.
    length = 600 if flavour.get("rope_scaling") else 60
    input_ids = torch.randint(600, (length,))
    input_ids[5 : 5 + 2 * features.shape[1]] = IMAGE_TOKEN
    logits = model(input_ids=input_ids[None], pixel_values=tiles).logits[0]
    torch.testing.assert_close(logits, compute_logits(state, config, input_ids, tiles), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_query_and_key_norms_have_the_eps_of_the_config(tmp_path: Path) -> None:
    # Native ones are fixed to 1e-6, which the original's are not.
    build_chat_checkpoint(tmp_path, vit="6b", eps=0.1)
    model, state = load(tmp_path), load_file(tmp_path / "model.safetensors")
    tiles = torch.randn(2, 3, 56, 56)
    features = model.get_image_features(pixel_values=tiles, return_dict=True).pooler_output
    expected = compute_image_features(state, json.loads((tmp_path / "config.json").read_text()), tiles)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_weights_survive_from_chat_to_native_and_back_bit_by_bit(flavour: dict[str, Any], tmp_path: Path) -> None:
    build_chat_checkpoint(tmp_path, dtype=torch.bfloat16, **flavour | {"tied": False})
    config = build_config(json.loads((tmp_path / "config.json").read_text()))
    original = load_file(tmp_path / "model.safetensors")
    native = to_native(open_weights(tmp_path), config)
    check_announced(native)
    # Through files, as a conversion does it.
    write_weights(to_chat(native, config), tmp_path / "again", max_shard_bytes=20_000)
    check_equal(read_all(open_weights(tmp_path / "again")), original)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_weights_survive_from_native_to_chat_and_back_bit_by_bit(flavour: dict[str, Any]) -> None:
    torch.manual_seed(1)
    config = build_config(make_chat_config(**flavour))
    state = {name: torch.randn_like(tensor) for name, tensor in InternVLForTraining(config).state_dict().items()}
    chat = to_chat(from_state_dict(state), config)
    check_announced(chat)
    check_equal(read_all(to_native(chat, config)), state)


@settings(max_examples=15)
@given(
    llm=st.sampled_from(["qwen2", "internlm2", "llama"]),
    vit=st.sampled_from(["300m", "6b"]),
    llm_bias=st.booleans(),
    num_llm_layers=st.integers(1, 13),
    num_vision_layers=st.integers(1, 13),
)
def test_names_are_mapped_one_to_one_whatever_the_number_of_layers(**kind: Any) -> None:
    chat_config = make_chat_config(**kind)
    config = build_config(chat_config)
    chat = from_state_dict(make_chat_state(chat_config))
    native = to_native(chat, config)
    with torch.device("meta"):
        expected = InternVLForTraining(config).state_dict()
    assert {name: tensor.shape for name, tensor in native.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    again = to_chat(native, config)
    assert {name: tensor.shape for name, tensor in again.items()} == {
        name: tensor.shape for name, tensor in chat.items()
    }


@pytest.mark.parametrize("flavour", FLAVOURS[:2] + FLAVOURS[3:5])
@torch.no_grad()
def test_a_converted_folder_loads_with_plain_transformers(flavour: dict[str, Any], tmp_path: Path) -> None:
    # Plain transformers knows one eps for query and key norms.
    build_chat_checkpoint(tmp_path / "chat", **flavour | {"select_layer": -1, "eps": 1e-6})
    model = load(tmp_path / "chat")
    write_weights(to_published_names(from_state_dict(model.state_dict())), tmp_path / "native")
    model.config.save_pretrained(tmp_path / "native")
    plain, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not any(report.values())
    tiles, input_ids = torch.randn(1, 3, 56, 56), torch.tensor([[1, *[IMAGE_TOKEN] * 4, 7, 8]])
    expected = model(input_ids=input_ids, pixel_values=tiles).logits
    torch.testing.assert_close(plain(input_ids=input_ids, pixel_values=tiles).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("llm", ["qwen2", "internlm2", "llama"])
@pytest.mark.parametrize("kept", ["head", "embeddings", "both"])
def test_a_tied_folder_may_hold_either_of_the_two(llm: str, kept: str) -> None:
    chat_config = make_chat_config(llm=llm, tied=True)
    state = make_chat_state(chat_config)
    head, embeddings = ("output", "tok_embeddings") if llm == "internlm2" else ("lm_head", "embed_tokens")
    names = {"head": f"language_model.{head}.weight", "embeddings": f"language_model.model.{embeddings}.weight"}
    given_state = {name: tensor for name, tensor in state.items() if name not in names.values()}
    given_state |= {name: state[name] for kind, name in names.items() if kept in (kind, "both")}
    native = read_all(to_native(from_state_dict(given_state), build_config(chat_config)))
    tensors = native["lm_head.weight"], native["model.language_model.embed_tokens.weight"]
    assert torch.equal(*tensors) == (kept != "both")
    assert torch.equal(tensors[0], state[names["embeddings" if kept == "embeddings" else "head"]])
    if kept != "both":
        with pytest.raises(ArgumentError, match="missing 1"):
            to_native(from_state_dict(given_state), build_config(make_chat_config(llm=llm)))


@pytest.mark.parametrize("vit", ["300m", "6b"])
@torch.no_grad()
def test_a_vision_component_is_the_tower_of_the_whole(vit: str) -> None:
    chat_config = make_chat_config(vit=vit)
    state = make_chat_state(chat_config)
    whole = to_native(from_state_dict(state), build_config(chat_config))
    start = "vision_model."
    part = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
    config = build_vision_config(chat_config["vision_config"])
    native = read_all(vision_to_native(from_state_dict(part), config))
    tower = {name: tensor.read() for name, tensor in whole.items() if name.startswith("model.vision_tower.")}
    check_equal(native, tower)


@pytest.mark.parametrize("llm", ["qwen2", "internlm2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_language_component_computes_what_the_reference_says(llm: str, tied: bool) -> None:
    chat_config = make_chat_config(llm=llm, tied=tied)
    state = make_chat_state(chat_config)
    start = "language_model."
    part = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
    if tied:
        del part["output.weight" if llm == "internlm2" else "lm_head.weight"]
    # Some old folders have what can be computed.
    part["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    native = read_all(llm_to_native(from_state_dict(part), chat_config["llm_config"]))
    model = AutoModelForCausalLM.from_config(build_text_config(chat_config["llm_config"])).eval()
    model.load_state_dict({name.replace("model.language_model.", "model."): value for name, value in native.items()})
    input_ids = torch.arange(40)
    logits = model(input_ids[None]).logits[0]
    torch.testing.assert_close(logits, compute_logits(state, chat_config, input_ids), rtol=1e-4, atol=1e-4)


def test_nothing_is_read_before_somebody_asks() -> None:
    def read() -> Tensor:
        raise AssertionError("read")

    chat_config = make_chat_config(llm="internlm2")
    shapes = from_state_dict(make_chat_state(chat_config))
    chat = {name: LazyTensor(tensor.shape, tensor.dtype, read) for name, tensor in shapes.items()}
    assert len(to_chat(to_native(chat, build_config(chat_config)), build_config(chat_config))) == len(chat)


def test_missing_and_unexpected_tensors_are_counted_and_the_first_named() -> None:
    chat_config = make_chat_config()
    state = from_state_dict(make_chat_state(chat_config))
    gone = [name for name in state if ".attn." in name]
    chat = {name: tensor for name, tensor in state.items() if name not in gone}
    chat["vision_model.head.weight"] = state["mlp1.0.bias"]
    with pytest.raises(ArgumentError) as refusal:
        to_native(chat, build_config(chat_config))
    check_one_line(refusal, f"missing {len(gone)}: ", "vision_model.encoder.layers.", ", ...")
    check_one_line(refusal, "unexpected 1: vision_model.head.weight.", f"of {len(state)} tensors")


def test_a_tensor_of_another_shape_is_named_with_both() -> None:
    chat_config = make_chat_config()
    state = make_chat_state(chat_config)
    state["mlp1.1.weight"] = torch.zeros(48, 64)
    with pytest.raises(ArgumentError) as refusal:
        to_native(from_state_dict(state), build_config(chat_config))
    check_one_line(refusal, "of another shape 1: mlp1.1.weight is [48, 64], not [48, 128].")


def test_a_native_model_that_is_incomplete_is_refused_too() -> None:
    config = build_config(make_chat_config())
    state = from_state_dict(InternVLForTraining(config).state_dict())
    del state["lm_head.weight"]
    with pytest.raises(ArgumentError) as refusal:
        to_chat(state, config)
    check_one_line(refusal, "missing 1: lm_head.weight.")


def test_a_component_that_does_not_fit_its_config_is_refused() -> None:
    chat_config = make_chat_config()
    whole = from_state_dict(make_chat_state(chat_config))
    with pytest.raises(ArgumentError, match=r"missing .* unexpected"):
        vision_to_native(whole, build_vision_config(chat_config["vision_config"]))
    with pytest.raises(ArgumentError, match=r"missing .* unexpected"):
        llm_to_native(whole, chat_config["llm_config"])


def test_a_checkpoint_of_the_reference_is_whole(tmp_path: Path) -> None:
    build_chat_checkpoint(tmp_path, llm="internlm2", vit="6b", seed=3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["llm_config"]["model_type"] == "internlm2"
    state = load_file(tmp_path / "model.safetensors")
    save_file(state, tmp_path / "again.safetensors", metadata={"format": "pt"})
    check_equal(state, make_chat_state(config, seed=3))
    assert (tmp_path / "tokenizer.json").is_file()
