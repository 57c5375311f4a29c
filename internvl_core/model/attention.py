"""Attention over packs that never crosses from one sample into another.

    flash_attention_2   transformers' own integration of flash-attn
    varlen              torch's varlen_attn: the same kernel as part of torch
    sdpa                a call of scaled_dot_product_attention for each segment: any device, any dtype

All three cost the sum of the squares of the segments, not the square of the pack. They are chosen by
name in transformers' registry of attention functions. A name that has no mask function there gets no
mask made (masking_utils of 5.23), and the causal mask within each segment is all that a pack needs.
Only the language model is switched: tiles are of equal size, so the vision tower never packs.

Shapes: `T` tokens of a pack, `H` heads, `D` width of a head, `N` segments, `L` tokens of one segment.
"""

import logging
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, InternVLModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from internvl_core.errors import ArgumentError

logger = logging.getLogger(__name__)

PACKED_ATTENTION = Literal["auto", "flash_attention_2", "varlen", "sdpa"]

_BY_PREFERENCE = ("flash_attention_2", "varlen", "sdpa")
_REGISTERED = {"flash_attention_2": "flash_attention_2", "varlen": "packed_varlen", "sdpa": "packed_sdpa"}
_MIN_CAPABILITY = (8, 0)
_MAX_HEAD_WIDTH = 256
# What some models ask of their attention beyond scaling, a window and dropout.
_EXTRAS = ("softcap", "s_aux", "position_bias")


def choose_packed_attention(wanted: PACKED_ATTENTION, device: torch.device, dtype: torch.dtype) -> str:
    """Choose the attention over packs: the wanted one, or with "auto" the fastest that can run here.

    Args:
        dtype: that attention computes in: under autocast autocast's, not the parameters'.

    Returns:
        A name of `PACKED_ATTENTION`, never "auto".

    Raises:
        ArgumentError: the wanted one cannot run here; says why.
    """
    if wanted not in get_args(PACKED_ATTENTION):
        raise ArgumentError(f"packed_attention: {wanted} is none of {', '.join(get_args(PACKED_ATTENTION))}.")
    if wanted == "auto":
        return next(name for name in _BY_PREFERENCE if _find_obstacle(name, device, dtype) is None)
    obstacle = _find_obstacle(wanted, device, dtype)
    if obstacle is not None:
        raise ArgumentError(f"packed_attention: {wanted} cannot run here: {obstacle}. Set auto or sdpa.")
    return wanted


def use_packed_attention(model: nn.Module, name: str) -> None:
    """Let the language model attend within the segments of a pack, from its next forward on.

    Args:
        model: an InternVL, or whatever PEFT, DDP or DeepSpeed wrapped around one.
        name: as `choose_packed_attention` returns it.

    Raises:
        ArgumentError: this language model's attention cannot be had from that function.
    """
    language_model = _find_language_model(model)
    _check_language_model(language_model, name)
    language_model.set_attn_implementation(_REGISTERED[name])
    logger.info("Attention over packs: %s", name)


def use_padded_attention(model: nn.Module) -> None:
    """Let the language model attend by a mask again, as padded batches and generation need it."""
    _find_language_model(model).set_attn_implementation("sdpa")


def list_packed_kwargs(model: nn.Module, cu_seq_lens: Tensor, max_seq_len: int) -> dict[str, Any]:
    """List what the attention functions in use need to know of a pack, as kwargs of the forward.

    Args:
        cu_seq_lens: [N+1], int32; where each segment begins, and T.

    Raises:
        ArgumentError: the language model attends by a mask, which would let samples see each other.
    """
    implementation = _find_language_model(model).config._attn_implementation
    if implementation == _REGISTERED["sdpa"]:
        # Python numbers, asked for once a forward: split needs them in every layer (F19).
        return {"segment_lengths": cu_seq_lens.diff().tolist()}
    if implementation not in _REGISTERED.values():
        raise ArgumentError(
            f"A packed batch, but the language model's attention is {implementation}. Call use_packed_attention first."
        )
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max_seq_len,
        "max_length_k": max_seq_len,
    }


def attend_by_segment(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: Any = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment as transformers would if it ran alone.

    Args:
        query: [1, H, T, D].
        key, value: the same, with as few heads as the model has for them.
        attention_mask: none; transformers makes none for this function.
        sliding_window: how many tokens a token sees, itself included; None for all before it.

    Returns:
        [1, T, H, D], and no attention weights.
    """
    _check_call(segment_lengths, kwargs)
    # Split, not slices: the gradient of each slice would be a tensor of the pack's length.
    segments = zip(*(torch.split(states, segment_lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for segment in segments:
        mask = _build_window_mask(segment[0], sliding_window)
        outputs.append(sdpa_attention_forward(module, *segment, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def attend_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Any = None,
    max_length_q: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment by torch's own flash attention; shapes as in `attend_by_segment`."""
    _check_call(cu_seq_lens_q, kwargs)
    device_type = query.device.type
    # Autocast knows nothing of this operation, and rotary embeddings leave query and key in fp32.
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    output: Any = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        # Counted without the token itself; 0 to the right is what makes it causal.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.unsqueeze(0), None


AttentionInterface.register(_REGISTERED["sdpa"], attend_by_segment)
AttentionInterface.register(_REGISTERED["varlen"], attend_varlen)


def _find_obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Find why an attention function cannot run on a device; None if it can."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, and this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, and this is {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0, and this one has {}.{}".format(*capability)
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        return "flash-attn 2.3.3 or newer is not installed"
    if name == "varlen" and not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without flash attention"
    return None


def _find_language_model(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, InternVLModel)).language_model


def _check_language_model(language_model: Any, name: str) -> None:
    config = language_model.config
    problem = None
    if name != "flash_attention_2" and not language_model._supports_sdpa:
        problem = "cannot be computed by scaled_dot_product_attention"
    elif name == "varlen" and getattr(config, "attention_dropout", None):
        problem = f"has a dropout of {config.attention_dropout}, which varlen lacks"
    elif name == "varlen" and (width := _get_head_width(config)) > _MAX_HEAD_WIDTH:
        problem = f"has heads {width} wide, and varlen takes at most {_MAX_HEAD_WIDTH}"
    elif name == "varlen" and width % 8:
        problem = f"has heads {width} wide, and varlen takes multiples of 8"
    if problem is not None:
        raise ArgumentError(f"packed_attention: {name}, but the attention of {config.model_type} {problem}.")


def _get_head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_call(segments: Any, kwargs: dict[str, Any]) -> None:
    if segments is None:
        raise ArgumentError(
            "A batch that is not packed reached the attention for packs. Call use_padded_attention before padded "
            "batches and generation."
        )
    extras = [name for name in _EXTRAS if kwargs.get(name) is not None]
    if extras:
        raise ArgumentError(f"This model's attention has {', '.join(extras)}, which attention over packs lacks.")


def _build_window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Build the mask [L, L] of a sliding window; None if the segment [1, H, L, D] is no longer than the window."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    is_near = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return is_near.tril().triu(1 - window)
