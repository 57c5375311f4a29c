"""From samples to a batch.

The attention mask comes from the samples' lengths, never from token ids: an id that also pads is
a real token wherever a sample contains it (F4). Bad samples are left out and listed; nothing takes their place.
Shapes: `B` samples, `T` tokens of the longest, or of all in a pack, `N` segments of a pack,
`K` tiles of all, `S` side of a tile in px.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from internvl_core.data.conversation import IGNORE_INDEX
from internvl_core.data.dataset import Prompt, Sample
from internvl_core.data.loss_weights import LossReduction, weigh_labels
from internvl_core.data.quarantine import BadSample
from internvl_core.data.sizes import PackLimits
from internvl_core.errors import DataError

# As one segment, the padding of eight nearly empty packs made a step of a tiny model take 77 s.
_PADDING_SEGMENT_TOKENS = 512


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
    loss_weights: Tensor
    """[B, T], float32, where the labels are."""
    num_tokens: int
    """Without padding; the model does not take it."""
    num_tiles: int
    bad_samples: list[BadSample]
    """Drawn for this batch and left out of it."""


class PackedBatch(TypedDict):
    """Samples of one training forward, one behind the other in one row."""

    input_ids: Tensor
    """[1, T], int64."""
    labels: Tensor
    """[1, T], int64."""
    position_ids: Tensor
    """[1, T], int64; restart at 0 with each segment."""
    loss_weights: Tensor
    """[1, T], float32, where the labels are: that of the token at t, which t-1 predicts."""
    cu_seq_lens: Tensor
    """[N+1], int32; where each segment begins, and T."""
    max_seq_len: int
    """Of the longest segment; counted here, because to ask a device for it stops it (F19)."""
    pixel_values: NotRequired[Tensor]
    """[K, 3, S, S], uint8, in the order of the samples, padding last; absent if K would be 0."""
    num_tiles: int
    """Tiles that have placeholders in the text; the rest of K is padding."""
    num_tokens: int
    """Without padding; the model does not take it."""
    sample_ids: list[str]
    """For messages and reports; the model does not take it."""
    bad_samples: list[BadSample]
    """Drawn for this batch and left out of it."""


@dataclass(frozen=True)
class SampleCollator:
    """Pad training samples on the right to the longest of the batch."""

    pad_token_id: int
    loss_reduction: LossReduction = "token"

    def __call__(self, samples: Sequence[Sample | BadSample]) -> Batch:
        """Join samples; a batch of which none is left is one padding token, from which nothing is learnt."""
        good, bad = _part(samples)
        rows = good or [_make_padding(1, self.pad_token_id)]
        prompt = _collate(rows, self.pad_token_id, padding_side="right")
        prompt["sample_ids"] = [sample["sample_id"] for sample in good]
        labels = _pad([sample["labels"] for sample in rows], IGNORE_INDEX, padding_side="right")
        weights = [weigh_labels(sample["labels"], self.loss_reduction) for sample in rows]
        num_tokens, num_tiles = _count(good)
        return {
            **prompt,
            "labels": labels,
            "loss_weights": _pad(weights, 0, padding_side="right"),
            "num_tokens": num_tokens,
            "num_tiles": num_tiles,
            "bad_samples": bad,
        }


@dataclass(frozen=True)
class PackCollator:
    """Put the samples of a pack one behind the other; several packs of a batch share the row."""

    pad_token_id: int
    loss_reduction: LossReduction
    padded_to: PackLimits | None = None
    """Of one pack, to which tokens and tiles are filled up (`strict_mode`); None pads nothing."""
    packs_per_batch: int = 1

    def __call__(self, samples: Sequence[Sample | BadSample]) -> PackedBatch:
        """Join samples; padding is in segments of its own, from which nothing is learnt.

        If no sample is left there is padding alone: one token, or all that `padded_to` says.

        Raises:
            DataError: more than `padded_to` holds.
        """
        good, bad = _part(samples)
        segments = [*good, *self._fill(good)]
        lengths = [len(segment["input_ids"]) for segment in segments]
        num_tokens, num_tiles = _count(good)
        batch: PackedBatch = {
            "input_ids": _join([segment["input_ids"] for segment in segments]),
            "labels": _join([segment["labels"] for segment in segments]),
            "position_ids": _join([torch.arange(length) for length in lengths]),
            "loss_weights": _join([weigh_labels(segment["labels"], self.loss_reduction) for segment in segments]),
            "cu_seq_lens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            "max_seq_len": max(lengths),
            "num_tiles": num_tiles,
            "num_tokens": num_tokens,
            "sample_ids": [sample["sample_id"] for sample in good],
            "bad_samples": bad,
        }
        tiles = self._join_tiles(good)
        if len(tiles):
            batch["pixel_values"] = tiles
        return batch

    def _fill(self, good: list[Sample]) -> list[Sample]:
        """Make the padding that the batch needs, in segments so short that attention over them costs little."""
        if self.padded_to is None:
            return [] if good else [_make_padding(1, self.pad_token_id)]
        num_missing = _count_missing(_count(good)[0], self.padded_to.max_tokens * self.packs_per_batch, "tokens")
        whole, rest = divmod(num_missing, _PADDING_SEGMENT_TOKENS)
        lengths = [_PADDING_SEGMENT_TOKENS] * whole + [rest] * (rest > 0)
        return [_make_padding(length, self.pad_token_id) for length in lengths]

    def _join_tiles(self, good: list[Sample]) -> Tensor:
        if not good:
            return torch.empty(0)
        tiles = torch.cat([sample["tiles"] for sample in good])
        if self.padded_to is None:
            return tiles
        num_missing = _count_missing(len(tiles), self.padded_to.max_tiles * self.packs_per_batch, "tiles")
        return torch.cat([tiles, tiles.new_zeros(num_missing, *tiles.shape[1:])])


@dataclass(frozen=True)
class PromptCollator:
    """Pad prompts on the left to the longest of the batch."""

    pad_token_id: int

    def __call__(self, prompts: Sequence[Prompt]) -> PromptBatch:
        return _collate(prompts, self.pad_token_id, padding_side="left")


def _part(samples: Sequence[Sample | BadSample]) -> tuple[list[Sample], list[BadSample]]:
    good = [sample for sample in samples if not isinstance(sample, BadSample)]
    return good, [sample for sample in samples if isinstance(sample, BadSample)]


def _count(samples: Sequence[Sample]) -> tuple[int, int]:
    """Count tokens and tiles."""
    return sum(len(sample["input_ids"]) for sample in samples), sum(len(sample["tiles"]) for sample in samples)


def _make_padding(num_tokens: int, pad_token_id: int) -> Sample:
    return {
        "input_ids": torch.full((num_tokens,), pad_token_id),
        "labels": torch.full((num_tokens,), IGNORE_INDEX),
        "tiles": torch.empty((0, 3, 1, 1), dtype=torch.uint8),
        "sample_id": "",
    }


def _count_missing(count: int, limit: int, unit: str) -> int:
    if count > limit:
        raise DataError(
            f"A batch of packs has {count} {unit}, but at most {limit} fit. The packer broke its own limit."
        )
    return limit - count


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


def _join(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows).unsqueeze(0)


def _pad(rows: list[Tensor], value: int, *, padding_side: str) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=padding_side)
