"""What a checkpoint in OpenGVLab's chat format means, in plain torch, and small random ones of every kind.

Written from the reference (2.2 to 2.4, 10.2) and shares nothing with `internvl_core`: names, shapes and
arithmetic are spelled out a second time here.

Shapes: `K` tiles, `P` patches and the class token, `C` width of the vision tower, `T` tokens, `D` width of
the language model, `H` heads.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

TOKENIZER_FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"
IMAGE_TOKEN = 602
VOCAB_SIZE = 640
PATCH_PX = 14

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "internlm2": "InternLM2ForCausalLM", "llama": "LlamaForCausalLM"}


def build_chat_checkpoint(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **kind: Any) -> None:
    """Write a chat folder of random weights: config.json, model.safetensors and the golden files' tokenizer.

    Args:
        folder: made if missing.
        seed: of the weights.
        dtype: of the weights.
        **kind: as in `make_chat_config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = make_chat_config(**kind) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    state = {name: tensor.to(dtype) for name, tensor in make_chat_state(config, seed=seed).items()}
    if config["llm_config"]["tie_word_embeddings"]:
        del state[_name_head(config)]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for file in TOKENIZER_FOLDER.iterdir():
        shutil.copyfile(file, folder / file.name)


def make_chat_config(
    *,
    llm: str = "qwen2",
    vit: str = "300m",
    ps_version: str = "v2",
    num_llm_layers: int = 2,
    num_vision_layers: int = 3,
    llm_bias: bool = False,
    eps: float = 1e-6,
    tied: bool = False,
    rope_scaling: dict[str, Any] | None = None,
    image_size: int = 56,
    force_image_size: int | None = 56,
    select_layer: int = -1,
) -> dict[str, Any]:
    """Describe a chat checkpoint.

    Args:
        llm: qwen2, internlm2 or llama.
        vit: "300m" (layer norm, biases on q, k, v) or "6b" (RMS norm, no such biases, query and key norms).
        ps_version: of the pixel shuffle.
        num_llm_layers: layers of the language model.
        num_vision_layers: layers of the vision tower.
        llm_bias: of the attention, of InternLM2 and Llama; Qwen2's is fixed.
        eps: of all norms but the projector's, whose is torch's.
        tied: head and embeddings are one, and the file has but one of them.
        rope_scaling: of the language model.
        image_size: px, of the position embedding.
        force_image_size: px of a tile; None is the same.
        select_layer: which of the hidden states is projected.
    """
    llm_config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[llm]],
        "model_type": llm,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": num_llm_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": eps,
        "rope_theta": 50000.0,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": tied,
    }
    if llm != "qwen2":
        llm_config["bias" if llm == "internlm2" else "attention_bias"] = llm_bias
    is_6b = vit == "6b"
    vision_config = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 40 if is_6b else 32,
        "num_attention_heads": 5 if is_6b else 4,
        "intermediate_size": 72,
        "num_hidden_layers": num_vision_layers,
        "norm_type": "rms_norm" if is_6b else "layer_norm",
        "qk_normalization": is_6b,
        "qkv_bias": not is_6b,
        "layer_norm_eps": eps,
        "image_size": image_size,
        "patch_size": PATCH_PX,
        "num_channels": 3,
        "hidden_act": "gelu",
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_factor": 0.1,
        "use_flash_attn": False,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": force_image_size,
        "llm_config": llm_config,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": ps_version,
        "select_layer": select_layer,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision_config,
    }


def make_chat_state(config: dict[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """Draw the weights of a chat checkpoint, large enough for every one of them to matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in {**_list_vision_shapes(config), **_list_llm_shapes(config)}.items():
        drawn = torch.randn(shape, generator=generator)
        is_scale = len(shape) == 1 and not name.endswith(".bias")
        state[name] = 1 + 0.3 * drawn if is_scale else 0.2 * drawn
    return state


def _list_vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    vision, width = config["vision_config"], config["llm_config"]["hidden_size"]
    c, inner = vision["hidden_size"], vision["intermediate_size"]
    places = (vision["image_size"] // PATCH_PX) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, c),
        "vision_model.embeddings.patch_embedding.weight": (c, 3, PATCH_PX, PATCH_PX),
        "vision_model.embeddings.patch_embedding.bias": (c,),
        "vision_model.embeddings.position_embedding": (1, places, c),
        "mlp1.0.weight": (4 * c,),
        "mlp1.0.bias": (4 * c,),
        "mlp1.1.weight": (width, 4 * c),
        "mlp1.1.bias": (width,),
        "mlp1.3.weight": (width, width),
        "mlp1.3.bias": (width,),
    }
    for layer in range(vision["num_hidden_layers"]):
        start = f"vision_model.encoder.layers.{layer}"
        shapes |= {f"{start}.ls1": (c,), f"{start}.ls2": (c,)}
        shapes |= {f"{start}.attn.qkv.weight": (3 * c, c)}
        shapes |= {f"{start}.attn.proj.weight": (c, c), f"{start}.attn.proj.bias": (c,)}
        shapes |= {f"{start}.mlp.fc1.weight": (inner, c), f"{start}.mlp.fc1.bias": (inner,)}
        shapes |= {f"{start}.mlp.fc2.weight": (c, inner), f"{start}.mlp.fc2.bias": (c,)}
        shapes |= {f"{start}.norm1.weight": (c,), f"{start}.norm2.weight": (c,)}
        if vision["norm_type"] == "layer_norm":
            shapes |= {f"{start}.norm1.bias": (c,), f"{start}.norm2.bias": (c,)}
        if vision["qkv_bias"]:
            shapes |= {f"{start}.attn.qkv.bias": (3 * c,)}
        if vision["qk_normalization"]:
            shapes |= {f"{start}.attn.q_norm.weight": (c,), f"{start}.attn.k_norm.weight": (c,)}
    return shapes


def _list_llm_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    llm = config["llm_config"]
    d, inner = llm["hidden_size"], llm["intermediate_size"]
    kv = d // llm["num_attention_heads"] * llm["num_key_value_heads"]
    is_internlm2 = llm["model_type"] == "internlm2"
    embeddings = "tok_embeddings" if is_internlm2 else "embed_tokens"
    shapes: dict[str, tuple[int, ...]] = {
        f"language_model.model.{embeddings}.weight": (llm["vocab_size"], d),
        "language_model.model.norm.weight": (d,),
        _name_head(config): (llm["vocab_size"], d),
    }
    for layer in range(llm["num_hidden_layers"]):
        start = f"language_model.model.layers.{layer}"
        if is_internlm2:
            linear = {"attention.wqkv": (d + 2 * kv, d), "attention.wo": (d, d)}
            plain = {"feed_forward.w1": (inner, d), "feed_forward.w2": (d, inner), "feed_forward.w3": (inner, d)}
            plain |= {"attention_norm": (d,), "ffn_norm": (d,)}
        else:
            linear = {f"self_attn.{part}_proj": (d if part in "qo" else kv, d) for part in "qkvo"}
            plain = {"mlp.gate_proj": (inner, d), "mlp.down_proj": (d, inner), "mlp.up_proj": (inner, d)}
            plain |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        shapes |= {f"{start}.{name}.weight": shape for name, shape in (linear | plain).items()}
        has_bias = llm.get("bias", llm.get("attention_bias", False))
        biased = [name for name in linear if has_bias or (llm["model_type"] == "qwen2" and "o_proj" not in name)]
        shapes |= {f"{start}.{name}.bias": linear[name][:1] for name in biased}
    return shapes


def _name_head(config: dict[str, Any]) -> str:
    return f"language_model.{'output' if config['llm_config']['model_type'] == 'internlm2' else 'lm_head'}.weight"


def compute_image_features(state: dict[str, Tensor], config: dict[str, Any], tiles: Tensor) -> Tensor:
    """Compute what the language model sees of tiles [K, 3, S, S]: [K, tokens of a tile, D]."""
    hidden = compute_vision_states(state, config, tiles)[config["select_layer"]][:, 1:]
    shuffled = shuffle_pixels(hidden, config["ps_version"])
    normed = functional.layer_norm(shuffled, shuffled.shape[-1:], state["mlp1.0.weight"], state["mlp1.0.bias"], 1e-5)
    inner = functional.gelu(normed @ state["mlp1.1.weight"].T + state["mlp1.1.bias"])
    return inner @ state["mlp1.3.weight"].T + state["mlp1.3.bias"]


def compute_vision_states(state: dict[str, Tensor], config: dict[str, Any], tiles: Tensor) -> list[Tensor]:
    """Run the InternViT over tiles [K, 3, S, S]: the embeddings and each layer's output [K, P, C] (reference 2.2)."""
    vision = config["vision_config"]
    part = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    kernel = part["embeddings.patch_embedding.weight"]
    patches = functional.conv2d(tiles, kernel, part["embeddings.patch_embedding.bias"], stride=PATCH_PX)
    rows, columns = patches.shape[-2:]
    places = part["embeddings.position_embedding"]
    side = vision["image_size"] // PATCH_PX
    grid = places[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False)
    patches = (patches + grid).flatten(2).mT
    first = (part["embeddings.class_embedding"] + places[:, :1]).expand(len(tiles), 1, -1)
    states = [torch.cat([first, patches], dim=1)]
    for layer in range(vision["num_hidden_layers"]):
        start = f"encoder.layers.{layer}."
        weights = {name.removeprefix(start): tensor for name, tensor in part.items() if name.startswith(start)}
        states.append(_run_vision_layer(states[-1], weights, vision))
    return states


def _run_vision_layer(x: Tensor, weights: dict[str, Tensor], vision: dict[str, Any]) -> Tensor:
    eps, heads = vision["layer_norm_eps"], vision["num_attention_heads"]

    def norm(values: Tensor, name: str) -> Tensor:
        if vision["norm_type"] == "rms_norm":
            return _rms_norm(values, weights[f"{name}.weight"], eps)
        return functional.layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def linear(values: Tensor, name: str) -> Tensor:
        return functional.linear(values, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    q, k, v = linear(norm(x, "norm1"), "attn.qkv").chunk(3, dim=-1)
    if vision["qk_normalization"]:
        # Over the whole width, before it is split into heads.
        q = _rms_norm(q, weights["attn.q_norm.weight"], eps)
        k = _rms_norm(k, weights["attn.k_norm.weight"], eps)
    q, k, v = (_split_heads(values, heads) for values in (q, k, v))
    scores = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
    attended = (scores @ v).transpose(1, 2).flatten(2)
    x = x + weights["ls1"] * linear(attended, "attn.proj")
    return x + weights["ls2"] * linear(functional.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")


def shuffle_pixels(hidden: Tensor, ps_version: str) -> Tensor:
    """Put each 2 x 2 block of patches into one token (reference 2.3): [K, n * n, C] to [K, n * n / 4, 4 C]."""
    side = round(hidden.shape[1] ** 0.5)
    grid = hidden.reshape(len(hidden), side, side, -1)
    blocks = torch.cat([grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)], dim=-1)
    if ps_version == "v1":
        blocks = blocks.transpose(1, 2)
    return blocks.flatten(1, 2)


def compute_logits(
    state: dict[str, Tensor], config: dict[str, Any], input_ids: Tensor, tiles: Tensor | None = None
) -> Tensor:
    """Compute the logits [T, V] of one sequence [T], whose image tokens stand for the tiles [K, 3, S, S]."""
    llm = config["llm_config"]
    is_internlm2 = llm["model_type"] == "internlm2"
    embeddings = state[f"language_model.model.{'tok_embeddings' if is_internlm2 else 'embed_tokens'}.weight"]
    x = embeddings[input_ids]
    if tiles is not None:
        x[input_ids == IMAGE_TOKEN] = compute_image_features(state, config, tiles).flatten(0, 1)
    for layer in range(llm["num_hidden_layers"]):
        start = f"language_model.model.layers.{layer}."
        weights = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
        x = _run_llm_layer(x, weights, llm)
    head = embeddings if llm["tie_word_embeddings"] else state[_name_head(config)]
    return _rms_norm(x, state["language_model.model.norm.weight"], llm["rms_norm_eps"]) @ head.T


def _run_llm_layer(x: Tensor, weights: dict[str, Tensor], llm: dict[str, Any]) -> Tensor:
    def linear(values: Tensor, name: str) -> Tensor:
        return functional.linear(values, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    heads, groups, eps = llm["num_attention_heads"], llm["num_key_value_heads"], llm["rms_norm_eps"]
    if llm["model_type"] == "internlm2":
        normed = _rms_norm(x, weights["attention_norm.weight"], eps)
        # For each key head: its queries' rows, its own, its value's.
        packed = linear(normed, "attention.wqkv").reshape(len(x), groups, heads // groups + 2, -1)
        q, k, v = packed[:, :, :-2].flatten(1, 2), packed[:, :, -2], packed[:, :, -1]
        out, gate, up, down, second = (
            "attention.wo",
            "feed_forward.w1",
            "feed_forward.w3",
            "feed_forward.w2",
            "ffn_norm",
        )
    else:
        normed = _rms_norm(x, weights["input_layernorm.weight"], eps)
        q = linear(normed, "self_attn.q_proj").unflatten(-1, (heads, -1))
        k, v = (linear(normed, f"self_attn.{part}_proj").unflatten(-1, (groups, -1)) for part in "kv")
        out, second = "self_attn.o_proj", "post_attention_layernorm"
        gate, up, down = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    q, k = _rotate(q, llm), _rotate(k, llm)
    k, v = (values.repeat_interleave(heads // groups, dim=1) for values in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)
    x = x + linear(torch.einsum("hqk,khd->qhd", scores, v).flatten(1), out)
    normed = _rms_norm(x, weights[f"{second}.weight"], eps)
    return x + linear(functional.silu(linear(normed, gate)) * linear(normed, up), down)


def _rotate(values: Tensor, llm: dict[str, Any]) -> Tensor:
    """Turn queries or keys [T, H, d] by their positions; a dynamic scaling begins beyond the longest known position."""
    length, _, width = values.shape
    base, longest = llm["rope_theta"], llm["max_position_embeddings"]
    scaling = llm["rope_scaling"]
    if scaling is not None and length > longest:
        factor = scaling["factor"]
        base = base * (factor * length / longest - (factor - 1)) ** (width / (width - 2))
    angles = torch.arange(length)[:, None] / base ** (torch.arange(0, width, 2) / width)
    cos, sin = (function(angles).repeat(1, 2)[:, None] for function in (torch.cos, torch.sin))
    left, right = values.chunk(2, dim=-1)
    return values * cos + torch.cat([-right, left], dim=-1) * sin


def _rms_norm(values: Tensor, scale: Tensor, eps: float) -> Tensor:
    return values / (values.square().mean(dim=-1, keepdim=True) + eps).sqrt() * scale


def _split_heads(values: Tensor, heads: int) -> Tensor:
    """[K, P, C] to [K, H, P, C / H]."""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)
