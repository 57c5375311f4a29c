import copy
import json
from pathlib import Path
from typing import Any

import pytest
from chat_reference import IMAGE_TOKEN, make_chat_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig, LlamaConfig, Qwen2Config

from internvl_core.errors import ArgumentError
from internvl_core.model.chat_config import (
    build_chat_config,
    build_native_config,
    build_text_config,
    build_vision_config,
    get_llm_family,
    has_tied_embeddings,
    is_chat_config,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

# What transformers 4 writes into every config beside the settings of its class, and what says nothing of the model.
LEGACY = {
    *("_commit_hash", "_name_or_path", "transformers_version", "torch_dtype", "torchscript", "use_bfloat16"),
    *("add_cross_attention", "cross_attention_hidden_size", "is_decoder", "is_encoder_decoder", "pruned_heads"),
    *("tie_encoder_decoder", "tie_word_embeddings", "tf_legacy_loss", "chunk_size_feed_forward", "prefix"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class"),
    *("output_attentions", "output_hidden_states", "return_dict", "decoder_start_token_id", "sep_token_id"),
    # Generation.
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping", "length_penalty"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "max_length"),
    *("forced_eos_token_id", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "top_k", "top_p"),
    *("num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty", "temperature"),
    *("return_dict_in_generate", "suppress_tokens", "typical_p"),
}


def load_golden(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / name / "config.json").read_text())
    return config


def build(chat: dict[str, Any]) -> InternVLConfig:
    return build_native_config(chat, image_token_id=IMAGE_TOKEN)


def check_refused(chat: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as refusal:
        build(chat)
    assert "\n" not in str(refusal.value)


def check_settings_kept(given_settings: dict[str, Any], written: dict[str, Any]) -> None:
    """Check that every setting of the model in the first is in the second, its parts' included."""
    for name, value in given_settings.items():
        if name in ("llm_config", "vision_config"):
            check_settings_kept(value, written[name])
        elif name not in LEGACY:
            assert name in written, name
            assert written[name] == value, name


def list_flavours() -> list[dict[str, Any]]:
    dynamic = {"type": "dynamic", "factor": 2.0}
    return [
        load_golden("qwen2"),
        load_golden("internlm2"),
        make_chat_config(llm="internlm2", vit="6b", ps_version="v1", llm_bias=True, rope_scaling=dynamic),
        make_chat_config(llm="llama", vit="6b", eps=1e-5, rope_scaling={"type": "linear", "factor": 4.0}),
        make_chat_config(llm="llama", llm_bias=True, force_image_size=None, select_layer=-2),
        make_chat_config(llm="qwen2", force_image_size=112, image_size=56),
    ]


@pytest.mark.parametrize("chat", list_flavours())
def test_every_setting_survives_from_chat_to_native_and_back(chat: dict[str, Any]) -> None:
    check_settings_kept(chat, build_chat_config(build(chat)))


@pytest.mark.parametrize("chat", list_flavours())
def test_the_native_config_survives_the_way_through_the_chat_format(chat: dict[str, Any], tmp_path: Path) -> None:
    native = build(chat)
    # Through files, as a conversion does it.
    native.save_pretrained(tmp_path)
    again = build(json.loads(json.dumps(build_chat_config(AutoConfig.from_pretrained(tmp_path)))))
    assert again.to_dict() == native.to_dict()


@given(
    top=st.fixed_dictionaries(
        {},
        optional={
            "template": st.sampled_from(["internvl2_5", "Hermes-2", None]),
            "dynamic_image_size": st.booleans(),
            "use_thumbnail": st.booleans(),
            "max_dynamic_patch": st.integers(1, 40),
            "min_dynamic_patch": st.integers(1, 4),
            "pad2square": st.booleans(),
            "select_layer": st.integers(-4, -1),
            "ps_version": st.sampled_from(["v1", "v2"]),
            "downsample_ratio": st.sampled_from([0.5, 0.25, 1.0]),
            "force_image_size": st.sampled_from([None, 28, 56, 60, 112]),
            "system_message": st.none() | st.text(),
            "eos_token_id": st.none() | st.integers(0, 600),
        },
    ),
    llm=st.fixed_dictionaries(
        {},
        optional={
            "sliding_window": st.none() | st.integers(1, 99),
            "use_sliding_window": st.booleans(),
            "max_window_layers": st.integers(0, 3),
            "rope_theta": st.sampled_from([10000, 1e6]),
            "rope_scaling": st.sampled_from([None, {"type": "dynamic", "factor": 2.0}]),
            "attention_dropout": st.sampled_from([0.0, 0.1]),
            "eos_token_id": st.none() | st.integers(0, 600) | st.lists(st.integers(0, 600), min_size=1),
            "pad_token_id": st.none() | st.integers(0, 600),
            "vocab_size": st.integers(640, 700),
            "some_setting_of_tomorrow": st.text(),
        },
    ),
    vision=st.fixed_dictionaries(
        {},
        optional={
            "drop_path_rate": st.floats(0, 1),
            "dropout": st.sampled_from([0.0, 0.2]),
            "initializer_factor": st.sampled_from([0.1, 1.0]),
            "qkv_bias": st.booleans(),
            "norm_type": st.sampled_from(["layer_norm", "rms_norm"]),
            "use_flash_attn": st.booleans(),
            "image_size": st.sampled_from([56, 224]),
        },
    ),
)
def test_any_setting_survives_both_ways(top: dict[str, Any], llm: dict[str, Any], vision: dict[str, Any]) -> None:
    chat = make_chat_config() | top
    chat["llm_config"] |= llm
    chat["vision_config"] |= vision
    before = copy.deepcopy(chat)
    native = build(chat)
    written = build_chat_config(native)
    assert chat == before
    check_settings_kept(chat, written)
    assert build(written).to_dict() == native.to_dict()


def test_the_native_fields_say_what_the_chat_fields_said() -> None:
    chat = make_chat_config(llm="internlm2", vit="6b", ps_version="v1", llm_bias=True, select_layer=-4)
    chat["llm_config"]["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    native = build(chat)
    vision, text = native.vision_config, native.text_config
    assert isinstance(text, LlamaConfig)
    assert (text.attention_bias, text.mlp_bias, text.rms_norm_eps) == (True, False, 1e-6)
    assert text.rope_parameters["rope_theta"] == 50000.0
    assert (text.rope_parameters["rope_type"], text.rope_parameters["factor"]) == ("dynamic", 2.0)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1, 2, 0)
    assert (vision.norm_type, vision.use_qk_norm, vision.attention_bias) == ("rms_norm", True, False)
    assert (tuple(vision.image_size), tuple(vision.patch_size), vision.use_mean_pooling) == ((56, 56), (14, 14), True)
    assert vision.layer_scale_init_value == 0.1
    assert (native.ps_version, native.vision_feature_layer, native.image_seq_length) == ("v1", -4, 4)
    assert native.image_token_id == IMAGE_TOKEN
    assert get_llm_family(native) == "internlm2"
    assert native.chat_settings["template"] == "internvl2_5"
    assert native.chat_settings["vision_config"]["drop_path_rate"] == 0.1


def test_generation_settings_of_old_configs_are_not_taken_over() -> None:
    native = build(load_golden("qwen2"))
    for part in (native, native.text_config, native.vision_config):
        assert not hasattr(part, "temperature")
        assert not hasattr(part, "max_length")


def test_forced_tiles_decide_the_tokens_and_the_weights_the_position_embedding() -> None:
    native = build(make_chat_config(image_size=56, force_image_size=112))
    assert tuple(native.vision_config.image_size) == (56, 56)
    assert native.image_seq_length == (112 // 14) ** 2 // 4
    assert build_chat_config(native)["force_image_size"] == 112


def test_a_config_that_was_resized_is_written_as_it_is_now() -> None:
    native = build(make_chat_config(image_size=56, force_image_size=56))
    native.vision_config.image_size = (112, 112)
    native.image_seq_length = 16
    native.text_config.vocab_size = 704
    chat = build_chat_config(native)
    assert (chat["force_image_size"], chat["vision_config"]["image_size"]) == (112, 112)
    assert chat["llm_config"]["vocab_size"] == 704


@pytest.mark.parametrize("tied_at", ["llm_config", "top"])
def test_embeddings_are_untied_at_both_levels_and_it_is_known_that_they_were_not(tied_at: str) -> None:
    chat = make_chat_config()
    (chat if tied_at == "top" else chat["llm_config"])["tie_word_embeddings"] = True
    native = build(chat)
    assert not native.tie_word_embeddings
    assert not native.text_config.tie_word_embeddings
    assert has_tied_embeddings(native)
    written = build_chat_config(native)
    assert not written["tie_word_embeddings"]
    assert not written["llm_config"]["tie_word_embeddings"]
    assert not has_tied_embeddings(build(written))
    assert not has_tied_embeddings(build(make_chat_config()))


def test_what_a_short_config_leaves_out_is_what_the_original_classes_say() -> None:
    native = build({"model_type": "internvl_chat", "llm_config": {"model_type": "internlm2"}, "vision_config": {}})
    vision, text = native.vision_config, native.text_config
    # The classes' defaults are the 6B tower, pixel shuffle v1 and InternLM2-7B with biases (reference 1.1, 2.2).
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (3200, 48, 25)
    assert (vision.norm_type, vision.use_qk_norm, vision.attention_bias) == ("rms_norm", True, False)
    assert (vision.image_size[0], vision.intermediate_size) == (224, 12800)
    assert (native.ps_version, native.image_seq_length) == ("v1", 64)
    assert (text.vocab_size, text.attention_bias) == (103168, True)
    assert native.chat_settings["max_dynamic_patch"] == 6
    assert native.chat_settings["template"] is None


def test_the_family_is_known_by_its_architecture_too() -> None:
    chat = make_chat_config(llm="internlm2")
    del chat["llm_config"]["model_type"]
    assert get_llm_family(build(chat)) == "internlm2"


def test_the_architecture_is_written_even_if_it_was_not_there() -> None:
    # The original chooses its class by nothing else.
    chat = make_chat_config(llm="internlm2")
    chat["llm_config"]["architectures"] = None
    assert build_chat_config(build(chat))["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("qwen3", {"head_dim": 24, "attention_bias": False, "rope_theta": 1e6}),
        ("internlm3", {"head_dim": 24, "qkv_bias": True, "bias": True}),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "long_factor": [1.5] * 6, "short_factor": [1.0] * 6}},
        ),
        ("phi3", {"sliding_window": 2047, "resid_pdrop": 0.1, "pad_token_id": 0, "eos_token_id": 1}),
    ],
)
def test_other_families_keep_their_settings(model_type: str, settings: dict[str, Any]) -> None:
    chat = make_chat_config(llm="llama")
    del chat["llm_config"]["attention_bias"], chat["llm_config"]["architectures"]
    chat["llm_config"] |= {"model_type": model_type, **settings}
    native = build(chat)
    assert native.text_config.model_type == model_type
    for name, value in settings.items():
        if not name.startswith("rope_"):
            assert getattr(native.text_config, name) == value
    check_settings_kept(chat, build_chat_config(native))


def test_components_of_their_own_folders_are_built_alike() -> None:
    chat = make_chat_config(llm="internlm2", vit="6b", tied=True)
    native = build(chat)
    assert build_vision_config(chat["vision_config"]).to_dict() == native.vision_config.to_dict()
    text = build_text_config(chat["llm_config"])
    assert text.tie_word_embeddings
    text.tie_word_embeddings = False
    assert text.to_dict() == native.text_config.to_dict()


def make_native(**changes: Any) -> InternVLConfig:
    vision = InternVLVisionConfig(image_size=448, **changes.pop("vision", {}))
    text = Qwen2Config(tie_word_embeddings=False)
    return InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **changes)


def test_a_native_model_that_never_was_chat_gets_the_published_settings() -> None:
    native = make_native()
    chat = build_chat_config(native)
    assert is_chat_config(chat)
    assert (chat["template"], chat["max_dynamic_patch"], chat["ps_version"]) == ("internvl2_5", 12, "v2")
    assert (chat["force_image_size"], chat["hidden_size"]) == (448, native.text_config.hidden_size)
    assert chat["llm_config"]["architectures"] == ["Qwen2ForCausalLM"]
    again = build_native_config(chat, image_token_id=native.image_token_id)
    assert again.text_config.to_diff_dict().keys() - native.text_config.to_diff_dict().keys() <= {"architectures"}
    for name in ("image_seq_length", "downsample_ratio", "vision_feature_layer", "image_token_id"):
        assert getattr(again, name) == getattr(native, name)
    assert again.vision_config.to_dict() == native.vision_config.to_dict()


def test_remote_code_of_a_chat_folder_is_found_on_the_hub() -> None:
    chat = build_chat_config(build(load_golden("qwen2")))
    assert chat["auto_map"]["AutoConfig"] == (
        "OpenGVLab/InternVL2_5-8B--configuration_internvl_chat.InternVLChatConfig"
    )


def test_other_formats_are_told_apart() -> None:
    assert is_chat_config(load_golden("qwen2"))
    assert not is_chat_config(make_native().to_dict())
    assert not is_chat_config({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm_config": {"model_type": "gemma2"}}, "type gemma2 are not known, only qwen2, internlm2, llama"),
        ({"llm_config": {"architectures": ["GptOssForCausalLM"]}}, "type GptOssForCausalLM are not known"),
        ({"llm_config": {}}, "type None are not known"),
        ({"llm_config": None}, "llm_config is missing"),
        ({"vision_config": "large"}, "vision_config is missing"),
        ({"ps_version": "v3"}, "ps_version is 'v3', not one of v1, v2"),
        ({"vision_config": {"norm_type": "batch_norm"}}, "norm_type is 'batch_norm', not one of layer_norm, rms_norm"),
        ({"vision_config": {"hidden_size": "wide"}}, "is no InternVLVisionConfig"),
        ({"llm_config": {"model_type": "qwen2", "hidden_size": "wide"}}, "is no Qwen2Config"),
        ({"llm_config": {"model_type": "internlm2", "rope_pos_id_version": "v2pe"}}, "rope_pos_id_version is v2pe"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    check_refused(make_chat_config() | change, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_hidden_act": "silu"}, "projector_hidden_act is silu"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is full"),
        ({"vision": {"use_mean_pooling": False}}, "use_mean_pooling is False"),
        ({"vision": {"use_mask_token": True}}, "use_mask_token is True"),
        ({"vision": {"hidden_dropout_prob": 0.1}}, "hidden_dropout_prob is 0.1"),
        ({"vision": {"patch_size": [14, 28]}}, "patch_size is"),
        ({"vision": {"use_qk_norm": True, "layer_norm_eps": 1e-5}}, "qk_norm_eps is 1e-06"),
    ],
)
def test_what_the_chat_format_cannot_say_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build_chat_config(make_native(**changes))


def test_a_language_model_that_the_chat_format_does_not_know_is_refused() -> None:
    native = make_native()
    native.text_config.model_type = "mamba"
    with pytest.raises(ArgumentError, match="no language models of type mamba"):
        build_chat_config(native)
