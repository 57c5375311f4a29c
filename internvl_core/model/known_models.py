"""Configurations of models, found without their weights; those of InternVL 2.5 and 3 and their parts ship as data.

A part is found through the smallest whole model that has it; the language models' own vocabularies
stand here (reference 2.5, 6.1).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig, PretrainedConfig

from internvl_core.checkpoint.folder import check_no_stage, resolve_folder
from internvl_core.checkpoint.store import is_checkpoint_uri, read_file
from internvl_core.contract import CheckpointRef
from internvl_core.data.templates import SPECIAL_TOKENS
from internvl_core.errors import ArgumentError
from internvl_core.model.chat_config import (
    build_native_config,
    build_text_config,
    build_vision_config,
    is_chat_config,
)
from internvl_core.model.configs import SIZES_2_5, SIZES_3, read_shipped
from internvl_core.model.resize import find_vocabulary_size
from internvl_core.model.tokenizer import load_tokenizer

_CONFIG_FILE = "config.json"

_WHOLE = re.compile(r"OpenGVLab/InternVL(2_5|3)-(\d+)B(-(MPO|Instruct|Pretrained|hf))*")
_TOWERS = {
    "OpenGVLab/InternViT-300M-448px": "internvl2_5-1b",
    "OpenGVLab/InternViT-300M-448px-V2_5": "internvl2_5-1b",
    "OpenGVLab/InternViT-6B-448px-V1-5": "internvl2_5-26b",
    "OpenGVLab/InternViT-6B-448px-V2_5": "internvl2_5-26b",
}


@dataclass(frozen=True)
class _Vocabulary:
    config: str
    num_rows: int
    """Of the embeddings, which are padded further than the tokenizer needs."""
    num_tokens: int


_LLMS = {
    **{
        f"Qwen/Qwen2.5-{size}{kind}": _Vocabulary(config, num_rows, 151665)
        for size, config, num_rows in (
            ("0.5B", "internvl2_5-1b", 151936),
            ("1.5B", "internvl3-2b", 151936),
            ("3B", "internvl2_5-4b", 151936),
            ("7B", "internvl3-8b", 152064),
            ("14B", "internvl3-14b", 152064),
            ("32B", "internvl2_5-38b", 152064),
            ("72B", "internvl2_5-78b", 152064),
        )
        for kind in ("", "-Instruct")
    },
    **{
        f"internlm/internlm2_5-{size}{kind}": _Vocabulary(config, 92544, 92544)
        for size, config in (("1_8b", "internvl2_5-2b"), ("7b", "internvl2_5-8b"), ("20b", "internvl2_5-26b"))
        for kind in ("", "-chat")
    },
    "internlm/internlm3-8b-instruct": _Vocabulary("internvl3-9b", 128512, 128512),
}


@dataclass(frozen=True)
class Source:
    """What a hub id stands for."""

    kind: Literal["whole", "tower", "llm"]
    content: dict[str, Any]
    """Of config.json."""
    num_tokens: int | None = None
    """Of the tokenizer, InternVL's nine included; None for a tower."""


def find_known(name: str) -> Source | None:
    """Find what ships for a hub id; None if nothing does."""
    whole = _WHOLE.fullmatch(name)
    if whole is not None and whole[2].lower() + "b" in (SIZES_2_5 if whole[1] == "2_5" else SIZES_3):
        content = read_shipped(f"internvl{whole[1]}-{whole[2]}b")
        return Source("whole", content, content["text_config"]["vocab_size"])
    if name in _TOWERS:
        return Source("tower", read_shipped(_TOWERS[name])["vision_config"])
    if name in _LLMS:
        known = _LLMS[name]
        content = read_shipped(known.config)["text_config"] | {"vocab_size": known.num_rows}
        return Source("llm", content, known.num_tokens + len(SPECIAL_TOKENS))
    return None


def find_config(name: str) -> PretrainedConfig:
    """Find the configuration of a whole model or of a part.

    Args:
        name: local folder, URI of a checkpoint or a folder, or hub id; nothing is fetched for a known id.

    Returns:
        An InternVLConfig, an InternVLVisionConfig, or the config of a language model, with the class
        that transformers has for it; embeddings never tied.

    Raises:
        ArgumentError: there is no such model, or it is of an unknown kind.
        CheckpointNotFound, CheckpointCorrupt, StoreUnavailable: the URI gives no config.
    """
    known = find_known(name)
    config = _build_config(known.content if known is not None else read_config(name), name)
    config.tie_word_embeddings = False
    return config


def join_parts(vision: str, llm: str, *, down_sample_ratio: float) -> InternVLConfig:
    """Make the configuration of a vision tower and a language model joined by a new projector (Path B).

    Args:
        vision, llm: as for `find_config`: the part alone, or a whole model that has it.

    Raises:
        ArgumentError: one of them is something else.
    """
    tower, text = find_config(vision), find_config(llm)
    tower = tower.vision_config if isinstance(tower, InternVLConfig) else tower
    text = text.text_config if isinstance(text, InternVLConfig) else text
    if not isinstance(tower, InternVLVisionConfig):
        raise ArgumentError(f"vision_path: {vision} is a {tower.model_type} model, not a vision tower of InternVL.")
    if isinstance(text, InternVLVisionConfig):
        raise ArgumentError(f"llm_path: {llm} is a {text.model_type} model, not a language model.")
    text.vocab_size = find_vocabulary_size(count_tokens(llm) or 0, text.vocab_size)
    text.tie_word_embeddings = False
    # The token's number changes no size, and only the tokenizer knows it.
    return InternVLConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=0,
        downsample_ratio=down_sample_ratio,
        tie_word_embeddings=False,
    )


def read_config(name: str) -> dict[str, Any]:
    """Read a model's config.json; an adapter has that of the model it was trained in."""
    if is_checkpoint_uri(name):
        return _read_remote(name)
    folder = Path(name)
    if folder.is_dir():
        path = folder / _CONFIG_FILE
        if not path.is_file():
            check_no_stage(folder)
            raise ArgumentError(f"{name} has no {_CONFIG_FILE}, so it is no model. Give a folder that has one.")
        return _parse(path.read_bytes(), str(path))
    if folder.is_absolute():
        raise ArgumentError(f"{name} does not exist. Give a folder in Hugging Face's format, or a hub id.")
    return _fetch_from_hub(name)


def count_tokens(name: str) -> int | None:
    """Count the tokens of a language model's tokenizer once InternVL's nine are in it; None where it is remote.

    Raises:
        ArgumentError: the folder holds no tokenizer.
    """
    known = find_known(name)
    if known is not None and known.num_tokens is not None:
        return known.num_tokens
    if not Path(name).is_dir():
        return None
    tokenizer = load_tokenizer(name)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return len(tokenizer)


def _build_config(content: dict[str, Any], name: str) -> PretrainedConfig:
    model_type = content.get("model_type")
    if is_chat_config(content):
        # The token's number changes no size, and only the tokenizer knows it.
        return build_native_config(content, image_token_id=0)
    if model_type == "intern_vit_6b":
        return build_vision_config(content)
    if model_type == "internlm2":
        return build_text_config(content)
    if model_type == InternVLConfig.model_type:
        return InternVLConfig(**content)
    try:
        return AutoConfig.for_model(**content)
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArgumentError(f"{name}: {_CONFIG_FILE} is of an unknown kind, {model_type!r}: {reason}") from error


def _read_remote(uri: str) -> dict[str, Any]:
    found = resolve_folder(uri)
    if isinstance(found, Path):
        return read_config(str(found))
    if isinstance(found, CheckpointRef):
        return _parse(read_file(found, _CONFIG_FILE), f"{found.uri}/{_CONFIG_FILE}")
    if _CONFIG_FILE not in found.files:
        raise ArgumentError(f"{uri} has no {_CONFIG_FILE}, so it is no model. Give a folder that has one.")
    return _parse(found.read(_CONFIG_FILE), f"{uri}/{_CONFIG_FILE}")


def _fetch_from_hub(name: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        path = hf_hub_download(name, _CONFIG_FILE)
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArgumentError(
            f"{name} is no folder here, its config does not ship, and the hub does not give it: {reason.rstrip('.')}. "
            "Give a folder, or the id of an InternVL 2.5 or 3 or of one of their parts."
        ) from None
    return _parse(Path(path).read_bytes(), path)


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ArgumentError(f"{where}: is not JSON: {error}.") from None
    if not isinstance(parsed, dict):
        raise ArgumentError(f"{where}: holds a {type(parsed).__name__}; it should be an object.")
    return parsed
