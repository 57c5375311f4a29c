"""The order of an epoch's draws: a function of seed and epoch that is computed, not stored.

A permutation of ten million draws would be 80 MB in every rank; these take no memory, and any
place in the order is reached at once, so a resumed run need not walk there.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.int64]

_ROUNDS = 6
_BLOCK_DRAWS = 4096


class Permutation:
    """A permutation of 0..size-1, by a key.

    A Feistel network over the smallest power of four that holds `size`, walked until the result lies
    inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = np.uint64((1 << self._half_bits) - 1)
        digest = hashlib.sha256(key.encode()).digest() + hashlib.sha256(b"\0" + key.encode()).digest()
        self._keys = np.frombuffer(digest[: 8 * _ROUNDS], dtype="<u8")

    def take(self, positions: Draws) -> Draws:
        """Give the elements at these positions."""
        values = self._encrypt(positions.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> np.uint64(self._half_bits), values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << np.uint64(self._half_bits)) | right


class Interleave:
    """Sources drawn in turn, each evenly over its share of the epoch.

    Draw `k` of a source with rate `r` stands at time `(k + u) / r`, with `u` in [0, 1) by a key: no
    stretch of the epoch has more of a source than its share, give or take one draw, and no pattern
    repeats. A source that is used up is over; the others go on at their own rates.
    """

    def __init__(self, sizes: Sequence[int], rates: Sequence[float], key: str) -> None:
        """Describe an epoch.

        Args:
            sizes: draws of each source.
            rates: draws of each per unit of time; only their ratios count.
        """
        self._sizes = np.array(sizes, np.int64)
        self._rates = np.array(rates, np.float64)
        self._keys = np.array(
            [int.from_bytes(hashlib.sha256(f"{key}/{number}".encode()).digest()[:8]) for number in range(len(sizes))],
            np.uint64,
        )
        self._bounds = self._find_bounds()

    def iter_blocks(self, start: int = 0) -> Iterator[tuple[NDArray[np.int64], Draws]]:
        """Yield sources and their own draw numbers, a block at a time, from the `start`-th draw of all."""
        block = self._find_block(start)
        skip = start - int(self._count(block).sum())
        while block < len(self._bounds) - 1:
            sources, draws = self._list_block(block)
            if len(sources) > skip:
                yield sources[skip:], draws[skip:]
            skip = max(0, skip - len(sources))
            block += 1

    def _find_bounds(self) -> NDArray[np.float64]:
        """Divide time so that every block has about as many draws, however few sources are left by then."""
        ends = np.sort(self._sizes / self._rates)
        drawn = np.array([np.minimum(self._rates * end, self._sizes).sum() for end in ends])
        bounds = np.interp(np.arange(0, drawn[-1], _BLOCK_DRAWS), [0, *drawn], [0, *ends])
        return np.append(bounds, np.inf)

    def _find_block(self, start: int) -> int:
        """Find the last block that begins at or before a draw."""
        low, high = 0, len(self._bounds) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if int(self._count(middle).sum()) <= start:
                low = middle
            else:
                high = middle - 1
        return low

    def _count(self, block: int) -> NDArray[np.int64]:
        """Count the draws of each source that stand before a block."""
        time = self._bounds[block]
        whole = np.floor(np.minimum(self._rates * time, self._sizes)).astype(np.int64)
        is_before = (whole + self._shift(whole, self._keys)) / self._rates < time
        counts: NDArray[np.int64] = np.minimum(self._sizes, whole + is_before)
        return counts

    def _list_block(self, block: int) -> tuple[NDArray[np.int64], Draws]:
        first, last = self._count(block), self._count(block + 1)
        counts = last - first
        sources = np.repeat(np.arange(len(counts)), counts)
        draws = np.arange(len(sources)) - np.repeat(np.cumsum(counts) - counts - first, counts)
        times = (draws + self._shift(draws, self._keys[sources])) / self._rates[sources]
        order = np.argsort(times, kind="stable")
        return sources[order], draws[order]

    @staticmethod
    def _shift(draws: Draws, keys: NDArray[np.uint64]) -> NDArray[np.float64]:
        # 53 bits: what a double holds.
        bits = _mix(draws.astype(np.uint64) ^ keys) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of 64-bit words (the finalizer of SplitMix64: Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
