"""What each update trains on: a plan that is a function of the data, the seed and the step.

A plan knows nothing of ranks, workers or processes: they share out its steps (`sampler.py`). It
starts at any step without walking there.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from internvl_core.data.mixture import Mixture
from internvl_core.data.packing import Pack, PackSampler
from internvl_core.train.pack_log import PackLog

# As Hugging Face's own grouping: so many batches are sorted together, but never more than a quarter of the epoch.
_MAX_GROUP_BATCHES = 50


@dataclass(frozen=True)
class Step:
    """What one update trains on, over all ranks."""

    items: Sequence[Sequence[int]]
    """Ids of the draws: a list for each pack, or for each sample alone."""
    epoch: float
    """How often the data were drawn when it is done."""
    state: Mapping[str, Any]
    """What the plan needs, beside the step's number, to go on behind it."""
    packs: Sequence[Pack] = ()
    """The packs whose draws `items` are."""


class StepPlan(Protocol):
    """The steps of a training, in order."""

    def begin(self) -> Mapping[str, Any]:
        """Decide what the data decide, and give the state before the first step."""
        ...

    def count_steps(self, num_epochs: float, start: Mapping[str, Any]) -> int:
        """Count the steps of some epochs.

        Args:
            start: of `begin`.
        """
        ...

    def iter_steps(
        self, first: int = 0, state: Mapping[str, Any] | None = None, *, is_of_other_data: bool = False
    ) -> Iterator[Step]:
        """Yield the steps behind the first so many, as long as there are data.

        Args:
            state: of the last of those, or of `begin`; None is decided here.
            is_of_other_data: the data are not those that the state was of.
        """
        ...


class PaddedPlan:
    """Samples by themselves; an epoch begins with a new step, and its last step may have fewer samples."""

    def __init__(self, mixture: Mixture, *, batch_size: int, is_grouped: bool, drops_last: bool) -> None:
        """Plan steps of single samples.

        Args:
            batch_size: samples of an update over all ranks.
            is_grouped: whether a step has samples of like length.
            drops_last: whether the rest of an epoch that is no whole step is left out.
        """
        self._mixture = mixture
        self._batch_size = batch_size
        self._is_grouped = is_grouped
        rounded = math.floor if drops_last else math.ceil
        self._steps_per_epoch = max(1, rounded(len(mixture) / batch_size))

    def begin(self) -> Mapping[str, Any]:
        return {}

    def count_steps(self, num_epochs: float, start: Mapping[str, Any]) -> int:
        return math.ceil(num_epochs * self._steps_per_epoch)

    def iter_steps(
        self, first: int = 0, state: Mapping[str, Any] | None = None, *, is_of_other_data: bool = False
    ) -> Iterator[Step]:
        epoch, done = divmod(first, self._steps_per_epoch)
        while True:
            order = self._iter_epoch(epoch, done)
            for number in range(done + 1, self._steps_per_epoch + 1):
                ids = list(itertools.islice(order, self._batch_size))
                yield Step([[draw] for draw in ids], epoch + number / self._steps_per_epoch, {})
            epoch, done = epoch + 1, 0

    def _iter_epoch(self, epoch: int, num_steps: int) -> Iterator[int]:
        """Yield an epoch's draws behind its first steps."""
        if not self._is_grouped:
            return self._mixture.iter_ids(epoch, num_steps * self._batch_size)
        num_batches = max(1, min(_MAX_GROUP_BATCHES, len(self._mixture) // (4 * self._batch_size)))
        stretch, skipped = divmod(num_steps, num_batches)
        grouped = self._iter_grouped(epoch, stretch, num_batches)
        return itertools.islice(grouped, skipped * self._batch_size, None)

    def _iter_grouped(self, epoch: int, stretch: int, num_batches: int) -> Iterator[int]:
        """Sort stretches of the order, so that no more of it is held than a stretch."""
        size = num_batches * self._batch_size
        order = self._mixture.iter_ids(epoch, stretch * size)
        while ids := list(itertools.islice(order, size)):
            generator = torch.Generator().manual_seed(_derive_seed(f"{self._mixture.seed}/{epoch}/{stretch}"))
            positions = get_length_grouped_indices(
                self._mixture.count_tokens(ids), self._batch_size, mega_batch_mult=num_batches, generator=generator
            )
            yield from (ids[position] for position in positions)
            stretch += 1


class PackedPlan:
    """Packs; steps run over the ends of epochs, so that none but the very last has fewer packs."""

    def __init__(
        self,
        build_sampler: Callable[[], PackSampler],
        *,
        draws_per_epoch: int,
        drops_last: bool = False,
        log: PackLog | None = None,
    ) -> None:
        """Plan steps of packs.

        Args:
            build_sampler: gives one that stands at the beginning.
            drops_last: whether the last packs, if they are no whole step, are left out.
            log: told of every step; None on all ranks but one.
        """
        self._build_sampler = build_sampler
        self._draws_per_epoch = draws_per_epoch
        self._drops_last = drops_last
        self._log = log

    def begin(self) -> Mapping[str, Any]:
        return self._build_sampler().state()

    def count_steps(self, num_epochs: float, start: Mapping[str, Any]) -> int:
        """Count the steps of all epochs that the sampler has, by planning them: some 10 us a sample."""
        sampler = self._build_sampler()
        sampler.load_state(start)
        sizes = [len(packs) for packs in iter(sampler.take_step, [])]
        num_steps = len(sizes) - (self._drops_last and sizes[-1] < sizes[0])
        return max(1, math.ceil(num_steps * num_epochs / math.ceil(num_epochs)))

    def iter_steps(
        self, first: int = 0, state: Mapping[str, Any] | None = None, *, is_of_other_data: bool = False
    ) -> Iterator[Step]:
        sampler = self._build_sampler()
        if state is not None:
            sampler.load_state(state, is_of_other_data=is_of_other_data)
        while True:
            packs = sampler.take_step()
            if not packs:
                return
            if self._log is not None:
                self._log.record(packs, block_steps=sampler.block_steps)
            epoch = sampler.num_samples / self._draws_per_epoch
            yield Step([pack.ids for pack in packs], epoch, sampler.state(), packs)


def _derive_seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1
