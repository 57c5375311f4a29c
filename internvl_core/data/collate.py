"""From samples to a batch.

The attention mask comes from the samples' lengths, never from token ids: an id that also pads is
a real token wherever a sample contains it (F4). Bad samples are left out and listed; nothing takes their place.
Shapes: `B` samples, `T` tokens of the longest, `K` tiles of all, `S` side of a tile in px.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from internvl_core.data.conversation import IGNORE_INDEX
from internvl_core.data.dataset import Prompt, Sample
from internvl_core.data.quarantine import BadSample


class PromptBatch(TypedDict):
    """Prompts of one generation, padded on the left so that all answers begin in the same column."""

    input_ids: Tensor
    """[B, T], int64."""
    attention_mask: Tensor
    """[B, T], int64; 1 for a token, 0 for padding."""
    pixel_values: NotRequired[Tensor]
    """[K, 3, S, S], uint8, in the order of the samples; absent where no sample has a tile."""
    sample_ids: list[str]
    """For messages and reports; the model does not take it."""


class Batch(PromptBatch):
    """Samples of one training forward, padded on the right."""

    labels: Tensor
    """[B, T], int64."""
    bad_samples: list[BadSample]
    """Drawn for this batch and left out of it."""


@dataclass(frozen=True)
class SampleCollator:
    """Pad training samples on the right to the longest of the batch."""

    pad_token_id: int

    def __call__(self, samples: Sequence[Sample | BadSample]) -> Batch:
        """Join samples; a batch of which none is left is one padding token, from which nothing is learnt."""
        good = [sample for sample in samples if not isinstance(sample, BadSample)]
        bad = [sample for sample in samples if isinstance(sample, BadSample)]
        rows = good or [self._pad_sample()]
        prompt = _collate(rows, self.pad_token_id, padding_side="right")
        prompt["sample_ids"] = [sample["sample_id"] for sample in good]
        labels = _pad([sample["labels"] for sample in rows], IGNORE_INDEX, padding_side="right")
        return {**prompt, "labels": labels, "bad_samples": bad}

    def _pad_sample(self) -> Sample:
        return {
            "input_ids": torch.tensor([self.pad_token_id]),
            "labels": torch.tensor([IGNORE_INDEX]),
            "tiles": torch.empty((0, 3, 1, 1), dtype=torch.uint8),
            "sample_id": "",
        }


@dataclass(frozen=True)
class PromptCollator:
    """Pad prompts on the left to the longest of the batch."""

    pad_token_id: int

    def __call__(self, prompts: Sequence[Prompt]) -> PromptBatch:
        return _collate(prompts, self.pad_token_id, padding_side="left")


def _collate(samples: Sequence[Prompt], pad_token_id: int, *, padding_side: str) -> PromptBatch:
    ids = [sample["input_ids"] for sample in samples]
    batch: PromptBatch = {
        "input_ids": _pad(ids, pad_token_id, padding_side=padding_side),
        "attention_mask": _pad([torch.ones_like(tokens) for tokens in ids], 0, padding_side=padding_side),
        "sample_ids": [sample["sample_id"] for sample in samples],
    }
    tiles = torch.cat([sample["tiles"] for sample in samples])
    if len(tiles):
        batch["pixel_values"] = tiles
    return batch


def _pad(rows: list[Tensor], value: int, *, padding_side: str) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=padding_side)
