"""What lies in a folder of weights: a whole model of either format, or one of its parts.

Nothing is read but configurations; weights come as tensors that are still to be read, under the names
that they have in our model. A part may be a folder of its own or taken out of a whole model.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLVisionConfig,
    PreTrainedTokenizerBase,
)

from internvl_core.checkpoint.base_model import BaseModel, get_base
from internvl_core.checkpoint.folder import check_no_stage, digest_folder, fetch_folder
from internvl_core.checkpoint.store import fetch, is_checkpoint_uri
from internvl_core.contract import CheckpointRef
from internvl_core.data.templates import CHAT_TOKENS, IMAGE_CONTEXT, SPECIAL_TOKENS
from internvl_core.errors import ArgumentError, CheckpointCorrupt
from internvl_core.model import chat_weights
from internvl_core.model.adapter_weights import is_adapter, merge_adapter_weights
from internvl_core.model.adapters import LEARNT_FILE
from internvl_core.model.chat_config import build_native_config, build_text_config, build_vision_config, is_chat_config
from internvl_core.model.export import ASSUMED_CONV_STYLE, build_generation_config, find_conv_style
from internvl_core.model.resize import fit_tiles
from internvl_core.model.tokenizer import load_tokenizer
from internvl_core.model.weights import LazyTensor, Weights, open_weights, to_module_names

logger = logging.getLogger(__name__)

TOWER = "model.vision_tower."
LLM = "model.language_model."
LM_HEAD = "lm_head.weight"
EMBEDDINGS = f"{LLM}embed_tokens.weight"

_CONFIG_FILE = "config.json"
_HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
_REMOTE_CODE_LLMS = ("internlm2", "internlm3")


@dataclass(frozen=True)
class WholeModel:
    """A whole InternVL on disk."""

    config: InternVLConfig
    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig | None


@dataclass(frozen=True)
class VisionTower:
    """A vision tower on disk."""

    config: InternVLVisionConfig
    weights: Weights


@dataclass(frozen=True)
class LanguageModel:
    """A language model on disk, with its head."""

    config: Any
    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig | None


def find_folder(path: str, cache_dir: Path, *, argument: str) -> Path:
    """Find the local folder of a path, a URI or a hub id; what is remote is fetched.

    Raises:
        ArgumentError: there is no such folder, nor a model of that name on the hub.
        CheckpointNotFound, CheckpointCorrupt, StoreUnavailable: the URI gives nothing.
    """
    if is_checkpoint_uri(path):
        return fetch_folder(path, cache_dir)
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_absolute():
        raise ArgumentError(f"{argument}: {path} does not exist. Give a folder in Hugging Face's format, or a hub id.")
    return _fetch_from_hub(path, argument=argument)


def fetch_base(base: BaseModel, cache_dir: Path, *, argument: str = "model_name_or_path") -> Path:
    """Bring what an adapter was trained over to this machine, and verify that it is still the same.

    Raises:
        ArgumentError: it is no longer there.
        CheckpointCorrupt: it has changed since.
    """
    if base.kind == "checkpoint":
        return fetch(CheckpointRef(base.name, base.digest), cache_dir)
    if base.kind == "hub":
        return _fetch_from_hub(base.name, argument=argument, revision=base.digest)
    if base.name.startswith("/") and not Path(base.name).is_dir():
        raise ArgumentError(f"{base.name}: gone, but an adapter was trained over it. Put the model back.")
    folder = find_folder(base.name, cache_dir, argument=argument)
    if digest_folder(folder) != base.digest:
        raise CheckpointCorrupt(
            f"{base.name} is no longer what the adapter was trained over: its files have another digest than "
            f"{base.digest[:16]}. Put the model back."
        )
    return folder


def describe_base(path: str, cache_dir: Path) -> BaseModel:
    """Describe a model for an adapter that is trained over it: a folder by its content, a hub id by its revision."""
    folder = find_folder(path, cache_dir, argument="model_name_or_path")
    if is_checkpoint_uri(path):
        return BaseModel("folder", path, digest_folder(folder))
    if Path(path).is_dir():
        return BaseModel("folder", str(folder.absolute()), digest_folder(folder))
    # The hub's cache names a snapshot after its commit.
    return BaseModel("hub", path, folder.name)


def open_whole(folder: Path, cache_dir: Path, *, argument: str = "model_name_or_path") -> WholeModel:
    """Open a whole model of the native or the chat format; adapters are merged into their base as it is read.

    Raises:
        ArgumentError: the folder holds something else, or is damaged.
    """
    if is_adapter(folder):
        base = open_base(folder, cache_dir, argument=argument)
        logger.info("Merging the adapter in %s into its base %s", folder, get_base(folder).name)
        return replace(base, weights=merge_adapter_weights(base.weights, folder))
    raw = read_config(folder, argument=argument)
    tokenizer = load_tokenizer(str(folder))
    generation_config = _find_generation_config(folder)
    if is_chat_config(raw):
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
        if image_token_id is None or image_token_id == tokenizer.unk_token_id:
            raise ArgumentError(f"{argument}: {folder}: the tokenizer has no {IMAGE_CONTEXT}. Take the model's own.")
        config = build_native_config(raw, image_token_id=image_token_id)
        weights: Weights = chat_weights.to_native(_open_chat(folder, raw), config)
        # What the original wrote there seldom says where an answer ends.
        style = find_conv_style(config) or ASSUMED_CONV_STYLE
        generation_config = build_generation_config(generation_config, tokenizer, style)
        _check_rows(weights, tokenizer, folder, argument=argument)
        return WholeModel(config, weights, tokenizer, generation_config)
    if raw.get("model_type") != InternVLConfig.model_type:
        raise ArgumentError(
            f"{argument}: {folder} holds a {raw.get('model_type')} model, not an InternVL. Give a native "
            "(transformers) or a chat-format (OpenGVLab) InternVL."
        )
    config = _load(argument, InternVLConfig.from_pretrained, str(folder))
    weights = _with_head(to_module_names(open_weights(folder)))
    _check_rows(weights, tokenizer, folder, argument=argument)
    return WholeModel(config, weights, tokenizer, generation_config)


def open_base(folder: Path, cache_dir: Path, *, argument: str = "model_name_or_path") -> WholeModel:
    """Open what an adapter was trained over, as it was while the adapter learnt: its tiles, its chat format.

    Raises:
        ArgumentError: the folder does not say what that is, or is no stage's result.
        CheckpointNotFound, CheckpointCorrupt, StoreUnavailable: the base cannot be had.
    """
    if (folder / LEARNT_FILE).is_file():
        raise ArgumentError(
            f"{argument}: {folder} is a state to resume from: beside the adapter it holds parameters that PEFT has no "
            "place for. Give the final checkpoint of its stage."
        )
    base = open_whole(fetch_base(get_base(folder), cache_dir, argument=argument), cache_dir, argument=argument)
    if not (folder / _CONFIG_FILE).is_file():
        return base
    trained = _load(argument, InternVLConfig.from_pretrained, str(folder))
    base.config.chat_settings = getattr(trained, "chat_settings", {})
    base.config.vision_feature_layer = trained.vision_feature_layer
    return replace(base, weights=fit_tiles(base.config, base.weights, trained.vision_config.image_size[0]))


def open_tower(folder: Path, cache_dir: Path) -> VisionTower:
    """Open a vision tower: of transformers or OpenGVLab's InternViT, alone or in a whole model."""
    raw = {} if is_adapter(folder) else read_config(folder, argument="vision_path")
    model_type = raw.get("model_type")
    if is_adapter(folder) or is_chat_config(raw) or model_type == InternVLConfig.model_type:
        whole = open_whole(folder, cache_dir, argument="vision_path")
        return VisionTower(whole.config.vision_config, take(whole.weights, TOWER))
    if model_type == InternVLVisionConfig.model_type:
        config = _load("vision_path", InternVLVisionConfig.from_pretrained, str(folder))
        return VisionTower(config, {f"{TOWER}{name}": tensor for name, tensor in open_weights(folder).items()})
    if model_type == "intern_vit_6b":
        config = build_vision_config(raw)
        return VisionTower(config, chat_weights.vision_to_native(open_weights(folder), config))
    raise ArgumentError(
        f"vision_path: {folder} holds a {model_type} model, not an InternViT. Give a vision tower in transformers' or "
        "OpenGVLab's format, or a whole InternVL."
    )


def open_llm(folder: Path, cache_dir: Path) -> LanguageModel:
    """Open a language model: of transformers, InternLM's, or the one in a whole InternVL."""
    raw = {} if is_adapter(folder) else read_config(folder, argument="llm_path")
    model_type = raw.get("model_type")
    if is_adapter(folder) or is_chat_config(raw) or model_type == InternVLConfig.model_type:
        whole = open_whole(folder, cache_dir, argument="llm_path")
        weights = {**take(whole.weights, LLM), LM_HEAD: whole.weights[LM_HEAD]}
        return LanguageModel(whole.config.text_config, weights, whole.tokenizer, whole.generation_config)
    if model_type in _REMOTE_CODE_LLMS:
        config = build_text_config(raw)
        weights = chat_weights.llm_to_native(open_weights(folder), raw)
    else:
        config = _load("llm_path", AutoConfig.from_pretrained, str(folder))
        weights = {
            f"{LLM}{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
            for name, tensor in open_weights(folder).items()
            if not name.endswith("rotary_emb.inv_freq")
        }
    if EMBEDDINGS not in weights:
        raise ArgumentError(
            f"llm_path: {folder} holds a {model_type} model, not a language model. Give one in Hugging Face's format."
        )
    tokenizer = load_tokenizer(str(folder))
    return LanguageModel(config, _with_head(weights), tokenizer, _find_generation_config(folder))


def read_config(folder: Path, *, argument: str) -> dict[str, Any]:
    """Read a folder's config.json as it is.

    Raises:
        ArgumentError: there is none, or it is no JSON object.
    """
    file = folder / _CONFIG_FILE
    if not file.is_file():
        check_no_stage(folder)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(
            f"{argument}: {folder} has no {_CONFIG_FILE}, so it is no model. Give a folder in Hugging Face's format."
        ) from None
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{argument}: {file} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ArgumentError(f"{argument}: {file} holds a {type(content).__name__}; it should be an object.")
    return content


def _check_rows(weights: Weights, tokenizer: PreTrainedTokenizerBase, folder: Path, *, argument: str) -> None:
    """Refuse a tokenizer with tokens that the embeddings have no row for; only of those that training writes."""
    vocabulary = tokenizer.get_vocab()
    last = max((token for token in (*SPECIAL_TOKENS, *CHAT_TOKENS) if token in vocabulary), key=vocabulary.__getitem__)
    num_rows = weights[EMBEDDINGS].shape[0] if EMBEDDINGS in weights else None
    if num_rows is not None and vocabulary[last] >= num_rows:
        raise ArgumentError(
            f"{argument}: {folder}: the tokenizer's {last} is token {vocabulary[last]}, but the embeddings have "
            f"{num_rows} rows. Take the model's own tokenizer."
        )


def _fetch_from_hub(name: str, *, argument: str, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArgumentError(
            f"{argument}: {name} cannot be loaded: {reason} Give a folder in Hugging Face's format, or a hub id."
        ) from error


def _open_chat(folder: Path, raw: Mapping[str, Any]) -> Weights:
    weights = open_weights(folder)
    if not any(".lora_A." in name for name in weights):
        return weights
    logger.info("Merging the adapters that %s was saved with", folder)
    return chat_weights.merge_chat_adapters(
        weights, backbone_rank=raw.get("use_backbone_lora", 0), llm_rank=raw.get("use_llm_lora", 0)
    )


def _with_head(weights: Weights) -> Weights:
    """Give a head to a model that was saved without: it shared the embeddings (F29)."""
    if LM_HEAD in weights or EMBEDDINGS not in weights:
        return weights
    return {**weights, LM_HEAD: weights[EMBEDDINGS]}


def _find_generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(str(folder))


def take(weights: Weights, prefix: str) -> dict[str, LazyTensor]:
    """Take the tensors of a part, by the beginning of their names."""
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _load(argument: str, load: Callable[..., Any], path: str) -> Any:
    """Load with transformers; a folder that is of another kind is the argument's fault."""
    try:
        return load(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArgumentError(
            f"{argument}: {path} cannot be loaded: {reason} Give a folder in Hugging Face's format, or a hub id."
        ) from error
