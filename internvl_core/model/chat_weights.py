"""Weights of OpenGVLab's chat format, renamed and cut into native ones, and joined back (reference 10.2).

Invariant: `to_chat` is the exact inverse of `to_native`: no number changes, none is left out. Which
tensors there are is said by the native class itself, built from the config without memory; a
folder that has others, fewer or of another shape is refused before anything is read.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    PretrainedConfig,
)

from internvl_core.errors import ArgumentError
from internvl_core.model.chat_config import get_llm_family, has_tied_embeddings
from internvl_core.model.weights import LazyTensor, Weights, from_state_dict

_PARTS = {
    "vision_model.": "model.vision_tower.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.",
    "mlp1.3.": "model.multi_modal_projector.linear_2.",
}

_VISION = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "embeddings.position_embedding": "embeddings.position_embeddings",
}

_VISION_LAYER = {
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}

_INTERNLM2 = {"model.tok_embeddings": "model.embed_tokens", "output": "lm_head"}

_INTERNLM2_LAYER = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"

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
        chat = _share_embeddings(chat, *_name_embeddings(config))
    _check(chat, _to_chat(_outline(InternVLForConditionalGeneration, config), config))
    native: dict[str, LazyTensor] = {}
    native |= _prefix("model.vision_tower.", _vision_to_native(_take("vision_model.", chat)))
    text = _take("language_model.", chat)
    if get_llm_family(config) == "internlm2":
        text = _internlm2_to_llama(text, config.text_config)
    native |= {_swap(f"language_model.{name}", _PARTS): tensor for name, tensor in text.items()}
    native |= {_swap(name, _PARTS): tensor for name, tensor in chat.items() if name.startswith("mlp1.")}
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
    """Turn an InternViT, whose names have no `vision_model.` before them, into an InternVLVisionModel.

    Raises:
        ArgumentError: tensors are missing, superfluous or of another shape than the config says.
    """
    vision = _drop_computed(vision)
    _check(vision, _vision_to_chat(_outline(InternVLVisionModel, config)))
    return _vision_to_native(vision)


def llm_to_native(llm: Weights, config: PretrainedConfig) -> dict[str, LazyTensor]:
    """Turn a causal language model's own folder into the native one: InternLM2 is cut into a Llama, others stay.

    If `config.tie_word_embeddings`, head and embeddings are the same where the folder has but one of them.

    Raises:
        ArgumentError: tensors are missing, superfluous or of another shape than the config says.
    """
    llm = _drop_computed(llm)
    expected = _outline(AutoModelForCausalLM, config)
    is_internlm2 = any(name.startswith("model.tok_embeddings.") for name in llm)
    if config.tie_word_embeddings:
        llm = _share_embeddings(
            llm, *(("output.weight", "model.tok_embeddings.weight") if is_internlm2 else (_HEAD, _EMBEDDINGS))
        )
    _check(llm, _llama_to_internlm2(expected, config) if is_internlm2 else expected)
    return _internlm2_to_llama(llm, config) if is_internlm2 else dict(llm)


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
                "Set use_backbone_lora and use_llm_lora to 0 before a merged model is saved, and train again."
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
    chat = _prefix("vision_model.", _vision_to_chat(_take("model.vision_tower.", weights)))
    inverse = {native: ours for ours, native in _PARTS.items() if native != "model.vision_tower."}
    rest = {_swap(name, inverse): tensor for name, tensor in weights.items()}
    text = _take("language_model.", rest)
    if get_llm_family(config) == "internlm2":
        text = _llama_to_internlm2(text, config.text_config)
    chat |= _prefix("language_model.", text)
    return chat | {name: tensor for name, tensor in rest.items() if name.startswith("mlp1.")}


def _vision_to_native(vision: Weights) -> dict[str, LazyTensor]:
    native = {}
    for name, tensor in vision.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            native[_swap_module(name, _VISION)] = tensor
        elif layer[2].startswith("attn.qkv."):
            kind = layer[2].removeprefix("attn.qkv.")
            for number, part in enumerate("qkv"):
                native[f"encoder.layer.{layer[1]}.attention.{part}_proj.{kind}"] = _cut_third(tensor, number)
        else:
            native[f"encoder.layer.{layer[1]}.{_swap_module(layer[2], _VISION_LAYER)}"] = tensor
    return native


def _vision_to_chat(native: Weights) -> dict[str, LazyTensor]:
    names, layer_names = _invert(_VISION), _invert(_VISION_LAYER)
    vision: dict[str, LazyTensor] = {}
    for name, tensor in native.items():
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if layer is None:
            vision[_swap_module(name, names)] = tensor
            continue
        part = re.fullmatch(r"attention\.([qkv])_proj\.(\w+)", layer[2])
        if part is None:
            vision[f"encoder.layers.{layer[1]}.{_swap_module(layer[2], layer_names)}"] = tensor
        elif part[1] == "q":
            parts = [native[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            vision[f"encoder.layers.{layer[1]}.attn.qkv.{part[2]}"] = _join(parts, torch.cat)
    return vision


def _internlm2_to_llama(text: Weights, config: PretrainedConfig) -> dict[str, LazyTensor]:
    llama = {}
    for name, tensor in text.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            llama[_swap_module(name, _INTERNLM2)] = tensor
        elif layer[2].startswith("attention.wqkv."):
            kind = layer[2].removeprefix("attention.wqkv.")
            for part in "qkv":
                llama[f"model.layers.{layer[1]}.self_attn.{part}_proj.{kind}"] = _cut_group(tensor, part, config)
        else:
            llama[f"model.layers.{layer[1]}.{_swap_module(layer[2], _INTERNLM2_LAYER)}"] = tensor
    return llama


def _llama_to_internlm2(text: Weights, config: PretrainedConfig) -> dict[str, LazyTensor]:
    names, layer_names = _invert(_INTERNLM2), _invert(_INTERNLM2_LAYER)
    internlm2: dict[str, LazyTensor] = {}
    for name, tensor in text.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            internlm2[_swap_module(name, names)] = tensor
            continue
        part = re.fullmatch(r"self_attn\.([qkv])_proj\.(\w+)", layer[2])
        if part is None:
            internlm2[f"model.layers.{layer[1]}.{_swap_module(layer[2], layer_names)}"] = tensor
        elif part[1] == "q":
            parts = [text[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            joined = _join(parts, lambda tensors: _interleave(tensors, config))
            internlm2[f"model.layers.{layer[1]}.attention.wqkv.{part[2]}"] = joined
    return internlm2


def _cut_third(qkv: LazyTensor, number: int) -> LazyTensor:
    rows = qkv.shape[0] // 3
    return LazyTensor((rows, *qkv.shape[1:]), qkv.dtype, lambda: qkv.read()[number * rows : (number + 1) * rows])


def _cut_group(wqkv: LazyTensor, part: str, config: PretrainedConfig) -> LazyTensor:
    """Take the queries, keys or values out of InternLM2's rows: per key head its queries, then key, then value."""
    groups = config.num_key_value_heads
    queries = config.num_attention_heads // groups
    chosen = {"q": slice(0, queries), "k": slice(queries, queries + 1), "v": slice(queries + 1, queries + 2)}[part]
    rest = wqkv.shape[1:]
    rows = wqkv.shape[0] // (queries + 2) * (queries if part == "q" else 1)

    def read() -> Tensor:
        return wqkv.read().reshape(groups, queries + 2, -1, *rest)[:, chosen].reshape(rows, *rest)

    return LazyTensor((rows, *rest), wqkv.dtype, read)


def _interleave(parts: list[Tensor], config: PretrainedConfig) -> Tensor:
    groups = config.num_key_value_heads
    head_rows = parts[1].shape[0] // groups
    rest = parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, head_rows, *rest) for part in parts], dim=1).reshape(-1, *rest)


def _join(parts: list[LazyTensor], join: Callable[[list[Tensor]], Tensor]) -> LazyTensor:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyTensor(shape, parts[0].dtype, lambda: join([part.read() for part in parts]))


def _merge(name: str, base: LazyTensor | None, adapter: Mapping[str, LazyTensor], rank: int) -> LazyTensor:
    if base is None or set(adapter) != {"A", "B"}:
        raise ArgumentError(f"{name}: its adapter is incomplete: the base, lora_A or lora_B is missing.")
    down, up = adapter["A"], adapter["B"]
    if down.shape != (rank, *base.shape[1:]) or up.shape != (base.shape[0], rank):
        raise ArgumentError(
            f"{name}: its adapter is of shapes {list(down.shape)} and {list(up.shape)}, but config.json says "
            f"rank {rank} for this part. Correct use_backbone_lora or use_llm_lora there."
        )

    def read() -> Tensor:
        return (base.read().float() + 2 * (up.read().float() @ down.read().float())).to(base.dtype)

    return LazyTensor(base.shape, base.dtype, read)


def _name_embeddings(config: InternVLConfig) -> tuple[str, str]:
    if get_llm_family(config) == "internlm2":
        return "language_model.output.weight", "language_model.model.tok_embeddings.weight"
    return f"language_model.{_HEAD}", f"language_model.{_EMBEDDINGS}"


def _share_embeddings(weights: Weights, head: str, embeddings: str) -> dict[str, LazyTensor]:
    """Let one tensor be both where a tied model was saved: transformers writes but one of them."""
    shared = weights.get(head, weights.get(embeddings))
    return dict(weights) if shared is None else {head: shared, embeddings: shared, **weights}


def _outline(model_class: Any, config: PretrainedConfig) -> dict[str, LazyTensor]:
    """Build a native model without memory, for the names and shapes of its tensors."""
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    with torch.device("meta"):
        return from_state_dict(build(config).state_dict())


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


def _swap(name: str, prefixes: Mapping[str, str]) -> str:
    """Exchange the beginning of a name."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _swap_module(name: str, modules: Mapping[str, str]) -> str:
    """Exchange the module in a name, whole words only: `norm1` is not the beginning of `norm10`."""
    module, dot, kind = name.rpartition(".")
    if name in modules:
        return modules[name]
    return modules.get(module, module) + dot + kind


def _invert(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
