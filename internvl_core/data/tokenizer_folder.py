"""The tokenizer of a folder or hub id, fast and without remote code, however it was saved.

Invariant: no Python of the folder is ever run. Where its configuration asks for that, its files are read by
themselves: `tokenizer.json` as it is, else `tokenizer.model` converted.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_core.errors import ArgumentError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

_CONFIG_FILE = "tokenizer_config.json"
_JSON_FILE = "tokenizer.json"
_SENTENCE_PIECE_FILE = "tokenizer.model"
_ADDED_TOKENS_FILE = "added_tokens.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_HUB_FILES = ("tokenizer*", "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt", "*.jinja")

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_KEPT_SETTINGS = ("model_max_length", "padding_side", "chat_template", "clean_up_tokenization_spaces")


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder or a hub id.

    Raises:
        ArgumentError: there is none, or none that can be had without running the folder's own code.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(path)
    try:
        settings = _read_settings(path)
        is_remote_code = _names_remote_code(settings)
        if not folder.is_dir() and is_remote_code:
            folder = _fetch_from_hub(path)
        has_json = (folder / _JSON_FILE).is_file()
        if (folder / _SENTENCE_PIECE_FILE).is_file() and not has_json:
            return _convert(folder, settings)
        if not is_remote_code:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **_hide_unknown_type(folder))
        if not has_json:
            raise ArgumentError(
                f"tokenizer: {path} has neither {_JSON_FILE} nor {_SENTENCE_PIECE_FILE}, only Python code of its own, "
                f"which is not run. Save it as a fast tokenizer, with a {_JSON_FILE}."
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArgumentError(f"tokenizer: {path} cannot be loaded: {reason}") from error
    # Saved with it, it would send the next reader to code that is not there.
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _hide_unknown_type(folder: Path) -> dict[str, Any]:
    """Give transformers a config of no type instead of one whose type it does not know, of which it warns."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    model_type = _read_json(folder / "config.json").get("model_type")
    return {} if model_type is None or model_type in CONFIG_MAPPING else {"config": PretrainedConfig()}


def _read_settings(path: str) -> dict[str, Any]:
    if Path(path).is_dir():
        return _read_json(Path(path) / _CONFIG_FILE)
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    settings: dict[str, Any] = get_tokenizer_config(path)
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict):
        raise ArgumentError(f"{file}: must be a JSON object.")
    return content


def _names_remote_code(settings: Mapping[str, Any]) -> bool:
    # A bare pair in the oldest folders; elsewhere a dictionary by Auto class.
    auto_map = settings.get("auto_map")
    return bool(auto_map) and (not isinstance(auto_map, dict) or "AutoTokenizer" in auto_map)


def _fetch_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))


def _convert(folder: Path, settings: Mapping[str, Any]) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    from internvl_core.data.sentence_piece import build_tokenizer

    special = {**_read_json(folder / _SPECIAL_TOKENS_FILE), **settings}
    named = {name: get_content(special[name]) for name in _NAMED_TOKENS if special.get(name) is not None}
    extra = [get_content(token) for token in special.get("additional_special_tokens") or []]
    backend = build_tokenizer(
        folder / _SENTENCE_PIECE_FILE, _read_added_tokens(folder, settings, {*named.values(), *extra})
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        # Both classes' own default; their published folders do not write it down.
        add_bos_token=settings.get("add_bos_token", True) and "bos_token" in named,
        extra_special_tokens=extra,
        **named,
        **{name: settings[name] for name in _KEPT_SETTINGS if settings.get(name) is not None},
    )
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _read_added_tokens(folder: Path, settings: Mapping[str, Any], special: set[str]) -> dict[int, "AddedToken"]:
    from tokenizers import AddedToken

    declared = settings.get("added_tokens_decoder")
    if declared is not None:
        return {int(token_id): AddedToken(**token) for token_id, token in declared.items()}
    # The older way: ids alone, and what is special in a file of its own.
    return {
        int(token_id): AddedToken(content, normalized=False, special=content in special)
        for content, token_id in _read_json(folder / _ADDED_TOKENS_FILE).items()
    }


def get_content(token: Any) -> str:
    """Get the text of a token, which is written down alone or with its settings."""
    return str(token["content"] if isinstance(token, dict) else token)
