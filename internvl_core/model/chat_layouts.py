"""Layouts of a chat folder's two parts: names of an InternViT and of an InternLM2, and how their rows are packed.

Each pair of functions is exact: one undoes the other, bit for bit. Names have no part's prefix before them.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from internvl_core.model.weights import LazyTensor, Weights

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


def internvit_to_native(vision: Weights) -> dict[str, LazyTensor]:
    """Rename an InternViT's tensors and cut its packed `qkv` into equal thirds (reference 10.2)."""
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


def native_to_internvit(native: Weights) -> dict[str, LazyTensor]:
    """Undo `internvit_to_native`."""
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


def internlm2_to_llama(text: Weights, config: PretrainedConfig) -> dict[str, LazyTensor]:
    """Rename an InternLM2's tensors and take its `wqkv` apart (reference 10.2).

    Args:
        text: the causal language model's tensors.
        config: of the Llama; its numbers of heads say how the rows are grouped.
    """
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


def llama_to_internlm2(text: Weights, config: PretrainedConfig) -> dict[str, LazyTensor]:
    """Undo `internlm2_to_llama`."""
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


def _swap_module(name: str, modules: Mapping[str, str]) -> str:
    """Exchange the module in a name, whole words only: `norm1` is not the beginning of `norm10`."""
    module, dot, kind = name.rpartition(".")
    if name in modules:
        return modules[name]
    return modules.get(module, module) + dot + kind


def _invert(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
