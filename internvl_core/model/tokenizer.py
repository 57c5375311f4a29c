"""A model's tokenizer: loaded from any folder, written for either format.

In the native format it names the tokens that transformers' InternVLProcessor asks for. One of them, `<video>`, the
processor replaces before anything is tokenized: it has an id behind all others and needs no row in the embeddings.
"""

import json
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from internvl_core.contract import write_json_atomically
from internvl_core.data.records import VIDEO_TAG
from internvl_core.data.templates import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from internvl_core.data.tokenizer_folder import load_tokenizer

__all__ = ["Format", "load_tokenizer", "write_tokenizer"]

Format = Literal["native", "chat"]

_PROCESSOR_TOKENS = {
    "start_image_token": IMAGE_START,
    "end_image_token": IMAGE_END,
    "context_image_token": IMAGE_CONTEXT,
    "video_token": VIDEO_TAG,
}
_CONFIG_FILE = "tokenizer_config.json"
_JSON_FILE = "tokenizer.json"
# Where it was loaded from and by what; remote code that is not there; the names of a native folder's tokens again.
_NOT_KEPT = ("auto_map", "backend", "is_local", "local_files_only", "model_specific_special_tokens", "processor_class")
# What transformers 5 calls its class of fast tokenizers; versions before know the second name only, as does 5.
_NEW_CLASS, _KNOWN_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, format: Format) -> None:
    """Write a tokenizer's files; text gives the same ids from them, in transformers 4 and 5."""
    tokenizer.save_pretrained(folder)
    settings = _read_json(folder / _CONFIG_FILE)
    extra = settings.pop("extra_special_tokens", None) or []
    if isinstance(extra, list):
        settings["additional_special_tokens"] = [_get_content(token) for token in extra]
    if settings.get("tokenizer_class") == _NEW_CLASS:
        settings["tokenizer_class"] = _KNOWN_CLASS
    for name in (*_PROCESSOR_TOKENS, *_NOT_KEPT):
        settings.pop(name, None)
    if format == "native":
        settings |= {"extra_special_tokens": _PROCESSOR_TOKENS, "processor_class": "InternVLProcessor"}
    else:
        _forget_video_token(folder / _JSON_FILE)
    write_json_atomically(folder / _CONFIG_FILE, settings)


def _forget_video_token(file: Path) -> None:
    """Take out `<video>`, if the native format added it: the chat format has it as plain text."""
    content = _read_json(file)
    base = content["model"]["vocab"]
    kept = [token for token in content["added_tokens"] if token["content"] != VIDEO_TAG]
    if VIDEO_TAG not in base and len(kept) < len(content["added_tokens"]):
        content["added_tokens"] = kept
        file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _get_content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
