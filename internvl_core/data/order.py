"""The order of draws: a function of keys that is computed, not stored.

A permutation of ten million draws would be 80 MB in every rank; these take no memory, and any
place in the order is reached at once, so a resumed run need not walk there.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.int64]
Keys = NDArray[np.uint64]

ENDLESS = 1 << 48
"""Draws of a source that never runs out: nine years of a million a second."""

# Even. After six, some orders of five elements were seven times as frequent as others; after twelve, less than twice.
_ROUNDS = 12
_BLOCK_DRAWS = 16384
# An odd number without a pattern of its own (the golden ratio): keys and rounds lie far apart.
_STRIDE = 0x9E3779B97F4A7C15


def build_keys(names: Sequence[str]) -> Keys:
    """Make a key of each name."""
    digests = (hashlib.sha256(name.encode()).digest() for name in names)
    return np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64)


def derive_keys(keys: Keys, numbers: Draws) -> Keys:
    """Make a key of each pair of a key and a number."""
    return _mix(keys + numbers.astype(np.uint64) * np.uint64(_STRIDE))


def permute(positions: Draws, sizes: Draws, keys: Keys) -> Draws:
    """Give the elements at positions of permutations, each of 0..size-1 and by a key.

    Many permutations at once, because a mixture has many small data sets. Each is a Feistel network over
    the smallest power of two that holds its size, walked until the result lies inside (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

    Args:
        positions: [N], each below its size.
        sizes: [N], or one for all; 1 to 2^53.
        keys: [N], or one for all.
    """
    positions, sizes, keys = np.broadcast_arrays(positions, sizes, keys)
    # The binary exponent of a double is the length of an integer in bits.
    num_bits = np.frexp((sizes - 1).astype(np.float64))[1].astype(np.uint64)
    values = _encrypt(positions.astype(np.uint64), num_bits, keys)
    outside = np.flatnonzero(values >= sizes)
    while len(outside):
        values[outside] = _encrypt(values[outside], num_bits[outside], keys[outside])
        outside = outside[values[outside] >= sizes[outside]]
    return values.astype(np.int64)


def _encrypt(values: NDArray[np.uint64], num_bits: NDArray[np.uint64], keys: Keys) -> NDArray[np.uint64]:
    one = np.uint64(1)
    low_bits = (num_bits + one) >> one
    mask, other_mask = (one << (num_bits - low_bits)) - one, (one << low_bits) - one
    left, right = values >> low_bits, values & other_mask
    # Halves of an odd number of bits differ by one, and change places in each of an even number of rounds.
    for number in range(_ROUNDS):
        round_key = np.uint64(number * _STRIDE % (1 << 64))
        left, right = right, left ^ (_mix(right + keys + round_key) & mask)
        mask, other_mask = other_mask, mask
    encrypted: NDArray[np.uint64] = (left << low_bits) | right
    return encrypted


class Interleave:
    """Sources drawn in turn, each evenly over its share of the epoch.

    Draw `k` of a source with rate `r` stands at time `(k + u) / r`, with `u` in [0, 1) by a key: no
    stretch of the epoch has more of a source than its share, give or take one draw, and no pattern
    repeats. A source that is used up is over; the others go on at their own rates.
    """

    def __init__(self, sizes: Sequence[int], rates: Sequence[float], key: str) -> None:
        """Describe an epoch.

        Args:
            sizes: draws of each source; `ENDLESS` at most.
            rates: draws of each per unit of time; only their ratios count.
        """
        self._sizes = np.array(sizes, np.int64)
        self._rates = np.array(rates, np.float64)
        self._keys = build_keys([f"{key}/{number}" for number in range(len(sizes))])
        # Between the ends of two sources, draws come at one pace.
        ends = self._sizes / self._rates
        order = np.argsort(ends)
        going_on = np.append(np.cumsum(self._rates[order[::-1]])[::-1][1:], 0.0)
        drawn = np.cumsum(self._sizes[order]) + ends[order] * going_on
        self._end_times = np.append(0.0, ends[order])
        self._drawn_at_ends = np.append(0.0, np.maximum.accumulate(drawn))
        self._num_blocks = int(-(-self._sizes.sum() // _BLOCK_DRAWS))

    def iter_blocks(self, start: int = 0) -> Iterator[tuple[NDArray[np.int64], Draws]]:
        """Yield sources and their own draw numbers, a block at a time, from the `start`-th draw of all."""
        block = self._find_block(start)
        first = self._count(block)
        skip = start - int(first.sum())
        while block < self._num_blocks:
            last = self._count(block + 1)
            sources, draws = self._list_block(first, last)
            if len(sources) > skip:
                yield sources[skip:], draws[skip:]
            skip = max(0, skip - len(sources))
            block, first = block + 1, last

    def _find_time(self, block: int) -> float:
        """Find when a block begins: every block has about as many draws, however few sources are left by then."""
        if block >= self._num_blocks:
            return float("inf")
        return float(np.interp(block * _BLOCK_DRAWS, self._drawn_at_ends, self._end_times))

    def _find_block(self, start: int) -> int:
        """Find the last block that begins at or before a draw."""
        # Before a time, a source has its share of draws, give or take one.
        low = max(0, min((start - len(self._sizes)) // _BLOCK_DRAWS, self._num_blocks - 1))
        high = min((start + len(self._sizes)) // _BLOCK_DRAWS + 1, self._num_blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if int(self._count(middle).sum()) <= start:
                low = middle
            else:
                high = middle - 1
        return low

    def _count(self, block: int) -> NDArray[np.int64]:
        """Count the draws of each source that stand before a block."""
        time = self._find_time(block)
        whole = np.floor(np.minimum(self._rates * time, self._sizes)).astype(np.int64)
        is_before = (whole + self._shift(whole, self._keys)) / self._rates < time
        counts: NDArray[np.int64] = np.minimum(self._sizes, whole + is_before)
        return counts

    def _list_block(self, first: Draws, last: Draws) -> tuple[NDArray[np.int64], Draws]:
        counts = last - first
        sources = np.repeat(np.arange(len(counts)), counts)
        draws = np.arange(len(sources)) - np.repeat(np.cumsum(counts) - counts - first, counts)
        times = (draws + self._shift(draws, self._keys[sources])) / self._rates[sources]
        order = np.argsort(times, kind="stable")
        return sources[order], draws[order]

    @staticmethod
    def _shift(draws: Draws, keys: Keys) -> NDArray[np.float64]:
        # 53 bits: what a double holds.
        bits = _mix(draws.astype(np.uint64) ^ keys) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of 64-bit words (the finalizer of SplitMix64: Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
