"""A whole model from memory to a folder that others can load.

The native format, except for the first pixel shuffle: transformers' own class would load such a model
and compute something else, so it is saved in the chat format, which has a word for it.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from internvl_core.contract import write_json_atomically
from internvl_core.model.chat_config import build_chat_config
from internvl_core.model.chat_weights import to_chat
from internvl_core.model.export import write_companions
from internvl_core.model.internvl import InternVLForTraining
from internvl_core.model.tokenizer import Format
from internvl_core.model.weights import from_state_dict, write_weights


def save_model(
    model: InternVLForTraining,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Save weights, configuration, tokenizer and what generating needs.

    Args:
        model: without adapters.
        folder: made if it is missing.
        state_dict: whole tensors by the names in the model, where it holds only its share; None for its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    has_native_format = getattr(model.config, "ps_version", "v2") == "v2"
    if has_native_format:
        model.save_pretrained(folder, state_dict=state_dict)
    else:
        weights = from_state_dict(model.state_dict() if state_dict is None else state_dict)
        write_weights(to_chat(weights, model.config), folder)
        write_json_atomically(folder / "config.json", build_chat_config(model.config))
    written: Format = "native" if has_native_format else "chat"
    write_companions(
        folder, config=model.config, tokenizer=tokenizer, generation_config=model.generation_config, format=written
    )
