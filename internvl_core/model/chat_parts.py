"""Configs of the chat format's two parts, the InternViT and the language model, and their native counterparts.

Each way loses nothing a part computes with. What else a chat config says (`find_differences`) is for the
caller to keep.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import InternVLVisionConfig, LlamaConfig, Phi3Config, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.internlm3 import InternLM3Config

from internvl_core.errors import ArgumentError

NOT_KEPT = frozenset(
    "_attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path add_cross_attention "  # noqa: SIM905
    "architectures auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size "
    "decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label "
    "is_composition is_decoder is_encoder_decoder label2id length_penalty max_length min_length "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states "
    "output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict "
    "return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss "
    "tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript "
    "transformers_version typical_p use_backbone_lora use_bfloat16 use_llm_lora".split()
)
"""Fields that transformers 4 writes into every config, and those that are written anew."""

_VISION_DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
}
"""Of the chat format's vision class (reference 2.2): the 6B tower."""

_SAME_IN_VISION = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "intermediate_size",
    "norm_type",
    "num_channels",
    "attention_dropout",
    "initializer_range",
    "layer_norm_eps",
)

NORMS = ("layer_norm", "rms_norm")

QK_NORM_EPS = 1e-6
"""What the native query and key norms are fixed to; the chat format takes `layer_norm_eps` there too."""

_INTERNLM2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 103168,
    "bias": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Where InternLM2's class differs from Llama's."""


@dataclass(frozen=True)
class Family:
    """A kind of language model: the name of its class, and its native config."""

    architecture: str
    config_class: Any


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", Qwen2Config),
    "internlm2": Family("InternLM2ForCausalLM", LlamaConfig),
    "llama": Family("LlamaForCausalLM", LlamaConfig),
    "qwen3": Family("Qwen3ForCausalLM", Qwen3Config),
    "phi3": Family("Phi3ForCausalLM", Phi3Config),
    "internlm3": Family("InternLM3ForCausalLM", InternLM3Config),
}


def build_vision_config(vision: Mapping[str, Any]) -> InternVLVisionConfig:
    """Build the native config of an InternViT, nested or of a folder of its own.

    If the query and key norms' eps is not the one native knows, `qk_norm_eps` is set, which InternVLForTraining heeds.
    """
    given = {**_VISION_DEFAULTS, **vision}
    if given["norm_type"] not in NORMS:
        raise ArgumentError(f"vision_config: norm_type is {given['norm_type']!r}, not one of {', '.join(NORMS)}.")
    config = build(
        InternVLVisionConfig,
        **{name: given[name] for name in _SAME_IN_VISION},
        attention_bias=given["qkv_bias"],
        use_qk_norm=given["qk_normalization"],
        projection_dropout=given["dropout"],
        image_size=[given["image_size"]] * 2,
        patch_size=[given["patch_size"]] * 2,
        layer_scale_init_value=float(given["initializer_factor"]),
        # No mean is taken; this is what leaves out the final norm, which an InternViT has not.
        use_mean_pooling=True,
    )
    if config.use_qk_norm and config.layer_norm_eps != QK_NORM_EPS:
        config.qk_norm_eps = config.layer_norm_eps
    return config


def build_text_config(llm: Mapping[str, Any]) -> PretrainedConfig:
    """Build the native config of a language model, nested or of a folder of its own; InternLM2 is a Llama.

    `tie_word_embeddings` is as given: it says whether the folder's weights have a head of their own.
    """
    family = FAMILIES[get_family(llm)]
    given = copy.deepcopy(dict(llm))
    if family is FAMILIES["internlm2"]:
        given = {**_INTERNLM2_DEFAULTS, **given}
        if given.get("rope_pos_id_version", "default") != "default":
            raise ArgumentError(
                f"llm_config: rope_pos_id_version is {given['rope_pos_id_version']}, which native models do not have."
            )
        given |= {"attention_bias": given["bias"], "mlp_bias": False}
    scaling = given.get("rope_scaling") or {}
    if scaling.get("type") == "su":
        # Phi-3's first name for it. transformers 5.23 renames it itself, but too late to complete it.
        scaling["type"] = "longrope"
    known = _list_fields(family.config_class) | {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    known |= set(family.config_class.attribute_map)
    settings = {name: value for name, value in given.items() if name in known}
    native = FAMILIES[family.config_class.model_type]
    return build(family.config_class, **settings, architectures=[native.architecture])


def write_vision(vision: InternVLVisionConfig) -> dict[str, Any]:
    """Write a vision tower's config as the chat format has it; the inverse of `build_vision_config`."""
    return {
        **{name: getattr(vision, name) for name in _SAME_IN_VISION},
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "qkv_bias": vision.attention_bias,
        "qk_normalization": vision.use_qk_norm,
        "dropout": vision.projection_dropout,
        "drop_path_rate": 0.0,
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
        "initializer_factor": vision.layer_scale_init_value,
        "use_flash_attn": True,
    }


def write_text(text: PretrainedConfig, family_name: str) -> dict[str, Any]:
    """Write a language model's config as the chat format has it; the inverse of `build_text_config`.

    Raises:
        ArgumentError: the chat format knows no such family.
    """
    if family_name not in FAMILIES:
        raise ArgumentError(
            f"text_config: the chat format has no language models of type {family_name}, only {', '.join(FAMILIES)}."
        )
    family = FAMILIES[family_name]
    names = _list_fields(family.config_class) - {"rope_parameters", "layer_types", "tie_word_embeddings"}
    written = {name: getattr(text, name) for name in sorted(names)}
    written = {old: written.pop(new) for old, new in family.config_class.attribute_map.items()} | written
    rope = copy.deepcopy(text.rope_parameters)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    written |= {
        "architectures": [family.architecture],
        "model_type": family_name,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {**rope, "type": kind},
        "tie_word_embeddings": False,
    }
    if family_name == "internlm2":
        written["bias"] = written.pop("attention_bias")
        written["attn_implementation"] = "eager"
        for name in ("mlp_bias", "attention_dropout", "head_dim", "pretraining_tp"):
            written.pop(name)
    return written


def find_differences(given: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Find the settings of a chat config that `written`, made of the native one, lacks or has otherwise."""
    absent = object()
    return {
        name: copy.deepcopy(value)
        for name, value in given.items()
        if name not in NOT_KEPT and written.get(name, absent) != value
    }


def get_family(llm: Mapping[str, Any]) -> str:
    """Name the family of a language model, one of `FAMILIES`.

    Raises:
        ArgumentError: it is none of them.
    """
    model_type = llm.get("model_type")
    architecture = (llm.get("architectures") or [None])[0]
    for name, family in FAMILIES.items():
        if name == model_type or (model_type is None and family.architecture == architecture):
            return name
    raise ArgumentError(
        f"llm_config: language models of type {model_type or architecture} are not known, only {', '.join(FAMILIES)}."
    )


def build(config_class: Any, **settings: Any) -> Any:
    """Build a config; values that its class refuses are an ArgumentError."""
    try:
        return config_class(**settings)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise ArgumentError(f"config.json is no {config_class.__name__}: {' '.join(str(error).split())}") from error


def _list_fields(config_class: Any) -> set[str]:
    """List what a config class has beyond the base of all of them."""
    inherited = {field.name for field in dataclasses.fields(PretrainedConfig)}
    own = {field.name for field in dataclasses.fields(config_class)}
    return own - inherited | {"tie_word_embeddings"}
