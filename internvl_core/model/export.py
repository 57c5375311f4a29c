"""Everything of a model's folder but its config and its weights, in the native or the chat format.

Invariant: what the chat template renders is what training renders for the same conversation (F26): both come from
`data/templates.py`, the default system message included.
"""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, InternVLConfig, PreTrainedTokenizerBase

from internvl_core.contract import write_json_atomically
from internvl_core.data.media import NORMALIZATIONS
from internvl_core.data.records import IMAGE_TAG, VIDEO_TAG, Role
from internvl_core.data.templates import CONV_STYLES, IMAGE_CONTEXT, ConvTemplate, get_template
from internvl_core.data.text_encoder import TextEncoder
from internvl_core.model.chat_config import compute_tile_px
from internvl_core.model.tokenizer import TOKENIZER_CONFIG_FILE, Format, write_tokenizer

ASSUMED_CONV_STYLE = "internvl2_5"
"""Of InternVL 2.5 and 3: for a model that does not say which style it was trained with."""

CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"

_BICUBIC = 3
_ASSUMED_MAX_TILES = 12


def write_companions(
    folder: Path,
    *,
    config: InternVLConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    format: Format,
) -> None:
    """Write tokenizer, chat template, generation config and the configs of the processors.

    Args:
        folder: exists.
        config: its `chat_settings` say how images were cut and which conversation style was trained.
        tokenizer: with InternVL's tokens.
        generation_config: the model's own, whose settings are kept; None for the defaults, which are greedy.
        format: whose readers the files are for.
    """
    write_tokenizer(folder, tokenizer, format)
    style = find_conv_style(config) or ASSUMED_CONV_STYLE
    # The processor of the native format asks for the context token; readers of the chat format for its tag.
    image = IMAGE_CONTEXT if format == "native" else IMAGE_TAG
    chat_template = build_chat_template(style, image=image, opens_with_bos=_opens_with_bos(tokenizer))
    _write_chat_template(folder, chat_template, format)
    generation = build_generation_config(generation_config, tokenizer, style).to_diff_dict()
    # The library's own stamp differs from version to version.
    kept = {name: generation[name] for name in sorted(generation) if name != "transformers_version"}
    write_json_atomically(folder / GENERATION_FILE, kept)
    if format == "chat":
        write_json_atomically(folder / "preprocessor_config.json", _build_clip_processor(config))
        return
    write_json_atomically(folder / "preprocessor_config.json", _build_image_processor(config))
    write_json_atomically(folder / "video_preprocessor_config.json", _build_video_processor(config))
    write_json_atomically(folder / "processor_config.json", _build_processor(config))


def find_conv_style(config: InternVLConfig) -> str | None:
    """Find the conversation style that a model was trained with; None where its config names none that we know."""
    style = _get_settings(config).get("template")
    return style if style in CONV_STYLES else None


def build_generation_config(
    generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, conv_style: str
) -> GenerationConfig:
    """Keep the settings of a generation config, or the defaults for None, and let answers end where trained ones do."""
    built = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    kept = built.eos_token_id
    kept_ids = kept if isinstance(kept, list) else [] if kept is None else [kept]
    template = get_template(conv_style)
    ending = next(token for token in sorted(template.tokens) if template.endings["gpt"].startswith(token))
    end_id = tokenizer.get_vocab().get(ending)
    ids = list(dict.fromkeys([*([] if end_id is None else [end_id]), *kept_ids]))
    built.eos_token_id = ids or None
    built.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ids), None)
    return built


def build_chat_template(conv_style: str, *, image: str, opens_with_bos: bool) -> str:
    """Write a conversation style as a Jinja template for `apply_chat_template`.

    A part that is an image or a video becomes its placeholder on a line of its own, as in the training data.

    Args:
        conv_style: one of `CONV_STYLES`.
        image: placeholder of an image.
        opens_with_bos: whether the tokenizer opens every text with its BOS, of which a conversation has one.
    """
    template = get_template(conv_style)
    roles: dict[str, Role] = {"system": "system", "user": "human", "assistant": "gpt"}
    headers = {name: template.headers[role] for name, role in roles.items()}
    endings = {name: template.endings[role] for name, role in roles.items()}
    # Joined without line breaks: each of them would be rendered.
    pieces = [
        "{{ bos_token }}" if opens_with_bos else "",
        f"{{% set headers = {_quote(headers)} %}}{{% set endings = {_quote(endings)} %}}",
        "{% if not messages or messages[0]['role'] != 'system' %}",
        f"{{{{ {_quote(_render_default(template))} }}}}{{% endif %}}",
        "{% for message in messages %}",
        "{% if message['role'] not in headers or (message['role'] == 'system' and not loop.first) %}",
        "{{ raise_exception('Roles are user and assistant, and system for the first message.') }}{% endif %}",
        "{% set content = namespace(text='') %}",
        "{% if message['content'] is string %}{% set content.text = message['content'] %}",
        "{% else %}{% for part in message['content'] %}",
        f"{{% if part['type'] == 'text' %}}{{% set piece = part['text'] %}}"
        f"{{% elif part['type'] == 'image' %}}{{% set piece = {_quote(image)} %}}"
        f"{{% elif part['type'] == 'video' %}}{{% set piece = {_quote(VIDEO_TAG)} %}}"
        "{% else %}{{ raise_exception('Parts are of type text, image or video.') }}{% endif %}",
        "{% set is_line = part['type'] != 'text' and not loop.last %}",
        "{% set content.text = content.text + piece + ('\\n' if is_line else '') %}{% endfor %}{% endif %}",
        f"{{% set text = content.text{'|trim' if template.strips_text else ''} %}}",
        "{{ headers[message['role']] + text + endings[message['role']] }}{% endfor %}",
        f"{{% if add_generation_prompt %}}{{{{ {_quote(template.prompt_header)} }}}}{{% endif %}}",
    ]
    return "".join(pieces)


def _write_chat_template(folder: Path, chat_template: str, format: Format) -> None:
    if format == "native":
        (folder / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        return
    # Where transformers 4 looks for it.
    (folder / CHAT_TEMPLATE_FILE).unlink(missing_ok=True)
    file = folder / TOKENIZER_CONFIG_FILE
    settings = json.loads(file.read_text(encoding="utf-8"))
    write_json_atomically(file, {**settings, "chat_template": chat_template})


def _get_settings(config: InternVLConfig) -> dict[str, Any]:
    settings: dict[str, Any] = getattr(config, "chat_settings", None) or {}
    return settings


def _render_default(template: ConvTemplate) -> str:
    message = template.default_system_message
    return template.render("system", message.strip() if template.strips_text else message)


def _quote(value: Any) -> str:
    # JSON's literals are Jinja's too, escapes included.
    return json.dumps(value, ensure_ascii=False)


def _opens_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return TextEncoder.from_tokenizer(tokenizer).bos_token_id is not None


def _get_normalization(config: InternVLConfig) -> tuple[Any, Any]:
    return NORMALIZATIONS[_get_settings(config).get("normalize_type", "imagenet")]


def _build_pixels(config: InternVLConfig) -> dict[str, Any]:
    side = compute_tile_px(config)
    mean, std = _get_normalization(config)
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "processor_class": "InternVLProcessor",
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }


def _build_image_processor(config: InternVLConfig) -> dict[str, Any]:
    settings = _get_settings(config)
    is_dynamic = settings.get("dynamic_image_size", True)
    return {
        **_build_pixels(config),
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": is_dynamic,
        "min_patches": settings.get("min_dynamic_patch", 1),
        # InternVLProcessor sets crop_to_patches whatever is written here: one tile at most is what stops it.
        "max_patches": settings.get("max_dynamic_patch", _ASSUMED_MAX_TILES) if is_dynamic else 1,
    }


def _build_video_processor(config: InternVLConfig) -> dict[str, Any]:
    return {**_build_pixels(config), "video_processor_type": "InternVLVideoProcessor"}


def _build_processor(config: InternVLConfig) -> dict[str, Any]:
    return {"image_seq_length": config.image_seq_length, "processor_class": "InternVLProcessor"}


def _build_clip_processor(config: InternVLConfig) -> dict[str, Any]:
    """Describe what the chat format's readers do to one tile; how an image is cut is in its config.json."""
    side = compute_tile_px(config)
    mean, std = _get_normalization(config)
    return {
        "crop_size": side,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(std),
        "resample": _BICUBIC,
        "size": side,
    }
