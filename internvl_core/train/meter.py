"""How full, how even and how fast the steps since the last log line were."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from internvl_core.data.sizes import PackLimits
from internvl_core.train.sampler import Share
from internvl_core.train.steps import Step

_Item = TypeVar("_Item")

_MICROSECONDS = 1_000_000


class StepMeter:
    """Sums over the ranks and the steps since the last log line.

    Fill and balance are of packs; batches that are padded have their own fill, the share of their
    places that hold a token.
    """

    def __init__(self, share: Share, limits: PackLimits | None, *, tell: Callable[[], None] = lambda: None) -> None:
        """Begin to measure.

        Args:
            share: how steps fall to ranks and forwards.
            limits: of a pack; None for padded batches.
            tell: called for each batch that is waited for: an update may wait for many.
        """
        self._tell = tell
        self._share = share
        self._limits = limits
        self._new = np.zeros(4, np.int64)
        self.total_stall_s = 0.0
        """Since the meter exists."""
        self.restart()

    def record_batch(self, *, tokens: int, tiles: int, places: int) -> None:
        """Enter what one forward of this rank has: its tokens, its tiles, and places for tokens."""
        self._new[:3] += (tokens, tiles, places)

    def time_waits(self, batches: Iterator[_Item]) -> Iterator[_Item]:
        """Pass batches on, and enter how long this rank waited for each."""
        while True:
            started = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._tell()
            self._new[3] += round((time.monotonic() - started) * _MICROSECONDS)
            yield batch

    def record_stall(self, seconds: float) -> None:
        """Enter how long this rank stood still for a save."""
        self._stall_s += seconds
        self.total_stall_s += seconds

    def take(self) -> list[int]:
        """Take what this rank entered since the last time, to be summed over the ranks."""
        taken: list[int] = self._new.tolist()
        self._new[:] = 0
        return taken

    def add(self, sums: Sequence[int], step: Step) -> int:
        """Add what all ranks took together in a step, and return its tokens."""
        self._sums += np.asarray(sums)
        costs = [pack.cost for pack in step.packs]
        if costs:
            costs += [0.0] * (self._share.items_per_step - len(costs))
            by_rank = np.reshape(costs, (self._share.accumulation_steps, self._share.world_size, -1)).sum(axis=2)
            self._mean_cost += by_rank.mean(axis=1).sum()
            # The packs of one forward run side by side: all wait for the dearest.
            self._max_cost += by_rank.max(axis=1).sum()
        self._num_packs += len(step.packs)
        self._num_samples += sum(len(item) for item in step.items)
        return int(sums[0])

    def read(self, elapsed_s: float) -> dict[str, float]:
        """Give the values of the time since they were read before; what there is nothing of is left out."""
        tokens, tiles, places, wait_us = self._sums.tolist()
        values = {
            "tokens_per_s": tokens / elapsed_s,
            "tiles_per_s": tiles / elapsed_s,
            "checkpoint_stall_pct": 100 * self._stall_s / elapsed_s,
            "data_wait_pct": 100 * wait_us / _MICROSECONDS / self._share.world_size / elapsed_s,
        }
        if self._limits is not None and self._num_packs:
            values |= {
                "token_fill": tokens / (self._num_packs * self._limits.max_tokens),
                "tile_fill": tiles / (self._num_packs * self._limits.max_tiles),
                "balance": self._mean_cost / self._max_cost,
                "samples_per_pack": self._num_samples / self._num_packs,
            }
        elif places:
            values["token_fill"] = tokens / places
        self.restart()
        return values

    def restart(self) -> None:
        """Forget the steps that were added."""
        self._sums = np.zeros(4, np.int64)
        self._mean_cost = self._max_cost = self._stall_s = 0.0
        self._num_packs = self._num_samples = 0
