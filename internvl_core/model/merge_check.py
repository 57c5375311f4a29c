"""Proof that merging an adapter changed nothing that the model says.

One model in memory, in float32: the base under PEFT's own adapter, then the same modules filled with the merged
weights, and once more as they will be written. So a wrong merge and a coarse data type are told apart.

Shapes: `T` tokens, `V` of the vocabulary, `S` pixels of a tile's side.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from internvl_core.errors import ArgumentError
from internvl_core.model.chat_config import compute_tile_px
from internvl_core.model.skeleton import build_skeleton, fill
from internvl_core.model.sources import WholeModel
from internvl_core.model.weights import Weights

logger = logging.getLogger(__name__)

MERGE_TOLERANCE = 1e-4
"""Largest difference that float32's own rounding may make, relative to the largest logit."""

DTYPE_TOLERANCES = {torch.float32: MERGE_TOLERANCE, torch.float16: 0.02, torch.bfloat16: 0.1}
"""The same for weights rounded to a type: their mantissas have 24, 11 and 8 bits."""

_NUM_TILES = 1
_NUM_TEXT_TOKENS = 24


@dataclass(frozen=True)
class MergeDifference:
    """Largest absolute differences of logits, and the largest logit to compare them with."""

    merged: float
    """Adapted model against merged weights, both float32."""
    written: float
    """Adapted model against the weights in the type they are written in."""
    largest_logit: float


@torch.inference_mode()
def check_merge(
    base: WholeModel, adapter: Path, *, merged: Weights, written: Weights, dtype: torch.dtype, source: str
) -> MergeDifference:
    """Compare logits of an adapted model with those of its merged weights, on tokens and pixels made up.

    Args:
        base: what the adapter was trained over.
        adapter: PEFT's folder.
        merged: the merged weights in float32, by their names in the model.
        written: the same as they will be written.
        dtype: of most of `written`.
        source: for the message.

    Raises:
        ArgumentError: a difference is beyond what rounding can explain.
    """
    from peft import PeftModel  # 2 s of imports that only adapters need

    model = build_skeleton(base.config, dtype=torch.float32)
    fill(model, base.weights, source=source)
    adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    expected = _compute_logits(adapted, base)
    plain = adapted.unload()
    differences = []
    for weights in (merged, written):
        fill(plain, weights, source=source)
        differences.append(float((_compute_logits(plain, base) - expected).abs().max()))
    found = MergeDifference(differences[0], differences[1], largest_logit=float(expected.abs().max()))
    for difference, tolerance, what in (
        (found.merged, MERGE_TOLERANCE, "merged"),
        (
            found.written,
            DTYPE_TOLERANCES.get(dtype, MERGE_TOLERANCE),
            f"written as {str(dtype).removeprefix('torch.')}",
        ),
    ):
        if not difference <= tolerance * found.largest_logit:
            raise ArgumentError(
                f"{source}: {what}, the model's logits differ by up to {difference:.3g} from those with the adapter, "
                f"where the largest is {found.largest_logit:.3g}; {tolerance * found.largest_logit:.3g} would be "
                "rounding. Nothing was written."
            )
    return found


def _compute_logits(model: nn.Module, whole: WholeModel) -> Tensor:
    """Compute the logits [T, V] of a fixed sequence with a tile between its texts."""
    config = whole.config
    generator = torch.Generator().manual_seed(0)
    num_tokens = min(len(whole.tokenizer), config.text_config.vocab_size)
    text = torch.randint(num_tokens, (2, _NUM_TEXT_TOKENS), generator=generator)
    text[text == config.image_token_id] = 0
    image = torch.full((_NUM_TILES * config.image_seq_length,), config.image_token_id)
    side = compute_tile_px(config)
    tiles = torch.randn(_NUM_TILES, 3, side, side, generator=generator)
    logits: Tensor = model(input_ids=torch.cat([text[0], image, text[1]])[None], pixel_values=tiles).logits
    return logits[0].float()
