"""Build the model and its tokenizer: from a whole checkpoint (Path A) or from components (Path B).

Invariant: input and output embeddings are never tied, whatever the folders' configs say (F29),
and both have a row for every token of the tokenizer.
"""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    InternVLConfig,
    InternVLVisionConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from internvl_core.arguments import DataTrainingArguments, ModelArguments
from internvl_core.checkpoint.store import fetch
from internvl_core.contract import CheckpointRef, write_json_atomically
from internvl_core.data.conversation import IMAGE_CONTEXT, SPECIAL_TOKENS
from internvl_core.errors import ArgumentError
from internvl_core.model.internvl import InternVLForTraining, add_drop_path

logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64

ADAPTER_FILE = "adapter_config.json"
BASE_FILE = "base_checkpoint.json"
"""In an adapter's folder: URI and digest of the checkpoint it was trained over."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and the tokenizer that belongs to it."""

    model: InternVLForTraining
    tokenizer: PreTrainedTokenizerBase

    @property
    def tokens_per_tile(self) -> int:
        return int(self.model.config.image_seq_length)


def build_model(
    model_arguments: ModelArguments, data_arguments: DataTrainingArguments, *, cache_dir: Path, dtype: torch.dtype
) -> LoadedModel:
    """Load what the arguments name (Path A if `model_name_or_path` is set, else Path B) and apply their settings.

    `model_name_or_path` is a local folder or a hub id here: URIs are fetched before.

    Raises:
        ArgumentError: the folder is not a native InternVL, or differs from the arguments' tile size or ratio.
    """
    if model_arguments.model_name_or_path is not None:
        loaded = load_checkpoint(model_arguments.model_name_or_path, cache_dir=cache_dir, dtype=dtype)
        _check_settings(loaded.model.config, data_arguments, source=model_arguments.model_name_or_path)
    else:
        if model_arguments.vision_path is None or model_arguments.llm_path is None:
            raise ArgumentError("model_name_or_path, or vision_path and llm_path: one of the two is needed.")
        loaded = assemble_components(
            model_arguments.vision_path,
            model_arguments.llm_path,
            down_sample_ratio=data_arguments.down_sample_ratio,
            force_image_size=data_arguments.force_image_size,
            dtype=dtype,
        )
    loaded.model.config.vision_feature_layer = model_arguments.vision_select_layer
    add_drop_path(loaded.model, model_arguments.drop_path_rate)
    return loaded


def load_checkpoint(path: str, *, cache_dir: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a native InternVL folder or hub id (Path A); an adapter is merged into its base.

    Args:
        path: folder or hub id.
        cache_dir: where an adapter's base is fetched to, if its store is remote.
        dtype: of the parameters in memory.
    """
    if (Path(path) / ADAPTER_FILE).is_file():
        return _load_merged_adapter(Path(path), cache_dir, dtype)
    config = _load("model_name_or_path", AutoConfig.from_pretrained, path)
    if not isinstance(config, InternVLConfig):
        raise ArgumentError(
            f"model_name_or_path: {path} holds a {config.model_type} model, not transformers' native InternVL. "
            "Give a checkpoint of this pipeline or a converted (-hf) InternVL."
        )
    _untie(config)
    model = _load("model_name_or_path", InternVLForTraining.from_pretrained, path, config=config, dtype=dtype)
    _check_untied(model)
    _forget_folders(model)
    return LoadedModel(model, _load("model_name_or_path", AutoTokenizer.from_pretrained, path))


def assemble_components(
    vision_path: str,
    llm_path: str,
    *,
    down_sample_ratio: float = 0.5,
    force_image_size: int = 448,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Join a vision tower and a language model by a fresh projector (Path B).

    The projector has torch's default initialisation, as in the original (reference 2.4). New
    embedding rows, input and output, get the mean of the old ones (F30).
    """
    vision_config = _load("vision_path", AutoConfig.from_pretrained, vision_path)
    if not isinstance(vision_config, InternVLVisionConfig):
        raise ArgumentError(
            f"vision_path: {vision_path} holds a {vision_config.model_type} model, not an internvl_vision tower. "
            "Give the tower alone, in transformers' native format."
        )
    vision_tower = _load("vision_path", AutoModel.from_pretrained, vision_path, dtype=dtype)
    llm = _load("llm_path", AutoModelForCausalLM.from_pretrained, llm_path, dtype=dtype)
    tokenizer = _load("llm_path", AutoTokenizer.from_pretrained, llm_path)
    num_old_tokens = len(tokenizer)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    config = InternVLConfig(
        vision_config=vision_tower.config,
        text_config=llm.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_seq_length=_count_tokens_per_tile(vision_tower.config, down_sample_ratio),
        downsample_ratio=down_sample_ratio,
    )
    _untie(config)
    if tuple(config.vision_config.image_size) != (force_image_size, force_image_size):
        raise ArgumentError(
            f"force_image_size: {force_image_size}, but the vision tower in {vision_path} has tiles of "
            f"{config.vision_config.image_size[0]} px. Resizing its position embedding is not built yet."
        )
    with torch.device("meta"):
        model = InternVLForTraining(config)
    projector = type(model.model.multi_modal_projector)(config).to(dtype)
    model.model.vision_tower = vision_tower
    model.model.language_model = llm.model
    model.model.multi_modal_projector = projector
    model.lm_head = _as_own_parameter(llm.lm_head)
    model.generation_config = llm.generation_config
    _resize_embeddings(model, num_old_tokens, len(tokenizer))
    _check_untied(model)
    _forget_folders(model)
    return LoadedModel(model, tokenizer)


def write_base(adapter_dir: Path, base: CheckpointRef) -> None:
    """Note in an adapter's folder which checkpoint it belongs to."""
    write_json_atomically(adapter_dir / BASE_FILE, asdict(base))


def _load(argument: str, load: Callable[..., Any], path: str, **options: Any) -> Any:
    """Load with transformers; a folder that is missing or of another kind is the argument's fault."""
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ArgumentError(f"{argument}: {path} does not exist. Give a folder in Hugging Face's format, or a hub id.")
    try:
        return load(path, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArgumentError(
            f"{argument}: {path} cannot be loaded: {reason} Give a folder in Hugging Face's format, or a hub id."
        ) from error


def _forget_folders(model: InternVLForTraining) -> None:
    """Drop the local folders that weights came from: saved, they would differ from machine to machine."""
    parts: tuple[PretrainedConfig, ...] = (model.config, model.config.vision_config, model.config.text_config)
    for config in parts:
        config._name_or_path = ""
    # None, not "": PEFT would look up a base model of that name on the hub.
    model.name_or_path = None


def _load_merged_adapter(path: Path, cache_dir: Path, dtype: torch.dtype) -> LoadedModel:
    from peft import PeftModel  # imports that only adapters need

    if not (path / BASE_FILE).is_file():
        raise ArgumentError(
            f"model_name_or_path: {path} holds an adapter without {BASE_FILE}, so nobody knows what it was trained "
            "over. Merge it into its base with PEFT and give the result."
        )
    base = CheckpointRef(**json.loads((path / BASE_FILE).read_text()))
    loaded = load_checkpoint(str(fetch(base, cache_dir)), cache_dir=cache_dir, dtype=dtype)
    merged = PeftModel.from_pretrained(loaded.model, str(path)).merge_and_unload()
    logger.info("Merged the adapter in %s into its base %s", path, base.uri)
    return LoadedModel(merged, loaded.tokenizer)


def _check_settings(config: InternVLConfig, data_arguments: DataTrainingArguments, *, source: str) -> None:
    problems = []
    if config.downsample_ratio != data_arguments.down_sample_ratio:
        problems.append(
            f"down_sample_ratio: {data_arguments.down_sample_ratio}, but the model has {config.downsample_ratio}."
        )
    tile_size = config.vision_config.image_size[0]
    if tile_size != data_arguments.force_image_size:
        problems.append(
            f"force_image_size: {data_arguments.force_image_size}, but the model has tiles of {tile_size} px. "
            "Resizing its position embedding is not built yet."
        )
    if problems:
        raise ArgumentError(f"{source}: " + " ".join(problems))


def _count_tokens_per_tile(vision_config: InternVLConfig, down_sample_ratio: float) -> int:
    patches = vision_config.image_size[0] // vision_config.patch_size[0]
    return int(patches**2 * down_sample_ratio**2)


def _untie(config: InternVLConfig) -> None:
    # transformers 5.23 ties lm_head by the outer flag even when the inner one says no (reference 10.4.1).
    config.tie_word_embeddings = False
    config.text_config.tie_word_embeddings = False


def _check_untied(model: InternVLForTraining) -> None:
    if model.lm_head.weight is model.get_input_embeddings().weight:
        raise ArgumentError("lm_head is tied to the input embeddings, which no InternVL checkpoint is.")


def _as_own_parameter(lm_head: nn.Linear) -> nn.Linear:
    """Detach the head from the embeddings that a small LLM shares it with."""
    lm_head.weight = nn.Parameter(lm_head.weight.detach().clone())
    return lm_head


def _resize_embeddings(model: InternVLForTraining, num_old_tokens: int, num_tokens: int) -> None:
    padded = math.ceil(num_tokens / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    # Never shrink: the published LLMs come padded further than their tokenizer needs.
    size = max(padded, model.get_input_embeddings().num_embeddings)
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            mean = embedding.weight[:num_old_tokens].float().mean(dim=0)
            embedding.weight[num_old_tokens:] = mean.to(embedding.weight.dtype)
