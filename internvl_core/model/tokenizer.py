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
from internvl_core.data.tokenizer_folder import get_content, load_tokenizer

__all__ = ["TOKENIZER_CONFIG_FILE", "Format", "load_tokenizer", "write_tokenizer"]

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

Format = Literal["native", "chat"]

_PROCESSOR_TOKENS = {
    "start_image_token": IMAGE_START,
    "end_image_token": IMAGE_END,
    "context_image_token": IMAGE_CONTEXT,
    "video_token": VIDEO_TAG,
}
_JSON_FILE = "tokenizer.json"
# Where it was loaded from and by what; remote code that is not there; the names of a native folder's tokens again.
_NOT_KEPT = ("auto_map", "backend", "is_local", "local_files_only", "model_specific_special_tokens", "processor_class")
# What transformers 5 calls its class of fast tokenizers; versions before know the second name only, as does 5.
_NEW_CLASS, _KNOWN_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
# The only class written in Python whose files can be had from a tokenizer.json; OpenGVLab's code asks for that kind.
_SLOW_CLASS = "Qwen2Tokenizer"


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, format: Format) -> None:
    """Write a tokenizer's files; text gives the same ids from them.

    Those of the chat format can be read by transformers 4.37 too, which OpenGVLab's code is pinned to.
    """
    tokenizer.save_pretrained(folder)
    settings = _read_json(folder / TOKENIZER_CONFIG_FILE)
    extra = settings.pop("extra_special_tokens", None) or []
    if isinstance(extra, list):
        settings["additional_special_tokens"] = [get_content(token) for token in extra]
    if settings.get("tokenizer_class") == _NEW_CLASS:
        settings["tokenizer_class"] = _KNOWN_CLASS
    for name in (*_PROCESSOR_TOKENS, *_NOT_KEPT):
        settings.pop(name, None)
    if format == "native":
        settings |= {"extra_special_tokens": _PROCESSOR_TOKENS, "processor_class": "InternVLProcessor"}
    else:
        has_slow_class = settings["tokenizer_class"] == _SLOW_CLASS
        settings["tokenizer_class"] = _SLOW_CLASS if has_slow_class else _KNOWN_CLASS
        settings["added_tokens_decoder"] = _write_for_old_readers(folder, has_slow_class=has_slow_class)
    write_json_atomically(folder / TOKENIZER_CONFIG_FILE, settings)


def _write_for_old_readers(folder: Path, *, has_slow_class: bool) -> dict[str, Any]:
    """Write the files again as they were written before transformers 5, and those that its class in Python reads.

    Without `<video>`, if the native format added it: the chat format has it as plain text. With it if other tokens were
    added behind it: they would lose their ids.

    Returns:
        The added tokens, by id; they were part of the tokenizer's config.
    """
    content = _read_json(folder / _JSON_FILE)
    model = content["model"]
    last = max(content["added_tokens"], key=lambda token: int(token["id"]), default=None)
    if last is not None and last["content"] == VIDEO_TAG and VIDEO_TAG not in model["vocab"]:
        content["added_tokens"].remove(last)
    merges = model.get("merges")
    if merges and not any(" " in piece for pair in merges for piece in pair):
        model["merges"] = [" ".join(pair) for pair in merges]
        if has_slow_class:
            _write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
            _write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *model["merges"], ""]))
    _write_text(folder / _JSON_FILE, json.dumps(content, ensure_ascii=False, indent=2))
    return {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in content["added_tokens"]
    }


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
