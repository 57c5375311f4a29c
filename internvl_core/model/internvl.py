"""Transformers' native InternVL, made fit for training.

Adds what the native class lacks and nothing else: the first version of the pixel shuffle, stochastic depth in
the vision tower, a vision tower that is in evaluation mode whenever nothing of it learns, a dummy tile for
batches without images, packs, and a weighted loss. Checkpoints stay plain native InternVL folders.

Shapes: `B` sequences, `T` tokens, `N` segments of a pack, `K` tiles, `S` pixels of a tile's side,
`D` width of the language model, `P` positions that are learnt, `V` tokens of the vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast

from internvl_core.errors import ArgumentError, DataError, Reason
from internvl_core.model.attention import list_packed_kwargs


class InternVLForTraining(InternVLForConditionalGeneration):
    """Native InternVL with both pixel shuffles, drop path, a properly frozen vision tower and a dummy tile."""

    def __init__(self, config: InternVLConfig) -> None:
        """Build it as the native class does.

        Args:
            config: may name its pixel shuffle as `ps_version`, and in `vision_config` the `qk_norm_eps` of the query
                and key norms, where the native class knows 1e-6 only.
        """
        check_select_layer(config.vision_feature_layer, config.vision_config.num_hidden_layers)
        super().__init__(config)
        qk_norm_eps = getattr(config.vision_config, "qk_norm_eps", None)
        if qk_norm_eps is not None:
            for layer in self.model.vision_tower.encoder.layer:
                layer.attention.q_norm.variance_epsilon = layer.attention.k_norm.variance_epsilon = qk_norm_eps
        if getattr(config, "ps_version", "v2") == "v1":
            self.model.multi_modal_projector.register_forward_hook(_transpose_grid)

    def train(self, mode: bool = True) -> "InternVLForTraining":
        """Switch the mode, but keep a vision tower of which nothing learns in evaluation mode.

        Of a tower of which only the last layers learn, those before stay in evaluation mode too.
        Trainer calls `model.train()` at each step; the original left drop path active in a frozen tower (F11).
        """
        super().train(mode)
        vision_tower = self.model.vision_tower
        if not any(parameter.requires_grad for parameter in vision_tower.parameters()):
            vision_tower.eval()
        for part in (vision_tower.embeddings, *vision_tower.encoder.layer):
            if any(parameter.requires_grad for parameter in part.parameters()):
                break
            part.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InternVLForTraining":
        """Move or cast as the native class, but keep the rotary frequencies in float32.

        DeepSpeed casts a whole model to bfloat16, buffers included, and frequencies rounded to 8 bits turn
        tokens a thousand places apart by radians more or less than the model was trained with.
        """
        exact = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.dtype == torch.float32
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in exact:
            cast = module._buffers[name]
            if cast is not None and cast.dtype != torch.float32 and cast.is_floating_point():
                module._buffers[name] = buffer.to(cast.device)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        loss_normalizer: Tensor | float | None = None,
        cu_seq_lens: Tensor | None = None,
        max_seq_len: int | None = None,
        num_tiles: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the native forward, or with weights only as much of it as the weighted loss needs.

        While training, a batch without tiles still touches the vision tower: under DDP and ZeRO every rank
        has to compute the same parameters in each step. The features of the dummy tile [1, 3, S, S] enter the
        loss multiplied by zero.

        Args:
            input_ids: [B, T]; B is 1 for a pack.
            pixel_values: normalised tiles [K, 3, S, S], in the order of their placeholders; None for no tile.
            labels: [B, T]; position t holds what t-1 predicts.
            loss_weights: [B, T], float32, where the labels are. None is the native loss, the mean over the labels.
            loss_normalizer: what the weighted sum is divided by; None means 1, and so does 0, the sum of the
                weights where nothing is learnt.
            cu_seq_lens: [N+1], int32; where each segment of a pack begins, and T. None if it is no pack.
            max_seq_len: of the longest segment.
            num_tiles: tiles that have placeholders; the rest of K is padding. None means all. With weights only.
            inputs_embeds: [B, T, D], instead of `input_ids`. Without weights only.
            **kwargs: as in the native class.

        Returns:
            The native output; with weights it holds the loss alone, no logits.

        Raises:
            DataError: there are more or fewer image tokens than the tiles make. With weights only; else ValueError.
            ArgumentError: a pack, but `use_packed_attention` was not called; or weights that are not float32.
        """
        if cu_seq_lens is not None:
            if max_seq_len is None:
                raise ArgumentError("max_seq_len: missing beside cu_seq_lens. Give the length of the longest segment.")
            kwargs |= list_packed_kwargs(self, cu_seq_lens, max_seq_len)
        if loss_weights is not None:
            if input_ids is None or labels is None:
                raise ArgumentError("input_ids, labels: missing beside loss_weights. Give both.")
            loss = self._compute_weighted_loss(input_ids, pixel_values, labels, loss_weights, num_tiles, kwargs)
            return InternVLCausalLMOutputWithPast(loss=_divide(loss, loss_normalizer))
        if pixel_values is None and inputs_embeds is None and self._must_keep_step(kwargs):
            # The order in which a batch with tiles walks the parameters, backward as well: embeddings, tower, the rest.
            inputs_embeds = self.get_input_embeddings()(input_ids) + 0.0 * self._project(self._make_dummy_tile()).sum()
            input_ids = None
        return super().forward(
            input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, labels=labels, **kwargs
        )

    def _must_keep_step(self, kwargs: dict[str, Any]) -> bool:
        """Tell whether another rank may wait for this one's share of the vision tower."""
        if self.training:
            return True
        past = kwargs.get("past_key_values")
        # Tiles come with the prompt, the first forward of a generation.
        return is_deepspeed_zero3_enabled() and (past is None or past.get_seq_length() == 0)

    def _compute_weighted_loss(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor,
        num_tiles: int | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Sum weight x cross entropy. Where nothing is learnt the sum is 0 and every gradient zero, not absent (F7)."""
        if loss_weights.dtype != torch.float32:
            raise ArgumentError(
                f"loss_weights are {loss_weights.dtype}, not float32: rounded, they no longer sum to the normaliser. "
                "Move them to the device without casting."
            )
        # What the host has to know, asked for before the device has work queued that it would wait for.
        image_places = (input_ids == self.config.image_token_id).nonzero(as_tuple=True)
        rows, columns = (loss_weights[:, 1:] > 0).nonzero(as_tuple=True)
        if pixel_values is None and self.training:
            pixel_values, num_tiles = self._make_dummy_tile(), 0
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            _check_image_tokens(len(image_places[0]), 0, self.config.image_seq_length)
        else:
            features = self._project(pixel_values)
            tiles = features[:num_tiles]
            _check_image_tokens(len(image_places[0]), len(tiles), features.shape[1])
            # Even if there is none to put: ranks of ZeRO-3 must walk the same graph backward, towers included.
            embeddings = embeddings.index_put(image_places, tiles.flatten(0, 1).to(embeddings.dtype))
        native = {**kwargs, "inputs_embeds": embeddings, "use_cache": False}
        hidden = self.model(**native).last_hidden_state
        # Only what is learnt reaches the head: the logits of a whole pack are gigabytes (F20).
        logits = self.lm_head(hidden[rows, columns])
        losses = nn.functional.cross_entropy(logits.float(), labels[rows, columns + 1], reduction="none")
        return (losses * loss_weights[rows, columns + 1]).sum()

    def _project(self, pixel_values: Tensor) -> Tensor:
        """Compute what the language model sees of tiles: [K, tokens of a tile, D]."""
        features: Tensor = self.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        return features

    def _make_dummy_tile(self) -> Tensor:
        height, width = self.config.vision_config.image_size
        return torch.zeros(1, self.config.vision_config.num_channels, height, width, device=self.device)


# Saved folders must load with plain transformers: it writes the class's name into config.json, and
# renames the weights to the published layout only for classes of its own or of a registered type.
InternVLForTraining.__name__ = InternVLForConditionalGeneration.__name__
register_checkpoint_conversion_mapping("internvl", get_checkpoint_conversion_mapping("internvl"), overwrite=True)


def check_select_layer(layer: int, num_layers: int) -> None:
    """Refuse a layer that the vision tower does not have: -1 the last to -L the first, or 1 the first to L the last.

    The state before the first layer, 0 or -(L+1) in the original, cannot be had from transformers' tower.
    """
    if layer == 0 or not -num_layers <= layer <= num_layers:
        raise ArgumentError(
            f"vision_select_layer: {layer}, but the vision tower has {num_layers} layers, 1 to {num_layers} or "
            f"-{num_layers} to -1. Use -1, the last, unless the model was trained otherwise."
        )


def add_drop_path(model: InternVLForConditionalGeneration, rate: float) -> None:
    """Add stochastic depth to the vision tower: layer l of L drops with probability `rate * l / (L - 1)`.

    Both residual branches of a layer are dropped tile by tile and scaled by the inverse of the
    probability to be kept, as in timm's DropPath, which the original uses (reference 2.2). The
    branch's layer scale multiplies channels, so scaling before it or after it is the same.
    """
    layers = model.model.vision_tower.encoder.layer
    for layer, layer_rate in zip(layers, torch.linspace(0, rate, len(layers)).tolist(), strict=True):
        if layer_rate > 0:
            layer.attention.register_forward_hook(_DropPath(layer_rate))
            layer.mlp.register_forward_hook(_DropPath(layer_rate))


def _transpose_grid(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
    """Swap rows and columns of each tile's tokens [K, T, D].

    So the first version of the pixel shuffle orders them, which the native class lacks (reference 2.3). The
    projector works token by token: behind it the same order can be had as before it.
    """
    side = math.isqrt(tokens.shape[1])
    return tokens.view(len(tokens), side, side, -1).transpose(1, 2).flatten(1, 2)


def _check_image_tokens(num_image_tokens: int, num_tiles: int, tokens_per_tile: int) -> None:
    # Features of another number would land in other samples' places (F5).
    if num_image_tokens != num_tiles * tokens_per_tile:
        raise DataError(
            f"{num_image_tokens} image tokens, but {num_tiles} tiles x {tokens_per_tile} tokens = "
            f"{num_tiles * tokens_per_tile}. The texts and the tiles of this batch do not belong together.",
            reason=Reason.SIZE_MISMATCH,
        )


def _divide(loss: Tensor, normalizer: Tensor | float | None) -> Tensor:
    if normalizer is None:
        return loss
    divisor = torch.as_tensor(normalizer, dtype=loss.dtype, device=loss.device)
    return loss / torch.where(divisor > 0, divisor, 1.0)


class _DropPath:
    """Forward hook that zeroes a branch for a random subset of the tiles."""

    def __init__(self, rate: float) -> None:
        self.keep = 1.0 - rate

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (self._drop(output[0]), *output[1:])
        return self._drop(output)

    def _drop(self, branch: Tensor) -> Tensor:
        mask = branch.new_empty(branch.shape[0], *[1] * (branch.dim() - 1)).bernoulli_(self.keep)
        return branch * mask.div_(self.keep)
