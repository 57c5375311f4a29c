"""Weights of OpenGVLab's chat format, renamed and cut into native ones, and joined back (reference 10.2).

Invariant: `to_chat` is the exact inverse of `to_native`: no number changes, none is left out. Which
tensors there are is said by the native class itself, built from the config without memory; a
folder that has others, fewer or of another shape is refused before anything is read.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    PretrainedConfig,
)
from transformers.modeling_utils import set_zero3_state

from internvl_core.errors import ArgumentError
from internvl_core.model.adapter_weights import add_product
from internvl_core.model.chat_config import build_text_config, get_llm_family, has_tied_embeddings
from internvl_core.model.chat_layouts import (
    internlm2_to_llama,
    internvit_to_native,
    llama_to_internlm2,
    native_to_internvit,
)
from internvl_core.model.chat_parts import get_family
from internvl_core.model.weights import LazyTensor, Weights, from_state_dict, swap_prefix

_PARTS = {
    "vision_model.": "model.vision_tower.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.",
    "mlp1.3.": "model.multi_modal_projector.linear_2.",
}

# transformers 4.30 and before saved what can be computed; nothing is learnt there.
_COMPUTED = ".rotary_emb.inv_freq"


def to_native(chat: Weights, config: InternVLConfig) -> dict[str, LazyTensor]:
    """Turn the tensors of a chat folder into those of our model, under its module names.

    Args:
        chat: without adapters; see `merge_chat_adapters`.
        config: of `build_native_config`.

    Raises:
        ArgumentError: tensors are missing, superfluous or of another shape than the config says.
    """
    chat = _drop_computed(chat)
    if has_tied_embeddings(config):
        head, embeddings = _name_embeddings(get_llm_family(config))
        chat = _share_embeddings(chat, f"language_model.{head}", f"language_model.{embeddings}")
    _check(chat, _to_chat(_outline(InternVLForConditionalGeneration, config), config))
    native: dict[str, LazyTensor] = {}
    native |= _prefix("model.vision_tower.", internvit_to_native(_take("vision_model.", chat)))
    text = _take("language_model.", chat)
    if get_llm_family(config) == "internlm2":
        text = internlm2_to_llama(text, config.text_config)
    native |= {swap_prefix(f"language_model.{name}", _PARTS): tensor for name, tensor in text.items()}
    native |= {swap_prefix(name, _PARTS): tensor for name, tensor in chat.items() if name.startswith("mlp1.")}
    return native


def to_chat(weights: Weights, config: InternVLConfig) -> dict[str, LazyTensor]:
    """Turn the tensors of our model, under module names, into those of a chat folder; the inverse of `to_native`.

    The language model gets InternLM2's layout if `config.chat_settings` says that it was one.

    Raises:
        ArgumentError: tensors are missing, superfluous or of another shape than the config says.
    """
    _check(weights, _outline(InternVLForConditionalGeneration, config))
    return _to_chat(weights, config)


def vision_to_native(vision: Weights, config: InternVLVisionConfig) -> dict[str, LazyTensor]:
    """Turn an InternViT of a folder of its own, where no name has `vision_model.` before it, into our model's tower.

    Args:
        vision: tensors of the folder.
        config: of `build_vision_config`.

    Returns:
        Tensors under the module names of the whole model.

    Raises:
        ArgumentError: tensors are missing, superfluous or of another shape than the config says.
    """
    vision = _drop_computed(vision)
    _check(vision, native_to_internvit(_outline(InternVLVisionModel, config)))
    return _prefix("model.vision_tower.", internvit_to_native(vision))


def llm_to_native(llm: Weights, llm_config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Turn a causal language model of a folder of its own into our model's; an InternLM2 is cut into a Llama.

    Where head and embeddings are tied the folder has but one of them; the result has both.

    Args:
        llm: tensors of the folder.
        llm_config: content of its config.json.

    Returns:
        Tensors under the module names of the whole model.

    Raises:
        ArgumentError: tensors are missing, superfluous or of another shape than the config says.
    """
    llm = _drop_computed(llm)
    config, family = build_text_config(llm_config), get_family(llm_config)
    expected = _outline(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    if config.tie_word_embeddings:
        llm = _share_embeddings(llm, *_name_embeddings(family))
    if family == "internlm2":
        _check(llm, llama_to_internlm2(expected, config))
        llm = internlm2_to_llama(llm, config)
    else:
        _check(llm, expected)
    return {swap_prefix(f"language_model.{name}", _PARTS): tensor for name, tensor in llm.items()}


def merge_chat_adapters(chat: Weights, *, backbone_rank: int, llm_rank: int) -> dict[str, LazyTensor]:
    """Merge the adapters that the original saves unmerged, under PEFT's names (F27): W + 2 B A, computed in float32.

    alpha is always twice the rank (reference 2.9). Without adapters the weights pass unchanged.

    Args:
        chat: tensors of a chat folder.
        backbone_rank: `use_backbone_lora` of its config.
        llm_rank: `use_llm_lora` of its config.

    Raises:
        ArgumentError: a part was wrapped twice, an adapter is incomplete or of another kind or rank.
    """
    merged: dict[str, LazyTensor] = {}
    adapters: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in chat.items():
        plain = name.replace(".base_model.model.", ".", 1).replace(".base_layer.", ".", 1)
        if ".base_model." in plain or ".base_layer." in plain:
            raise ArgumentError(
                f"{name}: this part was wrapped in adapters twice, so nobody knows their scales. "
                "Merge the first adapters before others are trained."
            )
        found = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", plain)
        if found:
            adapters.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
        elif ".lora_" in plain:
            raise ArgumentError(f"{name}: only plain LoRA adapters named default are merged. Merge it with PEFT.")
        else:
            merged[plain] = tensor
    for name, adapter in adapters.items():
        rank = backbone_rank if name.startswith("vision_model.") else llm_rank
        merged[name] = _merge(name, merged.get(name), adapter, rank)
    return merged


def _to_chat(weights: Weights, config: InternVLConfig) -> dict[str, LazyTensor]:
    chat = _prefix("vision_model.", native_to_internvit(_take("model.vision_tower.", weights)))
    inverse = {native: ours for ours, native in _PARTS.items() if native != "model.vision_tower."}
    rest = {swap_prefix(name, inverse): tensor for name, tensor in weights.items()}
    text = _take("language_model.", rest)
    if get_llm_family(config) == "internlm2":
        text = llama_to_internlm2(text, config.text_config)
    chat |= _prefix("language_model.", text)
    return chat | {name: tensor for name, tensor in rest.items() if name.startswith("mlp1.")}


def _merge(name: str, base: LazyTensor | None, adapter: Mapping[str, LazyTensor], rank: int) -> LazyTensor:
    if base is None or set(adapter) != {"A", "B"}:
        raise ArgumentError(f"{name}: its adapter is incomplete: the base, lora_A or lora_B is missing.")
    down, up = adapter["A"], adapter["B"]
    if down.shape != (rank, *base.shape[1:]) or up.shape != (base.shape[0], rank):
        raise ArgumentError(
            f"{name}: its adapter is of shapes {list(down.shape)} and {list(up.shape)}, but config.json says "
            f"rank {rank} for this part. Correct use_backbone_lora or use_llm_lora there."
        )

    # alpha is always twice the rank.
    return LazyTensor(base.shape, base.dtype, lambda: add_product(base.read(), down.read(), up.read(), 2.0))


def _name_embeddings(family: str) -> tuple[str, str]:
    """Name the head and the embeddings as the language model's own folder does."""
    if family == "internlm2":
        return "output.weight", "model.tok_embeddings.weight"
    return "lm_head.weight", "model.embed_tokens.weight"


def _share_embeddings(weights: Weights, head: str, embeddings: str) -> dict[str, LazyTensor]:
    """Let one tensor be both where a tied model was saved: transformers writes but one of them."""
    shared = weights.get(head, weights.get(embeddings))
    return dict(weights) if shared is None else {head: shared, embeddings: shared, **weights}


def _outline(model_class: Any, config: PretrainedConfig) -> dict[str, LazyTensor]:
    """Build a native model without memory, for the names and shapes of its tensors."""
    # Under ZeRO-3 transformers would cut the parts' parameters to pieces.
    with torch.device("meta"), set_zero3_state():
        return from_state_dict(model_class(copy.deepcopy(config)).state_dict())


def _check(given: Weights, expected: Weights) -> None:
    missing = [name for name in expected if name not in given]
    superfluous = [name for name in given if name not in expected]
    other = [
        f"{name} is {list(given[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    problems = [
        f"{what} {len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}."
        for what, names in (("missing", missing), ("unexpected", superfluous), ("of another shape", other))
        if names
    ]
    if problems:
        raise ArgumentError(
            f"The weights do not fit their config.json; of {len(expected)} tensors {' '.join(problems)} "
            "Give a folder whose files belong together."
        )


def _drop_computed(weights: Weights) -> dict[str, LazyTensor]:
    return {name: tensor for name, tensor in weights.items() if not name.endswith(_COMPUTED)}


def _take(prefix: str, weights: Weights) -> dict[str, LazyTensor]:
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _prefix(prefix: str, weights: Weights) -> dict[str, LazyTensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}
