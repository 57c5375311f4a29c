"""The order of the samples: a function of seed and epoch, the same on every rank and after a resume."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """A permutation for each epoch, random or with samples of like length together.

    accelerate's own tells neither a sampler nor a dataset its epoch when several ranks resume (1.15),
    and Trainer's grouping draws from the global generator, which ranks need not share.
    """

    def __init__(self, num_samples: int, *, seed: int, lengths: Sequence[int] | None, batch_size: int) -> None:
        """Order samples.

        Args:
            lengths: tokens of each sample, to group by; None for a plain shuffle.
            batch_size: samples of one update over all ranks; groups are filled with them.
        """
        self._num_samples = num_samples
        self._seed = seed
        self._lengths = lengths
        self._batch_size = batch_size
        self._epoch = 0

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        if self._lengths is None:
            yield from torch.randperm(self._num_samples, generator=generator).tolist()
        else:
            yield from get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
