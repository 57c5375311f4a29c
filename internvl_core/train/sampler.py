"""The order of the samples: a function of seed and epoch, the same on every rank and after a resume."""

import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from internvl_core.data.mixture import Mixture

# As Hugging Face's own grouping: so many batches are sorted together, but never more than a quarter of the epoch.
_MAX_GROUP_BATCHES = 50


class EpochSampler(Sampler[int]):
    """The draws of each epoch, as the mixture orders them or with samples of like length together.

    accelerate's own tells neither a sampler nor a dataset its epoch when several ranks resume (1.15),
    and Trainer's grouping draws from the global generator, which ranks need not share.
    """

    def __init__(self, mixture: Mixture, *, is_grouped: bool, batch_size: int) -> None:
        """Order samples.

        Args:
            is_grouped: whether batches hold samples of like length.
            batch_size: samples of one update over all ranks; groups are filled with them.
        """
        self._mixture = mixture
        self._is_grouped = is_grouped
        self._batch_size = batch_size
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._mixture)

    def __iter__(self) -> Iterator[int]:
        order = self._mixture.iter_order(self._epoch)
        return self._group(order) if self._is_grouped else order

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def _group(self, order: Iterator[int]) -> Iterator[int]:
        """Sort stretches of the order, so that no more of it is held than a stretch."""
        generator = torch.Generator().manual_seed(self._mixture.seed + self._epoch)
        num_batches = max(1, min(_MAX_GROUP_BATCHES, len(self) // (4 * self._batch_size)))
        while stretch := list(itertools.islice(order, num_batches * self._batch_size)):
            positions = get_length_grouped_indices(
                self._mixture.count_tokens(stretch), self._batch_size, mega_batch_mult=num_batches, generator=generator
            )
            yield from (stretch[position] for position in positions)
