"""Build the model and its tokenizer: from a whole checkpoint (Path A) or from components (Path B).

Invariant: input and output embeddings are never tied, whatever the folders' configs say (F29),
and both have a row for every token of the tokenizer.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig, PreTrainedTokenizerBase
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from internvl_core.arguments import DataTrainingArguments, ModelArguments
from internvl_core.checkpoint.base_model import get_base
from internvl_core.data.templates import IMAGE_CONTEXT, SPECIAL_TOKENS
from internvl_core.errors import ArgumentError
from internvl_core.model.adapter_weights import is_adapter
from internvl_core.model.internvl import InternVLForTraining, add_drop_path
from internvl_core.model.projector import PROJECTOR, find_projector, open_projector
from internvl_core.model.resize import count_tokens_per_tile, find_vocabulary_size, fit_tiles, resize_rows
from internvl_core.model.skeleton import build_skeleton, fill
from internvl_core.model.sources import (
    EMBEDDINGS,
    LM_HEAD,
    WholeModel,
    fetch_base,
    find_folder,
    open_llm,
    open_tower,
    open_whole,
)
from internvl_core.model.weights import Weights, from_state_dict

logger = logging.getLogger(__name__)

DEFAULT_CACHE_DIR = Path("~/.cache/internvl")


@dataclass(frozen=True)
class LoadedModel:
    """A model and the tokenizer that belongs to it."""

    model: InternVLForTraining
    tokenizer: PreTrainedTokenizerBase

    @property
    def tokens_per_tile(self) -> int:
        return int(self.model.config.image_seq_length)


def load_model(
    uri: str | Path, *, dtype: torch.dtype = torch.float32, cache_dir: Path = DEFAULT_CACHE_DIR
) -> InternVLForTraining:
    """Load a whole model of either format, in evaluation mode; an adapter is merged into its base.

    Args:
        uri: local folder, fsspec URI or hub id; a Path for a local folder only.
        dtype: of the parameters in memory.
        cache_dir: where what is remote is fetched to.

    Raises:
        ArgumentError: there is no InternVL.
    """
    return load_checkpoint(str(uri), cache_dir=cache_dir, dtype=dtype).model


def load_checkpoint(path: str, *, cache_dir: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load as `load_model` does, and the tokenizer with it."""
    cache_dir = cache_dir.expanduser()
    folder = find_folder(path, cache_dir, argument="model_name_or_path")
    return _build(open_whole(folder, cache_dir), dtype, source=path)


def build_model(
    model_arguments: ModelArguments, data_arguments: DataTrainingArguments, *, cache_dir: Path, dtype: torch.dtype
) -> LoadedModel:
    """Load what the arguments name (Path A if `model_name_or_path` is set, else Path B) and apply their settings.

    Each path is a local folder, an fsspec URI or a hub id. Tiles of another size than the vision tower's resize
    its position embedding.

    Raises:
        ArgumentError: a folder is no such model, or it contradicts the arguments.
    """
    path = model_arguments.model_name_or_path
    if path is not None:
        whole = open_whole(find_folder(path, cache_dir, argument="model_name_or_path"), cache_dir)
        check_settings(
            whole.config,
            down_sample_ratio=data_arguments.down_sample_ratio,
            ps_version=model_arguments.ps_version,
            source=path,
        )
        _warn_of_changes(whole.config, model_arguments, data_arguments, source=path)
        source = path
    else:
        if model_arguments.vision_path is None or model_arguments.llm_path is None:
            raise ArgumentError("model_name_or_path, or vision_path and llm_path: one of the two is needed.")
        source = f"{model_arguments.vision_path} and {model_arguments.llm_path}"
        whole = _join_components(
            model_arguments.vision_path,
            model_arguments.llm_path,
            down_sample_ratio=data_arguments.down_sample_ratio,
            cache_dir=cache_dir,
        )
        whole.config.ps_version = model_arguments.ps_version
    if model_arguments.mlp_path is not None:
        projector = open_projector(model_arguments.mlp_path, cache_dir)
        _check_projector(projector, whole.config, source=model_arguments.mlp_path)
        whole = replace(whole, weights={**whole.weights, **projector})
        source = f"{source} with {model_arguments.mlp_path}"
    whole = replace(whole, weights=fit_tiles(whole.config, whole.weights, data_arguments.force_image_size))
    whole.config.vision_feature_layer = model_arguments.vision_select_layer
    whole.config.chat_settings = _list_chat_settings(whole.config, data_arguments)
    loaded = _build(whole, dtype, source=source)
    add_drop_path(loaded.model, model_arguments.drop_path_rate)
    return loaded


def fetch_sources(model_arguments: ModelArguments, cache_dir: Path) -> None:
    """Bring everything that `build_model` will read to this machine; for one rank of each, before the others look."""
    for argument in ("model_name_or_path", "vision_path", "llm_path", "mlp_path"):
        path = getattr(model_arguments, argument)
        if path is None:
            continue
        is_projector = argument == "mlp_path"
        folder = find_projector(path, cache_dir) if is_projector else find_folder(path, cache_dir, argument=argument)
        while is_adapter(folder):
            folder = fetch_base(get_base(folder), cache_dir, argument=argument)


def _build(whole: WholeModel, dtype: torch.dtype, *, source: str) -> LoadedModel:
    model = build_skeleton(whole.config, dtype=dtype)
    fill(model, whole.weights, source=source)
    if whole.generation_config is not None:
        model.generation_config = whole.generation_config
    # Local folders that weights came from: saved, they would differ from machine to machine.
    for config in (model.config, model.config.vision_config, model.config.text_config):
        config._name_or_path = ""
    # None, not "": PEFT would look up a base model of that name on the hub.
    model.name_or_path = None
    return LoadedModel(model, whole.tokenizer)


def _join_components(vision_path: str, llm_path: str, *, down_sample_ratio: float, cache_dir: Path) -> WholeModel:
    """Join a vision tower and a language model by a fresh projector (Path B).

    The projector has torch's default initialisation, as in the original (reference 2.4). New
    embedding rows, input and output, get the mean of the old ones (F30).
    """
    tower = open_tower(find_folder(vision_path, cache_dir, argument="vision_path"), cache_dir)
    llm = open_llm(find_folder(llm_path, cache_dir, argument="llm_path"), cache_dir)
    tokenizer = llm.tokenizer
    num_known = min(len(tokenizer), llm.weights[EMBEDDINGS].shape[0])
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    config = InternVLConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_seq_length=count_tokens_per_tile(tower.config, down_sample_ratio),
        downsample_ratio=down_sample_ratio,
        tie_word_embeddings=False,
    )
    num_rows = find_vocabulary_size(len(tokenizer), llm.weights[EMBEDDINGS].shape[0])
    config.text_config.vocab_size = num_rows
    embeddings = {
        name: resize_rows(llm.weights[name], num_known=num_known, num_rows=num_rows) for name in (EMBEDDINGS, LM_HEAD)
    }
    projector = InternVLMultiModalProjector(config).state_dict()
    weights = {
        **tower.weights,
        **from_state_dict({f"{PROJECTOR}{name}": tensor for name, tensor in projector.items()}),
        **llm.weights,
        **embeddings,
    }
    return WholeModel(config, weights, tokenizer, llm.generation_config)


def _check_projector(projector: Weights, config: InternVLConfig, *, source: str) -> None:
    with torch.device("meta"):
        expected = InternVLMultiModalProjector(config).state_dict()
    for name, tensor in expected.items():
        found = projector[f"{PROJECTOR}{name}"].shape
        if found != tuple(tensor.shape):
            raise ArgumentError(
                f"mlp_path: {source}: {name} is {list(found)}, but between these two parts it is "
                f"{list(tensor.shape)}. Give a projector of such a pair, or leave mlp_path out."
            )


def check_settings(config: InternVLConfig, *, down_sample_ratio: float, ps_version: str, source: str) -> None:
    """Refuse arguments that would make another model of a trained one.

    Raises:
        ArgumentError: names what the model was trained with.
    """
    trained = getattr(config, "ps_version", "v2")
    problems = []
    if config.downsample_ratio != down_sample_ratio:
        problems.append(
            f"down_sample_ratio: {down_sample_ratio}, but the model has {config.downsample_ratio}. Set "
            f"down_sample_ratio to {config.downsample_ratio}."
        )
    if trained != ps_version:
        problems.append(
            f"ps_version: {ps_version}, but the model was trained with {trained}. Set ps_version to {trained}."
        )
    if problems:
        raise ArgumentError(f"{source}: " + " ".join(problems))


def _warn_of_changes(
    config: InternVLConfig, model_arguments: ModelArguments, data_arguments: DataTrainingArguments, *, source: str
) -> None:
    """Say what the arguments change about a trained model: often a default that nobody meant."""
    template = getattr(config, "chat_settings", {}).get("template")
    for name, trained, given in (
        ("conv_style", template, data_arguments.conv_style),
        ("vision_select_layer", config.vision_feature_layer, model_arguments.vision_select_layer),
    ):
        if trained is not None and trained != given:
            logger.warning(
                "%s: %s, but %s was trained with %s. Set that unless you mean it.", name, given, source, trained
            )


def _list_chat_settings(config: InternVLConfig, data_arguments: DataTrainingArguments) -> dict[str, Any]:
    """List what the chat format says beside the architecture, as this stage trains it."""
    return {
        **getattr(config, "chat_settings", {}),
        "template": data_arguments.conv_style,
        "dynamic_image_size": data_arguments.dynamic_image_size,
        "use_thumbnail": data_arguments.use_thumbnail,
        "min_dynamic_patch": data_arguments.min_dynamic_patch,
        "max_dynamic_patch": data_arguments.max_dynamic_patch,
        "pad2square": data_arguments.pad2square,
        "normalize_type": data_arguments.normalize_type,
    }
