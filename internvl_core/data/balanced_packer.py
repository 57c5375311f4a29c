"""Packs of equal cost: a queue of samples, packed from its front and closed with the best pair behind.

Ranks that wait for the slowest of them lose what packs differ in cost. So a pack may cost no more
than a cap that leaves some room below the tokens and the tiles that fit, and nearly every pack
costs just as much. Invariant: until the stream ends, the oldest sample of the window is in the next
pack, so no sample waits long and the mixture keeps its proportions.

Shapes: `N` samples, `W` places of the window, `D` distances of pairs.
"""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from internvl_core.data.packs import COST, MAX_COST_UNITS, TILES, TOKENS, FeedBlock, HeldPositions, Pack, SizeFeed
from internvl_core.data.sizes import PackLimits

COST_UNITS = 1 << 20
"""The cap in units of cost; only a single sample may cost more."""

MIN_WINDOW, MAX_WINDOW = 256, 4096
# A window has to hold several packs, or there is no choice.
_WINDOW_PACKS = 4
MAX_DELAY_WINDOWS = 4
"""A sample is packed before so many windows of later samples are drawn."""

_GOOD_ENOUGH = COST_UNITS // 500
# The last pair takes the place of about two samples of mean cost: there most pairs have the right sum.
_PAIR_SAMPLES = 2.2
_MOST_PAIR_COST = 0.7
# Pairs are tried at so many distances in the window: 4096 pairs of 256 samples take 12 us.
_DISTANCES = 16
# So many samples of the front are given back, one after the other, where nothing closes the pack well.
_MAX_RETRIES = 3


def choose_window(samples_per_pack: float) -> int:
    """Choose how many samples are looked at."""
    return int(min(MAX_WINDOW, max(MIN_WINDOW, -(-_WINDOW_PACKS * samples_per_pack // 64) * 64)))


class _Choice(NamedTuple):
    rest: int
    """Units of cost below the cap."""
    num_front: int
    tail: list[int]


class BalancedPacker:
    """Cost-capped packing of a stream; hard caps on tokens and tiles."""

    def __init__(self, limits: PackLimits, *, samples_per_cap: float, window: int = MIN_WINDOW) -> None:
        """Describe the packs; the cap on their cost is `COST_UNITS` of the feed's units.

        Args:
            samples_per_cap: samples of mean cost that make up a pack.
            window: samples that are looked at.
        """
        self._caps = (limits.max_tokens, limits.max_tiles, COST_UNITS)
        self._front_cost = int((1 - min(_MOST_PAIR_COST, _PAIR_SAMPLES / samples_per_cap)) * COST_UNITS)
        self._window = window
        self._num_held = 0
        self._places = np.zeros((2, window), np.int64)
        # Behind the window stand places that are never filled, for the partners of its last samples.
        self._sizes = np.zeros((3, window + _DISTANCES), np.int32)
        self._sizes[COST] = MAX_COST_UNITS
        self._first = [row[:window] for row in self._sizes]
        self._second = [as_strided(row[1:], (_DISTANCES, window), (4, 4), writeable=False) for row in self._sizes]
        self._sums = np.empty((_DISTANCES, window), np.int32)
        self._fits = np.empty((_DISTANCES, window), np.bool_)
        self._fits_too = np.empty((_DISTANCES, window), np.bool_)

    def next_pack(self, feed: SizeFeed) -> Pack | None:
        """Make the next pack; None when all samples of the feed are packed."""
        while (room := self._count_room(feed.position)) > 0:
            block = feed.take(room)
            if block is None:
                self._move_largest_to_front()
                break
            self._append(block)
        if not self._num_held:
            return None
        choice = self._choose()
        chosen = np.array([*range(choice.num_front), *choice.tail])
        tokens, tiles, cost = self._sizes.take(chosen, axis=1).sum(axis=1).tolist()
        ids = tuple(self._places[0].take(chosen).tolist())
        self._remove(chosen)
        return Pack(ids, tokens, tiles, cost * feed.cost_unit, feed.epoch)

    def held(self) -> HeldPositions:
        """Give the positions of the samples of the window, in its order."""
        positions: list[int] = self._places[1, : self._num_held].tolist()
        return [positions]

    def hold(self, groups: list[FeedBlock]) -> None:
        """Go on from `held()`."""
        self._num_held = 0
        self._sizes[COST] = MAX_COST_UNITS
        self._append(groups[0])

    def _count_room(self, position: int) -> int:
        room = self._window - self._num_held
        if not self._num_held:
            return room
        return min(room, int(self._places[1, 0]) + MAX_DELAY_WINDOWS * self._window - position)

    def _append(self, block: FeedBlock) -> None:
        new = slice(self._num_held, self._num_held + block.places.shape[1])
        self._places[:, new] = block.places
        self._sizes[:, new] = block.sizes
        self._num_held = new.stop

    def _move_largest_to_front(self) -> None:
        """At the end of an epoch, pack what is large while there is still something small to go with it."""
        if self._num_held:
            largest = int(self._sizes[COST, : self._num_held].argmax())
            order = np.array([largest, *range(largest), *range(largest + 1, self._num_held)])
            self._places[:, : self._num_held] = self._places.take(order, axis=1)
            self._sizes[:, : self._num_held] = self._sizes.take(order, axis=1)

    def _remove(self, chosen: NDArray[np.intp]) -> None:
        is_kept = np.ones(self._num_held, np.bool_)
        is_kept[chosen] = False
        (kept,) = is_kept.nonzero()
        num_kept = len(kept)
        self._places[:, :num_kept] = self._places.take(kept, axis=1)
        self._sizes[:, :num_kept] = self._sizes.take(kept, axis=1)
        self._sizes[COST, num_kept : self._num_held] = MAX_COST_UNITS
        self._num_held = num_kept

    def _choose(self) -> _Choice:
        """Choose the samples of the next pack.

        The oldest that fit, up to where a pair of samples is missing; then the single samples or
        pairs of the window that bring the cost nearest to the cap. Where that leaves a rest, the
        front is shortened by a sample and closed again.
        """
        held = self._sizes[:, : self._num_held]
        sums = held.cumsum(axis=1)
        num_front = int(sums[COST].searchsorted(self._front_cost)) + 1
        for row, cap in zip(sums, self._caps, strict=True):
            num_front = min(num_front, int(row.searchsorted(cap, "right")))
        num_front = max(1, num_front)
        smallest = held.min(axis=1).tolist()
        costs = self._sizes[COST]
        front_costs = costs[:num_front].copy()
        costs[:num_front] = MAX_COST_UNITS
        best = _Choice(MAX_COST_UNITS, 0, [])
        for shorter in range(num_front, max(0, num_front - 1 - _MAX_RETRIES), -1):
            costs[shorter:num_front] = front_costs[shorter:]
            used = sums[:, shorter - 1].tolist()
            rest = [cap - part for cap, part in zip(self._caps, used, strict=True)]
            choice = self._close(rest, smallest, shorter)
            if choice.rest < best.rest:
                best = choice
            if best.rest <= _GOOD_ENOUGH:
                break
        costs[:num_front] = front_costs
        return best

    def _close(self, rest: list[int], smallest: list[int], num_front: int) -> _Choice:
        """Choose samples behind the front until nothing more fits or the rest is small."""
        tail: list[int] = []
        tokens, tiles, cost = rest
        costs = self._sizes[COST]
        while (
            cost > _GOOD_ENOUGH and tokens >= smallest[TOKENS] and tiles >= smallest[TILES] and cost >= smallest[COST]
        ):
            found = self._find_best(tokens, tiles, cost)
            if not found:
                break
            for sample in found:
                tokens -= int(self._sizes[TOKENS, sample])
                tiles -= int(self._sizes[TILES, sample])
                cost -= int(costs[sample])
                costs[sample] += MAX_COST_UNITS
            tail += found
        for sample in tail:
            costs[sample] -= MAX_COST_UNITS
        return _Choice(cost, num_front, tail)

    def _find_best(self, tokens: int, tiles: int, cost: int) -> tuple[int, ...]:
        """Find the pair, or the single sample, of the highest cost that still fits; () if nothing does."""
        fits, fits_too, sums = self._fits, self._fits_too, self._sums
        np.less_equal(self._second[TOKENS], tokens - self._first[TOKENS], out=fits)
        np.less_equal(self._second[TILES], tiles - self._first[TILES], out=fits_too)
        np.logical_and(fits, fits_too, out=fits)
        np.add(self._first[COST], self._second[COST], out=sums)
        np.less_equal(sums, cost, out=fits_too)
        np.logical_and(fits, fits_too, out=fits)
        np.multiply(sums, fits, out=sums)
        distance, first = divmod(int(sums.argmax()), self._window)
        of_pair = int(sums[distance, first])
        if cost - of_pair > _GOOD_ENOUGH:
            fit = (self._first[TOKENS] <= tokens) & (self._first[TILES] <= tiles) & (self._first[COST] <= cost)
            single = int((self._first[COST] * fit).argmax())
            if not fit[single]:
                return ()
            if self._first[COST][single] >= of_pair:
                return (single,)
        return first, first + distance + 1
