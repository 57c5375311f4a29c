"""Bytes that a forward and a backward pass need beside the state: the passes themselves, run on the meta device.

The model's own layers run, so what learns, adapters, norms and recomputation count as they are; only
tensors have no content. Attention is a stand-in with the memory of a flash kernel: what it
keeps are its inputs, its output and a number a head and token, never a square of the tokens. Gradients of
weights vanish when they are complete, for `memory.py` counts them. Left out: the allocator's fragments, NCCL and
the kernels' workspaces.

Shapes: `B` sequences, `T` tokens of one, `K` tiles, `H` heads, `W` width of a head, `V` tokens of the vocabulary.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface

from internvl_core.model.internvl import InternVLForTraining

_PACKED, _PADDED = "rehearsed_packed", "rehearsed_padded"


@dataclass(frozen=True)
class Caps:
    """The largest batch of a stage."""

    num_sequences: int
    """1 for a pack."""
    tokens: int
    """Of a sequence."""
    tiles: int
    """Of all sequences together."""
    is_packed: bool


@dataclass(frozen=True)
class Activations:
    """Bytes, at the caps."""

    layers: int
    """The most at a time, the LM head aside: what is kept for the backward pass, and the layer at work."""
    kept: int
    """Of that, when the LM head begins."""
    logits: int
    """What the LM head and its loss need then, with every position supervised."""

    @property
    def peak(self) -> int:
        return max(self.layers, self.kept + self.logits)


def rehearse(model: InternVLForTraining, caps: Caps) -> Activations:
    """Run a step's forward and backward pass without content.

    Args:
        model: on the meta device, in training mode, in the dtype that it computes in, frozen and checkpointed as the
            stage has it; adapters may be inside. It is of no other use afterwards.
    """
    model.set_attn_implementation(_PACKED if caps.is_packed else _PADDED)
    for module in model.modules():
        if hasattr(module, "rope_type"):
            # The other types look at the positions, which have no content here; sizes are the same.
            module.rope_type = "default"
    ledger = _Ledger(model)
    with _dropping_gradients(model), ledger:
        vision = model.config.vision_config
        # As Trainer holds them: until the step is over.
        pixels = torch.empty(caps.tiles, vision.num_channels, *vision.image_size, dtype=model.dtype, device="meta")
        hidden = _run_to_head(model, pixels, caps)
        # A leaf in its place: so the head is measured by itself, and the layers go on from its gradient.
        head_input = hidden.detach().requires_grad_(hidden.requires_grad)
        kept, forward = ledger.live, ledger.restart()
        _run_head(model, head_input)
        logits = ledger.restart() - kept
        if head_input.grad is not None:
            hidden.backward(head_input.grad)  # type: ignore[no-untyped-call]
        backward = ledger.restart()
        del pixels
    return Activations(layers=max(forward, backward), kept=kept, logits=logits)


def _run_to_head(model: InternVLForTraining, pixels: Tensor, caps: Caps) -> Tensor:
    """Compute what reaches the LM head, [B, T, D]."""
    tokens = torch.empty(caps.num_sequences, caps.tokens, dtype=torch.long, device="meta")
    embeddings = model.get_input_embeddings()(tokens)
    features: Any = model.get_image_features(pixel_values=pixels, return_dict=True)
    features = features.pooler_output.flatten(0, 1)
    places = torch.empty(len(features), dtype=torch.long, device="meta")
    embeddings = embeddings.index_put((places, places), features)
    del features
    if not caps.is_packed:
        # The mask of padded batches, which every layer sees.
        mask = torch.empty(caps.num_sequences, 1, caps.tokens, caps.tokens, dtype=torch.bool, device="meta")
    hidden: Tensor = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    if not caps.is_packed:
        del mask
    return hidden


def _run_head(model: InternVLForTraining, hidden: Tensor) -> None:
    """Compute the loss of all positions and its gradient, as InternVLForTraining does."""
    labels = torch.empty(hidden.shape[0] * hidden.shape[1], dtype=torch.long, device="meta")
    logits = model.lm_head(hidden[labels.new_zeros(len(labels)), labels])
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    loss = losses.sum()
    del logits, losses
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]


@contextmanager
def _dropping_gradients(model: nn.Module) -> Iterator[None]:
    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    learning: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in learning]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Ledger(TorchDispatchMode):
    """Adds up the storages of all tensors that live, and remembers the most."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self._peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return output

    def restart(self) -> int:
        """Return the most since the last time."""
        peak, self._peak = self._peak, self.live
        return peak

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self._peak = max(self._peak, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Attention(torch.autograd.Function):
    """Inputs [B, H, T, W] and a mask or None; the output is [B, H, T, W]."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        normalizers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, output, normalizers, mask)
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attend_packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value, None).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]


def _attend_padded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Beside a mask torch's kernel takes as many heads of keys as of queries, and the mask in the queries' dtype."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    is_causal = getattr(module, "is_causal", False)
    mask = query.new_empty(query.shape[0], 1, query.shape[2], key.shape[2]) if is_causal else None
    return _Attention.apply(query, key, value, mask).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]


AttentionInterface.register(_PACKED, _attend_packed)
AttentionInterface.register(_PADDED, _attend_padded)
