"""Configs of OpenGVLab's chat format, turned into transformers' native ones and back.

Invariant: every setting survives both ways. What the native classes have no field for is kept in
`config.chat_settings`: the chat format's top-level settings, and under "llm_config" and
"vision_config" those of the parts. `config.ps_version` is "v1" or "v2"; a native config without it means v2.
Only the generation settings and file names that transformers 4 wrote into every config are left out, and
`tie_word_embeddings`, which is always False here: the chat class forces it too.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

from transformers import InternVLConfig

from internvl_core.errors import ArgumentError
from internvl_core.model.chat_parts import (
    QK_NORM_EPS,
    build,
    build_text_config,
    build_vision_config,
    find_differences,
    get_family,
    write_text,
    write_vision,
)

__all__ = [
    "build_chat_config",
    "build_native_config",
    "build_text_config",
    "build_vision_config",
    "get_llm_family",
    "has_tied_embeddings",
    "is_chat_config",
]

CHAT_MODEL_TYPE = "internvl_chat"

REMOTE_CODE = "OpenGVLab/InternVL2_5-8B"
"""Whose code the hub's users run on a chat folder; ours holds none."""

PIXEL_SHUFFLES = ("v1", "v2")

_TOP_DEFAULTS: dict[str, Any] = {
    "template": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad2square": False,
}
"""Of the chat config's class: what a file that lacks them means."""

_PUBLISHED_SETTINGS: dict[str, Any] = {
    "template": "internvl2_5",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "pad2square": False,
}
"""What InternVL 2.5 and 3 are published with, for a native model that says nothing about them."""


def is_chat_config(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is of OpenGVLab's chat format."""
    return config.get("model_type") == CHAT_MODEL_TYPE


def build_native_config(chat: Mapping[str, Any], *, image_token_id: int) -> InternVLConfig:
    """Build the native config of a chat checkpoint, its adapters taken as merged.

    `vision_config.image_size` stays that of the position embedding in the weights. Where
    `force_image_size` differs, it alone decides the tokens of a tile, and the model interpolates, as the original.

    Args:
        chat: content of the chat folder's config.json.
        image_token_id: of `<IMG_CONTEXT>` in its tokenizer; the chat format does not say it.

    Raises:
        ArgumentError: the language model, the pixel shuffle or a value is of an unknown kind.
    """
    for part in ("vision_config", "llm_config"):
        if not isinstance(chat.get(part), Mapping):
            raise ArgumentError(f"config.json: {part} is missing, which every {CHAT_MODEL_TYPE} model has.")
    ps_version = chat.get("ps_version", "v1")
    if ps_version not in PIXEL_SHUFFLES:
        raise ArgumentError(f"config.json: ps_version is {ps_version!r}, not one of {', '.join(PIXEL_SHUFFLES)}.")
    vision, text = build_vision_config(chat["vision_config"]), build_text_config(chat["llm_config"])
    is_tied = text.tie_word_embeddings or bool(chat.get("tie_word_embeddings", False))
    text.tie_word_embeddings = False
    ratio = float(chat.get("downsample_ratio", 0.5))
    tile_px = chat.get("force_image_size") or vision.image_size[0]
    config = build(
        InternVLConfig,
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=int((tile_px // vision.patch_size[0]) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=chat.get("select_layer", -1),
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
        dtype=chat.get("torch_dtype") or chat.get("dtype"),
        ps_version=ps_version,
    )
    config.chat_settings = _list_chat_settings(chat, config, is_tied)
    return config


def build_chat_config(native: InternVLConfig) -> dict[str, Any]:
    """Build the content of a chat folder's config.json; the inverse of `build_native_config`.

    A native config without `chat_settings` gets those that InternVL 2.5 and 3 are published with.

    Raises:
        ArgumentError: the chat format has no place for a setting.
    """
    settings = copy.deepcopy(getattr(native, "chat_settings", None) or _PUBLISHED_SETTINGS)
    vision_settings, llm_settings = settings.pop("vision_config", {}), settings.pop("llm_config", {})
    llm_settings.pop("tie_word_embeddings", None)
    _check_expressible(native)
    return {
        **_write_top(native),
        "llm_config": write_text(native.text_config, get_llm_family(native)) | llm_settings,
        "vision_config": write_vision(native.vision_config) | vision_settings,
        **settings,
    }


def get_llm_family(native: InternVLConfig) -> str:
    """Name the language model as the chat format does: an InternLM2 is a Llama in the native one."""
    return str(_get_llm_settings(native).get("model_type", native.text_config.model_type))


def has_tied_embeddings(native: InternVLConfig) -> bool:
    """Tell whether the chat config said that head and embeddings are one: its files may lack either."""
    return bool(_get_llm_settings(native).get("tie_word_embeddings", False))


def _get_llm_settings(native: InternVLConfig) -> dict[str, Any]:
    settings: dict[str, Any] = getattr(native, "chat_settings", None) or {}
    return dict(settings.get("llm_config", {}))


def _write_top(native: InternVLConfig) -> dict[str, Any]:
    dtype = str(native.dtype).removeprefix("torch.") if native.dtype is not None else None
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": f"{REMOTE_CODE}--configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": f"{REMOTE_CODE}--modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": f"{REMOTE_CODE}--modeling_internvl_chat.InternVLChatModel",
        },
        "model_type": CHAT_MODEL_TYPE,
        "downsample_ratio": native.downsample_ratio,
        "force_image_size": compute_tile_px(native),
        "hidden_size": native.text_config.hidden_size,
        "ps_version": getattr(native, "ps_version", "v2"),
        "select_layer": native.vision_feature_layer,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
    }


def _list_chat_settings(chat: Mapping[str, Any], config: InternVLConfig, is_tied: bool) -> dict[str, Any]:
    """Collect what the native config does not say in its own fields."""
    family = get_family(chat["llm_config"])
    llm = find_differences(chat["llm_config"], write_text(config.text_config, family))
    if config.text_config.model_type != family:
        llm["model_type"] = family
    if is_tied:
        llm["tie_word_embeddings"] = True
    top = {name: value for name, value in chat.items() if name not in ("llm_config", "vision_config")}
    return {
        **_TOP_DEFAULTS,
        **find_differences(top, _write_top(config)),
        "llm_config": llm,
        "vision_config": find_differences(chat["vision_config"], write_vision(config.vision_config)),
    }


def compute_tile_px(native: InternVLConfig) -> int:
    """Compute the side of a tile from the tokens that it becomes; a chat model's may differ from its tower's."""
    patches = math.isqrt(round(native.image_seq_length / native.downsample_ratio**2))
    return int(patches * native.vision_config.patch_size[0])


def _check_expressible(native: InternVLConfig) -> None:
    vision = native.vision_config
    qk_norm_eps = getattr(vision, "qk_norm_eps", QK_NORM_EPS)
    problems = {
        "projector_hidden_act": (native.projector_hidden_act, "gelu"),
        "vision_feature_select_strategy": (native.vision_feature_select_strategy, "default"),
        "vision_config.use_mean_pooling": (vision.use_mean_pooling, True),
        "vision_config.use_mask_token": (vision.use_mask_token, False),
        "vision_config.use_absolute_position_embeddings": (vision.use_absolute_position_embeddings, True),
        "vision_config.hidden_dropout_prob": (vision.hidden_dropout_prob, 0),
        "vision_config.image_size": (tuple(vision.image_size), (vision.image_size[0],) * 2),
        "vision_config.qk_norm_eps": (qk_norm_eps, vision.layer_norm_eps if vision.use_qk_norm else qk_norm_eps),
        "vision_config.patch_size": (tuple(vision.patch_size), (vision.patch_size[0],) * 2),
    }
    for name, (value, needed) in problems.items():
        if value != needed:
            raise ArgumentError(f"{name} is {value}, for which the chat format has no place: it means {needed}.")
